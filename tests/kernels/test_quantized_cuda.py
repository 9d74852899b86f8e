# SPDX-License-Identifier: Apache-2.0
"""Quantised 2:4 layers on Sparse Tensor Cores: who runs them, with pretended GPUs, and on one the reference's bits."""

import math

import pytest
import torch
from fp8_cases import assert_within_rule
from sparse24_cases import dense24
from sparse24_cases import epilogue as arguments

import madtp_kernels as mk
from madtp_kernels import dispatch, quantize
from madtp_kernels.native import quantized as native
from madtp_kernels.reference import quantized as reference

GPU = torch.device("cuda", 0)
SCHEMES = ("int8_24", "fp8_24")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = [(0, 8, 16), (1, 8, 16), (7, 24, 48), (65, 136, 144), (130, 264, 1168)]


@pytest.fixture
def pretended(monkeypatch):
    """A GPU of a capability, and kernels of ours that were built for some architectures."""

    def pretend(capability, archs):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(dispatch, "_build_archs", lambda: archs)
        monkeypatch.setattr(dispatch, "cuda_unsupported_reason", lambda device: None)
        monkeypatch.setitem(dispatch._BACKEND_UNSUPPORTED_REASONS, "cuda", lambda device: None)

    return pretend


def choose(scheme, backend=None, dtype=torch.bfloat16):
    return dispatch.choose("quantized_linear", backend, dtype, GPU, (), scheme)


def test_a_gpu_runs_cuda_where_it_can(pretended):
    pretended((9, 0), ["80", "90a"])
    for scheme in SCHEMES:
        for dtype in DTYPES:
            assert choose(scheme, dtype=dtype).backend == "cuda"
    for scheme in ("int8", "fp8"):
        assert choose(scheme).backend == "dense"
        assert choose(scheme).rejected["cuda"] == f"cuda multiplies by weights of int8_24 and fp8_24, not {scheme}"
    for capability, archs in (((9, 0), ["80"]), ((8, 9), ["80", "90a"])):
        pretended(capability, archs)
        assert choose("int8_24").backend == "cuda"
        assert choose("fp8_24").backend == "dense"
        with pytest.raises(RuntimeError, match="fp8_24 needs code for sm_90a, and the GPU runs that for sm_80"):
            choose("fp8_24", "cuda")


def test_a_dense_weight_has_no_layout_for_cuda():
    weight = quantize(torch.randn(8, 16), "int8")
    with pytest.raises(ValueError, match="weight must be of scheme int8_24 or fp8_24 for cuda, got int8"):
        weight.layout("cuda")


def test_a_layout_is_asked_for_its_size(monkeypatch):
    monkeypatch.setattr(native, "quantized_layout_bytes_cuda", lambda out_features, in_features: 64 * 80)
    weight = quantize(dense24(8, 16), "int8_24")
    layout = torch.zeros(64 * 80, dtype=torch.uint8)
    check = dispatch.record("quantized_linear").layout_checks["cuda"]
    assert check(layout, weight.values, weight.indices) is layout
    with pytest.raises(ValueError, match=r"layout must be contiguous uint8 of shape \(5120,\)"):
        check(layout[1:], weight.values, weight.indices)


# --- on a GPU

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
gpu = lambda test: on_gpu[0](on_gpu[1](test))  # noqa: E731


def skip_without(scheme):
    why = dispatch.unsupported_reason("quantized_linear", "cuda", torch.bfloat16, GPU, (), scheme)
    if why is not None:
        pytest.skip(why)


def draw(rows, in_features, dtype):
    x = torch.randn(rows, in_features, generator=torch.Generator().manual_seed(rows)).to(dtype)
    if rows > 2:
        x[1], x[2, 3] = 0, math.nan
    return x


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_are_those_of_the_reference(scheme, dtype):
    skip_without(scheme)
    grid = reference.FP8 if scheme == "fp8_24" else reference.INT8
    for rows, _, in_features in SIZES:
        x = draw(rows, in_features, dtype)
        expected, scale = reference.quantize_rows(x, grid)
        got, got_scale = native.quantize_rows_cuda(x.cuda(), grid.dtype)
        assert torch.equal(got.cpu().view(torch.uint8), expected.view(torch.uint8))
        torch.testing.assert_close(got_scale.cpu(), scale, rtol=0, atol=0, equal_nan=True)


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_every_configuration(scheme, dtype, activation):
    skip_without(scheme)
    for rows, out_features, in_features in SIZES:
        weight, x = quantize(dense24(out_features, in_features, seed=1), scheme), draw(rows, in_features, dtype)
        rest = arguments(rows, out_features, dtype, torch.float32)
        num_rows = torch.tensor(rows // 2 + 1, dtype=torch.int32)
        expected = mk.quantized_linear(x, weight, activation=activation, **rest, num_rows=num_rows, backend="reference")
        moved, on_device = weight.to("cuda"), {name: part.cuda() for name, part in rest.items()}
        names = ("bias", "residual", "scale")
        bias, residual, scale = (on_device.get(name) for name in names)
        parts = x.cuda(), moved.values, moved.indices, moved.scale, moved.layout("cuda"), bias, activation or "none"
        call = *parts, residual, scale, num_rows.cuda()
        for config in (None, *native.quantized_linear_configs(*call)):
            got = native.quantized_linear_cuda(*call, config).cpu()
            if scheme == "int8_24" and activation != "gelu":
                torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
            else:
                assert torch.equal(got.isnan(), expected.isnan())
                finite = ~expected.isnan()
                bound = {torch.float32: 1e-2, torch.bfloat16: 3e-2, torch.float16: 1e-2}[dtype]
                torch.testing.assert_close(got[finite], expected[finite], rtol=bound, atol=bound)


@gpu
def test_fp8_sums_are_within_the_rule():
    skip_without("fp8_24")
    for rows, out_features, in_features in SIZES:
        weight = quantize(dense24(out_features, in_features, seed=1), "fp8_24")
        x = torch.randn(rows, in_features, generator=torch.Generator().manual_seed(rows))
        got = mk.quantized_linear(x.cuda(), weight.to("cuda"), backend="cuda").cpu()
        assert_within_rule(got, x, weight)
