# SPDX-License-Identifier: Apache-2.0
"""Products of int8 and fp8 by torch, which `dense` runs on a GPU: here on CPU tensors, with pretended devices, and on a
GPU where there is one."""

import pytest
import torch
from fp8_cases import assert_within_rule, bits
from sparse24_cases import dense24
from sparse24_cases import epilogue as arguments

import madtp_kernels as mk
from madtp_kernels import dispatch, quantize
from madtp_kernels.ops import quantized
from madtp_kernels.quantized import torch_product
from madtp_kernels.reference.quantized import to_dense_values

GPU = torch.device("cuda", 0)
SCHEMES = ("int8", "int8_24", "fp8", "fp8_24")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weight_of(out_features, in_features, scheme):
    if scheme.endswith("24"):
        return quantize(dense24(out_features, in_features, seed=1), scheme)
    generator = torch.Generator().manual_seed(1)
    return quantize(torch.randn(out_features, in_features, generator=generator), scheme)


def run(x, weight, layout=None, bias=None, activation="none", residual=None, scale=None, num_rows=None):
    parts = weight.values, weight.indices, weight.scale
    return torch_product.quantized_linear(x, *parts, layout, bias, activation, residual, scale, num_rows)


@pytest.fixture
def strict(monkeypatch):
    """The rules of torch's products on a GPU, which CPUs do not have."""
    int_mm, scaled_mm = torch._int_mm, torch._scaled_mm

    def strict_int_mm(a, b):
        assert a.shape[0] > 16 and a.shape[1] > 0 and a.shape[1] % 8 == 0 and b.shape[1] % 8 == 0
        assert a.is_contiguous() and b.t().is_contiguous()
        return int_mm(a, b)

    def strict_scaled_mm(a, b, *, scale_a, scale_b, out_dtype):
        assert a.shape[0] > 0 and a.shape[1] > 0 and a.shape[1] % 16 == 0 and b.shape[1] % 16 == 0
        assert a.is_contiguous() and b.t().is_contiguous() and scale_a.numel() == scale_b.numel() == 1
        return scaled_mm(a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=out_dtype)

    monkeypatch.setattr(torch, "_int_mm", strict_int_mm)
    monkeypatch.setattr(torch, "_scaled_mm", strict_scaled_mm)


