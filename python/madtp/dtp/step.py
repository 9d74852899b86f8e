# SPDX-License-Identifier: Apache-2.0
"""DTP, dynamic token pruning: the step between self-attention and what follows it, in every block of a branch.

Source: MADTP (Cao et al., CVPR 2024, arXiv 2403.02991), section 3.3; docs/method.md lists where we differ and why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from madtp.dtp.keep_rules import Rule
from madtp.dtp.ragged import RaggedAttention, RaggedBatch
from madtp.dtp.selection_rules import GUIDED, METHOD, Tokens, choose
from madtp.hooks import is_watched
from madtp.mag import AlignmentGuide, aligned_feature
from madtp_kernels import AttentionStats, Selection, gather_merge, gather_merge_layernorm, prune_tokens


@dataclass(frozen=True)
class PruningStep:
    """The step between self-attention and what follows it, as one forward does it in all of its blocks."""

    name: str  # of the branch
    guide: AlignmentGuide
    attention: RaggedAttention
    selection: str | Rule
    temperature: float
    first_layer: int  # whose tokens are pruned; see `at_layer`
    align: bool
    observer: Callable[[Tensor, Selection], None] | None

    @property
    def prunes(self) -> bool:
        return self.temperature > 0

    def at_layer(self, layer: int) -> PruningStep:
        """As the block of this number does it, counted from 0: those before the first layer keep all tokens."""
        return self if layer >= self.first_layer else replace(self, temperature=0.0)

    @property
    def guided(self) -> bool:
        """Whether the alignment of MAG takes part."""
        return self.selection in GUIDED

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
        if not self.prunes or not _can_be_fused(norm):
            after = self.prune(batch, x, stats)
            return after, norm(after.x)
        logits, aligned = self._alignment(batch)
        after, normed = self._pruned(batch, x, stats, logits, (norm.weight, norm.bias, norm.eps))
        assert normed is not None, "a norm was given"
        return replace(after, aligned=aligned), normed

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
        prunable: int | None = None
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
            tokens = Tokens(x, stats, logits, batch.cu_seqlens, batch.summary_index, batch.prunable)
            importance, selection, changed, prunable = choose(self.selection, tokens, self.temperature)
            x = x if changed is None else changed
            if norm is None:
                x = gather_merge(x, selection)
            else:
                x, normed = gather_merge_layernorm(x, selection, *norm)
        if self.observer is not None:
            self.observer(importance, selection)
        return batch.selected(x, selection, prunable), normed


def _can_be_fused(norm: nn.LayerNorm) -> bool:
    plain = type(norm).forward is nn.LayerNorm.forward and norm.weight is not None and norm.bias is not None
    return plain and not is_watched(norm)
