"""DTP, dynamic token pruning: the step between self-attention and what follows it, in every block of a branch.

Source: MADTP (Cao et al., CVPR 2024, arXiv 2403.02991), section 3.3; docs/method.md lists where we differ and why.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from madtp.mag import AlignmentGuide, aligned_feature, normalised
from madtp.packed import Packed, RaggedAttention
from madtp_kernels import (
    AttentionStats,
    Selection,
    gather_merge,
    gather_merge_layernorm,
    prune_tokens,
    score_and_select,
)
from madtp_kernels.reference.ragged import summary_rows
from madtp_kernels.reference.tokens import layout


class Branch:
    """What one branch does and remembers: its temperature, and the selections of the last forward.

    Args:
        name: such as "vision".
        guide: alignment tokens and maps, shared with the other branches.
        attention: runs the branch's attention.
        selection: "instance", each sample keeps its own number of tokens; "batch_max", the published rule: every
            sample keeps as many as the batch's maximum.
    """

    def __init__(self, name: str, guide: AlignmentGuide, attention: RaggedAttention, selection: str = "instance"):
        self.name, self.guide, self.attention, self.selection = name, guide, attention, selection
        self.temperature = 0.0
        self.align = False  # collect the aligned features of MAG, for its loss
        self.observer: Callable[[Tensor, Selection], None] | None = None  # told of every importance (T,) and selection
        self.begin()

    def begin(self) -> None:
        """Forget the last forward."""
        self.layers: list[Packed] = []  # what is left after each block, without the features
        self.summaries: list[Tensor] = []  # (B, C) after each block
        self._aligned: list[Tensor] = []

    @property
    def prunes(self) -> bool:
        return self.temperature > 0

    def aligned(self) -> Tensor | None:
        """(B, K, d) aligned features of the last forward, normalised; None if none were collected."""
        return normalised(self._aligned) if self._aligned else None

    def prune(self, packed: Packed, x: Tensor, stats: AttentionStats | None) -> Packed:
        """Features after self-attention and its residual x (T, C) -> the tokens that stay.

        packed: the batch as it entered the block; its features give the alignment logits.
        """
        logits = self._alignment_logits(packed)
        return self._pruned(packed, x, stats, logits)[0] if self.prunes else packed.with_x(x)

    def prune_norm(
        self, packed: Packed, x: Tensor, stats: AttentionStats | None, norm: nn.LayerNorm
    ) -> tuple[Packed, Tensor]:
        """`prune` and the LayerNorm that follows, in one pass: the tokens that stay, and their normed features."""
        logits = self._alignment_logits(packed)
        if not self.prunes:
            return packed.with_x(x), norm(x)
        return self._pruned(packed, x, stats, logits, (norm.weight, norm.bias, norm.eps))

    def end_block(self, packed: Packed) -> None:
        """Remembers what a block leaves."""
        self.layers.append(packed.with_x(packed.x.new_empty(0)))
        self.summaries.append(packed.summary())

    def _alignment_logits(self, packed: Packed) -> Tensor | None:
        """(T, K) where they are needed; collects the aligned features on the way."""
        if not (self.prunes or self.align):
            return None
        q, logits = self.guide(self.name, packed.x)
        if self.align:
            self._aligned.append(aligned_feature(q, logits, packed.cu_seqlens, packed.max_seqlen))
        return logits

    def _pruned(
        self,
        packed: Packed,
        x: Tensor,
        stats: AttentionStats,
        logits: Tensor,
        norm: tuple[Tensor, Tensor, float] | None = None,
    ) -> tuple[Packed, Tensor | None]:
        if self.selection == "instance":
            x, normed, selection, importance = prune_tokens(
                x, stats, logits, packed.cu_seqlens, self.temperature, norm=norm
            )
        else:
            importance, own = score_and_select(stats, logits, packed.cu_seqlens, self.temperature)
            selection = batch_max(own, importance)
            if norm is None:
                x, normed = gather_merge(x, selection), None
            else:
                x, normed = gather_merge_layernorm(x, selection, *norm)
        if self.observer is not None:
            self.observer(importance, selection)
        return packed.selected(x, selection), normed


def batch_max(selection: Selection, importance: Tensor) -> Selection:
    """The published rule, for comparison: every sample keeps as many tokens as the sample that keeps most, its best.

    A sample with fewer than 2 tokens over that number keeps all. One host read per layer, as published.
    """
    cu_seqlens = selection.input_cu_seqlens
    is_summary = summary_rows(cu_seqlens, None, importance.shape[0])
    bounds = list(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True))
    most = max((int((selection.keep & ~is_summary)[begin:end].sum()) for begin, end in bounds), default=0)
    keep = is_summary.clone()
    for begin, end in bounds:
        prunable = begin + (~is_summary[begin:end]).nonzero().flatten()
        if prunable.numel() - most < 2:
            keep[prunable] = True
        else:
            keep[prunable[importance.detach()[prunable].argsort(descending=True, stable=True)[:most]]] = True
    keep, cu_seqlens_out, source, merge_weight = layout(keep, importance, cu_seqlens)
    source = source[: int(cu_seqlens_out[-1])]
    return Selection(keep, cu_seqlens_out, source, merge_weight, cu_seqlens)
