# SPDX-License-Identifier: Apache-2.0
"""Layers of int8 weights: what pack makes of which Linears, what they compute, copies, casts, and what is refused."""

import copy
import pickle

import pytest
import torch
from linear_blocks import Block, saved_and_loaded
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from madtp import hwp
from madtp.hwp import Epilogue, QuantizedLinear, Sparse24Linear
from madtp.hwp.packing import replace_linear
from madtp_kernels import dispatch, quantize, save_quantized
from madtp_kernels.measured import Timing
from madtp_kernels.quantized import tuning_cpu

BOTH = ["fc1", "fc2"]


def block():
    """Of a 2:4 Linear and one that is not."""
    made = Block()
    hwp.prune_one_shot(made, "2:4", ["fc1"])
    return made


def packed_block():
    made = block()
    hwp.pack(made, BOTH, epilogues={"fc1": Epilogue("act")}, dtype="int8")
    return made


def packed_24():
    made = Block()
    hwp.prune_one_shot(made, "2:4", BOTH)
    hwp.pack(made)
    return made


def round_rows(module, inputs):
    """A hook before a Linear, after which its inputs are as an int8 layer rounds them."""
    (x,) = inputs
    scale = x.abs().amax(-1, keepdim=True) / 127
    return torch.where(scale > 0, (x / scale).round() * scale, 0)


def test_a_packed_layer_is_the_linear_of_dequantised_weights_on_rounded_rows():
    made, x = block(), torch.randn(4, 32)
    expected_scales = {name: made.get_submodule(name).weight.abs().amax(1) / 127 for name in BOTH}
    before = made(x)
    assert hwp.pack(made, BOTH, epilogues={"fc1": Epilogue("act")}, dtype="int8") == {
        "fc1": Epilogue("act"),
        "fc2": Epilogue(),
    }
    assert (made.fc1.scheme, made.fc2.scheme) == ("int8_24", "int8")
    assert {name: (value.dtype, tuple(value.shape)) for name, value in made.named_buffers()} == {
        "fc1.weight": (torch.int8, (64, 16)),
        "fc1.weight_indices": (torch.uint8, (64, 4)),
        "fc1.weight_scale": (torch.float32, (64,)),
        "fc2.weight": (torch.int8, (32, 64)),
        "fc2.weight_scale": (torch.float32, (32,)),
    }
    assert all(torch.equal(made.get_submodule(name).weight_scale, scale) for name, scale in expected_scales.items())
    y = made(x)
    torch.testing.assert_close(y, before, atol=0.05, rtol=0.05)
    plain = copy.deepcopy(made)
    hwp.unpack(plain)
    assert type(plain.fc1) is type(plain.fc2) is nn.Linear and type(plain.act) is nn.ReLU
    assert plain.state_dict().keys() == Block().state_dict().keys()
    for linear in (plain.fc1, plain.fc2):
        linear.register_forward_pre_hook(round_rows)
    torch.testing.assert_close(y, plain(x))
    assert str(made.fc1) == "QuantizedLinear(in_features=32, out_features=64, activation=relu, scheme=int8_24)"
    assert made.fc2.choice.op == "quantized_linear" and not made.fc2.executes_sparse


def test_only_what_is_named_or_24_is_rounded():
    made = block()
    assert list(hwp.pack(made, dtype="int8")) == ["fc1"]
    assert type(made.fc2) is nn.Linear
    verdicts = hwp.explain_linears(made)
    assert verdicts["fc1"].startswith("int8 2:4, runs ")
    assert verdicts["fc2"] == "dense: has more than 2 non-zeros in an aligned 4"
    assert list(hwp.pack(made, ["fc2"], dtype="int8")) == ["fc2"]
    assert hwp.explain_linears(made)["fc2"] == f"int8, runs on {made.fc2.choice.backend}"
    assert hwp.pack(made, BOTH, dtype="int8") == {} == hwp.pack(made)


