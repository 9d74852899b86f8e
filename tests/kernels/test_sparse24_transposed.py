# SPDX-License-Identifier: Apache-2.0
"""The gradient of x through W^T in its 2:4 form."""

import copy
import pickle

import pytest
import torch

import madtp_kernels as mk
from madtp_kernels import dispatch, sparse24_compress

pytestmark = pytest.mark.sanitized

ACTIVATIONS = [None, "gelu", "gelu_tanh", "quick_gelu", "relu"]
BACKENDS = [
    "reference",
    pytest.param(
        "cpu", marks=pytest.mark.skipif(dispatch.extension_unsupported_reason() is not None, reason="no C++ extension")
    ),
]


def transposable(out_features=32, in_features=48, dtype=torch.float32):
    torch.manual_seed(0)
    weight = torch.randn(out_features, in_features, dtype=torch.float64)
    return weight.masked_fill(~mk.transposable_mask(weight), 0).to(dtype)


def inputs(rows, out_features, in_features, dtype):
    torch.manual_seed(rows)
    tensors = (
        torch.randn(rows, in_features),
        torch.randn(out_features),
        torch.randn(rows, out_features),
        torch.randn(out_features),
    )
    return [t.to(dtype).requires_grad_() for t in tensors]


def gradients(weight, tensors, activation, backend, names=("bias", "residual", "scale"), num_rows=None):
    x, *rest = tensors
    given = {name: t for name, t in zip(("bias", "residual", "scale"), rest, strict=True) if name in names}
    out = mk.sparse24_linear(x, weight, **given, activation=activation, num_rows=num_rows, backend=backend)
    generator = torch.Generator().manual_seed(1)
    seed = torch.randn(out.shape, generator=generator).to(out.dtype)
    return torch.autograd.grad(out, [x, *given.values()], seed)


