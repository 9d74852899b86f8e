# SPDX-License-Identifier: Apache-2.0
"""What decoders cost: predicted by `madtp.prompt_cost` without running them, and measured by `madtp.profile`."""

from pathlib import Path

import pytest
import torch
import transformers as hf
from torch.utils.flop_counter import FlopCounterMode
from vlm_families import CLIP, DECODERS, IMAGE, TEXT, TOWERS, families, make_vlm, mixed_prompt, vlm_batch
from vlm_shapes import SHAPES, make_shape, shapes_table

import madtp
from madtp.models.vlm import decoder_of, tower_layers
from madtp.models.vlm_branches import projectors_of
from madtp.profiling.macs import count_macs
from madtp_kernels import dispatch

pytestmark = pytest.mark.usefixtures("without_gradients")

PACKED = ("LLaVA-NeXT", "OneVision")  # with newlines
PREDICTED = [name for name in TOWERS if name in DECODERS or name.startswith(("LLaVA", "InternVL"))]
PREDICTED = [name for name in PREDICTED if name not in PACKED]
needs_extension = pytest.mark.skipif(dispatch.extension_unsupported_reason() is not None, reason="no C++ extension")


def uniform(amount):
    return madtp.Keep(amount, rule="uniform")


def keeps(*rules):
    """Settings of every seam and of all together; the layer is one behind which any decoder of the tests may prune."""
    return {
        "dense": {},
        "vision": {"vision": uniform(0.5)},
        "projector": {"projector": uniform(0.3)},
        "prefill": {"prefill": {2: uniform(2)}},
        "all": {"vision": uniform(0.6), "projector": uniform(1), "prefill": {2: uniform(0.5)}},
    }


def measured(model, keep, inputs):
    """The branches of a profile of all samples, with the logits of the last column."""
    handle = madtp.patch(model, keep=keep) if keep else None
    profile = madtp.profile(model, inputs | {"logits_to_keep": 1}, samples=1)
    if handle is not None:
        handle.remove()
    return {name: account.counted_macs for name, account in profile.branches.items()}


def agree(cost, branches):
    assert (cost.vision, cost.projector, cost.prefill) == tuple(branches[b] for b in ("vision", "projector", "decoder"))
    assert cost.rules == branches["other"] == 0


# What is measured.


@families(of=[*DECODERS, "Florence-2"])
def test_profile_knows_tower_projector_and_decoder(name):
    model = make_vlm(name)
    inputs = vlm_batch(name, model)
    if name == "Florence-2":
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :3]
    plain = madtp.profile(model, inputs)
    parts = [plain.branches[branch] for branch in ("vision", "projector", "decoder")]
    assert plain.branches["other"].dense_macs == 0 and all(part.dense_macs and part.params for part in parts)
    head = model.get_output_embeddings().weight
    assert parts[2].params == sum(p.numel() for p in {*decoder_parameters(model), head})
    handle = madtp.patch(model, keep={"projector": uniform(0.5)})
    pruned = madtp.profile(model, inputs)
    assert {name: account.dense_macs for name, account in pruned.branches.items()} == {
        name: account.dense_macs for name, account in plain.branches.items()
    }
    for branch in ("vision", "projector"):
        assert pruned.branches[branch].counted_macs == plain.branches[branch].dense_macs
    assert pruned.branches["decoder"].counted_macs < plain.branches["decoder"].dense_macs
    handle.remove()


def decoder_parameters(model):
    base = model.base_model
    return (base.language_model if hasattr(base, "language_model") else base.text_model).parameters()


def test_mergers_of_a_tower_are_projectors_and_deep_ones_too():
    model = make_vlm("Qwen3-VL")
    profile = madtp.profile(model, vlm_batch("Qwen3-VL", model))
    visual = model.model.visual
    mergers = sum(p.numel() for part in (visual.merger, visual.deepstack_merger_list) for p in part.parameters())
    assert profile.branches["projector"].params == mergers
    assert profile.branches["vision"].params == sum(p.numel() for p in visual.parameters()) - mergers


# What is predicted, against it.


