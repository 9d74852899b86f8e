# SPDX-License-Identifier: Apache-2.0
"""`madtp.patch(keep={"vision": ...})`: units that go inside the vision tower, family by family.

The towers are held against Hugging Face's own, whole and dense, whose attention is one of the test: plain softmax, in
which keys of units that are gone are hidden. It chooses by itself.
"""

import copy
import itertools
import json
import math
import re
import threading
import warnings

import pytest
import torch
import transformers as hf
from families import blip2
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.vision_utils import get_vision_window_index
from vlm_families import (
    CASES,
    END,
    GREEDY,
    IMAGE,
    QUICK,
    TEXT,
    TOWER,
    TOWER_CASES,
    TOWERS,
    answers,
    close,
    families,
    make_vlm,
    mixed_prompt,
    stays,
    vlm_batch,
)

import madtp
from madtp.dtp.keep_rules import RULES, Candidates, Kept
from madtp.models.patch_rows import distinct_units
from madtp.models.vision_rows import Rows, Segments
from madtp.models.vision_seam import nested

pytestmark = pytest.mark.usefixtures("without_gradients")


ABSENT = -2


class Oracle:
    """What a dense tower's attention does, layer after layer, with `share` of the units left at the end; or those that
    are above a threshold behind each layer, by a `Keep` with a temperature.

    Args:
        unit: (R,) the unit that each row is of, in the order of the tower's rows; -1 for one that is cut off, ABSENT
            for one that is not counted as a query: CLS, padding.
        entered: (U,) bool, the units that are there from the first layer on; None: all.
        lengths: units of each image.
        depth: layers after which some go.
    """

    def __init__(self, unit, lengths, depth, share, entered=None):
        self.unit, self.lengths, self.depth, self.share = unit, lengths, depth, share
        self.alive = torch.ones(sum(lengths), dtype=torch.bool) if entered is None else entered
        self.kept, self.received, self.row = [], torch.zeros(len(unit), dtype=torch.double), 0

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        rows = slice(self.row, self.row + query.shape[0] * query.shape[2])
        unit = self.unit[rows].view(query.shape[0], -1)
        gone = (unit >= 0) & ~self.alive[unit]
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
        scores = query @ key.transpose(2, 3) * scaling
        if attention_mask is not None:  # other images of a row, or padding
            hidden = ~attention_mask if attention_mask.dtype == torch.bool else attention_mask < 0
            scores = scores.masked_fill(hidden, -torch.inf)
        scores = scores.masked_fill(gone[:, None, None], -torch.inf)
        p = scores.softmax(-1).nan_to_num(0)  # a segment of which nothing is left
        seen = p.amax(1).masked_fill((gone | (unit == ABSENT))[:, :, None], 0)  # by tokens, and not by CLS
        self.received[rows] = seen.sum(1).flatten().double()
        self.row = rows.stop
        if self.row == len(self.unit):
            self.choose()
        return (p @ value).transpose(1, 2), None

    def choose(self):
        self.row = 0
        layer = len(self.kept) + 1
        if layer > self.depth:
            return
        score = torch.zeros(len(self.alive), dtype=torch.double).index_add(
            0, self.unit.clamp(min=0), self.received * (self.unit >= 0)
        )
        score = score.masked_fill(~self.alive, -1)
        kept = []
        for part, n in zip(score.split(self.lengths), self.lengths, strict=True):
            if isinstance(self.share, madtp.Keep):
                there = (part >= 0).nonzero().flatten()
                kept.append(there[stays(part[there], self.share.temperature)])
                continue
            count = max(math.ceil(round(n * self.share ** (layer / self.depth), 9)), 1)
            count = min(count, int((part >= 0).sum()))
            kept.append(part.topk(count).indices.sort().values)
        self.kept.append(kept)
        ends = torch.tensor([0, *self.lengths]).cumsum(0)
        self.alive = torch.zeros_like(self.alive)
        for begin, part in zip(ends, kept, strict=False):
            self.alive[begin + part] = True


def has_cls(tower):
    return any(hasattr(getattr(tower, "embeddings", None), name) for name in ("class_embedding", "cls_token"))


