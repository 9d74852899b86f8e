# SPDX-License-Identifier: Apache-2.0
"""Properties of 2:4, int8 and fp8 weights, of their layers and files, and of masks, at drawn sizes and values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from property_cases import (
    DTYPES,
    EPS,
    assert_within,
    cases,
    dtypes,
    generator_of,
    laid_out,
    layouts,
    needs_extension,
    numbers,
    same_bits,
    seeds,
    values,
)
from torch import Tensor

import madtp_kernels as mk
from madtp_kernels.reference import quantized as reference
from madtp_kernels.reference.sparse24 import ACTIVATIONS
from madtp_kernels.sparse24 import formats

pytestmark = [pytest.mark.sanitized, needs_extension]

SCHEMES = ("int8", "int8_24")
EVERY_SCHEME = (*SCHEMES, "fp8", "fp8_24")
ROWS = st.one_of(st.integers(0, 20), st.sampled_from([31, 32, 33, 48, 65, 100]))


@dataclass(frozen=True)
class Layer:
    """A call of a linear op."""

    rows: int
    out_features: int
    in_features: int
    dtype: torch.dtype
    weight_dtype: torch.dtype
    vectors: torch.dtype
    kinds: tuple[str, str]  # of x, of the weight
    layout: str
    parts: frozenset[str]
    activation: str | None
    num_rows: int | None
    scheme: str
    seed: int

    def x(self) -> Tensor:
        return numbers((self.rows, self.in_features), self.kinds[0], self.dtype, generator_of(self.seed))

    def weight(self) -> Tensor:
        shape = self.out_features, self.in_features
        return numbers(shape, self.kinds[1], self.weight_dtype, generator_of(self.seed + 1))

    def epilogue(self) -> dict[str, Tensor]:
        generator = generator_of(self.seed + 2)
        bias, scale = torch.randn(2, self.out_features, generator=generator).to(self.vectors)
        residual = torch.randn(self.rows, self.out_features, generator=generator).to(self.dtype)
        every = {"bias": bias, "scale": scale, "residual": residual}
        return {name: part for name, part in every.items() if name in self.parts}

    def options(self) -> dict:
        count = None if self.num_rows is None else torch.tensor(self.num_rows, dtype=torch.int32)
        return self.epilogue() | {"activation": self.activation, "num_rows": count}


@st.composite
def layers(draw, dense: bool = False, schemes: tuple[str, ...] = SCHEMES) -> Layer:
    rows, dtype = draw(ROWS), draw(dtypes)
    scheme = draw(st.sampled_from(schemes))
    sized = values.filter(lambda kind: kind != "large")  # or a product leaves float32
    any_size = dense and not scheme.endswith("24")
    return Layer(
        rows=rows,
        out_features=draw(st.integers(1, 70)) if any_size else 8 * draw(st.integers(1, 9)),
        in_features=draw(st.integers(1, 150)) if any_size else 16 * draw(st.integers(1, 12)),
        dtype=dtype,
        weight_dtype=draw(st.sampled_from([dtype, torch.float32])),
        vectors=draw(st.sampled_from([dtype, torch.float32])),
        kinds=(draw(sized), draw(sized)),
        layout=draw(layouts),
        parts=draw(st.frozensets(st.sampled_from(["bias", "scale", "residual"]))),
        activation=draw(st.sampled_from([None, None, "gelu", "gelu_tanh", "quick_gelu", "relu"])),
        num_rows=draw(st.sampled_from([None, None, None, 0, -1, rows // 2, rows + 5])),
        scheme=scheme,
        seed=draw(seeds),
    )


def sums(case: Layer, x: Tensor, weight: Tensor) -> float:
    """The largest sum of magnitudes that an output adds up, scale and residual with it."""
    if not x.numel():
        return 0.0
    product = (x.double().abs() @ weight.double().abs().T).max()
    parts = {name: float(part.double().abs().max()) for name, part in case.epilogue().items()}
    return (float(product) + parts.get("bias", 0)) * parts.get("scale", 1) + parts.get("residual", 0)


@cases(30, 2200, case=layers())
def test_sparse24_linear_within_twice_the_reference_error(case):
    weight, x = mk.sparse24_prune(case.weight()), case.x()
    run = lambda x, weight, backend, **parts: mk.sparse24_linear(  # noqa: E731
        x, weight, **(case.options() | parts), backend=backend
    )
    got = run(x, weight, "cpu")
    wide = {name: part.double() for name, part in case.epilogue().items()}
    exact = run(x.double(), weight.to(torch.float64), "reference", **wide)
    assert_within(got, exact, run(x, weight, "reference"), 4 * EPS * sums(case, x, weight.to_dense()))
    if case.num_rows is not None:
        assert not got[max(case.num_rows, 0) :].any()
    again = case.epilogue()
    if "residual" in again:
        again["residual"] = laid_out(again["residual"], case.layout)
    assert same_bits(run(laid_out(x, case.layout), weight, "cpu", **again), got)


@cases(30, 2200, case=layers(dense=True))
def test_quantized_linear_has_the_bits_of_the_reference(case):
    dense = case.weight()
    weight = mk.quantize(mk.sparse24_prune(dense) if case.scheme == "int8_24" else dense, case.scheme)
    x = case.x()
    run = lambda x, backend, **parts: mk.quantized_linear(x, weight, **(case.options() | parts), backend=backend)  # noqa: E731
    got, bound = run(x, "cpu"), run(x, "reference")
    if case.activation in (None, "relu"):
        assert same_bits(got, bound)
    else:
        bias = case.epilogue().get("bias")
        bias = None if bias is None else bias.float()
        before = mk.quantized_linear(x.float(), weight, bias, backend="reference").double()
        exact = ACTIVATIONS[case.activation](before) * case.epilogue().get("scale", torch.ones(1)).double()
        exact = exact + case.epilogue().get("residual", torch.zeros(1)).double()
        count = case.rows if case.num_rows is None else max(case.num_rows, 0)
        exact[count:] = 0
        assert_within(got, exact, bound, 4 * EPS * sums(case, x, weight.to_dense()))
    assert same_bits(run(laid_out(x, case.layout), "cpu"), got)
    assert same_bits(run(x, "dense"), got)


@cases(
    20, 1400, case=layers(), broken=st.sampled_from([None, math.nan, math.inf]), order=st.randoms(use_true_random=False)
)
def test_a_row_has_the_same_bits_whatever_the_others_are(case, broken, order):
    x, dense = case.x(), mk.sparse24_prune(case.weight())
    ops = (mk.sparse24_linear, dense), (mk.quantized_linear, mk.quantize(dense))
    for op, weight in ops:
        residual = case.epilogue().pop("residual", None)
        rest = {name: part for name, part in case.epilogue().items() if name != "residual"}

        def run(rows, x=x, op=op, weight=weight, residual=residual, rest=rest):
            part = None if residual is None else residual[rows]
            return op(x[rows], weight, **rest, residual=part, activation=case.activation, backend="cpu")

        every = list(range(case.rows))
        together = run(every)
        order.shuffle(every)
        assert same_bits(run(every), together[every])
        some = every[: case.rows // 3 + 1]
        assert same_bits(run(some), together[some])
        if broken is not None and case.rows > 1:
            spoilt = x.clone()
            spoilt[every[0], case.seed % case.in_features] = broken
            assert same_bits(run(every[1:], x=spoilt), together[every[1:]])
            assert same_bits(run(every, x=spoilt)[1:], together[every[1:]])


@cases(20, 1400, case=layers(), score=st.booleans())
def test_pruning_keeps_two_of_four_and_round_trips(case, score):
    weight = laid_out(case.weight(), case.layout)
    ranks = None
    if score:
        ranks = numbers(tuple(weight.shape), case.kinds[0], torch.float32, generator_of(case.seed + 3))
    mask = mk.nm_mask(weight, 2, 4, score=ranks)
    assert (mask.unflatten(1, (-1, 4)).sum(2) == 2).all()
    found = mk.sparse24_prune(weight, score=ranks, backend="cpu")
    expected = mk.sparse24_compress(weight.masked_fill(~mask, 0))
    assert same_bits(found.values, expected.values) and torch.equal(found.indices, expected.indices)
    found.check_indices()
    dense = found.to_dense()
    assert torch.equal(dense, weight.masked_fill(~mask, 0))
    again = mk.sparse24_compress(dense)
    assert same_bits(again.to_dense(), dense)
    unpacked = formats.from_bitmask(**formats.to_bitmask(found))
    assert same_bits(unpacked.to_dense(), dense)


@cases(
    15,
    900,
    n=st.integers(1, 9),
    more=st.integers(0, 40),
    groups=st.integers(0, 6),
    kind=values,
    dtype=dtypes,
    seed=seeds,
)
def test_a_mask_keeps_n_of_every_m_and_the_largest(n, more, groups, kind, dtype, seed):
    m = n + more
    weight = numbers((3, groups * m), kind, dtype, generator_of(seed))
    mask = mk.nm_mask(weight, n, m).unflatten(1, (-1, m)) if groups else mk.nm_mask(weight, n, m)
    if groups:
        assert (mask.sum(2) == n).all()
        magnitudes = weight.abs().unflatten(1, (-1, m))
        least_kept = magnitudes.masked_fill(~mask, torch.inf).amin(2)
        assert (magnitudes.masked_fill(mask, 0).amax(2) <= least_kept).all()
        columns = mk.nm_mask(weight.T.contiguous(), n, m, dim=0).T
        assert torch.equal(columns.reshape(mask.shape), mask)


@cases(10, 600, rows=st.integers(1, 6), columns=st.integers(1, 6), kind=values, seed=seeds)
def test_a_transposable_mask_is_two_of_four_both_ways(rows, columns, kind, seed):
    weight = numbers((4 * rows, 4 * columns), kind, torch.float32, generator_of(seed))
    mask = mk.transposable_mask(weight)
    assert (mask.unflatten(1, (-1, 4)).sum(2) == 2).all() and (mask.unflatten(0, (-1, 4)).sum(1) == 2).all()


@cases(20, 1400, case=layers(dense=True, schemes=("fp8", "fp8_24")), broken=st.sampled_from([None, math.nan, math.inf]))
def test_fp8_sums_are_exact_and_rows_their_own(case, broken):
    dense = case.weight()
    weight = mk.quantize(mk.sparse24_prune(dense) if case.scheme == "fp8_24" else dense, case.scheme)
    x = case.x()
    run = lambda x, **parts: mk.quantized_linear(x, weight, **(case.options() | parts))  # noqa: E731
    got = run(x)
    rounded, x_scale = reference.quantize_rows(x, reference.FP8)
    columns = torch.randperm(case.in_features, generator=generator_of(case.seed))
    whole = reference.to_dense_values(weight.values, weight.indices)
    sums = reference.exact_sums(rounded[:, columns], whole[:, columns])  # in another order
    before = reference.product(sums, x_scale, weight.scale, case.epilogue().get("bias"))
    rest = {name: case.options().get(name) for name in ("residual", "scale", "num_rows")}
    assert same_bits(reference.finish(before, x, case.activation or "none", **rest), got)
    assert same_bits(run(laid_out(x, case.layout)), got)
    exact = x_scale.double()[:, None] * rounded.double()
    largest = x.double().abs().amax(1, keepdim=True) if x.numel() else x.double()
    step = torch.maximum(x.double().abs() / 16, largest / 448 * 2.0**-10)
    assert (((exact - x.double()).abs() <= step * (1 + 1e-5)) | (largest < 2.0**-117)).all()
    if broken is not None and case.rows > 1:
        x[0, case.seed % case.in_features] = broken
        assert same_bits(run(x)[1:], got[1:])


@cases(15, 1000, case=layers(dense=True, schemes=EVERY_SCHEME))
def test_quantizing_is_to_the_nearest_and_once(case):
    dense = case.weight()
    if case.scheme.endswith("24"):
        dense = mk.sparse24_prune(dense).to_dense()
    weight = mk.quantize(dense, case.scheme)
    weight.check_values()
    amax, size = dense.double().abs().amax(1, keepdim=True), dense.double().abs()
    if case.scheme.startswith("int8"):
        half, least = weight.scale.double()[:, None] / 2, 2.0**-119
    else:  # of a step that has the size of the number, or of those below 2^-6
        half, least = torch.maximum(size / 16, weight.scale.double()[:, None] * 2.0**-10), 2.0**-117
    error = (weight.to_dense().double() - dense.double()).abs()
    assert ((error <= half * (1 + 1e-5)) | (amax < least)).all()  # such a row counts as zeros
    again = mk.quantize(weight.to_dense(), case.scheme, scale=weight.scale)
    assert torch.equal(again.to_dense(), weight.to_dense())


@cases(15, 700, case=layers(dense=True, schemes=EVERY_SCHEME), other=st.sampled_from([*DTYPES, torch.float64]))
def test_what_is_saved_is_loaded(case, other):
    sparse = mk.sparse24_prune(numbers((8, 32), case.kinds[1], torch.float32, generator_of(case.seed)).to(other))
    dense = case.weight()
    whole = mk.quantize(mk.sparse24_prune(dense) if case.scheme.endswith("24") else dense, case.scheme)
    plain = laid_out(case.weight(), case.layout)
    with TemporaryDirectory() as folder:
        mk.save_sparse24(Path(folder) / "a.safetensors", {"layer": sparse, "plain": plain})
        loaded = mk.load_sparse24(Path(folder) / "a.safetensors")
        mk.save_quantized(Path(folder) / "b.safetensors", {"layer": whole, "plain": plain})
        quantized = mk.load_quantized(Path(folder) / "b.safetensors")
    assert loaded["layer"].dtype == other and same_bits(loaded["layer"].values, sparse.values)
    assert torch.equal(loaded["layer"].indices, sparse.indices)
    assert same_bits(loaded["plain"], plain) and same_bits(quantized["plain"], plain)
    found = quantized["layer"]
    assert found.scheme == case.scheme and found.dtype == whole.dtype
    assert torch.equal(found.values.view(torch.uint8), whole.values.view(torch.uint8))
    assert torch.equal(quantized["layer"].scale, whole.scale)


@cases(12, 800, case=layers())
def test_dense_linear_within_twice_the_reference_error(case):
    weight, x, rest = case.weight().to(case.dtype), case.x(), {n: p.to(case.dtype) for n, p in case.epilogue().items()}
    run = lambda x, weight, rest, backend: mk.dense_linear(  # noqa: E731
        x, weight, **rest, activation=case.activation, backend=backend
    )
    exact = run(x.double(), weight.double(), {n: p.double() for n, p in rest.items()}, "reference")
    got, bound = run(x, weight, rest, "dense"), run(x, weight, rest, "reference")
    # Torch rounds the product to the dtype before the activation, and its result after it.
    size = sums(case, x, weight)
    assume(size < torch.finfo(case.dtype).max)
    assert_within(got, exact, bound, (4 * EPS + 2 * torch.finfo(case.dtype).eps) * size)