@pytest.mark.parametrize("keep", keeps())
@families(quick=("LLaVA", "Qwen2.5-VL"), of=PREDICTED)
def test_prediction_is_what_a_profile_counts(name, keep):
    model = make_vlm(name)
    inputs = vlm_batch(name, model)
    agree(madtp.prompt_cost(model, keeps()[keep], **inputs), measured(model, keeps()[keep], inputs))


@pytest.mark.parametrize(
    "keep",
    [
        {"vision": 0.5},
        {"vision": madtp.Keep(0.5, rule="divprune")},
        {"projector": 0.4},
        {"projector": madtp.Keep(5, rule="tome")},
        {"projector": madtp.Keep(5, rule="cdpruner")},
        {"prefill": {1: 0.5, 2: 0.5}},
        {"prefill": {2: madtp.Keep(0.5)}},
    ],
)
def test_products_of_rules_are_counted(llava, keep):
    model, inputs = llava
    cost, branches = madtp.prompt_cost(model, keep, **inputs), measured(model, keep, inputs)
    assert cost.first_token == sum(branches.values())
    assert cost.vision == branches["vision"]
    rules = branches["projector"] - cost.projector + branches["decoder"] - cost.prefill
    assert cost.rules == rules and (cost.rules > 0) == (keep != {"vision": 0.5})


def test_units_that_go_unevenly_are_near_enough():
    model = make_vlm("Qwen2.5-VL")
    inputs, keep = vlm_batch("Qwen2.5-VL", model), {"vision": madtp.Keep(0.5, rule="divprune")}
    total = sum(measured(model, keep, inputs).values())
    cost = madtp.prompt_cost(model, keep, **inputs).first_token
    assert 0 < abs(cost - total) < 3e-3 * total, "windows lose other numbers of units"


@families(quick=("Qwen2.5-VL",), of=("Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL"))
def test_images_and_videos(name):
    model = make_vlm(name)
    inputs, _ = mixed_prompt(name, model)
    for keep in ({}, keeps()["all"]):
        agree(madtp.prompt_cost(model, keep, **inputs), measured(model, keep, inputs))


def test_padding_costs_what_it_runs(llava):
    model, inputs = llava
    right = vlm_batch("LLaVA", model, right=True)
    wide = {key: torch.nn.functional.pad(value, (5, 0)) for key, value in inputs.items() if value.ndim == 2}
    wide = inputs | wide
    for keep, given in ((keeps()["prefill"], wide), (keeps()["all"], right), (keeps()["all"], wide)):
        agree(madtp.prompt_cost(model, keep, **given), measured(model, keep, given))


@families(quick=("LLaVA", "Gemma 3"), of=[name for name in PREDICTED if name in DECODERS])
def test_decoding_and_the_cache(name):
    model = make_vlm(name)
    inputs = vlm_batch(name, model)
    handle = madtp.patch(model, keep={"projector": uniform(0.5), "prefill": {2: uniform(0.5)}})
    cost = madtp.prompt_cost(model, **inputs)
    cache = model(**inputs, use_cache=True).past_key_values
    held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    assert cost.cache_bytes == sum(tensor.numel() * tensor.element_size() for tensor in held)
    macs = []
    for tokens in (1, 2):
        with count_macs(model) as counted:
            model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        macs.append(sum(counted.values()))
    assert cost.first_token == macs[0] and cost.decode == macs[1] - macs[0]
    handle.remove()


def test_windows_hold_no_more_than_they_see():
    model = make_vlm("Gemma 3")
    cost = madtp.prompt_cost(model, **vlm_batch("Gemma 3", model))
    columns, window, layers, row = 50, 12, 2, 2 * 2 * 8 * 8  # of 2 samples: keys and values of 2 heads, float64
    assert cost.cache_bytes == 2 * layers * row * (columns + window - 1)


