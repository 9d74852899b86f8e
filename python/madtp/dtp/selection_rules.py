# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a tower stay, by `CompressionConfig.selection`: the method's own rule and those it is compared with.

A rule takes `Tokens` and a temperature and returns an `Outcome`. Those here threshold by the temperature; the others
are the rules of `Keep`, or a user's function like them, which get a count for each sequence: of n prunable tokens
ceil(n / (1 + temperature / HALF)). To add one, write its function and its row in `RULES`, or in
`madtp.dtp.keep_rules.RULES`; the configuration and the branches read the names from here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from madtp.dtp import keep_rules
from madtp.dtp.keep_rules import Candidates, Kept, Rule
from madtp.dtp.threshold import least_first
from madtp_kernels import AttentionStats, Selection, score_and_select, select_tokens, token_importance
from madtp_kernels.ragged import prunable_rows, segment_sum
from madtp_kernels.selection import layout_on_device

HALF = 10.0  # the temperature at which a rule of counts keeps half of the tokens that enter a block


class Tokens(NamedTuple):
    """The tokens of a block, ragged, behind its attention."""

    x: Tensor  # (T, C)
    stats: AttentionStats
    logits: Tensor | None  # (T, K), the alignment of MAG, of a guided rule
    cu_seqlens: Tensor  # (B+1,) int32
    summary_index: Tensor | None  # (B,) int32
    each: int | None = None  # how many tokens of each sequence are prunable, where that is known: of `RaggedBatch`

    def prunable(self) -> Tensor:
        """(T,) bool: all but the summary tokens."""
        return prunable_rows(self.cu_seqlens, self.summary_index, None, self.x.shape[0])

    def lengths(self, prunable: Tensor) -> list[int]:
        """How many tokens of each sequence are prunable. Raises RuntimeError where an export cannot know it."""
        if self.each is not None:
            return [self.each] * (self.cu_seqlens.numel() - 1)
        if torch.compiler.is_exporting():
            raise RuntimeError(
                "attention_mask must be None where a model is exported whose selection keeps a count: "
                "it makes sequences of a length that only a run knows, got a mask; "
                "give unpadded inputs, or set the temperature of this branch to 0"
            )
        return _lengths(prunable, self.cu_seqlens)


class Outcome(NamedTuple):
    importance: Tensor  # (T,), by which pruned tokens are merged
    selection: Selection
    x: Tensor | None = None  # (T, C), where a rule changes the rows it keeps; no pruned token is merged then
    prunable: int | None = None  # how many tokens of each sequence are afterwards, where that is known


def batch_max(tokens: Tokens, temperature: float) -> Outcome:
    """The published rule: every sample keeps as many tokens as the sample that keeps most, its best.

    A sample with fewer than 2 tokens over that number keeps all. Numbers are read on the host, as published.
    """
    assert tokens.logits is not None, "the rule is guided"
    importance, own = score_and_select(
        tokens.stats, tokens.logits, tokens.cu_seqlens, temperature, summary_index=tokens.summary_index
    )
    if torch.compiler.is_exporting():
        raise RuntimeError("selection must not be batch_max in a model that is exported: its counts are read in a run")
    most = max(_lengths(own.keep & tokens.prunable(), tokens.cu_seqlens), default=0)
    return _keep_counts(keep_rules.largest, tokens, importance, importance, lambda length: min(most, length))


def unguided(tokens: Tokens, temperature: float) -> Outcome:
    """The method without MAG: what attention says decides alone.

    S = (S_cls + S_self) / 3, and in the threshold the softmax of A / tau is that of -z / tau, z the importances with
    mean 0 and deviation 1: near the least importance at a low temperature, at the mean at a high one, as with MAG.
    """
    stats, cu_seqlens, summary_index = tokens.stats, tokens.cu_seqlens, tokens.summary_index
    nothing = stats.summary_attention.new_zeros(stats.summary_attention.shape[0], 1)
    importance = token_importance(stats, nothing, cu_seqlens, summary_index=summary_index)
    logits = least_first(importance, cu_seqlens, tokens.prunable())
    selection = select_tokens(importance, logits, cu_seqlens, temperature, summary_index=summary_index)
    return Outcome(importance, selection)


def by_count(rule: Rule, attention: str | None, tokens: Tokens, temperature: float, *, obeys: bool = True) -> Outcome:
    """A rule of `Keep` in a tower, on the prunable tokens of each sequence.

    Args:
        attention: which of the statistics is the importance, by which pruned tokens are merged as well; None: the
            attention that tokens receive is at hand, and they are averaged.
        obeys: whether the rule keeps as many as it is told.
    """
    given = getattr(tokens.stats, attention or "received_attention")
    importance = torch.ones_like(given) if attention is None else given

    def count(length: int) -> int:
        return math.ceil(length / (1 + temperature / HALF))

    return _keep_counts(rule, tokens, given, importance, count, obeys)


