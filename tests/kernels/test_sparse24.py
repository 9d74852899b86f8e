# SPDX-License-Identifier: Apache-2.0
"""`sparse24_linear`: against dense torch, C++ against the reference, autograd, torch.compile, refusals."""

import inspect
import math

import pytest
import torch
from sparse24_cases import dense24
from sparse24_cases import epilogue as arguments
from torch.library import opcheck
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import madtp_kernels as mk
from madtp_kernels import dispatch, sparse24_compress
from madtp_kernels.ops import sparse24
from madtp_kernels.ops.sparse24 import sparse24_pack
from madtp_kernels.reference import sparse24 as reference

pytestmark = pytest.mark.sanitized

needs_extension = pytest.mark.skipif(dispatch.extension_unsupported_reason() is not None, reason="no C++ extension")
ACTIVATIONS = [None, "gelu", "gelu_tanh", "quick_gelu", "relu"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_follows_its_equation(activation):
    dense, x = dense24(24, 32).double(), torch.randn(5, 32, dtype=torch.float64)
    rest = arguments(5, 24, torch.float64)
    functions = {
        None: lambda t: t,
        "gelu": F.gelu,
        "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
        "quick_gelu": lambda t: t * torch.sigmoid(1.702 * t),
        "relu": F.relu,
    }
    expected = rest["residual"] + rest["scale"] * functions[activation](F.linear(x, dense, rest["bias"]))
    torch.testing.assert_close(mk.sparse24_linear(x, sparse24_compress(dense), activation=activation, **rest), expected)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [False, True], ids=["own", "float32"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_cpu_within_twice_the_reference_error(dtype, wide, activation):
    affine = torch.float32 if wide else dtype
    for rows, out_features, in_features in ((1, 8, 16), (7, 24, 48), (45, 264, 208), (133, 40, 80)):
        weight = sparse24_compress(dense24(out_features, in_features)).to(affine)
        x, rest = torch.randn(rows, in_features).to(dtype), arguments(rows, out_features, dtype, affine=affine)
        got, bound = (
            mk.sparse24_linear(x, weight, activation=activation, **rest, backend=backend)
            for backend in ("cpu", "reference")
        )
        double = {name: t.double() for name, t in rest.items()}
        exact = mk.sparse24_linear(x.double(), weight.to(torch.float64), activation=activation, **double)
        assert got.dtype == bound.dtype == dtype
        rounding = torch.finfo(torch.float32).eps * exact.abs().max()
        assert (got.double() - exact).abs().max() <= 2 * (bound.double() - exact).abs().max() + 4 * rounding


@needs_extension
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_cpu_activations_over_their_whole_range(activation):
    # W is the identity on 16 channels, so that x reaches the activation as it is.
    x = torch.cat([torch.linspace(-12, 12, 4000), torch.tensor([0.0, 1e-30, -1e-30, 1e4, -1e4, 3e38, -3e38, math.nan])])
    x = F.pad(x, (0, -x.numel() % 16)).view(-1, 16)
    got = mk.sparse24_linear(x, sparse24_compress(torch.eye(16)), activation=activation, backend="cpu")
    expected = reference.ACTIVATIONS[activation](x.double())
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=2e-7, equal_nan=True)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_results_do_not_depend_on_batch_or_threads(dtype):
    weight, before = sparse24_compress(dense24(280, 208).to(dtype)), torch.get_num_threads()
    x, rest = torch.randn(150, 208).to(dtype), arguments(150, 280, dtype)
    run = lambda rows: mk.sparse24_linear(  # noqa: E731
        x[rows], weight, rest["bias"], activation="gelu", residual=rest["residual"][rows], backend="cpu"
    )
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(slice(None)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)
    for count in (1, 2, 4, 8, 9, 16, 33, 64, 100):
        assert torch.equal(run(slice(3, 3 + count)), results[0][3 : 3 + count])


@needs_extension
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_num_rows_and_empty_and_non_contiguous(backend):
    weight, rest = sparse24_compress(dense24(24, 32)), arguments(20, 24)
    x = torch.randn(20, 32)
    run = lambda x, **changes: mk.sparse24_linear(  # noqa: E731
        x, weight, activation="gelu", backend=backend, **(rest | changes)
    )
    full = run(x)
    x_broken = x.clone()
    x_broken[13:] = math.nan
    for num_rows in (torch.tensor(13, dtype=torch.int32), torch.tensor([13], dtype=torch.int32)):
        out = run(x_broken, num_rows=num_rows)
        torch.testing.assert_close(out[:13], full[:13])
        assert (out[13:] == 0).all()
    wide = torch.randn(20, 40)
    wide[:, 3:35] = x
    views = (wide[:, 3:35], x.t().contiguous().t(), x.repeat_interleave(2, 0)[::2])
    for view in views:
        assert torch.equal(run(view), full)
    assert torch.equal(run(x, residual=rest["residual"].t().contiguous().t()), full)
    strided = torch.stack([rest["bias"], rest["bias"]], 1)[:, 0]
    assert torch.equal(run(x, bias=strided), full)
    empty = mk.sparse24_linear(x[:0], weight, backend=backend)
    assert empty.shape == (0, 24)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_extension)])