@families(quick=("LLaVA",), of=("LLaVA", "Qwen2.5-VL", "SmolVLM"))
def test_counts_that_were_seen_take_the_place_of_shares(name):
    model = make_vlm(name)
    inputs = vlm_batch(name, model)
    keep = {"vision": madtp.Keep(mass=0.6), "prefill": {2: madtp.Keep(mass=0.5, rule="fastv")}}
    handle = madtp.patch(model, keep=keep)
    with pytest.raises(ValueError, match="counts must be given for 'vision', where mass 0.6 decides"):
        madtp.prompt_cost(model, **inputs)
    total = madtp.profile(model, inputs | {"logits_to_keep": 1}, samples=1).total.counted_macs
    model(**inputs)
    seen = handle.selections
    counts = {
        "vision": [[len(image) for image in layer] for layer in seen["vision"]],
        "prefill": {layer: [len(image) for image in images] for layer, images in seen["prefill"].items()},
    }
    cost = madtp.prompt_cost(model, counts=counts, **inputs)
    assert abs(cost.first_token - total) < 3e-3 * total
    handle.remove()


def test_a_patched_model_is_counted_as_it_is_patched(llava):
    model, inputs = llava
    keep = {"vision": 0.5, "prefill": {1: 4}}
    dense, pruned = madtp.prompt_cost(model, **inputs), madtp.prompt_cost(model, keep, **inputs)
    assert pruned.first_token < dense.first_token
    handle = madtp.patch(model, keep=keep)
    assert madtp.prompt_cost(model, **inputs) == pruned and madtp.prompt_cost(model, {}, **inputs) == dense
    assert madtp.prompt_cost(model, counts=handle.counts(**inputs), **inputs) == pruned
    handle.remove()
    text = {"input_ids": torch.full((1, 9), 20)}
    assert madtp.prompt_cost(model, keep, **text) == madtp.prompt_cost(model, **text)