def units_of_rows(tower, pixels, lengths):
    """(R,) the unit that each row of a tower is of, by coordinates."""
    grids = next((pixels[name] for name in pixels if name.endswith("grid_thw")), None)
    if grids is not None:
        unit = torch.arange(sum(lengths)).repeat_interleave(4)
        if hasattr(tower, "window_size"):
            index = get_vision_window_index(grids, 2, tower.window_size, tower.patch_size)[0]
            unit = unit.view(-1, 4)[index].flatten()
        return unit
    patch, size = tower.config.patch_size, pixels["pixel_values"].shape
    patch = patch if isinstance(patch, int) else patch[0]
    if "spatial_shapes" in pixels:
        grids = pixels["spatial_shapes"].tolist()
    elif "image_sizes" in pixels:
        grids = [(height // patch, width // patch) for height, width in pixels["image_sizes"].tolist()]
    else:
        images = int((pixels["pixel_values"].flatten(0, -4) != 0).flatten(1).any(1).sum())  # without tiles of padding
        grids = [(size[-2] // patch, size[-1] // patch)] * images
    side = round((sum(height * width for height, width in grids) / sum(lengths)) ** 0.5)
    rows, begin = [], 0
    for height, width in grids:
        y, x = torch.arange(height)[:, None] // side, torch.arange(width) // side
        rows.append((y * (width // side) + x).flatten() + begin)
        begin += height * width // side**2
    if "spatial_shapes" in pixels:
        rows = [torch.nn.functional.pad(row, (0, size[1] - len(row)), value=ABSENT) for row in rows]
    if has_cls(tower):
        rows = [torch.nn.functional.pad(row, (1, 0), value=ABSENT) for row in rows]
    return torch.cat(rows)


def pixels_of(inputs, modality="image"):
    names = {"image": ("pixel_values", "image_sizes", "spatial_shapes", "pixel_attention_mask", "image_grid_thw")}
    names["video"] = ("pixel_values_videos", "video_grid_thw")
    return {name: inputs[name] for name in names[modality] if name in inputs}


def tower_of(base):
    return next(part for name in ("visual", "vision_tower", "vision_model") if (part := getattr(base, name, None)))


def packed_places(model, pixels):
    """Where tiles are packed: of each image the patch at each place, -1 for newlines, by what the projector gives."""
    seen = []
    hook = model.base_model.multi_modal_projector.register_forward_hook(lambda *given: seen.append(given[2]))
    whole = model.base_model.get_image_features(**pixels, return_dict=True).pooler_output
    hook.remove()
    same = [(part[:, None] == seen[0].flatten(0, 1)).all(-1) for part in whole]
    return [torch.where(part.any(1), part.int().argmax(1), -1) for part in same], seen[0].shape[:2]


def oracle(model, inputs, share, modality="image", entered=None):
    """-> the features of each image that are left, those for layers of the decoder, and by layer what was kept."""
    base = model.base_model
    tower, encode = tower_of(base), getattr(base, f"get_{modality}_features")
    pixels = pixels_of(inputs, modality)
    if packed := base.config.model_type in ("llava_next", "llava_onevision"):
        places, (tiles, patches) = packed_places(model, pixels)
        own = torch.cat(places)
        rows = torch.full((tiles * patches,), -1)
        rows[own[own >= 0]] = torch.arange(int((own >= 0).sum()))
        lengths = [int((part >= 0).sum()) for part in places]
        rows = torch.nn.functional.pad(rows.view(tiles, patches), (int(has_cls(tower)), 0), value=ABSENT).flatten()
    else:
        lengths = [len(part) for part in encode(**pixels, return_dict=True).pooler_output]
        rows = units_of_rows(tower, pixels, lengths)
    layers = len(next(part for part in tower.modules() if isinstance(part, torch.nn.ModuleList) and len(part) > 1))
    config = base.config
    read = getattr(config, "vision_feature_layer", getattr(config, "vision_feature_layers", -1))
    depth = max(number % (layers + 1) for number in ([read] if isinstance(read, int) else read))
    watching = Oracle(rows, lengths, depth, share, entered)
    AttentionInterface.register("vision_oracle", watching)
    AttentionMaskInterface.register("vision_oracle", sdpa_mask)
    before, tower.config._attn_implementation = tower.config._attn_implementation, "vision_oracle"
    try:
        out = encode(**pixels, return_dict=True)
    finally:
        tower.config._attn_implementation = before
    kept = watching.kept
    if packed:  # by places, and newlines stay
        patch = [(part >= 0).nonzero().flatten() for part in places]
        lines = [(part < 0).nonzero().flatten() for part in places]
        kept = [
            [torch.cat([p[k], n]).sort().values for k, p, n in zip(layer, patch, lines, strict=True)] for layer in kept
        ]

    def left(parts):
        return [part[own] for part, own in zip(parts, kept[-1], strict=True)]

    return left(out.pooler_output), [left(layer) for layer in out.get("deepstack_features") or ()], kept


def features(model, inputs):
    return model.base_model.get_image_features(**pixels_of(inputs))


def assert_by_hand(out, expected, deep, kept):
    """The features of a pruned tower are those of `oracle`."""
    assert [[a.tolist() for a in layer] for layer in out.madtp_left.selections()] == [
        [a.tolist() for a in layer] for layer in kept
    ]
    for a, b in zip(out.pooler_output, expected, strict=True):
        close(a, b)
    for layer, by_hand in zip(out.get("deepstack_features") or [], deep, strict=True):
        for a, b in zip(layer, by_hand, strict=True):
            close(a, b)


@families(quick=(*QUICK, "Qwen2-VL", "Qwen3-VL", "InternVL", "Gemma 3", "GLM-4V", "Mistral 3", "LLaVA-NeXT"), of=TOWERS)
def test_towers_by_hand(name):
    model = make_vlm(name)
    inputs = vlm_batch(name, model)
    for share in (0.5, 0.15):
        expected, deep, kept = oracle(model, inputs, share)
        handle = madtp.patch(model, keep={"vision": share})
        out = features(model, inputs)
        assert_by_hand(out, expected, deep, kept)
        handle.remove()


def draw_repeats(name, model):
    """A batch whose images have a blank half, a quarter that comes twice, and the rest; and the same with noise."""
    inputs = vlm_batch(name, model)
    pixels = inputs["pixel_values"]
    if "image_grid_thw" in inputs:
        units = pixels.view(-1, 4, pixels.shape[1])
        units[1::3] = 0.25
        units[2::6] = units[5]
    else:
        half = pixels.shape[-1] // 2
        real = (pixels != 0).flatten(-3).any(-1)[..., None, None, None]
        pixels[..., :half] = 0.25
        pixels[..., half:, half:] = pixels[..., :half, half:]
        pixels *= real
    noise = torch.randn(pixels.shape, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    return inputs, inputs | {"pixel_values": pixels + 1e-4 * noise.clamp(-2, 2) * (pixels != 0)}


def distinct_by_hand(tower, pixels, lengths, tolerance):
    """(U,) bool, unit after unit."""
    values = pixels["pixel_values"]
    if "image_grid_thw" in pixels:
        patches, unit = values, torch.arange(len(values)) // 4
    else:
        size = tower.config.patch_size if isinstance(tower.config.patch_size, int) else tower.config.patch_size[0]
        values = values.flatten(0, -4)
        values = values[(values != 0).flatten(1).any(1)]  # without tiles of padding
        sizes = pixels.get("image_sizes", [values.shape[2:]] * len(values))
        images = [image[:, :height, :width] for image, (height, width) in zip(values, sizes, strict=True)]
        patches = torch.cat([torch.nn.functional.unfold(image, size, stride=size).T for image in images])
        unit = units_of_rows(tower, pixels, lengths)
        unit = unit[unit != ABSENT]
    entered, begin = [], 0
    for length in lengths:
        kept = []
        for number in range(begin, begin + length):
            own = patches[unit == number]
            entered.append(all(float((own - other).abs().max()) > tolerance for other in kept))
            kept += [own] * entered[-1]
        begin += length
    return torch.tensor(entered)


@pytest.mark.parametrize("share", [1.0, 0.4])
@families(quick=QUICK, of=[name for name in TOWERS if name not in ("LLaVA-NeXT", "OneVision", "LFM2-VL")])
def test_duplicates_do_not_enter(name, share):
    """Held against the dense tower, whose attention hides them from its first layer on."""
    model = make_vlm(name)
    repeats, noisy = draw_repeats(name, model)
    tower = tower_of(model.base_model)
    for inputs, tolerance in ((repeats, 0.0), (noisy, 1e-3)):
        pixels = pixels_of(inputs)
        lengths = [len(part) for part in model.base_model.get_image_features(**pixels, return_dict=True).pooler_output]
        entered = distinct_by_hand(tower, pixels, lengths, tolerance)
        assert lengths[0] / 4 < entered[: lengths[0]].sum() < 0.8 * lengths[0]
        expected, deep, kept = oracle(model, inputs, share, entered=entered)
        handle = madtp.patch(model, keep={"vision": madtp.Keep(share, duplicates=tolerance)})
        out = model.base_model.get_image_features(**pixels)
        assert torch.equal(out.madtp_left.entered, entered)
        assert_by_hand(out, expected, deep, kept)
        logits, counts = model(**inputs).logits, handle.counts(**inputs)
        selections = handle.selections
        assert counts == {
            "pixels": [len(places) for places in selections["pixels"]],
            "vision": [[len(places) for places in layer] for layer in selections["vision"]],
        }
        assert torch.equal(torch.cat(selections["vision"][-1]), torch.cat(kept[-1]))
        if (CASES | TOWER_CASES)[name].plain:
            columns = handle.columns
            with handle.simulated():
                whole = model(**inputs).logits
            left = columns >= 0
            close(logits[left], whole[torch.arange(2)[:, None].expand_as(columns)[left], columns[left]])
        handle.remove()


def test_nothing_but_equal_pixels_goes_without_a_tolerance(llava):
    model, _ = llava
    _, noisy = draw_repeats("LLaVA", model)
    expected = model(**noisy).logits
    handle = madtp.patch(model, keep={"vision": madtp.Keep(duplicates=0.0)})
    close(model(**noisy).logits, expected)
    blank = noisy | {"pixel_values": torch.zeros_like(noisy["pixel_values"])}
    model(**blank)
    for selection in (handle.selections["pixels"], handle.selections["vision"][-1]):
        assert [places.tolist() for places in selection] == [[0]] * 3
    handle.remove()
    handle = madtp.patch(model, keep={"vision": madtp.Keep(5, duplicates=0, rule="uniform")})
    out = model.generate(**blank, **GREEDY)
    assert handle.counts(**blank) == {"pixels": [1] * 3, "vision": [[1] * 3] * 2}
    static = model.generate(**blank, **GREEDY, cache_implementation="static", disable_compile=True)
    assert torch.equal(static.sequences, out.sequences), "the cache is made when the prompt is short"


def test_newlines_stay_where_duplicates_go():
    model = make_vlm("LLaVA-NeXT")
    inputs = vlm_batch("LLaVA-NeXT", model)
    inputs["pixel_values"][:] = 0.5
    handle = madtp.patch(model, keep={"vision": madtp.Keep(duplicates=0.0), "projector": 1.0, "prefill": {2: 3}})
    counts = handle.counts(**inputs)
    model(**inputs)
    places, _ = packed_places(model.madtp_handle.remove(), pixels_of(inputs))
    assert counts["pixels"] == [1 + int((part < 0).sum()) for part in places] == counts["vision"][-1]
    assert counts["prefill"][2] == [3, 3, 3]


@families(quick=("Qwen2.5-VL",), of=("Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL"))
def test_duplicates_of_a_video(name):
    model = make_vlm(name)
    inputs, lengths = mixed_prompt(name, model)
    inputs["pixel_values_videos"][16:] = inputs["pixel_values_videos"][:16].repeat(2, 1)  # a still picture
    handle = madtp.patch(model, keep={"vision": madtp.Keep(duplicates=0.0)})
    logits = model(**inputs).logits
    assert handle.counts(**inputs)["pixels"] == [lengths[0], 4, lengths[2]]
    assert handle.selections["pixels"][1].tolist() == [0, 1, 2, 3]
    columns = handle.columns
    with handle.simulated():
        whole = model(**inputs).logits
    left = columns >= 0
    close(logits[left], whole[torch.arange(2)[:, None].expand_as(columns)[left], columns[left]])


def test_units_that_are_near_go_one_after_the_other():
    generator = torch.Generator().manual_seed(0)
    for case in range(8):
        units = torch.rand(40, 2, generator=generator) * (1 + case)
        kept = []
        for number, unit in enumerate(units):
            if all(float((unit - units[other]).abs().max()) > 0.5 for other in kept):
                kept.append(number)
        rows = Rows(units, torch.arange(40), 1, [40], Segments(torch.tensor([0, 40], dtype=torch.int32), 40))
        assert distinct_units(rows, 0.5).nonzero().flatten().tolist() == kept
    steps = torch.arange(5.0)[:, None] * 0.4
    rows = Rows(steps, torch.arange(5), 1, [5, 0], Segments(torch.tensor([0, 5], dtype=torch.int32), 5))
    assert distinct_units(rows, 0.5).tolist() == [True, False, True, False, True], "no chain of neighbours"
    assert distinct_units(rows.with_x(rows.x.bfloat16()), 0.0).all()
    broken = torch.tensor([0.0, torch.nan, 0.1, torch.inf, 5.0])[:, None].expand(-1, rows.x.shape[1])
    assert distinct_units(rows.with_x(broken), 0.5).tolist() == [True, True, False, True, True], "a NaN is no duplicate"


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (
            {"projector": madtp.Keep(5, rule="uniform", duplicates=0.0)},
            "keep of 'projector' must have no duplicates=",
        ),
        ({"prefill": {2: madtp.Keep(0.5, duplicates=0.0)}}, "keep of 'prefill' must have no duplicates="),
    ],
)
def test_duplicates_are_of_the_tower(llava, keep, message):
    model, inputs = llava
    with pytest.raises(ValueError, match=message):
        madtp.patch(model, keep=keep)
    for wrong in (-0.1, True, "0", float("nan"), float("inf")):
        with pytest.raises(ValueError, match="duplicates must be a tolerance, a number >= 0, got "):
            madtp.Keep(0.5, duplicates=wrong)
    handle = madtp.patch(model, keep={"vision": madtp.Keep(duplicates=0.0)})
    with pytest.raises(ValueError, match="pixel_values must have values where duplicates are left out by them, got"):
        handle.counts(**inputs | {"pixel_values": inputs["pixel_values"].to("meta")})


@families(of=TOWERS)
def test_all_kept_is_the_model(name):
    model = make_vlm(name)
    inputs, source, base = vlm_batch(name, model), type(model), type(model.base_model)
    logits, out = model(**inputs).logits, model.generate(**inputs, **GREEDY)
    handle = madtp.patch(model, keep={"vision": 1.0})
    close(model(**inputs).logits, logits)
    again = model.generate(**inputs, **GREEDY)
    assert torch.equal(again.sequences, out.sequences)
    close(answers(again), answers(out))
    layers = handle.counts(**inputs)["vision"]
    assert len(layers) == handle.seams["vision"].layers and layers[0] == layers[-1]
    assert [[places.tolist() for places in layer] for layer in handle.selections["vision"]] == [
        [list(range(count)) for count in layer] for layer in layers
    ]
    with handle.dense():
        assert torch.equal(model(**inputs).logits, logits)
    assert handle.remove() is model and type(model) is source and type(model.base_model) is base
    assert not any(hasattr(module, "madtp_vision") for module in model.modules())
    assert torch.equal(model(**inputs).logits, logits)


@families(of=TOWERS)
def test_the_prompt_of_what_is_left_is_the_whole_with_the_rest_hidden(name):
    """The dense model on features by hand, at the positions of the whole prompt."""
    case, model = (CASES | TOWER_CASES)[name], make_vlm(name)
    inputs = vlm_batch(name, model)
    handle = madtp.patch(model, keep={"vision": 0.5})
    out, logits = model.generate(**inputs, **GREEDY), model(**inputs).logits
    columns, kept = handle.columns, handle.selections["vision"]
    assert [[len(places) for places in layer] for layer in kept] == handle.counts(**inputs)["vision"]
    assert all(places.dtype == torch.long and (places.diff() > 0).all() for layer in kept for places in layer)
    with handle.simulated():
        hidden, whole = model.generate(**inputs, **GREEDY), model(**inputs).logits
        assert [[a.tolist() for a in b] for b in handle.selections["vision"]] == [[a.tolist() for a in b] for b in kept]
    assert whole.shape[1] == inputs["input_ids"].shape[1] > logits.shape[1]
    if case.plain:
        left = columns >= 0
        close(logits[left], whole[torch.arange(2)[:, None].expand_as(columns)[left], columns[left]])
        assert torch.equal(out.sequences, hidden.sequences)
        close(answers(out), answers(hidden))


@families(quick=("LLaVA",), of=[name for name in TOWERS if name in CASES])
def test_decoding_in_other_ways_is_the_same(name):
    case, model = CASES[name], make_vlm(name)
    inputs = vlm_batch(name, model)
    handle = madtp.patch(model, keep={"vision": 0.5})
    greedy = GREEDY | {"suppress_tokens": [IMAGE]}  # a prompt that is read anew must have none of its own
    expected = model.generate(**inputs, **greedy)
    ways = [{"use_cache": False}]
    ways += [{"cache_implementation": "static", "disable_compile": True}] * case.static
    ways += [{"prefill_chunk_size": 7}] * case.chunks
    for way in ways:
        out = model.generate(**inputs, **greedy, **way)
        assert torch.equal(out.sequences, expected.sequences), way
        close(answers(out), answers(expected))
    beams = model.generate(**inputs, **greedy, num_beams=3, num_return_sequences=2, output_scores=True)
    width = inputs["input_ids"].shape[1]
    assert torch.equal(beams.sequences[:, :width], inputs["input_ids"].repeat_interleave(2, 0))
    if case.plain and case.beams:
        with handle.simulated():
            hidden = model.generate(**inputs, **greedy, num_beams=3, num_return_sequences=2, output_scores=True)
        assert torch.equal(beams.sequences, hidden.sequences)
        close(beams.sequences_scores, hidden.sequences_scores)


@families(quick=("Qwen2.5-VL",), of=("Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL"))
def test_videos_beside_images(name):
    model = make_vlm(name)
    inputs, lengths = mixed_prompt(name, model)
    image, video = oracle(model, inputs, 0.4), oracle(model, inputs, 0.4, "video")
    dense = model.generate(**inputs, **GREEDY)
    handle = madtp.patch(model, keep={"vision": 1.0})
    assert torch.equal(model.generate(**inputs, **GREEDY).sequences, dense.sequences)
    handle.remove()
    handle = madtp.patch(model, keep={"vision": 0.4})
    out = model.generate(**inputs, **GREEDY)
    for layer, pictures, frames in zip(handle.selections["vision"], image[2], video[2], strict=True):
        assert [a.tolist() for a in layer] == [a.tolist() for a in (pictures[0], frames[0], pictures[1])]
    assert handle.counts(**inputs)["vision"][-1] == [math.ceil(0.4 * length) for length in lengths]
    with handle.simulated():
        close(answers(out), answers(model.generate(**inputs, **GREEDY)))


@families(quick=("Qwen2.5-VL",), of=[name for name in TOWERS if name in CASES])
def test_the_other_seams_get_what_the_tower_left(name):
    model = make_vlm(name)
    inputs = vlm_batch(name, model)
    keep = {"vision": 0.6, "projector": madtp.Keep(0.7, rule="divprune"), "prefill": {2: 0.5}}
    handle = madtp.patch(model, keep=keep)
    out, counts = model.generate(**inputs, **GREEDY), handle.counts(**inputs)
    tower, behind, inside = (handle.selections[seam] for seam in keep)
    assert counts["projector"] == [math.ceil(round(0.7 * count, 9)) for count in counts["vision"][-1]]
    for left, some, fewer in zip(tower[-1], behind, inside[2], strict=True):
        assert torch.isin(some, left).all() and torch.isin(fewer, some).all()
    assert [len(places) for places in behind] == counts["projector"]
    assert [len(places) for places in inside[2]] == counts["prefill"][2]
    for before, after in itertools.pairwise(tower):
        assert all(torch.isin(a, b).all() for b, a in zip(before, after, strict=True))
    if CASES[name].plain:
        with handle.simulated():
            close(answers(out), answers(model.generate(**inputs, **GREEDY)))


@families(quick=("Qwen2.5-VL",), of=TOWERS)
def test_gradients_by_hand(name):
    model = make_vlm(name)
    inputs = vlm_batch(name, model)
    tower = tower_of(model.base_model)

    def gradients(parts):
        model.zero_grad()
        (torch.cat(list(parts)) ** 2).mean().backward()
        return {name: p.grad.clone() for name, p in tower.named_parameters() if p.grad is not None}

    with torch.enable_grad():
        expected = gradients(oracle(model, inputs, 0.5)[0])
        madtp.patch(model, keep={"vision": 0.5})
        found = gradients(features(model, inputs).pooler_output)
        assert found.keys() == expected.keys() and len(found) > 10
        for key in found:
            close(found[key], expected[key])
        model.train().activation_checkpointing_enable()
        again = gradients(features(model, inputs).pooler_output)
        for key in found:
            close(again[key], found[key])


@pytest.mark.parametrize("right", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_losses_are_those_of_hidden_tokens(right):
    model = make_vlm("LLaVA")
    inputs = vlm_batch("LLaVA", model, right=right)
    ids = inputs["input_ids"]
    text = (ids > END) & (ids != IMAGE) & (ids.roll(1, 1) > END) & (ids.roll(1, 1) != IMAGE)
    handle = madtp.patch(model, keep={"vision": 0.5})

    def loss_and_gradients():
        model.zero_grad()
        with torch.enable_grad():
            loss = model(**inputs, labels=ids.masked_fill(~text, -100)).loss
            loss.backward()
        return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    loss, gradients = loss_and_gradients()
    with handle.simulated():
        expected, hidden = loss_and_gradients()
    close(loss, expected)
    for key in gradients:
        close(gradients[key], hidden[key])


def test_rules(llava):
    model, inputs = llava
    seen = []

    def least(given, counts):
        seen.append(given)
        return torch.cat(
            [
                torch.zeros(len(part), dtype=torch.bool).index_fill(0, part.topk(count, largest=False).indices, True)
                for part, count in zip(given.importance.split(list(given.lengths)), counts, strict=True)
            ]
        )

    last = {}
    for rule in ("received", "cls", "divprune", "uniform", "random", least):
        handle = madtp.patch(model, keep={"vision": madtp.Keep(5, rule=rule)})
        out = features(model, inputs)
        layers = [[len(a) for a in layer] for layer in out.madtp_left.selections()]
        assert layers == [[9] * 3, [5] * 3]  # 16 sqrt(5 / 16) is 8.9
        last[rule] = [a.tolist() for a in out.madtp_left.selections()[-1]]
        assert [len(part) for part in out.pooler_output] == [5, 5, 5]
        handle.remove()
    assert len({str(value) for value in last.values()}) == len(last)
    assert last["uniform"] == [[1, 4, 8, 11, 14]] * 3, "what the rule keeps at once"
    handle = madtp.patch(model, keep={"projector": madtp.Keep(5, rule="random")})
    model(**inputs)
    assert last["random"] == [a.tolist() for a in handle.selections["projector"]]
    assert [tuple(given.features.shape) for given in seen] == [(48, 32), (27, 32)] and seen[1].text is None


def test_cls_by_hand(llava):
    """Of the first layer: heads weighted by their share of the norm of what they give."""
    model, inputs = llava
    tower = model.model.vision_tower
    handle = madtp.patch(model, keep={"vision": madtp.Keep(6, rule="cls")})
    kept = features(model, inputs).madtp_left.selections()[0]
    handle.remove()
    layer = tower.encoder.layers[0]
    x = layer.layer_norm1(tower.pre_layrnorm(tower.embeddings(inputs["pixel_values"])))
    q, k, v = (
        f(x).unflatten(-1, (2, -1)).transpose(1, 2)
        for f in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
    )
    p = (q @ k.transpose(2, 3) / 4).softmax(-1)
    norm = (p @ v).norm(dim=-1)  # (B, H, N)
    weight = norm / norm.sum(1, keepdim=True)
    score = (p[:, :, 0] * weight).sum(1)[:, 1:]
    for chosen, part in zip(kept, score, strict=True):
        assert chosen.tolist() == part.topk(10).indices.sort().values.tolist()  # 16 sqrt(6 / 16) is 9.8


def test_rules_that_say_how_many(llava):
    model, inputs = llava
    handle = madtp.patch(model, keep={"vision": madtp.Keep(mass=0.8)})
    model(**inputs)
    counts = [[len(a) for a in layer] for layer in handle.selections["vision"]]
    assert all(0 < a < b < 16 for b, a in zip(*counts, strict=True))
    with pytest.raises(ValueError, match="counts must be of a share or a count, got mass"):
        handle.counts(**inputs)
    handle.remove()
    wanted = iter([7, 3])

    def some(given, counts):
        assert counts is None
        count = next(wanted)
        return torch.cat([torch.arange(length) < count for length in given.lengths])

    handle = madtp.patch(model, keep={"vision": madtp.Keep(rule=some)})
    logits = model(**inputs).logits
    assert [[a.tolist() for a in layer] for layer in handle.selections["vision"]] == [
        [list(range(7))] * 3,
        [[0, 1, 2]] * 3,
    ]
    assert logits.shape[1] == inputs["input_ids"].shape[1] - 26


def test_what_looks_at_nothing_is_nested():
    lengths, counts = [20, 7], [[15, 6], [11, 3], [4, 1]]
    for name in ("uniform", "random"):
        choose = RULES[name].choose
        kept = nested(choose, lengths, counts)
        assert [[int(part.sum()) for part in keep.split(lengths)] for keep in kept] == counts
        assert (kept[0] >= kept[1]).all() and (kept[1] >= kept[2]).all()
        assert torch.equal(kept[2], choose(Candidates(torch.zeros(27, 1), lengths), counts[2]))


def test_counts_larger_than_an_image_and_ones_that_would_leave_nothing(llava):
    model, inputs = llava
    logits = model(**inputs).logits
    handle = madtp.patch(model, keep={"vision": 64})
    with pytest.warns(UserWarning, match="keep of the seam 'vision' is 64 tokens an image, and an image has 16"):
        close(model(**inputs).logits, logits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**inputs)
    handle.remove()
    handle = madtp.patch(model, keep={"vision": 0.0001})
    model(**inputs)
    assert [[len(a) for a in layer] for layer in handle.selections["vision"]] == [[1] * 3] * 2


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (0, "amount must be a share"),
        (madtp.Keep(0.5, rule="fastv"), "as its rule one of received, cls, divprune, uniform, random, a function, got"),
        (madtp.Keep(0.5, rule="text"), "a function, got 'text'"),
        (madtp.Keep(0.5, rule="tome"), "a function, got 'tome'"),
        (madtp.Keep(mass=0.5, rule="uniform"), "as its rule with a mass one of received, cls, a function, got 'unif"),
    ],
)
def test_what_cannot_be_kept_is_one_line(llava, keep, message):
    with pytest.raises(ValueError, match=message) as error:
        madtp.patch(llava[0], keep={"vision": keep})
    assert "\n" not in str(error.value) and not hasattr(llava[0], "madtp_handle")


def test_registers_are_refused():
    vision = TOWER | {"model_type": "dinov3_vit", "image_size": 16, "patch_size": 4}
    text = TEXT | {"model_type": "llama"}
    model = hf.LlavaForConditionalGeneration(hf.LlavaConfig(vision_config=vision, text_config=text))
    with pytest.raises(TypeError, match="its patches, and those of dinov3_vit have registers among them, got Llava"):
        madtp.patch(model, keep={"vision": 0.5})


@pytest.mark.slow
def test_towers_that_cannot_prune():
    model = make_vlm("Florence-2")
    with pytest.raises(TypeError, match="model must have a vision seam, its tower must be of one grid") as error:
        madtp.patch(model, keep={"vision": 0.5})
    assert "\n" not in str(error.value) and not hasattr(model, "madtp_handle")
    assert not any(hasattr(module, "madtp_vision") for module in model.modules())


def test_what_is_interpolated_or_pooled_is_refused():
    model = make_vlm("OneVision")
    inputs = vlm_batch("OneVision", model)
    madtp.patch(model, keep={"vision": 0.5})
    with pytest.raises(ValueError, match=r"image_sizes must be such that .*, got \[32, 16\] of image 0"):
        model.get_image_features(**pixels_of(inputs), vision_aspect_ratio="anyres_max_1")
    with pytest.raises(ValueError, match="pixel_values_videos must be None at the vision seam of this model"):
        model.get_video_features(inputs["pixel_values"])
    with pytest.raises(
        ValueError, match="pixel_values must have the tiles of 3 image_sizes, .3, 3, 5. of 16 x 16, got"
    ):
        model.get_image_features(inputs["pixel_values"][:2], image_sizes=inputs["image_sizes"])


def test_counts_refuse_what_the_tower_refuses():
    model = make_vlm("OneVision")
    inputs, _ = mixed_prompt("OneVision", model)
    handle = madtp.patch(model, keep={"vision": 0.5})
    for call in (handle.counts, model):
        with pytest.raises(ValueError, match="pixel_values_videos must be None at the vision seam of this model"):
            call(**inputs)
    handle.remove()
    model = make_vlm("Qwen2.5-VL")
    inputs = vlm_batch("Qwen2.5-VL", model)
    counts = madtp.patch(model, keep={"vision": 0.5}).counts
    grids = {"input_ids": inputs["input_ids"], "image_grid_thw": inputs["image_grid_thw"]}
    assert counts(**grids) == counts(**inputs), "by grids alone"
    for call in (counts, model):
        with pytest.raises(
            ValueError, match="pixel_values must have a row for each patch of image_grid_thw, 80, got 79"
        ):
            call(**inputs | {"pixel_values": inputs["pixel_values"][1:]})


@families(quick=("LLaVA",), of=("LLaVA", "LLaVA with SigLIP", "Janus", "PaliGemma"))
def test_positions_are_interpolated_where_that_is_asked_for(name):
    model = make_vlm(name)
    pixels = torch.randn(2, 3, 32, 16, dtype=torch.double)
    base = model.base_model
    expected = base.get_image_features(pixels, interpolate_pos_encoding=True, return_dict=True).pooler_output
    handle = madtp.patch(model, keep={"vision": 1.0})
    found = base.get_image_features(pixels, interpolate_pos_encoding=True).pooler_output
    assert [len(part) for part in found] == [32, 32]
    for a, b in zip(found, expected, strict=True):
        close(a, b)
    with pytest.raises((ValueError, RuntimeError), match="size"):
        base.get_image_features(pixels)
    ids = {"input_ids": torch.tensor([[IMAGE] * 64 + [20]])}
    assert handle.counts(**ids, pixel_values=pixels)["vision"][-1] == [32, 32]


def test_what_a_tower_must_have(llava):
    model, inputs = llava
    blip = blip2(hf.Blip2ForConditionalGeneration)
    with pytest.raises(TypeError, match="vision seam, its class must be known: of the model types qwen2_vl, "):
        madtp.patch(blip, keep={"vision": 0.5})
    model.config.vision_feature_select_strategy = "full"
    with pytest.raises(TypeError, match="its patches, and vision_feature_select_strategy 'full' makes CLS one of them"):
        madtp.patch(model, keep={"vision": 0.5})
    model.config.vision_feature_select_strategy = "default"
    handle = madtp.patch(model, keep={"vision": 0.5})
    with pytest.raises(
        ValueError, match="vision_feature_layer must be that of the config, -2, at the vision seam, got -1"
    ):
        model(**inputs, vision_feature_layer=-1)
    handle.remove()
    with pytest.raises(TypeError, match="its tower must have a CLS token for the rule 'cls'"):
        madtp.patch(make_vlm("PaliGemma"), keep={"vision": madtp.Keep(0.5, rule="cls")})
    model.model.vision_tower.encoder.layers[0].self_attn = torch.nn.Identity()
    with pytest.raises(TypeError, match="its tower must have layers that call the attention of transformers"):
        madtp.patch(model, keep={"vision": 0.5})


def test_tiles_with_hidden_patches_are_refused():
    model = make_vlm("SmolVLM")
    inputs = vlm_batch("SmolVLM", model)
    mask = torch.ones(2, 2, 32, 32, dtype=torch.long)
    madtp.patch(model, keep={"vision": 0.5})
    expected = model(**inputs).logits
    assert torch.equal(model(**inputs, pixel_attention_mask=mask).logits, expected)
    mask[1, 1, 24:] = 0
    with pytest.raises(ValueError, match="pixel_attention_mask must hide no patch of an image where its tower prunes"):
        model(**inputs, pixel_attention_mask=mask)


def test_a_rule_that_changes_units_is_refused(llava):
    model, inputs = llava

    def rule(given, counts):
        keep = torch.cat([torch.arange(n) < c for n, c in zip(given.lengths, counts, strict=True)])
        return Kept(keep, given.features[keep])

    madtp.patch(model, keep={"vision": madtp.Keep(0.5, rule=rule)})
    with pytest.raises(ValueError, match="rule rule must return a bool tensor in a tower"):
        model(**inputs)


def test_explain_and_profile(llava):
    model, inputs = llava
    handle = madtp.patch(model, keep={"vision": 4})
    assert handle.explain().splitlines()[0].split() == [
        "vision",
        "rule",
        "received",
        "4",
        "of",
        "each",
        "image,",
        "layers:",
        "2",
    ]
    model(**inputs)
    table = [re.split(r"\s{2,}", line) for line in handle.explain().splitlines()]
    assert [line[:3] for line in table[1:5]] == [
        ["vision", "units", "48 -> 12"],
        ["vision", "by layer", "24, 12"],
        ["vision", "columns", "50 -> 26"],
        ["vision", "cache", "26"],
    ]
    profile = madtp.profile(model, inputs).total
    assert profile.counted_macs < profile.dense_macs


def test_only_rows_that_are_left_are_computed(llava):
    model, inputs = llava
    madtp.patch(model, keep={"vision": 4})
    rows = []
    for layer in model.model.vision_tower.encoder.layers:
        layer.mlp.register_forward_pre_hook(lambda _, given: rows.append(given[0].shape[1]))
    model.model.multi_modal_projector.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    model(**inputs)
    assert rows == [3 * 17, 3 * 9, 3 * 4], "the third layer, which nothing reads, does not run"


def test_copies_threads_and_images_encoded_before(llava):
    model, inputs = llava
    handle = madtp.patch(model, keep={"vision": 0.5})
    expected = model(**inputs).logits
    other = copy.deepcopy(model)
    assert other.madtp_handle.model is other and torch.equal(other(**inputs).logits, expected)
    assert other.model.madtp_vision is not model.model.madtp_vision
    encoded = {"image": model.get_image_features(inputs["pixel_values"])}
    ready = {name: value for name, value in inputs.items() if name != "pixel_values"}
    assert torch.equal(model(**ready, mm_encoder_outputs=encoded).logits, expected)
    assert handle.counts(**ready, mm_encoder_outputs=encoded) == handle.counts(**inputs)
    found = []
    with handle.dense():
        dense = {"image": model.get_image_features(inputs["pixel_values"])}
        thread = threading.Thread(target=lambda: found.append(model.get_image_features(inputs["pixel_values"])))
        thread.start()
        thread.join()
    assert [len(part) for part in found[0].pooler_output] == [8, 8, 8], "what holds in one thread holds there alone"
    assert model(**ready, mm_encoder_outputs=dense).logits.shape[1] == 50 and handle.selections["vision"] == []


def test_saved_and_loaded(llava, tmp_path):
    model, inputs = llava
    keep = madtp.Keep(0.5, duplicates=0.0)
    handle = madtp.patch(model, keep={"vision": keep, "projector": madtp.Keep(5, rule="cdpruner")})
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path / "pruned")
    settings = json.loads((tmp_path / "pruned" / "config.json").read_text())["quantization_config"]
    assert settings["keep"]["vision"] == {"amount": 0.5, "mass": None, "duplicates": 0.0, "rule": "received"}
    assert settings["keep"]["projector"] == {"amount": 5, "mass": None, "rule": "cdpruner"}
    loaded = madtp.from_pretrained(tmp_path / "pruned")
    assert loaded.madtp_handle.keep == handle.keep
    assert torch.equal(loaded(**inputs).logits, expected)


@pytest.mark.slow
def test_packed_towers():
    model = make_vlm("Qwen2-VL").float()
    inputs = vlm_batch("Qwen2-VL", model.double())
    model.float()
    inputs["pixel_values"] = inputs["pixel_values"].float()
    handle = madtp.patch(model, keep={"vision": 0.5})
    before = model(**inputs).logits
    madtp.hwp.pack(model, names=["model.visual.blocks.1.mlp.fc1"], dtype="int8")
    after = model(**inputs).logits
    assert after.shape == before.shape and not torch.equal(after, before)
    assert type(handle.remove().model.visual.blocks[1].mlp.fc1) is torch.nn.Linear


def test_half_precision_and_heads_of_any_size():
    """Towers as they are published: bfloat16, and 72 channels a head."""
    model = make_vlm("PaliGemma")
    config = copy.deepcopy(model.config)
    config.vision_config.hidden_size, config.vision_config.num_attention_heads = 144, 2
    torch.manual_seed(0)
    model = type(model)(config).eval()
    pixels = torch.randn(2, 3, 16, 16)
    madtp.patch(model, keep={"vision": madtp.Keep(0.5, rule="uniform")})
    expected = torch.cat(model.get_image_features(pixels).pooler_output)
    found = torch.cat(model.bfloat16().get_image_features(pixels.bfloat16()).pooler_output)
    assert found.dtype == torch.bfloat16 and found.shape == expected.shape == (16, 32)
    assert torch.cosine_similarity(found.float(), expected).min() > 0.99