@pytest.mark.parametrize("tokens", [0, 1, 64])
@pytest.mark.parametrize(("out_features", "in_features"), [(0, 16), (24, 0), (0, 0)])
def test_features_of_zero(backend, tokens, out_features, in_features):
    weight = sparse24_compress(torch.zeros(out_features, in_features))
    bias = torch.arange(-3.0, out_features - 3)
    y = mk.sparse24_linear(torch.zeros(tokens, in_features), weight, bias, activation="relu", backend=backend)
    assert torch.equal(y, bias.relu().expand(tokens, out_features))


@needs_extension
def test_cpu_writes_every_element(monkeypatch):
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        tensor = new_empty(self, *args, **kwargs)
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor.fill_(255)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    num_rows = torch.tensor(30, dtype=torch.int32)
    for rows in (1, 3, 20, 60):
        out = mk.sparse24_linear(
            torch.randn(rows, 48), sparse24_compress(dense24(280, 48)), num_rows=num_rows, backend="cpu"
        )
        assert out.isfinite().all()


# --- autograd


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_in_float64(activation):
    weight, rest = sparse24_compress(dense24(8, 16).double()), arguments(5, 8, torch.float64)
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    rest = [t.requires_grad_() for t in rest.values()]
    for num_rows in (None, torch.tensor(3, dtype=torch.int32)):

        def run(x, bias, residual, scale, num_rows=num_rows):
            return mk.sparse24_linear(
                x, weight, bias, activation=activation, residual=residual, scale=scale, num_rows=num_rows
            )

        assert torch.autograd.gradcheck(run, (x, *rest))
    assert torch.autograd.gradcheck(lambda x: mk.sparse24_linear(x, weight, activation=activation), (x,))


@needs_extension
def test_cpu_forward_has_the_exact_gradient():
    weight, rest = sparse24_compress(dense24(24, 32)), arguments(9, 24)
    x = torch.randn(9, 32)

    def gradients(dtype, backend):
        inputs = [t.to(dtype).requires_grad_() for t in (x, *rest.values())]
        out = mk.sparse24_linear(
            inputs[0],
            weight.to(dtype),
            inputs[1],
            activation="gelu",
            residual=inputs[2],
            scale=inputs[3],
            backend=backend,
        )
        return torch.autograd.grad((out**2).sum(), inputs)

    for got, want in zip(gradients(torch.float32, "cpu"), gradients(torch.float64, "reference"), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def test_opcheck_and_flops():
    weight = sparse24_compress(dense24(24, 32))
    x = torch.randn(6, 32, requires_grad=True)
    rest = {name: t.requires_grad_() for name, t in arguments(6, 24).items()}
    num_rows = torch.tensor(4, dtype=torch.int32)
    full = (rest["bias"], "gelu", rest["residual"], rest["scale"], num_rows, "auto")
    opcheck(torch.ops.madtp.sparse24_linear, (x, weight.values, weight.indices, None, *full))
    opcheck(
        torch.ops.madtp.sparse24_linear, (x, weight.values, weight.indices, None, None, "none", *[None] * 3, "auto")
    )
    detached = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in full)
    backward = (torch.randn(6, 24), x.detach(), weight.values, weight.indices, None, *detached)
    opcheck(torch.ops.madtp.sparse24_linear_backward, backward)
    with FlopCounterMode(display=False) as counter:
        mk.sparse24_linear(x.detach(), weight)
    assert counter.get_total_flops() == 6 * 24 * 32  # half of the dense product