def test_sizes_of_any_kind_go_int8_and_what_cannot_stays():
    model = nn.ModuleDict({"odd": nn.Linear(13, 5), "inf": nn.Linear(16, 8), "tied": nn.Linear(16, 8)})
    model["own"] = nn.Linear(16, 8)
    model["own"].weight_scale = 3.0  # of the user, and no scale
    model["other"] = nn.Linear(16, 8)
    model["other"].weight = model["tied"].weight
    model["nan"] = copy.deepcopy(model["inf"])
    with torch.no_grad():
        model["inf"].weight[0, 0] = torch.inf
        model["nan"].weight[0, 0] = torch.nan
    x = torch.randn(3, 13)
    expected = model["odd"](x)
    assert hwp.explain_linears(model, dtype="int8") == {
        "odd": "dense, but pack makes it int8",
        "inf": "dense: weight has a NaN or an infinity",
        "tied": "dense: weight is shared with other",
        "own": "dense: weight_scale is an attribute of it already",
        "other": "dense: weight is shared with tied",
        "nan": "dense: weight has a NaN or an infinity",
    }
    assert hwp.explain_linears(model)["nan"] == "dense: weight has NaN"
    assert list(hwp.pack(model, list(model), dtype="int8")) == ["odd"]
    torch.testing.assert_close(model["odd"](x), expected, atol=0.05, rtol=0.05)


def test_a_layer_that_was_packed_24_and_cannot_go_int8_says_why():
    made = block()
    hwp.pack(made)
    with torch.no_grad():
        made.fc1.weight[0, 0] = torch.nan
    assert hwp.pack(made, dtype="int8") == {} and made.fc1.scheme == "sparse24"
    assert hwp.explain_linears(made, dtype="int8")["fc1"].endswith("; not int8: weight has a NaN or an infinity")
    with pytest.raises(ValueError, match="dtype must be None or int8 or fp8, got 'int4'"):
        hwp.explain_linears(made, dtype="int4")


def test_a_layer_that_was_packed_24_goes_int8_and_keeps_what_it_took_over():
    made, x = block(), torch.randn(4, 32)
    hwp.pack(made, epilogues={"fc1": Epilogue("act")})
    made.fc1.note, seen = "of the user", []
    made.fc1.register_forward_hook(lambda *_: seen.append(1))
    y = made(x)
    assert hwp.pack(made, dtype="int8") == {"fc1": Epilogue("act")}
    layer = made.fc1
    assert (type(layer), layer.scheme, layer.activation) == (QuantizedLinear, "int8_24", "relu")
    assert layer.note == "of the user"
    torch.testing.assert_close(made(x), y, atol=0.05, rtol=0.05)
    assert len(seen) == 2
    hwp.unpack(made)
    assert type(made.act) is nn.ReLU and made.fc1.note == "of the user"
    torch.testing.assert_close(made(x), y, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("persistent", [False, None])  # None: a plain attribute
def test_scales_of_the_linear_are_those_of_its_weight(persistent):
    made = block()
    scale = made.fc1.weight.detach().abs().amax(1) / 100
    if persistent is None:
        made.fc1.weight_scale = scale
    else:
        made.fc1.register_buffer("weight_scale", scale, persistent=persistent)
    expected = quantize(made.fc1.weight, "int8_24", scale)
    hwp.pack(made, dtype="int8")
    assert torch.equal(made.fc1.weight, expected.values) and torch.equal(made.fc1.weight_scale, scale)
    assert "fc1.weight_scale" in made.state_dict()
    hwp.unpack(made)
    assert torch.equal(made.fc1.weight, expected.to_dense()) and torch.equal(made.fc1.weight_scale, scale)
    assert "fc1.weight_scale" not in made.state_dict()
    hwp.pack(made)  # a 2:4 layer of floats carries them, and they count where that goes int8
    assert type(made.fc1) is Sparse24Linear and torch.equal(made.fc1.weight_scale, scale)
    hwp.pack(made, dtype="int8")
    assert torch.equal(made.fc1.weight, expected.values)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.ones(3), r"weight_scale of fc1: scale must be \(N,\) = \(64,\) on cpu like weight, got float32 \(3,\)"),
        (torch.zeros(64), "weight_scale of fc1: scale must be positive and finite in float32"),
    ],
)
def test_scales_that_cannot_be_are_refused_before_anything_is_packed(scale, message):
    made = block()
    made.fc1.register_buffer("weight_scale", scale, persistent=False)
    with pytest.raises(ValueError, match=message):
        hwp.pack(made, ["fc2", "fc1"], dtype="int8")
    assert type(made.fc2) is nn.Linear


