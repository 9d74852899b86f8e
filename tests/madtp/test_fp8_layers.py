# SPDX-License-Identifier: Apache-2.0
"""fp8 weights where they are not as int8 ones: what pack makes, casts, files, one shot, training, plans."""

import copy
import dataclasses
import json
import pickle

import pytest
import torch
import transformers as hf
from families import CASES, CONFIG
from linear_blocks import Block, saved_and_loaded
from safetensors.torch import load_file
from test_compress_int8 import FC1, FC2, INT8, JOINT, NONE, plan
from test_compression import Questions, Task
from test_hwp_scores import correlated, make_model, output_error
from test_int8_models import rewritten
from test_latency import sensitivities
from tiny_models import tiny_blip
from torch import nn

import madtp
from madtp import hwp
from madtp.budgets.allocate import choose
from madtp.budgets.plan import Plan
from madtp.cli.options import settings
from madtp.hwp import Epilogue, QuantizedLinear
from madtp.hwp.packing import schemes_of
from madtp.hwp.weight_grid import GridWeight, rounded
from madtp.profiling.macs import profile
from madtp_kernels import quantize, quantized_linear
from madtp_kernels.reference.quantized import FP8, nearest, quantize_rows

BOTH = ["fc1", "fc2"]
E4M3 = torch.float8_e4m3fn


def block():
    """Of a 2:4 Linear and one that is not."""
    made = Block()
    hwp.prune_one_shot(made, "2:4", ["fc1"])
    return made


def packed_block():
    made = block()
    hwp.pack(made, BOTH, epilogues={"fc1": Epilogue("act")}, dtype="fp8")
    return made


def round_rows(module, inputs):
    values, scale = quantize_rows(inputs[0], FP8)
    return values.float() * scale[:, None]


def same_bits(value, other):
    return value.dtype == other.dtype and torch.equal(value.view(torch.uint8), other.view(torch.uint8))


# --- one layer


def test_a_packed_layer_is_the_linear_of_dequantised_weights_on_rounded_rows():
    made, x = block(), torch.randn(4, 32)
    before = made(x)
    hwp.pack(made, BOTH, epilogues={"fc1": Epilogue("act")}, dtype="fp8")
    assert (made.fc1.scheme, made.fc1.sparse, made.fc2.scheme, made.fc2.sparse) == ("fp8_24", True, "fp8", False)
    assert {name: (value.dtype, tuple(value.shape)) for name, value in made.named_buffers()} == {
        "fc1.weight": (E4M3, (64, 16)),
        "fc1.weight_indices": (torch.uint8, (64, 4)),
        "fc1.weight_scale": (torch.float32, (64,)),
        "fc2.weight": (E4M3, (32, 64)),
        "fc2.weight_scale": (torch.float32, (32,)),
    }
    y = made(x)
    torch.testing.assert_close(y, before, atol=0.1, rtol=0.1)
    verdicts = hwp.explain_linears(made)
    assert verdicts["fc1"] == "fp8 2:4, runs dense: faster, or all there is" and verdicts["fc2"].startswith("fp8, runs")
    assert not made.fc1.executes_sparse
    plain = copy.deepcopy(made)
    hwp.unpack(plain)
    for linear in (plain.fc1, plain.fc2):
        assert type(linear) is nn.Linear
        linear.register_forward_pre_hook(round_rows)
    torch.testing.assert_close(y, plain(x))


def test_a_layer_that_was_packed_24_goes_fp8():
    made, x = block(), torch.randn(4, 32)
    hwp.pack(made)
    y = made(x)
    assert list(hwp.pack(made, dtype="fp8")) == ["fc1"] and made.fc1.scheme == "fp8_24"
    torch.testing.assert_close(made(x), y, atol=0.1, rtol=0.1)
    assert hwp.pack(made, dtype="int8") == {}  # it is rounded already


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded])
def test_copies(copied):
    made, x = packed_block(), torch.randn(4, 32)
    twin, expected = copied(made), made(x)
    assert torch.equal(twin(x), expected) and same_bits(twin.fc1.weight, made.fc1.weight)
    assert twin.fc1.quantized_weight.values is twin.fc1.weight is not made.fc1.weight
    with torch.no_grad():
        twin.fc2.weight_scale.zero_()
        twin.fc1.weight.zero_()
    assert torch.equal(made(x), expected) and not torch.equal(twin(x), expected)


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to("meta")])
def test_casts_and_moves_leave_the_weight_in_fp8(cast):
    made = packed_block()
    twin = cast(copy.deepcopy(made))
    for name, value in made.fc1.named_buffers():
        other = twin.fc1.get_buffer(name)
        assert other.dtype == value.dtype and (other.is_meta or same_bits(other, value))
    assert twin.fc1.quantized_weight.scheme == "fp8_24" and twin.fc1.dense_dtype == twin.fc1.bias.dtype
    if not twin.fc1.bias.is_meta:
        hwp.unpack(twin)
        assert twin.fc1.weight.dtype == twin.fc1.bias.dtype != torch.float32


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "fc1.weight",
            lambda v: (v.view(torch.uint8) | 0x7F).view(E4M3),
            "fc1.weight.values must .*got a NaN at row 0",
        ),
        ("fc1.weight", torch.Tensor.float, "fc1.weight must be float8_e4m3fn for a layer of fp8_24, got float32"),
        ("fc2.weight", lambda v: v.view(torch.int8), "fc2.weight must be float8_e4m3fn for a layer of fp8, got int8"),
        ("fc2.weight_scale", torch.Tensor.half, "fc2.weight_scale must be float32 for a layer of fp8, got float16"),
    ],
)
def test_states_that_no_kernel_may_read_are_refused(name, change, message):
    made, x = packed_block(), torch.randn(4, 32)
    state, expected = made.state_dict(), made(x)
    with pytest.raises(RuntimeError, match=message):
        made.load_state_dict(state | {name: change(state[name])})
    assert torch.equal(made(x), expected)
    made.load_state_dict(state)