@pytest.mark.parametrize("name", ["LLaVA", pytest.param("Qwen2.5-VL", marks=pytest.mark.slow)])
def test_duplicates_cost_their_patches_alone(name):
    model = make_vlm(name)
    inputs = vlm_batch(name, model)
    inputs["pixel_values"][..., :8] = 0
    inputs["pixel_values"][: len(inputs["pixel_values"]) // 2] = 0
    keep = {"vision": madtp.Keep(0.5, rule="uniform", duplicates=0.0)}
    cost, branches = madtp.prompt_cost(model, keep, **inputs), measured(model, keep, inputs)
    assert (cost.projector, cost.prefill) == (branches["projector"], branches["decoder"])
    assert abs(cost.vision - branches["vision"]) <= (0 if name == "LLaVA" else 0.01 * cost.vision)  # windows
    assert cost.vision < madtp.prompt_cost(model, {"vision": uniform(0.5)}, **inputs).vision
    handle = madtp.patch(model, keep=keep)
    counts = handle.counts(**inputs)
    meta = inputs | {"pixel_values": inputs["pixel_values"].to("meta")}
    assert madtp.prompt_cost(model, counts=counts, **meta) == cost
    with pytest.raises(ValueError, match="pixel_values must have values where duplicates are left out by them"):
        madtp.prompt_cost(model, **meta)
    with pytest.raises(ValueError, match="counts of the seam 'pixels' must not grow"):
        madtp.prompt_cost(model, counts=counts | {"pixels": [99] * 3}, **meta)
    handle.remove()


def test_costs_add_up(llava):
    model, inputs = llava
    cost = madtp.prompt_cost(model, **inputs)
    twice = cost + cost
    assert (twice.first_token, twice.decode, twice.cache_bytes) == (
        2 * cost.first_token,
        2 * cost.decode,
        2 * cost.cache_bytes,
    )


def test_a_head_that_pools_runs_with_the_dense_tower_alone():
    vision = CLIP | {"model_type": "siglip_vision_model", "vision_use_head": True}
    config = hf.LlavaConfig(
        vision_config=vision,
        text_config=TEXT | {"model_type": "llama"},
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = hf.LlavaForConditionalGeneration(config).eval()
    ids = torch.tensor([[IMAGE] * 16 + [20, 21]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16)}
    for keep in ({}, keeps()["vision"]):
        agree(madtp.prompt_cost(model, keep, **inputs), measured(model, keep, inputs))


@needs_extension
def test_packed_sparse_layers_count_at_half(llava):
    model, inputs = llava
    model, inputs = model.float(), {k: x.float() if x.is_floating_point() else x for k, x in inputs.items()}
    name = "model.language_model.layers.2.mlp.gate_proj"
    dense, weights = madtp.prompt_cost(model, **inputs), model.get_submodule(name).weight.numel()
    with madtp.hwp.collect_inputs(model, [name]) as statistics:
        model(**inputs)
    madtp.hwp.prune_one_shot(model, "2:4", [name], statistics)
    handle = madtp.patch(model, keep={"prefill": {1: uniform(0.5)}})
    madtp.hwp.pack(model, names=[name])
    cost = madtp.prompt_cost(model, {}, **inputs)
    samples, columns = inputs["input_ids"].shape
    assert dense.prefill - cost.prefill == samples * columns * weights // 2
    assert dense.decode - cost.decode == samples * weights // 2
    profile = madtp.profile(model, inputs | {"logits_to_keep": 1}, samples=1)
    assert madtp.prompt_cost(model, **inputs).prefill == profile.branches["decoder"].counted_macs
    handle.remove()


@pytest.mark.parametrize("masked", [False, True])
def test_sparse_layers_count_at_half_before_they_are_packed(llava, masked):
    model, inputs = llava
    names = ["model.language_model.layers.2.mlp.gate_proj", "model.vision_tower.encoder.layers.0.mlp.fc1"]
    names.append("model.multi_modal_projector.linear_1")
    dense = madtp.prompt_cost(model, **inputs)
    for name in names:
        module = model.get_submodule(name)
        if masked:
            torch.nn.utils.parametrize.register_parametrization(module, "weight", Alternating())
        else:
            module.weight.copy_(Alternating()(module.weight))
    cost = madtp.prompt_cost(model, **inputs)
    agree(cost, measured(model, {}, inputs))
    assert cost.vision < dense.vision and cost.projector < dense.projector and cost.prefill < dense.prefill
    assert cost.decode < dense.decode


class Alternating(torch.nn.Module):
    """A weight of which two of four columns are zeros."""

    def forward(self, weight):
        return weight * (torch.arange(weight.shape[1]) % 4 < 2)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"prefill": {2: [1, 1, 1]}}, "counts must be of the seams vision, got prefill"),
        ({"vision": [[8, 8, 8]]}, "counts of the seam 'vision' must be of 2 layers, each of 3 images"),
        ({"vision": [[8, 8, 8], [8, 9, 8]]}, "counts of the seam 'vision' must not grow"),
        ({"vision": [8, 8]}, "counts of the seam 'vision' must be of 2 layers, each of 3 images"),
        ({"vision": [[8, 8, 8], [8.5, 8, 8]]}, "counts of the seam 'vision' must be of 2 layers, each of 3 images"),
        ({"vision": torch.full((2, 3), 8)}, "counts of the seam 'vision' must be of 2 layers, each of 3 images"),
        ([8], "counts must be a mapping by seam, as VlmHandle.counts gives it, got list"),
    ],
)
def test_counts_that_do_not_fit(llava, counts, message):
    model, inputs = llava
    with pytest.raises(ValueError, match=message):
        madtp.prompt_cost(model, {"vision": 0.5}, counts=counts, **inputs)


def test_what_is_refused(llava):
    model, inputs = llava
    with pytest.raises(ValueError, match=r"input_ids must be a tensor \(B, S\) with values, got None"):
        madtp.prompt_cost(model, pixel_values=inputs["pixel_values"])
    with pytest.raises(ValueError, match=r"attention_mask must be \(2, 50\), as input_ids, got \(2, 3\)"):
        madtp.prompt_cost(model, **inputs | {"attention_mask": torch.ones(2, 3)})
    with pytest.raises(ValueError, match="where rule first decides by what it sees, got none"):
        madtp.prompt_cost(model, {"projector": madtp.Keep(rule=first)}, **inputs)
    with pytest.raises(TypeError, match="model must be a decoder that reads images, .*, got Linear"):
        madtp.prompt_cost(torch.nn.Linear(2, 2), **inputs)


