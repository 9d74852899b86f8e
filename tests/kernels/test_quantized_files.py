# SPDX-License-Identifier: Apache-2.0
"""Weights of 8 bits on disk: the names in the file, and which weights are refused. The rest is in test_weight_files."""

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from sparse24_cases import dense24

from madtp_kernels import (
    QuantizedWeight,
    load_quantized,
    quantize,
    save_quantized,
    weight_files,
)
from madtp_kernels.quantized import files


def mixed():
    generator = torch.Generator().manual_seed(0)
    return {
        "fc1": quantize(dense24(16, 32)),
        "fc2": quantize(torch.randn(5, 7, generator=generator), "int8"),
        "fc1.bias": torch.arange(16.0),
        "none": torch.empty(0, 4),
    }


@pytest.fixture
def saved(tmp_path):
    save_quantized(tmp_path / "w.safetensors", mixed())
    return tmp_path / "w.safetensors"


def test_names(saved):
    found = load_quantized(saved)
    assert {name: found[name].scheme for name in ("fc1", "fc2")} == {"fc1": "int8_24", "fc2": "int8"}
    assert all(map(torch.equal, found["fc2"]._parts(), mixed()["fc2"]._parts()))
    stored = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in load_file(saved).items()}
    assert stored == {
        "fc1.weight": (torch.int8, (16, 16)),
        "fc1.weight_indices": (torch.uint8, (16, 4)),
        "fc1.weight_scale": (torch.float32, (16,)),
        "fc2.weight": (torch.int8, (5, 7)),
        "fc2.weight_scale": (torch.float32, (5,)),
        "fc1.bias": (torch.float32, (16,)),
        "none": (torch.float32, (0, 4)),
    }
    with safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["version"]) == ("madtp-quantized", "1")
    assert json.loads(metadata["quantized"]) == {"fc1": "int8_24", "fc2": "int8"}


def test_size_on_disk(tmp_path):
    dense = dense24(256, 512)
    for scheme, share in (("int8", 0.25), ("int8_24", 0.16)):
        save_quantized(tmp_path / scheme, {"weight": quantize(dense, scheme)})
        assert (tmp_path / scheme).stat().st_size <= (share + 0.01) * dense.nbytes


def at(index, value):
    def changed(tensor):
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return changed


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        *(
            ("fc2.weight_scale", at(3, value), f"fc2: weight.scale must be positive and finite, got {value} at row 3")
            for value in (0.0, -1.0, math.nan, math.inf)
        ),
        ("fc1.weight", at((1, 2), -128), "fc1: weight.values must be from -127 to 127, got -128"),
        ("fc1.weight_indices", at((1, 0), 0), "fc1: weight.indices must be two ascending columns for every group"),
        ("fc1.weight", torch.Tensor.float, "fc1: values must be a 2-dimensional tensor of int8"),
        ("fc1.weight", lambda t: t[:, :8], r"fc1: indices must be \(N, C/8\) = \(16, 2\)"),
        ("fc1.weight_indices", lambda t: t[:8], r"fc1: indices must be \(N, C/8\) = \(16, 4\)"),
        ("fc2.weight_scale", lambda t: t[1:], r"fc2: scale must be \(N,\) = \(5,\)"),
        ("fc2.weight_scale", torch.Tensor.half, "fc2: scale must be a 1-dimensional tensor of float32"),
        (
            "fc1.weight_indices",
            None,
            "fc1 must be int8_24, weight, weight_scale, weight_indices, got weight, weight_sc",
        ),
        ("fc2.weight_scale", None, "fc2 must be int8, weight, weight_scale, got weight$"),
        (
            "fc2.weight_indices",
            torch.ones,
            "fc2 must be int8, weight, weight_scale, got weight, weight_scale, weight_i",
        ),
    ],
)
def test_weights_that_cannot_be_are_refused(saved, name, change, message):
    tensors, schemes = load_file(saved), {"fc1": "int8_24", "fc2": "int8"}
    before = tensors.pop(name, 3)
    if change is not None:
        tensors[name] = change(before)
    weight_files.write(saved, files.KIND, files.VERSION, schemes, tensors)
    with pytest.raises(ValueError, match=f"w.safetensors: {message}") as refused:
        load_quantized(saved)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("schemes", [{"fc1": "int4"}, {"fc1": ["int8"]}, ["fc1"], None])