def test_what_is_no_dtype_and_no_linear_is_refused():
    with pytest.raises(ValueError, match="dtype must be None or int8 or fp8, got 'int4'"):
        hwp.pack(block(), dtype="int4")
    with pytest.raises(ValueError, match="names must name Linear modules, got 'act', which is a ReLU"):
        hwp.pack(block(), ["act"], dtype="int8")
    with pytest.raises(ValueError, match="modules must name Linear modules, got 'fc1', which is a QuantizedLinear"):
        hwp.WeightPruner(packed_block(), "2:4", ["fc1"], schedule="one_shot")
    with pytest.raises(ValueError, match="scheme must be one of sparse24, int8, int8_24, fp8, fp8_24, got 'int4'"):
        replace_linear(block(), "fc1", "int4", Epilogue())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded])
def test_copies(copied):
    made, x = packed_block(), torch.randn(4, 32)
    twin, expected = copied(made), made(x)
    assert torch.equal(twin(x), expected)
    assert twin.fc1.quantized_weight.values is twin.fc1.weight
    with torch.no_grad():
        twin.fc2.weight_scale.zero_()
    assert torch.equal(made(x), expected) and not torch.equal(twin(x), expected)
    averaged = AveragedModel(made, use_buffers=True)
    averaged.update_parameters(made)
    assert torch.equal(averaged(x), expected)


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, lambda m: m.to("cpu", torch.bfloat16)])
def test_casts_leave_the_weight_alone_and_unpacking_follows_them(cast):
    made, x = packed_block(), torch.randn(4, 32)
    twin = cast(copy.deepcopy(made))
    dtype = twin.fc1.bias.dtype
    assert dtype in (torch.float16, torch.bfloat16)
    assert all(torch.equal(value, twin.fc1.get_buffer(name)) for name, value in made.fc1.named_buffers())
    y = twin(x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), made(x), atol=0.05, rtol=0.05)
    scale = twin.fc1.weight_scale.clone()
    assert torch.equal(twin.float().half().fc1.weight_scale, scale)  # whose values did not go through 16 bits
    hwp.unpack(twin)
    assert twin.fc1.weight.dtype == twin.fc2.weight.dtype == torch.float16


def test_moves_to_other_devices_take_all_of_it():
    made = packed_block()
    moved = copy.deepcopy(made).to("meta")
    assert {value.device.type for value in (*moved.parameters(), *moved.buffers())} == {"meta"}
    assert moved.fc1.quantized_weight.device.type == "meta"
    back = moved.to_empty(device="cpu")
    back.load_state_dict(made.state_dict())
    x = torch.randn(4, 32)
    assert torch.equal(back(x), made(x))


def test_gradients_pass_to_what_can_be_trained():
    made, x = packed_block(), torch.randn(4, 32, requires_grad=True)
    made(x).square().sum().backward()
    assert x.grad.abs().sum() > 0 and made.fc1.bias.grad.abs().sum() > 0
    assert [name for name, _ in made.named_parameters()] == ["fc1.bias", "fc2.bias"]


def test_hooks_see_the_linear_alone():
    made, x, seen = block(), torch.randn(4, 32), []
    made.fc1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    made.fc2.register_forward_hook(lambda module, inputs, output: seen.append(output))
    hwp.pack(made, BOTH, epilogues={"fc1": Epilogue("act")}, dtype="int8")
    assert made.fc1.activation is None
    y = made(x)
    torch.testing.assert_close(x + seen[1], y)
    assert (seen[0] < 0).any()