def test_scales_of_another_dtype_are_not_taken():
    made = block()
    hwp.prune_one_shot(made, None, BOTH, weight_dtype="fp8")
    with pytest.raises(ValueError, match="weight_scale of fc1 must be such as leave int8_24 .* got 0.28 of row 0"):
        hwp.pack(made, BOTH, dtype="int8")
    assert type(made.fc1) is nn.Linear
    hwp.pack(made, BOTH, dtype="fp8")
    hwp.unpack(made)
    with pytest.raises(ValueError, match="weight_scale of fc1 must be such as leave int8_24"):
        hwp.pack(made, dtype="int8")


def test_gradients_and_export():
    made, x = packed_block(), torch.randn(4, 32, requires_grad=True)
    made(x).square().sum().backward()
    assert x.grad.abs().sum() > 0 and made.fc1.bias.grad.abs().sum() > 0
    exported = torch.export.export(made, (x.detach(),)).module()
    assert torch.equal(exported(x.detach()), made(x))


def test_bits_and_bytes_are_those_of_int8():
    found = {}
    for dtype in ("int8", "fp8"):
        made, x = block(), torch.randn(4, 32)
        hwp.pack(made, BOTH, dtype=dtype)
        account = profile(made, x).total
        found[dtype] = account.bit_operations, account.weight_bytes, account.counted_macs
    assert found["int8"] == found["fp8"]


# --- one shot and training


@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize("correct", [False, True])
def test_one_shot_leaves_the_grid(pattern, correct):
    model, x = make_model(), correlated()
    with torch.no_grad(), hwp.collect_inputs(model, ["0", "2"], gram=True) as statistics:
        model(x)
    dense = model[0].weight.detach().clone()
    hwp.prune_one_shot(model, pattern, ["0", "2"], statistics, correct=correct, weight_dtype="fp8")
    for layer in (model[0], model[2]):
        scale = layer.weight_scale
        values = nearest(layer.weight, scale[:, None], FP8)
        assert torch.equal(values * scale[:, None], layer.weight)
        assert torch.equal(quantize(layer.weight, "fp8", scale).values.float(), values)
        assert pattern is None or hwp.is_pattern(layer.weight, pattern)
    if pattern is None:
        naive = output_error(dense, rounded(dense, FP8), x)
        error = output_error(dense, model[0].weight, x)
        assert error < 0.7 * naive if correct else error == naive


def test_values_that_a_dtype_does_not_hold_are_refused():
    grid = GridWeight(torch.tensor([[448.0, 1.0]]).to(E4M3), torch.tensor([1e-9]))
    assert grid.to_dense(torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"dtype must be one that holds values \* scale, got float16"):
        grid.to_dense(torch.float16)
    for call in (hwp.round_weight, lambda weight, dtype: hwp.reconstruct_rounded(weight, torch.eye(16), dtype=dtype)):
        with pytest.raises(ValueError, match="dtype must be int8 or fp8, got 'fp4'"):
            call(torch.randn(8, 16), dtype="fp4")


def test_training_computes_as_the_layers_will():
    model, x = make_model(), torch.randn(40, 64)
    quantizer = hwp.FakeQuantizer(model, ["0", "2"], total_steps=1, dtype="fp8")
    quantizer.start()
    found = model[0](x)
    torch.testing.assert_close(found, quantized_linear(x, quantize(model[0].weight, "fp8"), model[0].bias))
    found.sum().backward()
    assert model[0].weight.grad.abs().sum() > 0
    quantizer.stop()
    with pytest.raises(ValueError, match="dtype must be int8 or fp8, got 'fp4'"):
        hwp.FakeQuantizer(model, ["0"], total_steps=1, dtype="fp4")


