# SPDX-License-Identifier: Apache-2.0
"""Backend `cusparselt` of `sparse24_linear`: what torch is handed, with its part faked; a GPU runs it for real."""

import copy

import pytest
import torch
from sparse24_cases import dense24
from torch.nn import functional as F

import madtp_kernels as mk
from madtp_kernels import dispatch, sparse24_compress
from madtp_kernels.reference.sparse24 import sparse24_to_dense
from madtp_kernels.sparse24 import backend_cusparselt as cusparselt

ACTIVATIONS = [None, "gelu", "gelu_tanh", "quick_gelu", "relu"]
GPU = torch.device("cuda", 0)
SHAPES = [(1, 8, 16), (7, 24, 48), (8, 64, 64), (45, 264, 208)]


class Library:
    """torch's functions for cuSPARSELt with their rules. A row: kept values, then their columns, then, as small weights
    have it, nothing."""

    def __init__(self):
        self.calls = []

    def compress(self, dense):
        rows, columns = dense.shape
        assert rows % 16 == 0 and columns % 16 == 0 and dense.numel() and dense.is_contiguous()
        assert dense.dtype in (torch.bfloat16, torch.float16)
        weight = sparse24_compress(dense)
        compressed = torch.cat([weight.values, weight.indices.view(dense.dtype)], dim=1)
        return F.pad(compressed, (0, -compressed.shape[1] % 8), value=torch.nan)

    def sparse_mm(self, compressed, x_t, bias=None, *, transpose_result, alg_id, split_k, split_k_mode):
        in_features, rows = x_t.shape
        assert in_features % 16 == 0 and rows % 8 == 0 and x_t.t().is_contiguous() and x_t.data_ptr() % 16 == 0
        assert compressed.dtype == x_t.dtype and compressed.shape[1] * 16 >= in_features * 9
        values, indices, _ = compressed.tensor_split([in_features // 2, in_features * 9 // 16], dim=1)
        indices = indices.contiguous().view(torch.uint8)
        out = sparse24_to_dense(values, indices).float() @ x_t.float()
        if bias is not None:
            assert bias.dtype == x_t.dtype and bias.shape == (compressed.shape[0],) and bias.data_ptr() % 16 == 0
            out += bias.float()[:, None]
        self.calls.append((rows, compressed.shape[0], bias is not None, (alg_id, split_k, split_k_mode)))
        assert transpose_result
        return out.t().to(x_t.dtype).contiguous()


@pytest.fixture
def library(monkeypatch):
    fake = Library()
    monkeypatch.setattr(torch, "_cslt_compress", fake.compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", fake.sparse_mm)
    monkeypatch.setitem(dispatch._BACKEND_UNSUPPORTED_REASONS, "cusparselt", lambda device: None)
    return fake


def draw(*shape, dtype, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def epilogue(rows, out_features, dtype, affine, device="cpu"):
    return {
        "bias": draw(out_features, dtype=affine, device=device, seed=1),
        "residual": draw(rows, out_features, dtype=dtype, device=device, seed=2),
        "scale": draw(out_features, dtype=affine, device=device, seed=3),
    }


def assert_close_to_exact(rows, out_features, in_features, dtype, affine, activation, names, device="cpu"):
    """Within one rounding of the product, and one of the result, of float64."""
    x = draw(rows, in_features, dtype=dtype, device=device)
    weight = sparse24_compress(dense24(out_features, in_features).to(device, dtype))
    given = {name: t for name, t in epilogue(rows, out_features, dtype, affine, device).items() if name in names}
    double = {name: t.double() for name, t in given.items()}
    got = mk.sparse24_linear(x, weight, activation=activation, **given, backend="cusparselt")
    exact = mk.sparse24_linear(x.double(), weight.to(torch.float64), activation=activation, **double)
    product = mk.sparse24_linear(x.double(), weight.to(torch.float64), double.get("bias"))
    size = product.abs() * (double["scale"].abs() if "scale" in double else 1)
    size = torch.maximum(size, exact.abs()).max()
    assert got.dtype == dtype and got.shape == (rows, out_features) and got.is_contiguous()
    assert (got.double() - exact).abs().max() <= 1.5 * torch.finfo(dtype).eps * size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [False, True], ids=["own", "float32"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_against_float64(library, dtype, wide, activation):
    affine = torch.float32 if wide else dtype
    for shape in SHAPES:
        for names in ((), ("bias",), ("bias", "residual"), ("scale",), ("bias", "scale", "residual")):
            assert_close_to_exact(*shape, dtype, affine, activation, names)
    fused = {bias for _, _, bias, _ in library.calls}
    assert fused == ({False} if wide else {False, True})  # a bias of another dtype is added in torch


def test_rows_and_features_are_filled_up(library):
    weight = sparse24_compress(dense24(24, 32).bfloat16())
    for rows in (1, 8, 9):
        mk.sparse24_linear(draw(rows, 32, dtype=torch.bfloat16), weight, backend="cusparselt")
    assert [call[:2] for call in library.calls] == [(8, 32), (8, 32), (16, 32)]
    assert weight.layout("cusparselt") is weight.layout("cusparselt")
    assert cusparselt.min_layout_shape(24, 32) == (32, 18) and weight.layout("cusparselt").shape == (32, 24)


def test_num_rows_empty_and_views(library):
    weight, rest = sparse24_compress(dense24(24, 32).half()), epilogue(20, 24, torch.float16, torch.float16)
    x = draw(20, 32, dtype=torch.float16)
    run = lambda x, **changes: mk.sparse24_linear(  # noqa: E731
        x, weight, activation="gelu", backend="cusparselt", **(rest | changes)
    )
    full, broken = run(x), x.clone()
    broken[13:] = torch.nan
    out = run(broken, num_rows=torch.tensor(13, dtype=torch.int32))
    assert torch.equal(out[:13], full[:13]) and (out[13:] == 0).all()
    assert torch.equal(run(x.repeat_interleave(2, 0)[::2]), full)
    odd = torch.zeros(24, 33).half()
    odd[:20, 1:] = x
    assert torch.equal(run(odd[:20, 1:]), full)
    assert torch.equal(run(odd[:16, 1:], residual=rest["residual"][:16]), full[:16])
    before = len(library.calls)
    assert mk.sparse24_linear(x[:0], weight, backend="cusparselt").shape == (0, 24)
    nothing = mk.Sparse24Weight(torch.zeros(24, 0).half(), torch.zeros(24, 0, dtype=torch.uint8))
    bias = rest["bias"]
    assert torch.equal(mk.sparse24_linear(x[:, :0], nothing, bias, backend="cusparselt"), bias.expand(20, 24))
    assert len(library.calls) == before


def test_gradients_are_those_of_the_reference(library):
    weight = sparse24_compress(dense24(24, 32).bfloat16())
    inputs = [draw(9, 32, dtype=torch.bfloat16), *epilogue(9, 24, torch.bfloat16, torch.float32).values()]
    inputs = [t.requires_grad_() for t in inputs]

    def gradients(backend):
        x, bias, residual, scale = inputs
        options = {"activation": "gelu", "residual": residual, "scale": scale, "backend": backend}
        return torch.autograd.grad(mk.sparse24_linear(x, weight, bias, **options).sum(), inputs)

    for got, expected in zip(gradients("cusparselt"), gradients("reference"), strict=True):
        assert torch.equal(got, expected)


def test_the_gradient_through_a_kept_transpose(library):
    dense = dense24(32, 48)
    dense = dense.masked_fill(~mk.transposable_mask(dense), 0).bfloat16()
    plain, kept = sparse24_compress(dense), sparse24_compress(dense).keep_transposed()
    x = draw(9, 48, dtype=torch.bfloat16).requires_grad_()
    seed = draw(9, 32, dtype=torch.bfloat16, seed=1)
    out = mk.sparse24_linear(x, kept, backend="cusparselt")
    (got,) = torch.autograd.grad(out, x, seed)
    assert [call[:2] for call in library.calls] == [(16, 32), (16, 48)]  # W, then W^T
    (expected,) = torch.autograd.grad(mk.sparse24_linear(x, plain, backend="reference"), x, seed)
    torch.testing.assert_close(got, expected, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-6)


def test_copies_pack_again_and_layouts_are_checked(library):
    weight, x = sparse24_compress(dense24(24, 32).half()), draw(5, 32, dtype=torch.float16)
    expected = mk.sparse24_linear(x, weight, backend="cusparselt")
    assert torch.equal(mk.sparse24_linear(x, copy.deepcopy(weight), backend="cusparselt"), expected)
    rest = (None, "none", None, None, None, "cusparselt")
    assert torch.equal(torch.ops.madtp.sparse24_linear(x, weight.values, weight.indices, None, *rest), expected)
    right = weight.layout("cusparselt")
    rule = r"layout must be contiguous torch.float16 of shape \(32, 18 or more\), from cuSPARSELt, got"
    for layout in (right[:8], right[:, :18], right[:, :17].contiguous(), right.flatten(), right.bfloat16()):
        with pytest.raises(ValueError, match=rule):
            torch.ops.madtp.sparse24_linear(x, weight.values, weight.indices, layout, *rest)
    weight.values.mul_(2)
    assert torch.equal(mk.sparse24_linear(x, weight, backend="cusparselt"), 2 * expected)


def test_where_it_cannot_run(monkeypatch):
    weight, x = sparse24_compress(dense24(24, 32).half()), draw(5, 32, dtype=torch.float16)
    with pytest.raises(RuntimeError, match=r"'cusparselt' \(from backend=\): the tensors are on cpu; auto would run"):
        mk.sparse24_linear(x, weight, backend="cusparselt")
    assert mk.explain("sparse24_linear", x, weight).rejected["cusparselt"] == "the tensors are on cpu"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    choose = lambda dtype=torch.half: dispatch.choose("sparse24_linear", "cusparselt", dtype, GPU)  # noqa: E731
    for available, why in ((False, "was built without cuSPARSELt"), (True, r"capability 8.0 or newer, got \(7, 5\)")):
        monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda available=available: available)
        with pytest.raises(RuntimeError, match=why):
            choose()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose().backend == "cusparselt"
    with pytest.raises(RuntimeError, match="Sparse Tensor Cores take bfloat16 and float16"):
        choose(torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_on_a_gpu(dtype, activation):
    if (why := dispatch._cusparselt_unsupported_reason(GPU)) is not None:
        pytest.skip(why)
    for shape in (*SHAPES, (577, 768, 3072)):
        for names in ((), ("bias",), ("bias", "scale", "residual")):
            assert_close_to_exact(*shape, dtype, dtype, activation, names, device="cuda")
    x, weight = draw(577, 768, dtype=dtype, device="cuda"), sparse24_compress(dense24(768, 768).to("cuda", dtype))
    layout, bias = weight.layout("cusparselt"), draw(768, dtype=dtype, device="cuda", seed=1)
    arguments = x, weight.values, weight.indices, layout, bias, "none", None, None, None
    found = cusparselt.sparse24_linear(*arguments, cusparselt.search(x, layout, bias))
    rounding = 2 * torch.finfo(dtype).eps * found.abs().max().item()
    torch.testing.assert_close(found, cusparselt.sparse24_linear(*arguments), rtol=0, atol=rounding)