SIZES = [(0, 8, 16), (1, 8, 16), (7, 24, 48), (45, 264, 208), (17, 40, 144)]
ODD = [(1, 1, 1), (5, 13, 7), (20, 9, 30), (33, 17, 133)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES[:2])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_int8_has_the_bits_of_the_reference(strict, scheme, dtype, activation):
    for rows, out_features, in_features in SIZES + (ODD if scheme == "int8" else []):
        weight = weight_of(out_features, in_features, scheme)
        x, rest = torch.randn(rows, in_features).to(dtype), arguments(rows, out_features, dtype, torch.float32)
        layout = torch_product.pack(weight.values, weight.indices)
        for options in ({}, rest, {**rest, "num_rows": torch.tensor(rows // 2, dtype=torch.int32)}):
            expected = mk.quantized_linear(x, weight, activation=activation, **options, backend="reference")
            for kept in (None, layout):
                got = run(x, weight, kept, activation=activation, **options)
                assert got.dtype == dtype and torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES[2:])
def test_fp8_is_the_reference_up_to_the_order_of_sums(strict, scheme, dtype):
    for rows, out_features, in_features in SIZES + (ODD if scheme == "fp8" else []):
        weight = weight_of(out_features, in_features, scheme)
        x, rest = torch.randn(rows, in_features).to(dtype), arguments(rows, out_features, dtype, torch.float32)
        if rows > 2:
            x[2] = 0
        layout = torch_product.pack(weight.values, weight.indices)
        assert_within_rule(run(x.float(), weight, layout), x.float(), weight, run=32)
        expected = mk.quantized_linear(x, weight, activation="gelu", **rest, backend="reference")
        eps = torch.finfo(dtype).eps * 4
        torch.testing.assert_close(run(x, weight, layout, activation="gelu", **rest), expected, rtol=eps, atol=8 * eps)


def test_rows_that_cannot_be_scaled(strict):
    for scheme in ("int8", "fp8"):
        weight, x, bias = weight_of(24, 32, scheme), torch.randn(6, 32), torch.randn(24)
        x[1, 3], x[2, 31], x[3], x[4] = torch.nan, torch.inf, 0.0, 1e-37
        y = run(x, weight, bias=bias)
        assert y[1:3].isnan().all() and torch.equal(y[3:5], bias.expand(2, 24)) and y[[0, 5]].isfinite().all()


def test_what_is_packed_is_the_dense_weight_with_zeros():
    for scheme in SCHEMES:
        weight = weight_of(24, 48, scheme)
        packed = torch_product.pack(weight.values, weight.indices)
        assert packed.dtype == weight.dtype and packed.shape == (32, 48) and packed.is_contiguous()
        dense = to_dense_values(weight.values, weight.indices)
        assert torch.equal(bits(packed)[:24], bits(dense)) and not bits(packed)[24:].any()
        assert torch_product.check_layout(packed, weight.values, (24, 48)) is packed
        with pytest.raises(ValueError, match=r"layout must be the dense weight, contiguous .* of shape \(32, 48\)"):
            torch_product.check_layout(packed[:-1], weight.values, (24, 48))
    with pytest.raises(ValueError, match="layout must be the dense weight, contiguous torch.float8_e4m3fn"):
        torch_product.check_layout(packed.view(torch.int8), weight.values, (24, 48))


# --- who runs it


@pytest.fixture
def pretended(monkeypatch):
    """A GPU of a capability, without kernels of ours."""

    def pretend(capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(dispatch, "extension_unsupported_reason", lambda: "it is not there")
        monkeypatch.setattr(dispatch, "_missing_triton", lambda: "triton cannot be imported")

    return pretend


@pytest.mark.parametrize(
    ("capability", "int8", "fp8"),
    [
        ((7, 5), "needs compute capability 8.0 or newer", "needs compute capability 8.9 or newer"),
        ((8, 0), None, "needs compute capability 8.9 or newer, got (8, 0)"),
        ((8, 9), None, None),
        ((9, 0), None, None),
    ],
)
def test_a_gpu_runs_dense_where_it_can(pretended, capability, int8, fp8):
    pretended(capability)
    for scheme, why in zip(SCHEMES, (int8, int8, fp8, fp8), strict=True):
        for dtype in DTYPES:
            choice = dispatch.choose("quantized_linear", None, dtype, GPU, (), scheme)
            assert choice.backend == ("dense" if why is None else "reference")
            assert dispatch.backend_name("quantized_linear", None, dtype, GPU, (), scheme) == choice.backend
            assert choice.rejected["cpu"] == "the tensors are on cuda"
            if why is None:
                assert f"with {scheme} weights on cuda" in choice.reason
            else:
                assert why in choice.rejected["dense"]
                with pytest.raises(RuntimeError, match="cannot run on backend 'dense'.*compute capability"):
                    dispatch.choose("quantized_linear", "dense", dtype, GPU, (), scheme)


def test_other_devices_run_the_reference(pretended, monkeypatch):
    pretended((9, 0))
    reason = lambda device, scheme: dispatch.unsupported_reason(  # noqa: E731
        "quantized_linear", "dense", torch.float32, torch.device(device), (), scheme
    )
    assert reason("cpu", "int8") == "it is not there"
    assert reason("xpu", "fp8") == "the tensors are on xpu"
    assert dispatch.backend_name("quantized_linear", None, torch.float32, torch.device("xpu"), (), "fp8") == "reference"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "NVIDIA GPUs alone" in reason("cuda", "int8")


def test_layouts_are_those_of_the_device():
    values = torch.zeros(24, 32, dtype=torch.int8, device="meta")  # stands for any device but a CPU
    weight = mk.QuantizedWeight(values, torch.ones(24, device="meta"))
    layout = weight.layout("dense")
    assert layout.dtype == torch.int8 and layout.shape == (32, 32) and weight.layout("dense") is layout
    assert quantized._check_dense_layout(layout, values, None) is layout
    with pytest.raises(ValueError, match="layout must be the dense weight"):
        quantized._check_dense_layout(layout[:24], values, None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu(scheme, dtype):
    if scheme.startswith("fp8") and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8 before sm_89")
    for rows, out_features, in_features in SIZES + (ODD if not scheme.endswith("24") else []):
        weight = weight_of(out_features, in_features, scheme)
        x, rest = torch.randn(rows, in_features).to(dtype), arguments(rows, out_features, dtype, torch.float32)
        moved, on_gpu = weight.to("cuda"), {name: part.cuda() for name, part in rest.items()}
        got = mk.quantized_linear(x.cuda(), moved, activation="relu", **on_gpu, backend="dense").cpu()
        expected = mk.quantized_linear(x, weight, activation="relu", **rest, backend="reference")
        if scheme.startswith("int8"):
            assert torch.equal(got, expected)
        else:
            eps = torch.finfo(dtype).eps + 2.0**-13 * in_features**0.5
            torch.testing.assert_close(got, expected, rtol=eps, atol=8 * eps * max(1.0, expected.abs().max().item()))
            plain = mk.quantized_linear(x.float().cuda(), moved, backend="dense").cpu()
            assert_within_rule(plain, x.float(), weight)
        run = torch.compile(lambda x, moved=moved: mk.quantized_linear(x, moved, backend="dense"), fullgraph=True)
        assert torch.equal(run(x.cuda()), mk.quantized_linear(x.cuda(), moved, backend="dense"))
