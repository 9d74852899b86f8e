# SPDX-License-Identifier: Apache-2.0
"""`quantized_linear` with fp8 weights: the equation, the rounding, exact sums, autograd, compile, what is refused."""

import copy
import math
import pickle

import pytest
import torch
from fp8_cases import assert_within_rule, bits, coarse_sums, exact_product, rounded_rows
from sparse24_cases import dense24
from sparse24_cases import epilogue as arguments
from torch.library import opcheck
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import madtp_kernels as mk
from madtp_kernels import QuantizedWeight, dispatch, quantize
from madtp_kernels.ops.quantized import quantized_pack
from madtp_kernels.reference import quantized as reference
from madtp_kernels.reference.quantized import FP8, MAX_IN_FEATURES, quantize_rows, sum_error

E4M3 = torch.float8_e4m3fn
SCHEMES = ("fp8", "fp8_24")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weight_of(out_features, in_features, scheme, seed=0):
    if scheme == "fp8_24":
        return quantize(dense24(out_features, in_features, seed=seed), scheme)
    return quantize(torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed)), scheme)


# --- the rounding


def test_every_number_of_the_grid_stays_itself():
    grid = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    grid = grid[~grid.isnan()]
    assert len(grid) == 254 and grid.max() == 448
    weight = quantize(grid[None], "fp8", torch.ones(1))
    assert torch.equal(weight.to_dense()[0], grid)
    assert (bits(weight.values) != 0x80).all()  # -0.0 became 0.0
    values, scale = quantize_rows(grid[None])[0], quantize_rows(grid[None], FP8)[1]
    assert values.dtype == torch.int8 and scale == 1  # int8 is what rows are rounded to where nothing is said
    assert torch.equal(quantize_rows(grid[None], FP8)[0].float()[0], grid)


def test_rounding_is_to_the_nearest_half_to_even_and_is_cut():
    grid = torch.arange(0x7F, dtype=torch.uint8).view(E4M3).float()  # 0 to 448, ascending
    half = (grid[:-1] + grid[1:]) / 2  # float32 numbers
    even = grid[torch.arange(len(half)) + torch.arange(len(half)) % 2]  # the neighbour whose last bit is 0
    inputs = torch.stack([half, -half, half.nextafter(grid[1:]), half.nextafter(grid[:-1])])
    expected = torch.stack([even, -even, grid[1:], grid[:-1]])
    one = torch.ones(4)
    assert torch.equal(quantize(inputs, "fp8", one).to_dense(), expected)
    assert torch.equal(quantize(inputs.double(), "fp8", one).to_dense(), expected)
    beyond = torch.tensor([[448.1, 1e9, -464.0, -3e38]])
    assert torch.equal(quantize(beyond, "fp8", torch.ones(1)).to_dense(), beyond.clamp(-448, 448))


def test_scales_are_those_of_the_largest_magnitudes():
    dense = dense24(24, 32)
    dense[3], dense[4] = 0, dense[4] * 1e-37
    weight = quantize(dense, "fp8_24")
    assert weight.scheme == "fp8_24" and weight.dtype == E4M3
    assert weight.values.shape == (24, 16) and weight.indices.shape == (24, 4)
    assert weight.nbytes == 24 * 16 + 24 * 4 + 24 * 4
    assert (weight.scale[3:5] == 1).all() and not weight.to_dense()[3:5].any()
    amax = dense.abs().amax(1)
    assert torch.equal(weight.scale[:3], amax[:3] / 448) and (weight.values.float().abs().amax(1)[:3] == 448).all()
    error = (weight.to_dense() - dense).abs()
    step = torch.maximum(dense.abs() * 2.0**-4, weight.scale[:, None] * 2.0**-10)  # half of one, of numbers below 2^-6
    assert (error <= step * 1.0001)[:3].all()
    assert torch.equal(bits(quantize(mk.sparse24_compress(dense), "fp8_24").values), bits(weight.values))
    assert torch.equal(quantize(dense, "fp8").to_dense(), weight.to_dense())


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_cannot_be_scaled(dtype):
    weight, bias = weight_of(24, 32, "fp8_24"), torch.randn(24)
    x = torch.randn(7, 32).to(dtype)
    x[1, 3], x[2, 31], x[3, 0] = math.nan, math.inf, -math.inf
    x[4] = 0
    x[5] = {torch.float32: 1e-36, torch.bfloat16: 1e-36, torch.float16: 0.0}[dtype]
    y = mk.quantized_linear(x, weight, bias, activation="relu")
    assert y[1:4].isnan().all() and y[[0, 6]].isfinite().all()
    assert torch.equal(y[4:6], bias.relu().to(dtype).expand(2, 24))