@pytest.fixture
def products(monkeypatch):
    """The shapes of the weights that backends multiply by."""
    shapes = []
    for name in ("reference", "cpu", "dense"):
        run = dispatch.record("sparse24_linear").implementations[name]

        def spy(x, values, *rest, run=run):
            shapes.append((values.shape[0], 2 * values.shape[1]))
            return run(x, values, *rest)

        monkeypatch.setitem(dispatch.record("sparse24_linear").implementations, name, spy)
    return shapes


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    weight = sparse24_compress(transposable(16, 16, torch.float64)).keep_transposed()
    for num_rows in (None, torch.tensor(2, dtype=torch.int32)):
        run = lambda x, bias, residual, scale, num_rows=num_rows: mk.sparse24_linear(  # noqa: E731
            x,
            weight,
            bias,
            activation=activation,
            residual=residual,
            scale=scale,
            num_rows=num_rows,
            backend="reference",
        )
        assert torch.autograd.gradcheck(run, inputs(3, 16, 16, torch.float64))
    assert torch.autograd.gradcheck(lambda x: mk.sparse24_linear(x, weight), inputs(3, 16, 16, torch.float64)[:1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_the_dense_weight(backend, activation, products):
    plain, kept = (sparse24_compress(transposable()) for _ in range(2))
    kept.keep_transposed()
    for names in ((), ("bias",), ("residual",), ("bias", "residual", "scale")):
        for rows, num_rows in ((0, None), (9, None), (9, torch.tensor(4, dtype=torch.int32))):
            arguments = inputs(rows, 32, 48, torch.float32), activation, backend, names, num_rows
            products.clear()
            got = gradients(kept, *arguments)
            assert products[-1] == (48, 32)
            assert len(products) == (2 if activation is None and "scale" not in names else 3)
            expected = gradients(plain, *arguments)
            for ours, theirs in zip(got, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rounding_in_bfloat16(backend):
    weight = sparse24_compress(transposable(64, 96, torch.bfloat16))
    tensors = inputs(33, 64, 96, torch.bfloat16)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    exact = gradients(weight.to(torch.float64), wide, "gelu", "reference")
    plain = gradients(weight, tensors, "gelu", backend)
    for got, same, true in zip(
        gradients(weight.keep_transposed(), tensors, "gelu", backend), plain, exact, strict=True
    ):
        bound = (same.double() - true).abs().max() + torch.finfo(torch.bfloat16).eps * true.abs().max()
        assert (got.double() - true).abs().max() <= 2 * bound


def test_rows_past_num_rows_take_no_part():
    weight = sparse24_compress(transposable()).keep_transposed()
    tensors, num_rows = inputs(9, 32, 48, torch.float32), torch.tensor(4, dtype=torch.int32)
    expected = gradients(weight, tensors, "gelu", None, num_rows=num_rows)
    with torch.no_grad():
        tensors[0][4:] = torch.nan
    for got, same in zip(gradients(weight, tensors, "gelu", None, num_rows=num_rows), expected, strict=True):
        torch.testing.assert_close(got, same)
    assert (expected[0][4:] == 0).all()


def test_on_dense_and_without_a_gradient_it_is_not_used(products):
    weight = sparse24_compress(transposable()).keep_transposed()
    x = torch.randn(5, 48, requires_grad=True)
    mk.sparse24_linear(x, weight, backend="dense").sum().backward()
    torch.testing.assert_close(x.grad, weight.to_dense().sum(0).expand(5, -1))
    with torch.no_grad():
        mk.sparse24_linear(x, weight, backend="reference")
    assert products == [(32, 48)] * 2 and not weight.transposed._packed


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_keep_theirs_and_writes_are_followed(backend):
    weight = sparse24_compress(transposable()).keep_transposed()
    assert weight.transposed is weight.transposed and torch.equal(weight.transposed.to_dense(), weight.to_dense().t())
    copies = [weight.to(torch.bfloat16), pickle.loads(pickle.dumps(weight)), copy.deepcopy(weight), copy.copy(weight)]
    for other in copies:
        assert other.transposed is not None and other.transposed.dtype == other.dtype
        assert torch.equal(other.transposed.to_dense(), other.to_dense().t())
    assert weight.to("meta").transposed.device.type == "meta"
    assert sparse24_compress(transposable()).to(torch.float64).transposed is None
    assert pickle.loads(pickle.dumps(sparse24_compress(transposable()))).transposed is None
    x = torch.randn(5, 48, requires_grad=True)
    mk.sparse24_linear(x, weight, backend=backend).sum().backward()
    first, x.grad = x.grad, None
    weight.values.mul_(2)
    mk.sparse24_linear(x, weight, backend=backend).sum().backward()
    torch.testing.assert_close(x.grad, 2 * first)
    assert torch.equal(copies[2].transposed.to_dense(), transposable().t())


def test_kept_in_inference_mode_it_serves_a_backward():
    with torch.inference_mode():
        weight = sparse24_compress(transposable()).keep_transposed()
    weight = mk.Sparse24Weight(weight.values.clone(), weight.indices.clone())
    with torch.inference_mode():
        weight.keep_transposed()
    x = torch.randn(5, 48, requires_grad=True)
    mk.sparse24_linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.to_dense().sum(0).expand(5, -1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_and_is_a_lawful_op(backend):
    weight, x = sparse24_compress(transposable()).keep_transposed(), torch.randn(5, 48, requires_grad=True)
    layer = lambda x: mk.sparse24_linear(x, weight, activation="gelu", backend=backend)  # noqa: E731
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    (got,) = torch.autograd.grad(torch.compile(layer, fullgraph=True, backend="aot_eager")(x).sum(), x)
    torch.testing.assert_close(got, expected)
    t, rest = weight.transposed, (None, "gelu", None, None, None, backend)
    arguments = (x, weight.values, weight.indices, None, *rest, t.values, t.indices, None)
    torch.library.opcheck(torch.ops.madtp.sparse24_linear, arguments)
    grad = torch.randn(5, 32)
    for values in (t.values[:8], t.values.double()):
        wrong = (grad, x, weight.values, weight.indices, None, *rest, values, t.indices, None)
        with pytest.raises(
            ValueError, match=r"values_t must be torch.float32 of shape \(48, 16\), \(C, N/2\), of W\^T"
        ):
            torch.ops.madtp.sparse24_linear_backward(*wrong)


def test_what_cannot_be_kept_is_refused():
    with pytest.raises(ValueError, match=r"weight must be \(N, C\) with N a multiple of 16 to be kept transposed, got"):
        sparse24_compress(torch.zeros(24, 32)).keep_transposed()
    offence = torch.zeros(32, 32)
    offence[20:23, 5] = 1.0
    message = r"2:4 along its columns too, .* \(see transposable_mask\), got 3 at column 5, rows 20 to 23"
    weight = sparse24_compress(offence)
    with pytest.raises(ValueError, match=message):
        weight.keep_transposed()
    assert weight.transposed is None
    weight = sparse24_compress(transposable(32, 32)).keep_transposed()
    weight.values.copy_(sparse24_compress(offence).values)
    weight.indices.copy_(sparse24_compress(offence).indices)
    with pytest.raises(ValueError, match=message):
        mk.sparse24_linear(torch.randn(3, 32, requires_grad=True), weight)
