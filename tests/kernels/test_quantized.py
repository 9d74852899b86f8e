# SPDX-License-Identifier: Apache-2.0
"""`quantized_linear` and its weights: the equation, C++ bit by bit as the reference, autograd, compile, refusals."""

import copy
import math
import pickle

import pytest
import torch
from sparse24_cases import dense24
from sparse24_cases import epilogue as arguments
from torch.library import opcheck
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import madtp_kernels as mk
from madtp_kernels import QuantizedWeight, dispatch, quantize
from madtp_kernels.ops.quantized import quantized_pack
from madtp_kernels.reference import quantized as reference
from madtp_kernels.reference.quantized import MAX_IN_FEATURES

pytestmark = pytest.mark.sanitized

needs_extension = pytest.mark.skipif(dispatch.extension_unsupported_reason() is not None, reason="no C++ extension")
SCHEMES = ("int8", "int8_24")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ["reference", pytest.param("cpu", marks=needs_extension)]


def weight_of(out_features, in_features, scheme, seed=0):
    if scheme == "int8_24":
        return quantize(dense24(out_features, in_features, seed=seed))
    return quantize(torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed)), "int8")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_follows_its_equation(scheme):
    weight, x, rest = weight_of(24, 32, scheme), torch.randn(5, 32), arguments(5, 24)
    amax = x.abs().amax(1, keepdim=True)
    rounded = (x.double() * 127 / amax).round() * amax / 127
    product = F.linear(rounded, weight.to_dense().double(), rest["bias"].double())
    expected = rest["residual"] + rest["scale"] * F.gelu(product)
    torch.testing.assert_close(
        mk.quantized_linear(x, weight, activation="gelu", **rest).double(), expected, rtol=1e-5, atol=1e-5
    )
    # As close to the exact product as 8 bits of x allow: half a step of each of its elements.
    exact = F.linear(x.double(), weight.to_dense().double())
    bound = amax / 127 / 2 * weight.to_dense().abs().sum(1) * 1.01
    assert ((mk.quantized_linear(x, weight) - exact).abs() <= bound).all()


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_cpu_has_the_bits_of_the_reference(scheme, dtype, activation):
    sizes = [(1, 8, 16), (7, 24, 48), (45, 264, 208), (133, 40, 144), (33, 520, 400)]
    odd = [(1, 1, 1), (5, 13, 7), (20, 9, 30), (9, 300, 133)] if scheme == "int8" else []
    for rows, out_features, in_features in sizes + odd:
        weight = weight_of(out_features, in_features, scheme)
        x, rest = torch.randn(rows, in_features).to(dtype), arguments(rows, out_features, dtype, torch.float32)
        x[rows // 2] = 0.0
        for options in ({}, rest, {"bias": rest["bias"].to(dtype)}):
            got, expected = (
                mk.quantized_linear(x, weight, activation=activation, **options, backend=backend)
                for backend in ("cpu", "reference")
            )
            assert got.dtype == dtype and torch.equal(got, expected)


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu"])
def test_cpu_activations_within_twice_the_reference_error(dtype, activation):
    weight, x, rest = weight_of(264, 208, "int8_24"), torch.randn(45, 208).to(dtype), arguments(45, 264, dtype)
    got, bound = (
        mk.quantized_linear(x, weight, activation=activation, **rest, backend=backend)
        for backend in ("cpu", "reference")
    )
    before = mk.quantized_linear(x.float(), weight, rest["bias"].float()).double()
    exact = {"gelu": F.gelu, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh")}.get(
        activation, lambda t: t * torch.sigmoid(1.702 * t)
    )(before) * rest["scale"].double() + rest["residual"].double()
    rounding = torch.finfo(torch.float32).eps * exact.abs().max()
    assert (got.double() - exact).abs().max() <= 2 * (bound.double() - exact).abs().max() + 4 * rounding


@needs_extension
@pytest.mark.parametrize("scheme", SCHEMES)
def test_cpu_results_do_not_depend_on_batch_or_threads(scheme):
    weight, before, x = weight_of(280, 208, scheme), torch.get_num_threads(), torch.randn(150, 208)
    run = lambda rows: mk.quantized_linear(x[rows], weight, activation="gelu", backend="cpu")  # noqa: E731
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
def test_sums_are_exact_up_to_the_last_input_feature():
    weight = QuantizedWeight(torch.full((8, MAX_IN_FEATURES), 127, dtype=torch.int8), torch.ones(8))
    x = torch.ones(2, MAX_IN_FEATURES)
    x[1, ::2] = -1
    expected = torch.tensor([127 * 127 * MAX_IN_FEATURES, 0.0])[:, None].expand(2, 8) * torch.tensor(1 / 127)
    assert torch.equal(mk.quantized_linear(x, weight, backend="cpu"), expected)
    wider = torch.zeros(8, MAX_IN_FEATURES + 1)
    with pytest.raises(ValueError, match=f"weight must be of at most {MAX_IN_FEATURES} input features, got 65537"):
        quantize(wider, "int8")
    with pytest.raises(ValueError, match=f"values must be of at most {MAX_IN_FEATURES} input features"):
        QuantizedWeight(wider.to(torch.int8), torch.ones(8))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_cannot_be_scaled(backend, dtype):
    weight, bias = weight_of(24, 32, "int8_24"), torch.randn(24)
    x = torch.randn(7, 32).to(dtype)
    x[1, 3], x[2, 31], x[3, 0] = math.nan, math.inf, -math.inf
    x[4] = 0
    tiny = {torch.float32: 1e-37, torch.bfloat16: 1e-37, torch.float16: 0.0}[dtype]
    x[5] = tiny
    y = mk.quantized_linear(x, weight, bias, activation="relu", backend=backend)
    assert y[1:4].isnan().all() and y[[0, 6]].isfinite().all()
    assert torch.equal(y[4:6], bias.relu().to(dtype).expand(2, 24))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scale_at_the_edge_of_what_is_normal(backend):
    weight = QuantizedWeight(torch.eye(8, dtype=torch.int8), torch.ones(8))
    x = torch.full((2, 8), 2.0**-119)
    x[1] = torch.nextafter(torch.tensor(2.0**-119), torch.tensor(0.0))
    y = mk.quantized_linear(x, weight, backend=backend)
    assert (y[0] > 0).all() and (y[1] == 0).all()
    big = torch.full((1, 8), 3e38)
    torch.testing.assert_close(mk.quantized_linear(big, weight, backend=backend), big)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_num_rows_and_empty_and_non_contiguous(backend, scheme):
    weight, rest, x = weight_of(24, 32, scheme), arguments(20, 24), torch.randn(20, 32)
    run = lambda x, **changes: mk.quantized_linear(  # noqa: E731
        x, weight, activation="relu", backend=backend, **(rest | changes)
    )
    full = run(x)
    broken = x.clone()
    broken[13:] = math.nan
    out = run(broken, num_rows=torch.tensor(13, dtype=torch.int32))
    assert torch.equal(out[:13], full[:13]) and (out[13:] == 0).all()
    wide = torch.randn(20, 40)
    wide[:, 3:35] = x
    for view in (wide[:, 3:35], x.t().contiguous().t(), x.repeat_interleave(2, 0)[::2]):
        assert torch.equal(run(view), full)
    assert torch.equal(run(x, residual=rest["residual"].t().contiguous().t()), full)
    assert torch.equal(run(x, bias=torch.stack([rest["bias"], rest["bias"]], 1)[:, 0]), full)
    assert mk.quantized_linear(x[:0], weight, backend=backend).shape == (0, 24)
    shaped = mk.quantized_linear(x.view(2, 10, 32), weight, residual=rest["residual"].view(2, 10, 24), backend=backend)
    assert torch.equal(shaped.view(20, 24), mk.quantized_linear(x, weight, residual=rest["residual"], backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [0, 1, 64])
@pytest.mark.parametrize(("out_features", "in_features"), [(0, 16), (24, 0), (0, 0)])
def test_features_of_zero(backend, tokens, out_features, in_features):
    bias = torch.arange(-3.0, out_features - 3)
    for scheme in SCHEMES:
        weight = quantize(torch.zeros(out_features, in_features), scheme)
        y = mk.quantized_linear(torch.zeros(tokens, in_features), weight, bias, activation="relu", backend=backend)
        assert torch.equal(y, bias.relu().expand(tokens, out_features))


@needs_extension
@pytest.mark.parametrize("scheme", SCHEMES)
def test_cpu_writes_every_element(monkeypatch, scheme):
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        tensor = new_empty(self, *args, **kwargs)
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor.fill_(255)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    for rows in (1, 3, 20, 60):
        weight, num_rows = weight_of(280, 48, scheme), torch.tensor(30, dtype=torch.int32)
        out = mk.quantized_linear(torch.randn(rows, 48), weight, num_rows=num_rows, backend="cpu")
        assert out.isfinite().all() and (out[30:] == 0).all()


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_gradients_go_straight_through(activation):
    weight, leaf = weight_of(16, 32, "int8_24"), lambda t: t.requires_grad_()
    rest = {name: leaf(t) for name, t in arguments(5, 16).items()}
    x, grad = leaf(torch.randn(5, 32)), torch.randn(5, 16)
    mk.quantized_linear(x, weight, activation=activation, **rest, backend="auto").backward(grad)
    # The same with the rounding of x written as a constant that is added.
    integers, scale = reference.quantize_rows(x.detach())
    rounding = integers * scale[:, None] - x.detach()
    others = [leaf(t.detach().clone()) for t in (x, rest["bias"], rest["residual"], rest["scale"])]
    product = F.linear(others[0] + rounding, weight.to_dense(), others[1])
    expected = others[2] + others[3] * (product if activation is None else F.gelu(product))
    expected.backward(grad)
    for got, other in zip((x, rest["bias"], rest["residual"], rest["scale"]), others, strict=True):
        torch.testing.assert_close(got.grad, other.grad)


@needs_extension
@pytest.mark.parametrize("scheme", SCHEMES)
def test_opcheck_and_compile(scheme):
    weight, x, rest = weight_of(24, 32, scheme), torch.randn(5, 32, requires_grad=True), arguments(5, 24)
    for backend in ("reference", "cpu"):
        args = (x, weight.values, weight.indices, weight.scale, None, rest["bias"], "gelu", None, None, None, backend)
        opcheck(torch.ops.madtp.quantized_linear, args)
    opcheck(torch.ops.madtp.quantized_pack, (weight.values, weight.indices), test_utils="test_schema")
    run = lambda x: mk.quantized_linear(x, weight, activation="relu", **rest)  # noqa: E731
    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x))