@needs_extension
def test_opcheck_of_the_packer():
    weight = sparse24_compress(dense24(24, 32))
    opcheck(torch.ops.madtp.sparse24_pack, (weight.values, weight.indices))


@pytest.mark.parametrize("cached", [False, True])
def test_compiles_without_graph_breaks(cached):
    weight, rest = sparse24_compress(dense24(24, 32)), arguments(11, 24)
    if cached:
        mk.sparse24_linear(torch.zeros(1, 32), weight)

    def layer(x):
        return mk.sparse24_linear(x, weight, activation="gelu", **rest)

    def run(function):
        x = torch.linspace(-1, 1, 11 * 32).reshape(11, 32).requires_grad_()
        out = function(x)
        (out**2).sum().backward()
        return out.detach(), x.grad

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for got, expected in zip(run(compiled), run(layer), strict=True):
        torch.testing.assert_close(got, expected)


# --- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 16)}, r"x must be of 32 channels like weight, got float32 \(4, 16\)"),
        ({"x": torch.zeros(4, 32).long()}, "x must be a 2-dimensional tensor of .*, got int64"),
        ({"x": torch.zeros(4, 32).half()}, "bias must be a 1-dimensional tensor of float16 or float32, got float64"),
        ({"weight": torch.zeros(24, 32)}, "weight must be a Sparse24Weight, got Tensor"),
        ({"bias": torch.zeros(8)}, "bias must be of 24 rows like weight"),
        ({"scale": torch.zeros(24, 1)}, "scale must be a 1-dimensional tensor"),
        ({"residual": torch.zeros(4, 8)}, r"residual must be of shape \(4, 24\), \(T, N\), got float32 \(4, 8\)"),
        ({"residual": torch.zeros(4, 24).half()}, "residual must be a 2-dimensional tensor of float32, got float16"),
        ({"num_rows": torch.tensor([1, 2], dtype=torch.int32)}, "num_rows must be a tensor of one int32, got int32"),
        ({"num_rows": torch.tensor(1)}, "num_rows must be a tensor of one int32, got int64"),
        ({"num_rows": 3}, "num_rows must be a tensor of one int32, got int 3"),
        ({"activation": "swish"}, "activation must be one of none, gelu, gelu_tanh, quick_gelu, relu, got swish"),
        ({"residual": torch.zeros(4, 24, device="meta")}, "residual must be on cpu, got .* on meta"),
        ({"backend": "tpu"}, "backend= must be one of auto"),
    ],
)
def test_refuses(change, message):
    good = {"x": torch.zeros(4, 32), "weight": sparse24_compress(dense24(24, 32)), "bias": torch.zeros(24)}
    if change.get("x") is not None and change["x"].dtype == torch.float16:
        good["bias"] = torch.zeros(24).double()
    else:
        mk.sparse24_linear(**good)  # so that calls of its kind go straight to their backend
    with pytest.raises(ValueError, match=message):
        mk.sparse24_linear(**(good | change))


def test_the_old_name_of_num_rows_is_refused_with_the_new_one():
    weight, x = sparse24_compress(dense24(24, 32)), torch.zeros(4, 32)
    for given in (None, torch.tensor(3, dtype=torch.int32)):
        with pytest.raises(TypeError, match="^sparse24_linear: total is now called num_rows$"):
            mk.sparse24_linear(x, weight, total=given)
    with pytest.raises(TypeError, match="unexpected keyword argument 'rows'"):
        mk.sparse24_linear(x, weight, rows=3)
    assert "old" not in inspect.signature(mk.sparse24_linear).parameters
    with pytest.raises(TypeError, match="unexpected keyword argument 'rows'"):
        mk.explain("sparse24_linear", x, weight, rows=3)


def test_other_backends_are_refused():
    weight = sparse24_compress(dense24(24, 32))
    with pytest.raises(RuntimeError, match="cannot run on backend 'triton'.*has no triton implementation"):
        mk.sparse24_linear(torch.zeros(4, 32), weight, backend="triton")
    assert mk.explain("sparse24_linear", torch.zeros(4, 32).double(), weight).backend == "reference"