def test_residuals_of_every_shape_and_of_a_wider_type():
    layer = packed_block().fc2
    for shape in ((64,), (0, 64), (2, 3, 64)):
        x = torch.randn(shape)
        residual = torch.randn(*shape[:-1], 32)
        torch.testing.assert_close(layer(x, residual), layer(x) + residual)
    y = layer.bfloat16()(torch.randn(3, 64, dtype=torch.bfloat16), torch.randn(3, 32))
    assert y.dtype == torch.float32
    with pytest.raises(ValueError, match=r"x must be of 64 channels like weight, got bfloat16 \(1, 16\)"):
        layer(torch.ones(16, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("fc1.weight", lambda v: torch.full_like(v, -128), r"fc1.weight.values must be from -127 to 127, got -128"),
        ("fc1.weight_indices", torch.zeros_like, "fc1.weight.indices must be two ascending columns for every group"),
        ("fc1.weight_scale", torch.zeros_like, "fc1.weight.scale must be positive and finite, got 0.0 at row 0"),
        ("fc2.weight_scale", torch.neg, "fc2.weight.scale must be positive and finite, got -"),
        ("fc2.weight_scale", lambda v: v * torch.nan, "fc2.weight.scale must be positive and finite, got nan"),
        ("fc2.weight_scale", torch.Tensor.half, "fc2.weight_scale must be float32 for a layer of int8, got float16"),
        ("fc2.weight", torch.Tensor.float, "fc2.weight must be int8 for a layer of int8, got float32"),
        ("fc2.weight", lambda v: v[:, :32], "size mismatch for fc2.weight"),
    ],
)
def test_states_that_no_kernel_may_read_are_refused(name, change, message):
    made, x = packed_block(), torch.randn(4, 32)
    state, expected = made.state_dict(), made(x)
    with pytest.raises(RuntimeError, match=message):
        made.load_state_dict(state | {name: change(state[name])})
    assert torch.equal(made(x), expected)
    del state[name]
    with pytest.raises(RuntimeError, match=f'Missing key.* "{name}"'):
        made.load_state_dict(state)


def test_states_of_plain_linears_are_refused():
    """Those of a dense int8 layer have the shape of a plain one's: torch would cast them."""
    made = packed_block()
    with pytest.raises(RuntimeError, match="fc2.weight must be int8 for a layer of int8, got float32"):
        made.load_state_dict(block().state_dict(), strict=False)


def test_what_is_exported_is_the_layer():
    made, x = packed_block(), torch.randn(4, 32)
    exported = torch.export.export(made, (x,)).module()
    assert torch.equal(exported(x), made(x))


@pytest.mark.parametrize("made", [packed_block, packed_24])
def test_what_is_loaded_into_a_compiled_layer_is_what_it_computes(made):
    layers, other, x = made(), made(), torch.randn(4, 32)
    compiled = torch.compile(layers, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layers(x))
        layers.load_state_dict(other.state_dict())
        torch.testing.assert_close(compiled(x), other(x))


def test_a_file_of_int8_weights_is_the_state_of_its_layers(tmp_path):
    made, other, x = packed_block(), packed_block(), torch.randn(4, 32)
    layers = {name: made.get_submodule(name) for name in BOTH}
    weights = {name: layer.quantized_weight for name, layer in layers.items()}
    save_quantized(tmp_path / "w.safetensors", weights | {f"{name}.bias": layer.bias for name, layer in layers.items()})
    other.load_state_dict(load_file(tmp_path / "w.safetensors"))
    assert torch.equal(other(x), made(x))


@pytest.mark.skipif(dispatch.extension_unsupported_reason() is not None, reason="no C++ extension")
def test_a_layer_says_what_was_measured_of_it(monkeypatch, tmp_path):
    def time_backends(case, backends):
        return Timing({"cpu": 10.0, "dense": 5.0}, "2026-01-02")

    monkeypatch.setenv("MADTP_TUNE", "on")
    monkeypatch.setenv("MADTP_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning_cpu, "time_backends", time_backends)
    tuning_cpu.measurements.forget()
    made, x = packed_block(), torch.randn(4, 32)
    expected = copy.deepcopy(made)
    monkeypatch.setenv("MADTP_BACKEND", "cpu")
    expected = expected(x)
    monkeypatch.delenv("MADTP_BACKEND")
    assert torch.equal(made(x), expected)
    choice = made.fc1.choice
    assert choice.backend == "dense" and "(4 rows, 32 to 64, float32, relu" in choice.reason
    assert "cpu 10.0 us, dense 5.0 us" in choice.reason and not made.fc1.executes_sparse
    assert hwp.explain_linears(made)["fc1"] == "int8 2:4, runs dense: faster, or all there is"
    assert made.fc2.choice.backend == "cpu"  # not 2:4
    tuning_cpu.measurements.forget()