def test_a_scale_at_the_edge_of_what_is_normal():
    weight = QuantizedWeight(torch.eye(8).to(E4M3), torch.ones(8))
    x = torch.full((2, 8), 2.0**-117)
    x[1] = torch.nextafter(torch.tensor(2.0**-117), torch.tensor(0.0))
    y = mk.quantized_linear(x, weight)
    torch.testing.assert_close(y[0], x[0], rtol=1e-6, atol=0.0)
    assert (y[1] == 0).all()
    big = torch.full((1, 8), 3e38)
    torch.testing.assert_close(mk.quantized_linear(big, weight), big)


# --- the op


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_follows_its_equation(scheme, dtype):
    weight, x, rest = weight_of(24, 32, scheme), torch.randn(5, 32).to(dtype), arguments(5, 24, dtype)
    amax = x.float().abs().amax(1, keepdim=True)
    rounded = (x.float() * (torch.full_like(amax, 448) / amax)).to(E4M3).double() * (amax / 448).double()
    assert torch.equal(rounded, rounded_rows(x))
    product = F.linear(rounded, weight.to_dense().double(), rest["bias"].double())
    expected = rest["residual"].double() + rest["scale"].double() * F.gelu(product)
    got = mk.quantized_linear(x, weight, activation="gelu", **rest)
    assert got.dtype == dtype
    eps = max(torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(got.double(), expected, rtol=eps, atol=eps)
    # As close to the exact product as 4 bits of x allow: 1/16 of each of its elements, or half of the smallest step.
    exact = F.linear(x.double(), weight.to_dense().double())
    step = torch.maximum(x.double().abs() / 16, amax.double() / 448 * 2.0**-10)
    bound = F.linear(step, weight.to_dense().double().abs()) * 1.001
    got = mk.quantized_linear(x.float(), weight)
    assert ((got - exact).abs() <= bound).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_sums_are_exact_whatever_the_batch_and_the_threads(scheme):
    weight, x = weight_of(40, 208, scheme), torch.randn(70, 208)
    x[:, ::3] *= 1e-3
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(mk.quantized_linear(x, weight))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)
    for count in (1, 2, 7, 33):
        assert torch.equal(mk.quantized_linear(x[3 : 3 + count], weight), results[0][3 : 3 + count])
    order = torch.randperm(208)
    rounded, scale = quantize_rows(x, FP8)
    dense = reference.to_dense_values(weight.values, weight.indices)
    shuffled = F.linear(rounded.double()[:, order], dense.double()[:, order]).float() * scale[:, None] * weight.scale
    assert torch.equal(shuffled, results[0])


def test_sums_are_exact_up_to_the_last_input_feature():
    values = torch.full((2, MAX_IN_FEATURES), 448.0)
    values[1] = 2.0**-9
    values[:, -1] = 2.0**-9
    weight = QuantizedWeight(values.to(E4M3), torch.ones(2))
    x = torch.full((1, MAX_IN_FEATURES), 448.0)
    x[0, -1] = 2.0**-9
    big = 448.0 * 448 * (MAX_IN_FEATURES - 1) + 2.0**-18
    small = 448.0 * 2.0**-9 * (MAX_IN_FEATURES - 1) + 2.0**-18
    sums = reference.F.linear(x.double(), weight.values.double())
    assert sums[0].tolist() == [big, small]
    assert torch.equal(mk.quantized_linear(x, weight), sums.float())
    with pytest.raises(ValueError, match=f"weight must be of at most {MAX_IN_FEATURES} input features, got 65537"):
        quantize(torch.zeros(8, MAX_IN_FEATURES + 1), "fp8")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_num_rows_and_empty_and_non_contiguous(scheme):
    weight, rest, x = weight_of(24, 32, scheme), arguments(20, 24), torch.randn(20, 32)
    run = lambda x, **changes: mk.quantized_linear(x, weight, activation="relu", **(rest | changes))  # noqa: E731
    full = run(x)
    broken = x.clone()
    broken[13:] = math.nan
    out = run(broken, num_rows=torch.tensor(13, dtype=torch.int32))
    assert torch.equal(out[:13], full[:13]) and (out[13:] == 0).all()
    wide = torch.randn(20, 40)
    wide[:, 3:35] = x
    for view in (wide[:, 3:35], x.t().contiguous().t(), x.repeat_interleave(2, 0)[::2]):
        assert torch.equal(run(view), full)
    columns = QuantizedWeight(bits(weight.values).t().contiguous().t().view(E4M3), weight.scale, weight.indices)
    assert not columns.values.is_contiguous()
    assert torch.equal(mk.quantized_linear(x, columns, activation="relu", **rest), full)
    assert mk.quantized_linear(x[:0], weight).shape == (0, 24)
    shaped = mk.quantized_linear(x.view(2, 10, 32), weight, residual=rest["residual"].view(2, 10, 24))
    assert torch.equal(shaped.view(20, 24), mk.quantized_linear(x, weight, residual=rest["residual"]))