@pytest.mark.parametrize(
    ("values", "indices", "message"),
    [
        ((20, 16), (20, 4), "values must be of a multiple of 8 rows"),
        ((24, 12), (24, 3), r"values must be of shape \(N, C/2\), C a multiple of 16"),
        ((24, 16), (24, 5), r"indices must be of shape \(24, 4\), \(N, C/8\), got uint8 \(24, 5\)"),
    ],
)
def test_shapes_of_a_weight_are_refused(values, indices, message):
    values, indices = torch.zeros(values), torch.full(indices, 0x44, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        sparse24_pack(values, indices)
    with pytest.raises(ValueError, match=message):
        torch.ops.madtp.sparse24_linear(
            torch.zeros(4, 2 * values.shape[1]), values, indices, None, None, "none", None, None, None, "auto"
        )


@needs_extension
def test_indices_and_layouts_are_refused():
    weight = sparse24_compress(dense24(24, 32))
    for nibble in (0, 1, 5, 3, 15):
        broken = weight.indices.clone()
        broken[7, 2] = 0x40 | nibble
        with pytest.raises(ValueError, match="indices must be ascending in every group"):
            sparse24_pack(weight.values, broken)
    with pytest.raises(ValueError, match="values must be a 2-dimensional tensor of float32 or .*, got float64"):
        sparse24_pack(weight.values.double(), weight.indices)
    rest = (None, "none", None, None, None, "cpu")
    for layout in (weight.layout("cpu")[1:], weight.layout("cpu").view(torch.int8)):
        with pytest.raises(ValueError, match="layout must be contiguous uint8 of shape"):
            torch.ops.madtp.sparse24_linear(torch.zeros(4, 32), weight.values, weight.indices, layout, *rest)


@needs_extension
@pytest.mark.parametrize("backend", ["reference", "cpu", "dense", None])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 3), (2, 1, 2)])
def test_any_shape_that_a_linear_takes(backend, shape):
    weight, bias = sparse24_compress(dense24(24, 32)), torch.randn(24)
    x, residual = torch.randn(*shape, 32), torch.randn(*shape, 24)
    expected = residual + torch.nn.functional.linear(x, weight.to_dense(), bias)
    for _ in range(2):
        got = mk.sparse24_linear(x, weight, bias, residual=residual, backend=backend)
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(())}, r"^x must be of shape \(\.\.\., 32\) like weight, got float32 \(\) on cpu$"),
        ({"x": torch.zeros(2, 2, 16)}, r"^x must be of shape \(\.\.\., 32\) like weight"),
        ({"x": torch.zeros(32), "num_rows": torch.tensor(1, dtype=torch.int32)}, r"^num_rows must be None unless x is"),
        ({"x": torch.zeros(32), "residual": torch.zeros(1, 24)}, r"^residual must be of shape \(24,\)"),
        ({"weight": sparse24_compress(dense24(24, 32)).to(torch.bfloat16)}, "^values must be a .* of float32, got bf"),
        ({"x": torch.zeros(4, 32).long()}, "^x must be a 2-dimensional tensor of"),
        ({"x": [1.0] * 10_000}, r"^x must be a tensor, got list \[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, \.\.\.\]$"),
        (
            {"activation": "swish"},
            "^activation must be one of none, gelu, gelu_tanh, quick_gelu, relu, got swish$",
        ),
        ({"activation": 3}, "^activation must be one of none, gelu, .* or None, got int 3$"),
        ({"bias": 0.5}, "^bias must be a tensor or None, got float 0.5$"),
        ({"backend": 5}, "^backend= must be one of auto, .*, got 5$"),
    ],
)
def test_arguments_are_checked_before_anything_is_measured(monkeypatch, change, message):
    monkeypatch.setattr(sparse24.tuning, "fastest", lambda case: pytest.fail("measured"))
    good = {"x": torch.zeros(4, 32), "weight": sparse24_compress(dense24(24, 32))}
    with pytest.raises(ValueError, match=message):
        mk.sparse24_linear(**(good | change))