def first(candidates, counts):
    return torch.ones(len(candidates.features), dtype=torch.bool)


@families(quick=("LLaVA-NeXT",), of=("LLaVA-NeXT", "OneVision", "Florence-2", "LFM2-VL"))
def test_models_of_which_something_is_not_known(name):
    model = make_vlm(name)
    with pytest.raises(TypeError, match="model must have a (vision tower|decoder) that is known, its "):
        madtp.prompt_cost(model, **vlm_batch(name, model))


def test_experts_are_refused():
    model = make_vlm("LLaVA")
    layer = decoder_of(model).layers[0]
    layer.experts = torch.nn.Module()
    layer.experts.up = torch.nn.Parameter(torch.zeros(4, 32, 48))
    with pytest.raises(ValueError, match=r"got a weight \(4, 32, 48\) of a Module"):
        madtp.prompt_cost(model, **vlm_batch("LLaVA", model))


# Published shapes, on the meta device.


def test_a_model_without_weights_is_patched_and_counted():
    model, inputs = make_shape("Qwen2.5-VL-3B, 1036 x 756")
    keep = {"vision": 0.25, "projector": 100, "prefill": {2: 0.5}}
    cost = madtp.prompt_cost(model, keep, **inputs)
    handle = madtp.patch(model, keep=keep)
    assert madtp.prompt_cost(model, **inputs) == cost
    handle.remove()
    assert cost.first_token < 0.4 * madtp.prompt_cost(model, **inputs).first_token


def macs_of(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() // 2


def meta(*shape):
    return torch.empty(*shape, device="meta", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "name", [n if n.startswith("Smol") else pytest.param(n, marks=pytest.mark.slow) for n in SHAPES]
)
def test_published_shapes_cost_what_torch_counts(name):
    model, inputs = make_shape(name)
    cost = madtp.prompt_cost(model, **inputs)
    decoder, columns = decoder_of(model), inputs["input_ids"].shape[1]
    config = decoder.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    tables = meta(1, columns, width), meta(1, columns, width)
    layer = macs_of(
        lambda: decoder.layers[0](meta(1, columns, config.hidden_size), position_embeddings=tables, attention_mask=None)
    )
    head = macs_of(lambda: model.lm_head(meta(1, config.hidden_size)))
    assert cost.prefill == len(decoder.layers) * layer + head
    tower, tokens = tower_layers(model)[0], SHAPES[name].tokens
    base, pixels = model.base_model, inputs["pixel_values"]
    if name.startswith("Qwen"):
        grid = inputs["image_grid_thw"]
        rows, ends = len(pixels), torch.tensor([0, len(pixels)])
        _, windows = hf.vision_utils.get_vision_window_index(grid, spatial_merge_size=2, window_size=112, patch_size=14)
        hidden, rotary = meta(rows, 1280), (meta(rows, 80), meta(rows, 80))
        vision = macs_of(lambda: base.visual.patch_embed(pixels))
        for cu_seqlens, times in ((ends, 4), (windows, 28)):
            vision += times * macs_of(lambda: tower(hidden, cu_seqlens=cu_seqlens, position_embeddings=rotary))  # noqa: B023
        projector = macs_of(lambda: base.visual.merger(hidden))
    elif name.startswith("Smol"):
        embedding = base.vision_model.embeddings.patch_embedding
        vision = macs_of(lambda: embedding(pixels[0])) + 12 * macs_of(
            lambda: tower(meta(13, 1024, 768), attention_mask=None)
        )
        projector = macs_of(lambda: base.connector(meta(13, 1024, 768)))
    else:
        both = macs_of(lambda: base.get_image_features(pixels))
        projector = both - macs_of(lambda: base.vision_tower(pixels))
        vision = both - projector
    assert (cost.vision, cost.projector) == (vision, projector)
    assert len(projectors_of(model)) == 1 and tokens == sum(inputs["input_ids"][0] == IMAGE)


@pytest.mark.slow
def test_the_table_of_the_docs():
    text = (Path(__file__).parents[2] / "docs" / "method.md").read_text()
    assert shapes_table() in text