def _keep_counts(
    rule: Rule,
    tokens: Tokens,
    given: Tensor,
    importance: Tensor,
    count: Callable[[int], int],
    obeys: bool = True,
) -> Outcome:
    """What a rule keeps of `count(n)` of the n prunable tokens of a sequence; all where fewer than 2 would go.

    Args:
        given: (T,), the importance that the rule sees.
        importance: (T,), by which pruned tokens are merged.
        obeys: of `by_count`.
    """
    prunable = tokens.prunable()
    importance = importance.masked_fill(~prunable, 0)
    lengths = tokens.lengths(prunable)
    counts = [length if length - count(length) < 2 else count(length) for length in lengths]
    if counts == lengths:
        return Outcome(importance, _laid_out(torch.ones_like(prunable), importance, tokens, 0), None, tokens.each)
    rows = keep_rules.rows_of(prunable, sum(lengths))
    logits = None if tokens.logits is None else tokens.logits[rows]
    candidates = Candidates(tokens.x[rows], lengths, given[rows], logits=logits)
    chosen = rule(candidates, counts)
    kept = chosen if isinstance(chosen, Kept) else Kept(chosen, None)
    if not obeys:
        counts = candidates.counts_of(kept.keep)
    fixed = obeys and tokens.each is not None
    keep = torch.ones_like(prunable).index_copy(0, rows, kept.keep)
    if kept.features is None:
        pruned, merged = sum(lengths) - sum(counts), sum(n > c for n, c in zip(lengths, counts, strict=True))
        selection = _laid_out(keep, importance, tokens, pruned - merged)
        return Outcome(importance, selection, None, counts[0] + 1 if fixed else None)
    ends = torch.nn.functional.pad(_count(keep, tokens.cu_seqlens).cumsum(0), (1, 0)).int()
    source = keep_rules.rows_of(keep, keep.shape[0] - sum(lengths) + sum(counts)).int()
    nothing = torch.zeros_like(importance)
    selection = Selection(keep, tokens.cu_seqlens, ends, source, nothing)
    changed = keep_rules.rows_of(keep & prunable, sum(counts))
    x = tokens.x.index_copy(0, changed, kept.features)
    return Outcome(importance, selection, x, counts[0] if fixed else None)


def checked(rule: Rule) -> Rule:
    """A user's function, of whose result is made sure that it is one."""

    def choose(candidates: Candidates, counts: Sequence[int]) -> Tensor | Kept:
        return keep_rules.checked(rule(candidates, counts), candidates, keep_rules.name_of(rule))

    return choose


METHOD = "instance"  # each sample keeps its own number of tokens: `madtp_kernels.prune_tokens`, one call for all of it
ATTENTION = {"received": "received_attention", "cls": "summary_attention", "visionzip": "summary_attention"}
# What a tower has not: a text in the space of its tokens, and the last token of a prompt.
ELSEWHERE = [name for name, entry in keep_rules.RULES.items() if entry.needs_text or name == "fastv"]
RULES: dict[str, Callable[[Tokens, float], Outcome]] = {
    "batch_max": batch_max,
    "unguided": unguided,
    "static": partial(by_count, keep_rules.largest, "summary_attention"),  # "cls" by the name it had first
    **{
        name: partial(by_count, entry.choose, ATTENTION.get(name))
        for name, entry in keep_rules.RULES.items()
        if name not in ELSEWHERE
    },
    "random": partial(by_count, partial(keep_rules.random, seed=None), None),  # other tokens in every block and step
}
GUIDED = (METHOD, "batch_max")  # those that need the alignment of MAG; the others get None for their logits
SELECTIONS = (METHOD, *RULES)


def choose(selection: str | Rule, tokens: Tokens, temperature: float) -> Outcome:
    """What a selection other than the method's own does."""
    if callable(selection):
        if torch.compiler.is_exporting():
            name = keep_rules.name_of(selection)
            raise RuntimeError(f"selection must be a rule by its name in a model that is exported, got {name}")
        return by_count(checked(selection), None, tokens, temperature, obeys=False)
    return RULES[selection](tokens, temperature)


def is_selection(value: object) -> bool:
    return callable(value) or (isinstance(value, str) and value in SELECTIONS)


def _laid_out(keep: Tensor, importance: Tensor, tokens: Tokens, fewer: int) -> Selection:
    """fewer: by how many rows the batch is shorter then."""
    keep, cu_seqlens_out, source, merge_weight = layout_on_device(keep, importance, tokens.cu_seqlens)
    return Selection(keep, tokens.cu_seqlens, cu_seqlens_out, source[: keep.shape[0] - fewer], merge_weight)


def _count(which: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(B,) float32: how many rows of each sequence are of `which` (T,)."""
    return segment_sum(which.float(), cu_seqlens)


def _lengths(which: Tensor, cu_seqlens: Tensor) -> list[int]:
    """`_count`, on the host."""
    return [int(count) for count in _count(which, cu_seqlens).tolist()]
