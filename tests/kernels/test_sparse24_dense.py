# SPDX-License-Identifier: Apache-2.0
"""Backend `dense` of `sparse24_linear`: torch's product on the decompressed weight."""

import pytest
import torch
from sparse24_cases import dense24

import madtp_kernels as mk
from madtp_kernels import dispatch, sparse24_compress

ACTIVATIONS = [None, "gelu", "gelu_tanh", "quick_gelu", "relu"]


def arguments(rows, out_features, dtype, affine):
    torch.manual_seed(rows)
    bias, scale = torch.randn(2, out_features).to(affine)
    return {"bias": bias, "residual": torch.randn(rows, out_features).to(dtype), "scale": scale}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", ["none", "weight", "vectors", "both"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rounds_at_most_twice(dtype, wide, activation):
    affine = torch.float32 if wide in ("vectors", "both") else dtype
    for rows, out_features, in_features in ((1, 8, 16), (7, 24, 48), (45, 264, 208)):
        weight = sparse24_compress(dense24(out_features, in_features).to(dtype))
        weight = weight.to(torch.float32) if wide in ("weight", "both") else weight
        x, rest = torch.randn(rows, in_features).to(dtype), arguments(rows, out_features, dtype, affine)
        for names in ((), ("bias",), ("bias", "residual"), ("scale",), ("bias", "scale", "residual")):
            given = {name: rest[name] for name in names}
            double = {name: t.double() for name, t in given.items()}
            exact = mk.sparse24_linear(x.double(), weight.to(torch.float64), activation=activation, **double)
            got = mk.sparse24_linear(x, weight, activation=activation, **given, backend="dense")
            product = mk.sparse24_linear(x.double(), weight.to(torch.float64), double.get("bias"))
            size = product.abs() * (1 if "scale" not in given else double["scale"].abs())
            size = torch.maximum(size, exact.abs()).max()
            assert got.dtype == dtype
            assert (got.double() - exact).abs().max() <= 1.5 * torch.finfo(dtype).eps * size + 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_num_rows_empty_and_views(dtype):
    weight, rest = sparse24_compress(dense24(24, 32).to(dtype)), arguments(20, 24, dtype, dtype)
    x = torch.randn(20, 32).to(dtype)
    run = lambda x, **changes: mk.sparse24_linear(  # noqa: E731
        x, weight, activation="gelu", backend="dense", **(rest | changes)
    )
    full, broken = run(x), x.clone()
    broken[13:] = torch.nan
    out = run(broken, num_rows=torch.tensor(13, dtype=torch.int32))
    assert torch.equal(out[:13], full[:13]) and (out[13:] == 0).all()
    assert torch.equal(run(x.repeat_interleave(2, 0)[::2]), full)
    assert mk.sparse24_linear(x[:0], weight, backend="dense").shape == (0, 24)
    other = torch.cat([x[:7], torch.randn(13, 32).to(dtype)])
    assert torch.equal(run(other)[:7], full[:7])


def test_autocast_leaves_float32_alone():
    weight, x = sparse24_compress(dense24(24, 32)), torch.randn(5, 32)
    expected = mk.sparse24_linear(x, weight, activation="gelu", backend="dense")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mk.sparse24_linear(x, weight, activation="gelu", backend="dense"), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_the_reference(activation):
    weight = sparse24_compress(dense24(24, 32))
    inputs = [
        t.requires_grad_() for t in (torch.randn(9, 32), *arguments(9, 24, torch.float32, torch.float32).values())
    ]

    def gradients(backend):
        x, bias, residual, scale = inputs
        out = mk.sparse24_linear(
            x, weight, bias, activation=activation, residual=residual, scale=scale, backend=backend
        )
        return torch.autograd.grad((out**2).sum(), inputs)

    for got, expected in zip(gradients("dense"), gradients("reference"), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_compiles_checks_and_follows_writes():
    weight, x = sparse24_compress(dense24(24, 32)), torch.randn(5, 32)
    layer = lambda x: mk.sparse24_linear(x, weight, backend="dense")  # noqa: E731
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    rest = (None, "none", None, None, None, "dense")
    torch.library.opcheck(torch.ops.madtp.sparse24_linear, (x, weight.values, weight.indices, None, *rest))
    for layout in (weight.to_dense()[:8], weight.to_dense().half()):
        with pytest.raises(ValueError, match=r"layout must be the dense weight, torch.float32 of shape \(24, 32\)"):
            torch.ops.madtp.sparse24_linear(x, weight.values, weight.indices, layout, *rest)
    weight.values.mul_(2)
    torch.testing.assert_close(layer(x), x @ weight.to_dense().t())
    with pytest.raises(RuntimeError, match="float64 runs on the reference only"):
        mk.sparse24_linear(x.double(), weight.to(torch.float64), backend="dense")
    with pytest.raises(RuntimeError, match="token_importance has no dense implementation"):
        dispatch.choose("token_importance", "dense", torch.float32, torch.device("cpu"))