@pytest.mark.parametrize(("out_features", "in_features"), [(0, 16), (24, 0), (0, 0)])
def test_features_of_zero(out_features, in_features):
    bias = torch.arange(-3.0, out_features - 3)
    for scheme in SCHEMES:
        weight = quantize(torch.zeros(out_features, in_features), scheme)
        for tokens in (0, 1, 20):
            y = mk.quantized_linear(torch.zeros(tokens, in_features), weight, bias, activation="relu")
            assert torch.equal(y, bias.relu().expand(tokens, out_features))


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_gradients_go_straight_through(activation):
    weight, leaf = weight_of(16, 32, "fp8_24"), lambda t: t.requires_grad_()
    rest = {name: leaf(t) for name, t in arguments(5, 16).items()}
    x, grad = leaf(torch.randn(5, 32)), torch.randn(5, 16)
    mk.quantized_linear(x, weight, activation=activation, **rest).backward(grad)
    rounding = rounded_rows(x.detach()).float() - x.detach()
    others = [leaf(t.detach().clone()) for t in (x, rest["bias"], rest["residual"], rest["scale"])]
    product = F.linear(others[0] + rounding, weight.to_dense(), others[1])
    expected = others[2] + others[3] * (product if activation is None else F.gelu(product))
    expected.backward(grad)
    for got, other in zip((x, rest["bias"], rest["residual"], rest["scale"]), others, strict=True):
        torch.testing.assert_close(got.grad, other.grad)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_opcheck_and_compile(scheme):
    weight, x, rest = weight_of(24, 32, scheme), torch.randn(5, 32, requires_grad=True), arguments(5, 24)
    parts = x, weight.values, weight.indices, weight.scale
    # Not test_schema, which compares inputs in fp8 as torch cannot; int8 has it.
    checks = ("test_autograd_registration", "test_faketensor")
    opcheck(torch.ops.madtp.quantized_linear, (*parts, None, rest["bias"], *EPILOGUE), test_utils=checks)
    run = lambda x: mk.quantized_linear(x, weight, activation="relu", **rest)  # noqa: E731
    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x))


EPILOGUE = "gelu", None, None, None, "reference"


def test_flops_are_those_of_the_kept_weights():
    for scheme, kept in (("fp8", 1), ("fp8_24", 2)):
        with FlopCounterMode(display=False) as counter:
            mk.quantized_linear(torch.randn(5, 32), weight_of(24, 32, scheme))
        assert counter.get_total_flops() == 2 * 5 * 32 * 24 // kept


# --- the rule for accumulators with fewer bits


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("in_features", [64, 768])
def test_a_coarse_accumulator_keeps_the_rule(scheme, in_features):
    weight, x = weight_of(24, in_features, scheme, seed=1), torch.randn(9, in_features)
    rounded, x_scale = quantize_rows(x, FP8)
    sums = coarse_sums(rounded, reference.to_dense_values(weight.values, weight.indices))
    got = reference.product(sums, x_scale, weight.scale, None)
    assert (got.double() - exact_product(x, weight)).abs().max() > 1e-5  # it is coarse
    assert_within_rule(got, x, weight)
    assert_within_rule(mk.quantized_linear(x, weight), x, weight, run=32)
    bounds = [sum_error(x, weight.values, weight.indices, weight.scale, run).max() for run in (32, 64, None)]
    assert in_features == 64 or bounds == sorted(bounds)


def test_a_coarse_accumulator_is_exact_where_its_bits_suffice():
    integers = torch.randint(-4, 5, (6, 128)).float()
    weight = QuantizedWeight(torch.randint(-4, 5, (8, 128)).float().to(E4M3), torch.ones(8))
    x = integers.index_fill(1, torch.tensor([0]), 448.0)  # so that the scale is 1
    weight.values[:, 0] = 0.0
    rounded, x_scale = quantize_rows(x, FP8)
    assert (x_scale == 1).all() and torch.equal(rounded.float(), x)
    assert F.linear(x.abs(), weight.to_dense().abs()).max() <= 2**13
    assert torch.equal(coarse_sums(rounded, weight.values), mk.quantized_linear(x, weight))