def test_sensitivity_is_about_what_is_measured():
    model, x = make_model(), torch.randn(500, 64)
    with torch.no_grad(), hwp.collect_inputs(model, ["0", "2"], gram=True) as statistics:
        model(x)
        inputs = {"0": x, "2": model[:2](x)}
        found = hwp.rounding_sensitivity(model, statistics, dtype="fp8")
        for name, layer in (("0", model[0]), ("2", model[2])):
            y = inputs[name] @ layer.weight.T
            measured = (quantized_linear(inputs[name], quantize(layer.weight, "fp8")) - y).norm() / y.norm()
            assert found[name] == pytest.approx(measured.item(), rel=0.15)
    with pytest.raises(ValueError, match="dtype must be int8 or fp8, got 'fp4'"):
        hwp.rounding_sensitivity(model, statistics, dtype="fp4")


# --- models


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model, folder = CASES["ViTModel"].build().eval(), tmp_path_factory.mktemp("fp8")
    handle = madtp.patch(model, CONFIG)
    handle.set_temperature(2.0)
    names = hwp.select_modules(model, "2:4", exclude=(*handle.family.dense_modules, "madtp_guide")).selected
    hwp.prune_one_shot(model, "2:4", names[::2])
    hwp.pack(model, names, dtype="fp8")
    model.save_pretrained(folder)
    return model, folder


def output(model):
    with torch.no_grad():
        return model(**CASES["ViTModel"].inputs()).last_hidden_state


def test_what_was_saved_loads_again(saved):
    model, folder = saved
    written = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert written["version"] == 6
    assert {layer: of["scheme"] for layer, of in written["packed"].items()} == schemes_of(model)
    assert set(schemes_of(model).values()) == {"fp8", "fp8_24"}
    for load in (hf.AutoModel.from_pretrained, madtp.from_pretrained):
        other = load(folder)
        assert schemes_of(other) == schemes_of(model) and torch.equal(output(other), output(model))
        half = load(folder, dtype=torch.bfloat16)
        for name, layer in half.named_modules():
            if isinstance(layer, QuantizedLinear):
                ours = model.get_submodule(name)
                assert same_bits(layer.weight, ours.weight) and same_bits(layer.weight_scale, ours.weight_scale)
                assert layer.bias.dtype == layer.dense_dtype == torch.bfloat16
        assert half.dtype == torch.bfloat16 and output(half).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (torch.Tensor.float, r"fc1.weight as config.json .* F8_E4M3 of shape \(64, 16\), got F32 \(64, 16\)"),
        (lambda v: v.view(torch.int8), r"fc1.weight as config.json .* F8_E4M3 of shape \(64, 16\), got I8 \(64, 16\)"),
        (lambda v: (v.view(torch.uint8) | 0x7F).view(E4M3), "fc1.weight.values must be from -448 to 448, got a NaN"),
    ],
)
def test_files_that_do_not_hold_what_they_say_are_refused(saved, tmp_path, change, message):
    key = "layers.0.mlp.fc1.weight"
    rewritten(saved[1], tmp_path, lambda weights: weights | {key: change(weights[key])})
    for load in (madtp.from_pretrained, hf.AutoModel.from_pretrained):
        with pytest.raises(madtp.ModelError, match=message):
            load(tmp_path)
    assert load_file(saved[1] / "model.safetensors")[key].dtype == E4M3


def test_a_reader_that_knows_no_fp8_says_so(saved, monkeypatch):
    monkeypatch.setattr(hwp.packing, "SCHEMES", ("int8", "int8_24"))
    with pytest.raises(madtp.ModelError, match="scheme must be one of sparse24, int8, int8_24, got 'fp8"):
        madtp.from_pretrained(saved[1])


# --- runs


def test_configs_and_plans_take_fp8(tmp_path):
    config, _ = settings(None, weights="fp8")
    assert config.weight_dtype == "fp8"
    assert madtp.CompressionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    measured = sensitivities()
    weights = {"a": dataclasses.replace(measured.weights["fc"], rounding_error=0.01)}
    measured = dataclasses.replace(measured, weights=weights)
    chosen = choose(measured, dataclasses.replace(INT8, weight_dtype="fp8", macs_reduction=0.2))
    assert chosen.weight_dtypes == {"a": "fp8"} and chosen.weight_dtype == "fp8"
    chosen.save(tmp_path / "plan.yaml")
    assert Plan.load(tmp_path / "plan.yaml") == chosen
    assert Plan(0.3, {"vision": 0.5}, ("fc1",)).weight_dtype is None


def test_a_run_ends_in_fp8(tmp_path):
    config, data = dataclasses.replace(JOINT, weight_dtype=None), Questions(24)
    some = plan(weight_dtypes={FC1: "fp8", FC2: "fp8"})
    result = madtp.compress(tiny_blip(), Task(), data, None, config, output_dir=tmp_path, plan=some, training=NONE)
    assert schemes_of(result.model) == {FC1: "fp8_24", FC2: "fp8"} == result.report["plan"]["quantized_modules"]
    assert result.report["config"]["weight_dtype"] == "fp8"
    with pytest.raises(ValueError, match=f"^model must have no fp8 2:4 weights, which do not train, got '{FC1}'"):
        madtp.compress(result.model, Task(), data, None, config, output_dir=tmp_path, training=NONE)
