# SPDX-License-Identifier: Apache-2.0
"""Properties of `varlen_attention` and `attention_rows` at drawn sizes, options, layouts and values."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import strategies as st
from property_cases import (
    EPS,
    assert_within,
    cases,
    dtypes,
    generator_of,
    laid_out,
    layouts,
    lengths,
    needs_extension,
    numbers,
    ordinary,
    rows_of,
    same_bits,
    seeds,
    values,
)
from ragged_cases import cu_seqlens_of
from torch import Tensor

import madtp_kernels as mk

pytestmark = [pytest.mark.sanitized, needs_extension]

HEADS = st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 2), (6, 2)])
HEAD_DIMS = st.sampled_from([8, 16, 24, 40, 64, 72, 128, 200, 256])
SIDES = st.sampled_from([-1, -1, -1, 0, 1, 2, 5, 40, 2**40])


@dataclass(frozen=True)
class Attention:
    """A call of varlen_attention; `keys` None is self-attention."""

    queries: list[int]
    keys: list[int] | None
    heads: tuple[int, int]
    head_dim: int
    dtype: torch.dtype
    kinds: tuple[str, str]  # of q and k, of v
    layout: str
    causal: bool
    window: tuple[int, int]
    softcap: float
    slopes: str
    scale: float | None
    summary: str
    stats: bool
    seed: int

    def tensors(self) -> list[Tensor]:
        generator = generator_of(self.seed)
        (heads, key_heads), rows = self.heads, sum(self.queries)
        keys = rows if self.keys is None else sum(self.keys)
        q = numbers((rows, heads, self.head_dim), self.kinds[0], self.dtype, generator)
        k = numbers((keys, key_heads, self.head_dim), "normal", self.dtype, generator)
        v = numbers((keys, key_heads, self.head_dim), self.kinds[1], self.dtype, generator)
        if self.kinds[1] == "large":
            v = v / 128  # the sum over keys of exp(score) v is a float32 before it is divided
        return [q, k, v]

    def options(self, sequences: slice = slice(None)) -> dict:
        """The arguments beside the tensors, of some of the sequences."""
        queries = self.queries[sequences]
        generator = generator_of(self.seed + 1)
        arguments = {"cu_seqlens_q": cu_seqlens_of(queries), "max_seqlen_q": max(queries, default=0)}
        if self.keys is not None:
            keys = self.keys[sequences]
            arguments |= {"cu_seqlens_k": cu_seqlens_of(keys), "max_seqlen_k": max(keys, default=0)}
        slopes = torch.rand(len(self.queries), self.heads[0], generator=generator)
        if self.slopes != "none":
            one = torch.ones(self.heads[0])
            arguments["alibi_slopes"] = slopes[sequences] if self.slopes == "by sequence" else one
        if self.stats and self.summary != "first":
            index = torch.tensor([-1 if self.summary == "none" else n - 1 for n in queries], dtype=torch.int32)
            arguments["summary_index"] = index
        return arguments | {
            "causal": self.causal,
            "window_size": self.window,
            "softcap": self.softcap,
            "softmax_scale": self.scale,
        }

    def run(self, tensors, backend: str = "cpu", sequences: slice = slice(None)) -> tuple[Tensor, ...]:
        result = mk.varlen_attention(*tensors, **self.options(sequences), return_stats=self.stats, backend=backend)
        return (result[0], *result[1]) if self.stats else (result,)

    def part(self, tensors, at: int) -> list[Tensor]:
        """The rows of one sequence."""
        queries = rows_of(self.queries)[at]
        keys = queries if self.keys is None else rows_of(self.keys)[at]
        return [tensors[0][queries], tensors[1][keys], tensors[2][keys]]


@st.composite
def attentions(draw, kinds=values) -> Attention:
    queries = draw(lengths)
    cross = draw(st.integers(0, 3)) == 0
    keys = [draw(st.integers(1, 40)) if n else draw(st.integers(0, 3)) for n in queries] if cross else None
    return Attention(
        queries=queries,
        keys=keys,
        heads=draw(HEADS),
        head_dim=draw(HEAD_DIMS),
        dtype=draw(dtypes),
        kinds=(draw(st.one_of(ordinary, st.just("least"))), draw(kinds)),
        layout=draw(layouts),
        causal=draw(st.booleans()),
        window=(draw(SIDES), draw(SIDES)),
        softcap=draw(st.sampled_from([0.0, 0.0, 0.5, 30.0])),
        slopes=draw(st.sampled_from(["none", "none", "by head", "by sequence"])),
        scale=draw(st.sampled_from([None, None, 1.0, 0.0, -0.3, 8.0])),
        summary=draw(st.sampled_from(["first", "none", "last"])),
        stats=not cross and draw(st.booleans()),
        seed=draw(seeds),
    )


def magnitudes(case: Attention, tensors) -> tuple[float, float]:
    """The largest score that a softmax may see, and the largest value."""
    q, k, v = (t.double() for t in tensors)
    scale = case.head_dim**-0.5 if case.scale is None else abs(case.scale)
    reach = q.flatten(1).abs().sum(1).max() * k.abs().max() * scale if q.numel() and k.numel() else 0.0
    score = min(float(reach), case.softcap or math.inf)
    return score, float(v.abs().max()) if v.numel() else 0.0


@cases(30, 2500, case=attentions())
def test_attention_within_twice_the_reference_error(case):
    tensors = case.tensors()
    exact = case.run([t.double() for t in tensors], "reference")
    bounds = case.run(tensors, "reference")
    got = case.run(tensors)
    score, value = magnitudes(case, tensors)
    sums = 2 * EPS * (1 + score)  # what exp makes of a rounding of the scores
    statistic = sums * max([1, *case.queries])
    sizes = {"out": sums * value, "summary_attention": sums, "received_attention": statistic}
    for name, result, want, bound in zip(sizes, got, exact, bounds, strict=False):
        fits = bound.isfinite()  # the norm of an output above 1e19 does not: its squares leave float32
        assert result[fits].isfinite().all() and (fits.all() or name == "summary_attention"), name
        assert_within(result[fits], want[fits], bound[fits], sizes[name], name)


@cases(14, 1000, case=attentions(kinds=ordinary))
def test_attention_gradients_within_twice_the_reference_error(case):
    def run(dtype, backend):
        tensors = [t.to(dtype).requires_grad_() for t in case.tensors()]
        results = case.run(tensors, backend)
        generator = generator_of(case.seed + 2)
        weights = [torch.randn(r.shape, generator=generator, dtype=torch.float64).bfloat16() for r in results]
        loss = sum((r * w.to(r.dtype)).sum() for r, w in zip(results, weights, strict=True))
        return torch.autograd.grad(loss, tensors)

    tensors = case.tensors()
    score, value = magnitudes(case, tensors)
    sizes = [float(t.double().abs().max()) if t.numel() else 0.0 for t in tensors]
    scale = case.head_dim**-0.5 if case.scale is None else abs(case.scale)
    reach = 16 * EPS * (1 + score) * (1 + value) * max([1, *case.queries, *(case.keys or ())]) * case.heads[0]
    floors = reach * scale * sizes[1] * 4, reach * scale * sizes[0] * 4, reach * 4
    exact, bounds = run(torch.float64, "reference"), run(case.dtype, "reference")
    for name, floor, *results in zip("qkv", floors, run(case.dtype, "cpu"), exact, bounds, strict=True):
        assert_within(*results, floor, f"gradient of {name}")


@cases(20, 1500, case=attentions(), order=st.randoms(use_true_random=False))
def test_attention_has_the_bits_of_each_sequence_alone(case, order):
    tensors = case.tensors()
    together = case.run(tensors)
    views = case.run([laid_out(t, case.layout) for t in tensors])
    assert all(same_bits(a, b) for a, b in zip(views, together, strict=True))
    spans = rows_of(case.queries)
    for at, span in enumerate(spans):
        alone = case.run(case.part(tensors, at), sequences=slice(at, at + 1))
        assert all(same_bits(a[span], b) for a, b in zip(together, alone, strict=True))
    if case.slopes != "by sequence" and case.queries:
        turns = list(range(len(spans)))
        order.shuffle(turns)
        keys = None if case.keys is None else [case.keys[i] for i in turns]
        shuffled = replace(case, queries=[case.queries[i] for i in turns], keys=keys)
        parts = [case.part(tensors, i) for i in turns]
        elsewhere = shuffled.run([torch.cat(column) for column in zip(*parts, strict=True)])
        for a, b in zip(together, elsewhere, strict=True):
            assert same_bits(torch.cat([a[spans[i]] for i in turns]), b)


@cases(
    12,
    800,
    case=attentions(),
    broken=st.sampled_from([math.nan, math.inf, -math.inf]),
    which=st.integers(0, 2),
    at=st.integers(0, 200),
)
def test_a_broken_value_of_attention_stays_in_its_sequence(case, broken, which, at):
    tensors = case.tensors()
    if not tensors[which].shape[0]:
        return
    before = case.run(tensors)
    row = at % tensors[which].shape[0]
    tensors[which][row].view(-1)[at % case.head_dim] = broken
    after = case.run(tensors)
    keys = case.queries if which == 0 or case.keys is None else case.keys
    for span, owner in zip(rows_of(case.queries), rows_of(keys), strict=True):
        if not owner.start <= row < owner.stop:
            assert all(same_bits(a[span], b[span]) for a, b in zip(before, after, strict=True))


@cases(12, 800, case=attentions())
def test_outputs_of_attention_are_means_of_the_values(case):
    tensors = case.tensors()
    out, *statistics = case.run(tensors)
    score, value = magnitudes(case, tensors)
    slack = EPS * 8 * value + 2 * value * torch.finfo(case.dtype).eps
    groups = case.heads[0] // case.heads[1]
    for at, span in enumerate(rows_of(case.queries)):
        v = case.part(tensors, at)[2].double().repeat_interleave(groups, 1)
        if v.numel() and out[span].numel():
            seen = out[span].double()  # a query that sees nothing has zeros
            assert (seen <= v.amax(0).clamp_min(0) + slack).all() and (seen >= v.amin(0).clamp_max(0) - slack).all()
    if statistics:
        summary_attention, received_attention = statistics
        if case.kinds[1] != "large":  # of which the norms leave float32
            assert ((summary_attention >= 0) & (summary_attention <= 1 + 1e-5)).all()
        assert (received_attention >= 0).all()
        for at, span in enumerate(rows_of(case.queries)):
            observers = case.queries[at] - (case.summary != "none" and case.queries[at] > 0)
            masked = case.causal or max(case.window) >= 0
            least, most = (0, math.inf) if masked else (observers, observers * case.heads[0])
            assert least * (1 - 1e-4) <= float(received_attention[span].double().sum()) <= most * (1 + 1e-4)


# --- attention_rows


@dataclass(frozen=True)
class Rows:
    """A call of attention_rows."""

    rows: list[int]
    keys: list[int]
    heads: tuple[int, int]
    head_dim: int
    dtype: torch.dtype
    kind: str
    layout: str
    placed: bool
    scale: float | None
    seed: int

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        generator = generator_of(self.seed)
        q = numbers((sum(self.rows), self.heads[0], self.head_dim), self.kind, self.dtype, generator)
        k = numbers((sum(self.keys), self.heads[1], self.head_dim), "normal", self.dtype, generator)
        position = torch.randint(-2, 45, (sum(self.rows),), generator=generator, dtype=torch.int32)
        return q, k, position if self.placed else None

    def run(self, q, k, position, backend="cpu", rows=None, keys=None):
        cu = cu_seqlens_of(self.rows if rows is None else rows), cu_seqlens_of(self.keys if keys is None else keys)
        return mk.attention_rows(q, k, *cu, position, softmax_scale=self.scale, backend=backend)


@st.composite
def chosen_rows(draw) -> Rows:
    keys = draw(lengths)
    return Rows(
        rows=[draw(st.integers(0, 5)) for _ in keys],
        keys=keys,
        heads=draw(HEADS),
        head_dim=draw(st.sampled_from([8, 20, 64, 72, 128, 264])),
        dtype=draw(dtypes),
        kind=draw(st.one_of(ordinary, st.just("least"))),
        layout=draw(layouts),
        placed=draw(st.booleans()),
        scale=draw(st.sampled_from([None, None, 1.0, 0.0, -0.3])),
        seed=draw(seeds),
    )


@cases(20, 1500, case=chosen_rows())
def test_attention_rows_within_twice_the_reference_error(case):
    q, k, position = case.tensors()
    got = case.run(q, k, position)
    exact = case.run(q.double(), k.double(), position, "reference")
    scale = case.head_dim**-0.5 if case.scale is None else abs(case.scale)
    reach = 0.0
    if q.numel() and k.numel():
        reach = float(q.double().flatten(1).abs().sum(1).max() * k.double().abs().max() * scale)
    assert_within(got, exact, case.run(q, k, position, "reference"), 2 * EPS * (1 + reach))
    for n, rows, keys in zip(case.keys, rows_of(case.rows), rows_of(case.keys), strict=True):
        sees = rows.stop > rows.start if position is None else bool((position[rows] >= 0).any())
        assert float(got[keys].double().sum()) == pytest.approx(float(sees and n > 0), abs=1e-5)


@cases(16, 1200, case=chosen_rows(), broken=st.sampled_from([None, math.nan, math.inf]), at=st.integers(0, 200))
def test_attention_rows_have_the_bits_of_each_sequence_alone(case, broken, at):
    q, k, position = case.tensors()
    if broken is not None and k.shape[0]:
        k[at % k.shape[0], 0, at % case.head_dim] = broken
    together = case.run(q, k, position)
    assert same_bits(case.run(laid_out(q, case.layout), laid_out(k, case.layout), position), together)
    for i, (rows, keys) in enumerate(zip(rows_of(case.rows), rows_of(case.keys), strict=True)):
        place = None if position is None else position[rows]
        assert same_bits(case.run(q[rows], k[keys], place, rows=[case.rows[i]], keys=[case.keys[i]]), together[keys])
