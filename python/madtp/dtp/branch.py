# SPDX-License-Identifier: Apache-2.0
"""DTP, dynamic token pruning: the step between self-attention and what follows it, in every block of a branch.

Source: MADTP (Cao et al., CVPR 2024, arXiv 2403.02991), section 3.3; docs/method.md lists where we differ and why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor, nn

from madtp.dtp.ragged import RaggedAttention, RaggedBatch
from madtp.dtp.selection_rules import GUIDED, METHOD, RULES
from madtp.handles import find_handle
from madtp.mag import AlignmentGuide, aligned_feature, normalised
from madtp_kernels import AttentionStats, Selection, gather_merge, gather_merge_layernorm, prune_tokens


class Branch:
    """What one branch does and remembers: its temperature, and the selections of the last forward.

    Args:
        name: such as "vision".
        guide: alignment tokens and maps, shared with the other branches.
        attention: runs the branch's attention.
        selection: one of `selection_rules.SELECTIONS`.
    """

    def __init__(self, name: str, guide: AlignmentGuide, attention: RaggedAttention, selection: str = METHOD):
        self.name, self.guide, self.attention, self.selection = name, guide, attention, selection
        self.temperature = 0.0
        self.capacity = "exact"  # or "upper_bound", where a forward needs no gradients: of `madtp.patch`
        self.samples_per_feature = 1  # consecutive parts of the batch whose aligned features are averaged
        self.align = False  # collect the aligned features of MAG, for its loss
        self.observer: Callable[[Tensor, Selection], None] | None = None  # told of every importance (T,) and selection
        self.entered: RaggedBatch | None = None  # what the last forward began with, without the features
        self.begin(None)

    def begin(self, batch: RaggedBatch | None) -> None:
        """Forgets the last forward; the next one is of `batch`."""
        self.entered = None if batch is None else batch.with_x(batch.x.new_empty(0))
        self.layers: list[RaggedBatch] = []  # what is left after each block, without the features
        self.summary_features: list[Tensor] = []  # (B, C): the summary tokens after each block
        self._aligned: list[Tensor] = []

    def entered_length(self) -> int:
        """How long the padded sequences were that the last forward began with."""
        if self.entered is None:
            raise RuntimeError(f"branch {self.name} must have run, and has not yet")
        return self.entered.max_seqlen

    @property
    def prunes(self) -> bool:
        return self.temperature > 0

    @property
    def guided(self) -> bool:
        """Whether the alignment of MAG takes part."""
        return self.selection in GUIDED

    def aligned(self) -> Tensor | None:
        """(B, K, d) aligned features of the last forward, normalised; None if none were collected."""
        parts = self.samples_per_feature
        features = [f.unflatten(0, (parts, -1)).mean(0) if parts > 1 else f for f in self._aligned]
        return normalised(features) if features else None

    def prune(self, batch: RaggedBatch, x: Tensor, stats: AttentionStats | None) -> RaggedBatch:
        """Features after self-attention and its residual x (T, C) -> the tokens that stay.

        batch: as it entered the block; its features give the alignment logits.
        """
        logits, aligned = self._alignment(batch)
        after = self._pruned(batch, x, stats, logits)[0] if self.prunes else batch.with_x(x)
        return replace(after, aligned=aligned)

    def prune_norm(
        self, batch: RaggedBatch, x: Tensor, stats: AttentionStats | None, norm: nn.LayerNorm
    ) -> tuple[RaggedBatch, Tensor]:
        """`prune` and the LayerNorm that follows, in one pass: the tokens that stay, and their normed features."""
        logits, aligned = self._alignment(batch)
        if self.prunes:
            after, normed = self._pruned(batch, x, stats, logits, (norm.weight, norm.bias, norm.eps))
            assert normed is not None, "a norm was given"
        else:
            after, normed = batch.with_x(x), norm(x)
        return replace(after, aligned=aligned), normed

    def end_block(self, batch: RaggedBatch) -> None:
        """Remembers what a block leaves."""
        self.layers.append(replace(batch, x=batch.x.new_empty(0), aligned=None))
        self.summary_features.append(batch.summary_features())
        if batch.aligned is not None:
            self._aligned.append(batch.aligned)

    def _alignment(self, batch: RaggedBatch) -> tuple[Tensor | None, Tensor | None]:
        """The logits (T, K) and the aligned feature (B, K, d) of the tokens entering a block, where they are needed."""
        if not self.guided or not (self.prunes or self.align):
            return None, None
        q, logits = self.guide(self.name, batch.x)
        if not self.align:
            return logits, None
        return logits, aligned_feature(q, logits, batch.cu_seqlens, batch.max_seqlen, batch.summary_index)

    def _pruned(
        self,
        batch: RaggedBatch,
        x: Tensor,
        stats: AttentionStats | None,
        logits: Tensor | None,
        norm: tuple[Tensor, Tensor, float] | None = None,
    ) -> tuple[RaggedBatch, Tensor | None]:
        assert stats is not None, "attention gives statistics where a branch prunes"
        x = batch.for_op(x)
        logits = None if logits is None else batch.for_op(logits)
        normed: Tensor | None = None
        if self.selection == METHOD:
            assert logits is not None, "the method is guided"
            x, normed, selection, importance = prune_tokens(
                x,
                stats,
                logits,
                batch.cu_seqlens,
                self.temperature,
                norm=norm,
                summary_index=batch.summary_index,
                capacity="upper_bound" if batch.fixed else "exact",
            )
        else:
            rule = RULES[self.selection]
            importance, selection = rule(stats, logits, batch.cu_seqlens, self.temperature, batch.summary_index)
            if norm is None:
                x = gather_merge(x, selection)
            else:
                x, normed = gather_merge_layernorm(x, selection, *norm)
        if self.observer is not None:
            self.observer(importance, selection)
        return batch.selected(x, selection), normed


@contextmanager
def exact_capacity(model: nn.Module) -> Iterator[None]:
    """A context in which a patched model has no rows but those of its tokens; any other model stays as it is."""
    handle = find_handle(model)
    before = {} if handle is None else {branch: branch.capacity for branch in handle.pruning.values()}
    try:
        for branch in before:
            branch.capacity = "exact"
        yield
    finally:
        for branch, capacity in before.items():
            branch.capacity = capacity