def test_flops_are_those_of_the_kept_weights():
    for scheme, kept in (("int8", 1), ("int8_24", 2)):
        with FlopCounterMode(display=False) as counter:
            mk.quantized_linear(torch.randn(5, 32), weight_of(24, 32, scheme))
        assert counter.get_total_flops() == 2 * 5 * 32 * 24 // kept


def test_quantize_rounds_to_the_nearest_integer():
    dense = dense24(24, 32)
    dense[3] = 0
    weight = quantize(dense)
    assert weight.scheme == "int8_24" and weight.values.shape == (24, 16) and weight.indices.shape == (24, 4)
    assert weight.scale[3] == 1 and weight.nbytes == 24 * 16 + 24 * 4 + 24 * 4
    assert ((weight.to_dense() - dense).abs() <= weight.scale[:, None] / 2 * 1.0001).all()
    assert torch.equal(quantize(mk.sparse24_compress(dense)).values, weight.values)
    assert torch.equal(quantize(dense, "int8").to_dense(), weight.to_dense())
    coarse = quantize(dense, scale=torch.full((24,), 0.5))
    assert torch.equal(coarse.to_dense(), (dense / 0.5).round().clamp(-127, 127) * 0.5)
    half = quantize(dense.bfloat16())
    assert half.scale.dtype == torch.float32 and half.values.dtype == torch.int8