# --- the weight


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_weight_is_fixed_moved_copied_and_pickled(scheme, tmp_path):
    weight = weight_of(24, 32, scheme)
    with pytest.raises(AttributeError, match="make another"):
        weight.values = weight.values
    torch.save(weight, tmp_path / "w.pt")
    copies = copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), torch.load(tmp_path / "w.pt", weights_only=True)
    for other in copies:
        assert torch.equal(other.to_dense(), weight.to_dense()) and other.values is not weight.values
        assert other.scheme == scheme
    assert weight.to("cpu") is weight and weight.to("meta").values.is_meta
    assert f"scheme='{scheme}'" in repr(weight)
    x = torch.randn(3, 32)
    before = mk.quantized_linear(x, weight)
    bits(weight.values).bitwise_xor_(0x80)  # the sign
    assert torch.equal(mk.quantized_linear(x, weight), -before)
    weight.forget()


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_a_nan_is_refused(byte, tmp_path):
    weight = weight_of(24, 32, "fp8_24")
    bits(weight.values)[5, 2] = byte
    with pytest.raises(ValueError, match="weight.values must be from -448 to 448, got a NaN at row 5"):
        weight.check_values()
    with pytest.raises(ValueError, match="got a NaN at row 5"):
        pickle.loads(pickle.dumps(weight))
    torch.save(weight, tmp_path / "bad.pt")
    with pytest.raises(Exception, match="got a NaN at row 5"):
        torch.load(tmp_path / "bad.pt", weights_only=True)
    assert mk.quantized_linear(torch.randn(3, 32), weight)[:, 5].isnan().all()  # and shows where none looked


def test_a_zero_with_a_sign_is_a_zero():
    weight = weight_of(24, 32, "fp8_24")
    values = torch.where(weight.values.float() > 0, weight.values.float(), 0.0)
    signed = torch.where(values == 0, -0.0, values)
    x = torch.randn(3, 32)
    plus, minus = (QuantizedWeight(v.to(E4M3), weight.scale, weight.indices) for v in (values, signed))
    minus.check_values()
    assert torch.equal(mk.quantized_linear(x, minus), mk.quantized_linear(x, plus))


def test_bad_weights_and_calls_are_refused():
    good, x = weight_of(24, 32, "fp8_24"), torch.randn(5, 32)
    other = torch.float8_e5m2
    refused = [
        (lambda: quantize(torch.randn(24, 32), "fp8_24"), "weight must be 2:4"),
        (lambda: quantize(mk.sparse24_prune(torch.randn(24, 32)), "fp8"), "scheme must be int8_24 or fp8_24"),
        (lambda: quantize(torch.full((8, 16), math.nan), "fp8"), "weight must be finite"),
        (
            lambda: quantize(torch.full((8, 16), 1.0).to(E4M3), "fp8"),
            "weight must be a 2-dimensional tensor of float32",
        ),
        (
            lambda: QuantizedWeight(good.values.to(other), good.scale),
            "tensor of int8 or float8_e4m3fn, got float8_e5m2",
        ),
        (lambda: QuantizedWeight(good.values, good.scale, good.indices * 0).check_values(), "ascending columns"),
        (lambda: mk.quantized_linear(x[:, 1:], good), "x must be of 32 channels"),
        (lambda: mk.quantized_linear(x.double(), good), "x must be a 2-dimensional tensor of float32"),
        (lambda: mk.quantized_linear(x.to(E4M3), good), "x must be a 2-dimensional tensor of float32"),
        (lambda: quantized_pack(good.values, good.indices), "values must be int8 on cpu, got float8_e4m3fn"),
    ]
    for call, message in refused:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_cpu_runs_the_reference_and_says_why(scheme):
    weight, x = weight_of(24, 32, scheme), torch.randn(3, 32)
    choice = mk.explain("quantized_linear", x, weight)
    assert choice.backend == "reference" and f"runs torch.float32 with {scheme} weights on cpu" in choice.reason
    if dispatch.extension_unsupported_reason() is None:
        assert choice.rejected["cpu"] == f"cpu multiplies by weights of int8 and int8_24, not {scheme}"
    assert choice.rejected["dense"] == "on a CPU dense multiplies by int8 weights alone; fp8 runs on the reference"
    for backend in ("cpu", "dense"):
        with pytest.raises(RuntimeError, match=rf"cannot run on backend '{backend}'.*auto would run 'reference'"):
            mk.quantized_linear(x, weight, backend=backend)
    with pytest.raises(RuntimeError, match="cannot run on backend 'dense'"):
        parts = weight.values, weight.indices, weight.scale
        torch.ops.madtp.quantized_linear(x, *parts, None, None, "none", None, None, None, "dense")