def test_schemes_that_are_none(saved, schemes):
    weight_files.write(saved, files.KIND, files.VERSION, schemes, load_file(saved))
    with pytest.raises(
        ValueError, match="path must be a file of weights that are int8 or int8_24 or fp8 or fp8_24, got .*w.safe"
    ):
        load_quantized(saved)


def negative():
    weight = quantize(torch.ones(8, 16), "int8")
    weight.scale[2] = -1
    return weight


def on_meta():
    return QuantizedWeight(torch.ones(8, 16, dtype=torch.int8, device="meta"), torch.ones(8, device="meta"))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": negative()}, r"weights\['a'\].scale must be positive and finite, got -1.0 at row 2"),
        ({"a": on_meta()}, r"weights\['a'\] must be strided and not on meta, got int8 \(8, 16\)"),
    ],
)
def test_save_refuses_and_leaves_what_was_there(saved, weights, message):
    before = saved.read_bytes()
    with pytest.raises(ValueError, match=message):
        save_quantized(saved, weights)
    assert saved.read_bytes() == before and [path.name for path in saved.parent.iterdir()] == ["w.safetensors"]


# --- fp8


@pytest.fixture
def saved_fp8(tmp_path):
    generator = torch.Generator().manual_seed(0)
    weights = {
        "fc1": quantize(dense24(16, 32), "fp8_24"),
        "fc2": quantize(torch.randn(5, 7, generator=generator), "fp8"),
    }
    save_quantized(tmp_path / "w.safetensors", weights)
    return tmp_path / "w.safetensors", weights


def test_fp8_is_saved_and_loaded(saved_fp8):
    path, weights = saved_fp8
    found = load_quantized(path)
    assert {name: weight.scheme for name, weight in found.items()} == {"fc1": "fp8_24", "fc2": "fp8"}
    for name, weight in weights.items():
        for part, loaded in zip(weight._parts(), found[name]._parts(), strict=True):
            assert loaded.dtype == part.dtype and torch.equal(loaded.view(torch.uint8), part.view(torch.uint8))
    stored = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in load_file(path).items()}
    assert stored["fc1.weight"] == (torch.float8_e4m3fn, (16, 16))
    assert stored["fc2.weight"] == (torch.float8_e4m3fn, (5, 7))


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_a_file_with_nan_in_fp8_is_refused(saved_fp8, byte):
    path, weights = saved_fp8
    tensors = load_file(path)
    tensors["fc2.weight"].view(torch.uint8)[3, 1] = byte
    weight_files.write(path, files.KIND, files.VERSION, {name: w.scheme for name, w in weights.items()}, tensors)
    with pytest.raises(ValueError, match="fc2: weight.values must be from -448 to 448, got a NaN at row 3$"):
        load_quantized(path)
    weights["fc2"].values.view(torch.uint8)[3, 1] = byte
    with pytest.raises(ValueError, match=r"weights\['fc2'\].values must be from -448 to 448, got a NaN at row 3$"):
        save_quantized(path, weights)


@pytest.mark.parametrize(("name", "claimed"), [("fc1", "int8_24"), ("fc2", "int8")])
def test_a_scheme_of_other_values_is_refused(saved_fp8, name, claimed):
    path, weights = saved_fp8
    tensors, of = load_file(path), {name: weight.scheme for name, weight in weights.items()}
    weight_files.write(path, files.KIND, files.VERSION, {**of, name: claimed}, tensors)
    with pytest.raises(ValueError, match=f"{name}: values must be those of {claimed}, got float8_e4m3fn"):
        load_quantized(path)


def test_a_reader_that_knows_no_fp8_says_so(saved_fp8, monkeypatch):
    monkeypatch.setattr(files, "SCHEMES", ("int8", "int8_24"))
    with pytest.raises(ValueError, match="path must be a file of weights that are int8 or int8_24, got .* 'fp8'"):
        load_quantized(saved_fp8[0])