def test_a_weight_is_fixed_moved_copied_and_packed_again():
    weight = weight_of(24, 32, "int8_24")
    with pytest.raises(AttributeError, match="make another"):
        weight.values = weight.values
    for other in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert torch.equal(other.to_dense(), weight.to_dense()) and other.values is not weight.values
    assert weight.to("cpu") is weight and weight.to("meta").values.is_meta
    if dispatch.extension_unsupported_reason() is None:
        x = torch.randn(3, 32)
        before = mk.quantized_linear(x, weight, backend="cpu")
        weight.values.neg_()
        assert torch.equal(mk.quantized_linear(x, weight, backend="cpu"), -before)


@needs_extension
def test_writes_that_torch_does_not_count():
    weight, x = weight_of(24, 32, "int8_24"), torch.randn(3, 32)
    before = mk.quantized_linear(x, weight, backend="cpu")
    weight.values.numpy()[:] *= -1
    weight.forget()
    assert torch.equal(mk.quantized_linear(x, weight, backend="cpu"), -before)


@needs_extension
def test_explain_names_the_kernel():
    choice = mk.explain("quantized_linear", torch.randn(3, 32), weight_of(24, 32, "int8_24"))
    assert choice.backend == "cpu"
    choice = mk.explain("quantized_linear", torch.randn(3, 32), quantize(torch.ones(0, 32), "int8"))
    assert choice.backend == "reference" and "no elements" in choice.rejected["cpu"]
    message = "x must be a 2-dimensional tensor of float32 or bfloat16 or float16, got float64"
    for run in (mk.quantized_linear, lambda *call: mk.explain("quantized_linear", *call)):
        with pytest.raises(ValueError, match=message):
            run(torch.randn(3, 32).double(), weight_of(24, 32, "int8_24"))


