# SPDX-License-Identifier: Apache-2.0
"""Pruned weights that are fitted to the dense model: closer to it, as sparse as before, with the tokens left."""

import copy

import pytest
import torch
from test_compression import Questions, Task
from tiny_models import tiny_batch, tiny_blip

import madtp
from madtp.compression.reconstruction import reconstruct_blocks
from madtp.hwp import is_pattern, prune_one_shot, select_modules
from madtp.inference import evaluating

CONFIG = madtp.CompressionConfig(
    macs_reduction=0.55,
    alignment_tokens=8,
    alignment_dim=32,
    hwp_schedule="one_shot",
    hwp_score="second_order",
    hwp_reconstruction_steps=2,
)


@pytest.fixture
def pruned():
    """A patched BLIP, 2:4 by magnitude; the same before; names; batches."""
    torch.manual_seed(0)
    model = tiny_blip().eval()
    handle = madtp.patch(model, CONFIG)
    names = select_modules(model, "2:4", exclude=(*handle.family.dense_modules, "madtp_guide")).selected
    dense = copy.deepcopy(model)
    prune_one_shot(model, "2:4", names)
    handle.set_temperature(0.7)
    return model, dense, names, [tiny_batch(5), tiny_batch(4)]


def logits(model, batches):
    with torch.no_grad():
        return torch.cat([model(**batch).logits.flatten() for batch in batches])


def test_every_part_comes_closer_and_stays_sparse(pruned):
    model, dense, names, batches = pruned
    before = copy.deepcopy(model)
    wanted, started = logits(dense, batches), logits(model, batches)
    random = torch.get_rng_state()
    found = reconstruct_blocks(model, dense, names, batches, steps=30)
    assert torch.equal(torch.get_rng_state(), random)
    parts = ["vision_model.encoder.layers.0.attention", "vision_model.encoder.layers.0.mlp"]
    assert list(found)[:2] == parts and "text_encoder.encoder.layer.0.cross_attention" in found
    assert all(0 < part.after < 0.8 * part.before for part in found.values()), found
    assert (logits(model, batches) - wanted).norm() < (started - wanted).norm()
    for name in names:
        weight, old = model.get_submodule(name).weight, before.get_submodule(name).weight
        assert (
            is_pattern(weight.detach(), "2:4") and torch.equal(weight == 0, old == 0) and not torch.equal(weight, old)
        )
        assert weight.requires_grad and weight.grad is None
    others = set(dict(model.named_parameters())) - {f"{n}.{p}" for n in names for p in ("weight", "bias")}
    assert all(torch.equal(model.get_parameter(n), before.get_parameter(n)) for n in others)
    assert model.madtp_handle.temperatures == before.madtp_handle.temperatures


def test_the_parts_meet_the_tokens_that_are_left(pruned, monkeypatch):
    model, dense, names, batches = pruned
    rows = {}
    from madtp.compression import reconstruction

    whole = reconstruction.mlp_part

    def counted(layer, spec, batch, normed):
        rows[id(layer)] = len(normed)
        return whole(layer, spec, batch, normed)

    monkeypatch.setattr(reconstruction, "mlp_part", counted)
    reconstruct_blocks(model, dense, [n for n in names if "vision_model" in n], batches[:1], steps=1)
    with torch.no_grad(), evaluating(model):
        model(**batches[0])
    left = model.madtp_handle.tokens_per_layer["vision"]
    layers = model.vision_model.encoder.layers
    samples = len(batches[0]["input_ids"])
    assert [rows[id(layer)] / samples for layer in layers] == pytest.approx(left[-len(layers) :])


