# SPDX-License-Identifier: Apache-2.0
"""Properties of the token ops at drawn sizes, options, layouts and values."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st
from property_cases import (
    EPS,
    assert_within,
    cases,
    channels,
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
from madtp_kernels.selection import ARGMAX_TEMPERATURE, PADDING

pytestmark = [
    pytest.mark.sanitized,
    needs_extension,
    pytest.mark.filterwarnings(r"ignore:var\(\). degrees of freedom:UserWarning"),  # the reference on no rows
]

STATISTICS = ("normal", "equal", "zeros", "few integers", "subnormal", "large", "of all sizes")
LOGITS = ("normal", "normal", "negative", "equal", "zeros", "far apart", "few integers")
TEMPERATURES = st.sampled_from([0.0, 1e-30, 0.003, 0.01, 0.5, 1.0, 1.0, 5.0, 1e6, 1e30])


@dataclass(frozen=True)
class Step:
    """A prune step: what comes in, and what is asked for."""

    lengths: list[int]
    alignment_tokens: int
    channels: int
    dtype: torch.dtype
    affine: bool  # norm weights in float32, else in the dtype of x
    kinds: tuple[str, str, str]  # of the statistics, the logits, x
    layout: str
    temperature: float
    summary: str
    protected: bool
    seed: int

    def arguments(self) -> dict:
        generator, rows = generator_of(self.seed), sum(self.lengths)
        draw = torch.rand(2, rows, generator=generator, dtype=torch.float64)
        kind = self.kinds[0]
        if kind == "equal":
            draw = torch.full_like(draw, 0.3)
        elif kind == "few integers":
            draw = (3 * draw).round()
        elif kind == "of all sizes":
            draw = 10 ** (60 * draw - 40)
        draw *= {"zeros": 0.0, "subnormal": 1e-41, "large": 1e36}.get(kind, 1.0)
        logits = 3 * torch.randn(rows, self.alignment_tokens, generator=generator, dtype=torch.float64)
        kind = self.kinds[1]
        if kind == "negative":
            logits = -logits.abs()
        elif kind == "equal":
            logits = torch.full_like(logits, 0.7)
        elif kind == "few integers":
            logits = logits.round()
        logits *= {"zeros": 0.0, "far apart": 1e3}.get(kind, 1.0)
        index = None
        if self.summary != "first":
            index = torch.tensor([-1 if self.summary == "none" else n - 1 for n in self.lengths], dtype=torch.int32)
        protected = torch.rand(rows, generator=generator) < 0.25 if self.protected else None
        return {
            "stats": mk.AttentionStats(*draw.float()),
            "mag_logits": logits.to(self.dtype),
            "summary_index": index,
            "protected": protected,
        }

    def x(self) -> Tensor:
        return numbers((sum(self.lengths), self.channels), self.kinds[2], self.dtype, generator_of(self.seed + 1))

    def norm(self) -> tuple[Tensor, Tensor]:
        affine = torch.randn(2, self.channels, generator=generator_of(self.seed + 2))
        return tuple(affine.to(torch.float32 if self.affine else self.dtype))

    def select(self, arguments=None, backend="cpu", lengths=None, capacity="exact"):
        return mk.score_and_select(
            **(arguments or self.arguments()),
            cu_seqlens=cu_seqlens_of(self.lengths if lengths is None else lengths),
            temperature=self.temperature,
            capacity=capacity,
            backend=backend,
        )

    def candidates(self, arguments) -> Tensor:
        """(T,) bool: neither summary token nor protected."""
        free = torch.ones(sum(self.lengths), dtype=torch.bool)
        for span, length in zip(rows_of(self.lengths), self.lengths, strict=True):
            if length and self.summary != "none":
                free[span.start if self.summary == "first" else span.stop - 1] = False
        return free if arguments["protected"] is None else free & ~arguments["protected"]


@st.composite
def steps(draw, of_x=values) -> Step:
    return Step(
        lengths=draw(lengths),
        alignment_tokens=draw(st.sampled_from([1, 3, 7, 16, 100])),
        channels=draw(channels),
        dtype=draw(dtypes),
        affine=draw(st.booleans()),
        kinds=(draw(st.sampled_from(STATISTICS)), draw(st.sampled_from(LOGITS)), draw(of_x)),
        layout=draw(layouts),
        temperature=draw(TEMPERATURES),
        summary=draw(st.sampled_from(["first", "none", "last"])),
        protected=draw(st.booleans()),
        seed=draw(seeds),
    )


def in_float64(arguments: dict) -> dict:
    wide = mk.AttentionStats(*(t.double() for t in arguments["stats"]))
    return arguments | {"stats": wide, "mag_logits": arguments["mag_logits"].double()}


@cases(25, 1800, case=steps())
def test_importance_within_twice_the_reference_error(case):
    arguments = case.arguments()
    run = lambda arguments, backend: mk.token_importance(  # noqa: E731
        **arguments, cu_seqlens=cu_seqlens_of(case.lengths), backend=backend
    )
    got, bound = run(arguments, "cpu"), run(arguments, "reference")
    exact = run(in_float64(arguments), "reference")
    for span in rows_of(case.lengths):
        size = 4 * EPS * float(exact[span].abs().max()) if span.stop > span.start else 0.0
        assert_within(got[span], exact[span], bound[span], size + 1e-45, span)
    assert (got[~case.candidates(arguments)] == 0).all()


@cases(30, 2500, case=steps())
def test_a_selection_is_whole(case):
    arguments = case.arguments()
    importance, selection = case.select(arguments)
    cu = cu_seqlens_of(case.lengths)
    separate = {"mag_logits": arguments["mag_logits"], "summary_index": arguments["summary_index"]}
    separate |= {"cu_seqlens": cu, "protected": arguments["protected"], "backend": "cpu"}
    again = mk.select_tokens(importance, temperature=case.temperature, **separate)
    assert same_bits(importance, mk.token_importance(stats=arguments["stats"], **separate))
    assert all(same_bits(a, b) for a, b in zip(selection, again, strict=True))
    padded = case.select(arguments, capacity="upper_bound")[1]
    rows = int(selection.cu_seqlens_out[-1])
    assert same_bits(padded.source[:rows], selection.source) and (padded.source[rows:] == PADDING).all()

    assert selection.keep[~case.candidates(arguments)].all()
    assert selection.source.numel() == rows and selection.cu_seqlens_out[0] == 0
    if case.temperature == 0:
        assert selection.keep.all()
    for at, span in enumerate(rows_of(case.lengths)):
        keep, weight = selection.keep[span], selection.merge_weight[span]
        kept = (span.start + keep.nonzero().flatten()).tolist()  # ascending
        merged = [] if keep.all() else [-(at + 1)]
        out = slice(*selection.cu_seqlens_out[at : at + 2].tolist())
        assert selection.source[out].tolist() == kept + merged
        assert (~keep).sum() != 1 and (weight[keep] == 0).all()
        if merged:
            assert (weight >= 0).all() and float(weight.double().sum()) == pytest.approx(1, abs=1e-5)


def margins(importance: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """(N,) how far each candidate of a sequence is above the threshold, in the largest deficit; float64."""
    deficit = importance.max() - importance
    threshold = ((logits / temperature).softmax(0) * deficit[:, None]).sum(0).max()
    threshold = threshold + (1 - min(temperature / ARGMAX_TEMPERATURE, 1.0)) * (deficit.max() - threshold)
    return (threshold - deficit) / deficit.max().clamp_min(1e-300)


@cases(25, 1800, case=steps())
def test_a_token_stays_where_it_is_above_the_threshold(case):
    arguments = case.arguments()
    importance, selection = case.select(arguments)
    exact = mk.select_tokens(
        importance.double(),
        arguments["mag_logits"].double(),
        cu_seqlens_of(case.lengths),
        case.temperature,
        summary_index=arguments["summary_index"],
        protected=arguments["protected"],
        backend="reference",
    )
    free = case.candidates(arguments)
    for span in rows_of(case.lengths):
        if torch.equal(selection.keep[span], exact.keep[span]):
            close = exact.merge_weight[span].float()
            torch.testing.assert_close(selection.merge_weight[span], close, rtol=1e-4, atol=1e-6)
            continue
        # They may differ by what float32 rounds of a threshold: about some token, or about whether two go at all.
        rows = span.start + free[span].nonzero().flatten()
        logits = arguments["mag_logits"][rows].double()
        margin = margins(importance[rows].double(), logits, case.temperature)
        near = margin.abs() <= 1e-5 * (1 + min(float(logits.abs().max()) / case.temperature, 100))
        differs = selection.keep[rows] != exact.keep[rows]
        assert near.any() and (bool(near[differs].all()) or int((margin <= 0).sum()) <= 2), span


def errors_of_norms(out, normed, scaled, selection, weight, bias) -> tuple[tuple[float, float], float]:
    """Of both norms of the rows as stored, and the largest element in standard deviations."""
    real = selection.source != PADDING
    rows, w, b = out[real].double(), weight.double(), bias.double()
    deviation = (rows.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    layernorm = (rows - rows.mean(1, keepdim=True)) / deviation * w + b
    rmsnorm = rows * (rows.square().mean(1, keepdim=True) + 1e-5).rsqrt() * w
    found = zip((normed, scaled), (layernorm, rmsnorm), strict=True)
    errors = [float((got[real].double() - exact).abs().amax()) if real.any() else 0.0 for got, exact in found]
    return tuple(errors), float((rows.abs() / deviation).amax()) if real.any() else 0.0


@cases(25, 2000, case=steps())
def test_gathers_within_twice_the_reference_error(case):
    selection = case.select(capacity="upper_bound" if case.affine else "exact")[1]
    x, (weight, bias) = case.x(), case.norm()
    x = x / 128 if case.kinds[2] == "large" else x

    def run(x, selection, weight, bias, backend):
        out, normed = mk.gather_merge_layernorm(x, selection, weight, bias, 1e-5, backend=backend)
        again, scaled = mk.gather_merge_rmsnorm(x, selection, weight, 1e-5, backend=backend)
        assert same_bits(out, again) and same_bits(out, mk.gather_merge(x, selection, backend=backend))
        return out, normed, scaled

    got, bound = (run(x, selection, weight, bias, backend) for backend in ("cpu", "reference"))
    wide = selection._replace(merge_weight=selection.merge_weight.double())
    exact = mk.gather_merge(x.double(), wide, backend="reference")
    size = float(x.double().abs().max()) if x.numel() else 0.0
    assert_within(got[0], exact, bound[0], 8 * EPS * size, "merged")  # of up to 65 rows, one after another
    if got[0].numel() and case.kinds[2] != "large":  # the squares of large numbers leave float32
        errors, reach = zip(
            *(errors_of_norms(*results, selection, weight, bias) for results in (got, bound)), strict=True
        )
        noise = 4 * EPS * (1 + reach[0]) * float(weight.abs().max()) + 4 * EPS * float(bias.abs().max())
        assert all(error <= 2 * allowed + noise for error, allowed in zip(*errors, strict=True)), (errors, noise)
    views = run(laid_out(x, case.layout), selection, weight, bias, "cpu")
    assert all(same_bits(a, b) for a, b in zip(views, got, strict=True))
    kept = selection.source >= 0
    assert torch.equal(got[0][kept], x[selection.source[kept].long()])
    assert not any(out[selection.source == PADDING].any() for out in got)
    ones = mk.gather_merge(torch.ones(x.shape[0], 3), selection, backend="cpu")[selection.source != PADDING]
    torch.testing.assert_close(ones, torch.ones_like(ones), rtol=0, atol=1e-5)  # no mass is lost or made


@cases(14, 1000, case=steps(of_x=ordinary))
def test_gradients_of_the_gather_within_twice_the_reference_error(case):
    selection, x = case.select()[1], case.x()
    grad = torch.randn(selection.source.numel(), case.channels, generator=generator_of(case.seed + 3)).to(case.dtype)
    wide = selection._replace(merge_weight=selection.merge_weight.double())
    run = torch.ops.madtp.gather_merge_backward
    exact = run(grad.double(), x.double(), *wide, "reference")
    size = float(x.double().abs().max()) if x.numel() else 0.0
    floors = 4 * EPS * 5, EPS * case.channels * 5 * size
    for *results, floor in zip(
        run(grad, x, *selection, "cpu"), exact, run(grad, x, *selection, "reference"), floors, strict=True
    ):
        assert_within(*results, floor)
    strided = run(laid_out(grad, case.layout), laid_out(x, case.layout), *selection, "cpu")
    assert all(same_bits(a, b) for a, b in zip(strided, run(grad, x, *selection, "cpu"), strict=True))


@cases(
    20,
    1500,
    case=steps(),
    order=st.randoms(use_true_random=False),
    broken=st.sampled_from([None, None, math.nan, math.inf]),
)
def test_a_prune_step_has_the_bits_of_each_sequence_alone(case, order, broken):
    arguments, x, norm = case.arguments(), case.x(), (*case.norm(), 1e-5)
    if broken is not None and x.shape[0]:
        arguments["stats"].received_attention[case.seed % x.shape[0]] = broken
        x[(case.seed // 7) % x.shape[0]] = broken

    def run(arguments, x, lengths):
        pruned = mk.prune_tokens(
            x, cu_seqlens=cu_seqlens_of(lengths), temperature=case.temperature, norm=norm, backend="cpu", **arguments
        )
        ends = pruned.selection.cu_seqlens_out.tolist()
        spans = [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]
        per_row = pruned.importance, pruned.selection.keep, pruned.selection.merge_weight
        return [
            (*(t[rows] for t in per_row), pruned.x[span], pruned.normed[span])
            for rows, span in zip(rows_of(lengths), spans, strict=True)
        ]

    def part(at):
        rows, index = rows_of(case.lengths)[at], arguments["summary_index"]
        stats = mk.AttentionStats(*(t[rows] for t in arguments["stats"]))
        protected = None if arguments["protected"] is None else arguments["protected"][rows]
        return {
            "stats": stats,
            "mag_logits": arguments["mag_logits"][rows],
            "summary_index": None if index is None else index[at : at + 1],
            "protected": protected,
        }, x[rows]

    together = run(arguments, x, case.lengths)
    views = {
        "stats": mk.AttentionStats(*torch.stack(arguments["stats"], 1).unbind(1)),
        "mag_logits": laid_out(arguments["mag_logits"], case.layout),
        "protected": None if arguments["protected"] is None else laid_out(arguments["protected"], "offset"),
    }
    parts = [part(at) for at in range(len(case.lengths))]
    alone = [run(given, rows, [n])[0] for (given, rows), n in zip(parts, case.lengths, strict=True)]
    for other in (run(arguments | views, laid_out(x, case.layout), case.lengths), alone):
        for a, b in zip(together, other, strict=True):
            assert all(same_bits(p, q) for p, q in zip(a, b, strict=True))
    turns = list(range(len(case.lengths)))
    order.shuffle(turns)
    if turns:
        rows = torch.cat([torch.arange(span.start, span.stop) for span in (rows_of(case.lengths)[i] for i in turns)])
        index = arguments["summary_index"]
        shuffled = {
            "stats": mk.AttentionStats(*(t[rows] for t in arguments["stats"])),
            "mag_logits": arguments["mag_logits"][rows],
            "summary_index": None if index is None else index[turns],
            "protected": None if arguments["protected"] is None else arguments["protected"][rows],
        }
        elsewhere = run(shuffled, x[rows], [case.lengths[i] for i in turns])
        for i, b in zip(turns, elsewhere, strict=True):
            assert all(same_bits(p, q) for p, q in zip(together[i], b, strict=True))


@cases(10, 700, case=steps(), broken=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_what_kept_rows_hold_does_not_reach_a_merged_row(case, broken):
    selection, x = case.select()[1], case.x()
    merged = mk.gather_merge(x, selection, backend="cpu")[selection.source < 0]
    x[selection.keep] = broken
    assert same_bits(mk.gather_merge(x, selection, backend="cpu")[selection.source < 0], merged)