def with_value(tensor, index, value):
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


def test_bad_weights_are_refused():
    good = weight_of(24, 32, "int8_24")
    refused = [
        (lambda: quantize(torch.randn(24, 32)), "weight must be 2:4"),
        (lambda: quantize(torch.randn(24, 32), "int4"), "scheme must be one of int8, int8_24, fp8, fp8_24, got int4"),
        (lambda: quantize(mk.sparse24_prune(torch.randn(24, 32)), "int8"), "scheme must be int8_24 or fp8_24"),
        (lambda: quantize(torch.full((8, 16), math.nan), "int8"), "weight must be finite"),
        (lambda: quantize(torch.full((8, 16), 1e300, dtype=torch.float64), "int8"), "weight must be finite"),
        (lambda: quantize(torch.ones(8, 16, device="meta"), "int8"), "weight must be of values"),
        (lambda: quantize(torch.ones(8, 16), "int8", torch.zeros(8)), "scale must be positive and finite"),
        (lambda: quantize(torch.ones(8, 16), "int8", torch.ones(7)), r"scale must be \(N,\) = \(8,\)"),
        (lambda: QuantizedWeight(good.values.float(), good.scale), "values must be a 2-dimensional tensor of int8"),
        (lambda: QuantizedWeight(good.values, good.scale.half()), "scale must be a 1-dimensional tensor of float32"),
        (lambda: QuantizedWeight(good.values, good.scale, good.indices[:, :1]), r"indices must be \(N, C/8\)"),
        (lambda: QuantizedWeight(with_value(good.values, (1, 2), -128), good.scale).check_values(), "-127 to 127"),
        *(
            (lambda v=v: QuantizedWeight(good.values, with_value(good.scale, 5, v)).check_values(), "at row 5")
            for v in (0.0, -1.0, math.nan, math.inf)
        ),
        (lambda: QuantizedWeight(good.values, good.scale, good.indices * 0).check_values(), "ascending columns"),
    ]
    for call, message in refused:
        with pytest.raises(ValueError, match=message):
            call()


def test_bad_calls_are_refused():
    x, weight = torch.randn(5, 32), weight_of(24, 32, "int8_24")
    refused = [
        ({"x": torch.randn(5, 31)}, "x must be of 32 channels"),
        ({"x": x.double()}, "x must be a 2-dimensional tensor of float32 or bfloat16 or float16"),
        ({"weight": weight.values}, "weight must be a QuantizedWeight, got Tensor"),
        ({"bias": torch.randn(23)}, "bias must be of 24 rows like weight"),
        ({"residual": torch.randn(4, 24)}, r"residual must be of shape \(5, 24\)"),
        ({"activation": "swish"}, "activation must be one of"),
        ({"num_rows": torch.tensor(3)}, "num_rows must be a tensor of one int32"),
        ({"backend": "onednn"}, "no onednn implementation"),
        ({"backend": "fast"}, "backend= must be one of"),
    ]
    for change, message in refused:
        with pytest.raises((ValueError, RuntimeError), match=message):
            mk.quantized_linear(**({"x": x, "weight": weight} | change))


@needs_extension
def test_indices_and_layouts_are_refused():
    weight = weight_of(24, 32, "int8_24")
    with pytest.raises(ValueError, match="indices must be two ascending columns"):
        quantized_pack(weight.values, weight.indices * 0)
    call = lambda layout: torch.ops.madtp.quantized_linear(  # noqa: E731
        torch.randn(5, 32), weight.values, weight.indices, weight.scale, layout, None, "none", None, None, None, "cpu"
    )
    with pytest.raises(ValueError, match="layout must be contiguous uint8"):
        call(quantized_pack(weight.values, None))


def test_weights_only_loading_trusts_nothing(tmp_path):
    weight = weight_of(24, 32, "int8_24")
    torch.save(weight, tmp_path / "good.pt")
    assert torch.equal(torch.load(tmp_path / "good.pt", weights_only=True).to_dense(), weight.to_dense())
    weight.scale[2] = -1
    torch.save(weight, tmp_path / "bad.pt")
    with pytest.raises(Exception, match="positive and finite"):
        torch.load(tmp_path / "bad.pt", weights_only=True)