def test_what_is_exact_is_left_as_it_is(pruned):
    _, dense, names, batches = pruned
    model = copy.deepcopy(dense)
    found = reconstruct_blocks(model, dense, names, batches, steps=2)
    assert all(part.before == part.after == 0 for part in found.values())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_are_fitted_too(pruned, dtype):
    model, dense, names, batches = pruned
    batches = [{**batch, "pixel_values": batch["pixel_values"].to(dtype)} for batch in batches]
    vision = [name for name in names if "vision_model" in name]
    found = reconstruct_blocks(model.to(dtype), dense.to(dtype), vision, batches, steps=20)
    assert all(part.after < 0.8 * part.before for part in found.values()), found
    assert all(is_pattern(model.get_submodule(name).weight.detach(), "2:4") for name in vision)


def test_what_one_token_outweighs_is_fitted_too(pruned):
    model, dense, names, batches = pruned
    for tower in (model, dense):
        tower.vision_model.embeddings.position_embedding.data[0, 3] *= 1e4
    found = reconstruct_blocks(model, dense, [n for n in names if "layers.0.mlp" in n], batches, steps=30)
    assert all(part.after < 0.8 * part.before for part in found.values()), found


def test_outputs_of_zeros_have_an_error(pruned):
    model, dense, names, batches = pruned
    name = "vision_model.encoder.layers.1.self_attn.projection"
    block = "vision_model.encoder.layers.1"
    for tower in (model, dense):
        for parameter in tower.get_submodule(f"{block}.mlp.fc1").parameters():
            parameter.data.zero_()
        tower.get_submodule(f"{block}.mlp.fc2").bias.data.zero_()
    found = reconstruct_blocks(model, dense, [f"{block}.mlp.fc2", name], batches, steps=1)
    assert all(part.before == part.before and part.after <= part.before for part in found.values())


def test_under_autocast_and_in_inference_mode_it_is_the_same(pruned):
    model, dense, names, batches = pruned
    vision = [name for name in names if "layers.0.mlp" in name]
    other = copy.deepcopy(model)
    wanted = reconstruct_blocks(model, dense, vision, batches, steps=2)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        assert reconstruct_blocks(other, dense, vision, iter(batches), steps=2) == wanted


def test_an_interrupt_leaves_gradients_as_they_were(pruned, monkeypatch):
    model, dense, names, batches = pruned
    parameter = model.get_submodule(names[0]).weight.requires_grad_(False)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.Adam, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        reconstruct_blocks(model, dense, names, batches, steps=2)
    assert not parameter.requires_grad and all(p.grad is None for p in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be a positive integer, got int 0"),
        ({"steps": True}, "steps must be a positive integer, got bool True"),
        ({"batches": []}, "batches must be at least one, got none"),
        ({"modules": ["vision_model"]}, "modules must name Linear modules, got 'vision_model'"),
    ],
)
def test_bad_input(pruned, changes, message):
    model, dense, names, batches = pruned
    given = {"modules": names, "batches": batches, "steps": 1} | changes
    with pytest.raises(ValueError, match=message):
        reconstruct_blocks(model, dense, given.pop("modules"), given.pop("batches"), **given)


def test_compress_without_training(tmp_path):
    """From the start, since such a run has nothing to go on from, whatever checkpoints lie there."""
    torch.manual_seed(0)
    (tmp_path / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    run = {"output_dir": tmp_path, "training": {"max_steps": 0}, "resume": True}
    result = madtp.compress(tiny_blip(), Task(), Questions(24), None, CONFIG, **run)
    parts = result.report["plan"]["reconstructions"]
    assert len(parts) > 4 and all(part["after"] < part["before"] for part in parts.values())
    assert result.report["plan"]["packed_modules"]


@pytest.mark.slow
def test_compress_to_int8(tmp_path):
    torch.manual_seed(0)
    config = madtp.CompressionConfig.from_dict(CONFIG.to_dict() | {"weight_dtype": "int8"})
    result = madtp.compress(
        tiny_blip(), Task(), Questions(24), None, config, output_dir=tmp_path, training={"max_steps": 0}
    )
    assert set(result.report["plan"]["quantized_modules"].values()) >= {"int8_24"}
