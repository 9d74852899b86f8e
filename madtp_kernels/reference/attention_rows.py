# SPDX-License-Identifier: Apache-2.0
"""What chosen queries of ragged sequences attend to, sequence by sequence.

Source: FastV (Chen et al., ECCV 2024, arXiv 2403.06764), section 4, ranks the image tokens of a decoder by it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from madtp_kernels.selection import bounds


class _Maps(NamedTuple):
    """Of one sequence of R rows and N keys, which Hk key heads have, each read by G query heads."""

    rows: slice  # of q_rows
    keys: slice  # of k
    scaled: Tensor  # (R, Hk, G, D) queries times softmax_scale
    probabilities: Tensor  # (Hk, G, R, N), zeros where a row does not see a key
    observers: Tensor  # (): heads times the rows that see a key, at least 1


def _attend(q_rows, k, cu_seqlens_q, cu_seqlens_k, row_position, softmax_scale) -> Iterator[_Maps]:
    wide = torch.promote_types(q_rows.dtype, torch.float32)
    heads, key_heads = q_rows.shape[1], k.shape[1]
    for spans in zip(bounds(cu_seqlens_q), bounds(cu_seqlens_k), strict=True):
        rows, keys = (slice(*span) for span in spans)
        scaled = q_rows[rows].to(wide).unflatten(1, (key_heads, heads // key_heads)) * softmax_scale
        scores = torch.einsum("rhgd,nhd->hgrn", scaled, k[keys].to(wide))
        if row_position is None:
            visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=k.device)
        else:
            visible = torch.arange(scores.shape[-1], device=k.device) <= row_position[rows, None]  # (R, N)
        # A finite floor keeps the softmax of a row that sees nothing defined.
        probabilities = scores.masked_fill(~visible, torch.finfo(wide).min).softmax(dim=-1).masked_fill(~visible, 0)
        observers = visible.any(dim=1).sum().clamp_min(1) * heads
        yield _Maps(rows, keys, scaled, probabilities, observers)


def attention_rows(
    q_rows: Tensor,  # (R, H, D)
    k: Tensor,  # (T, Hk, D)
    cu_seqlens_q: Tensor,  # (B+1,) int32
    cu_seqlens_k: Tensor,  # (B+1,) int32
    row_position: Tensor | None,  # (R,) int32
    softmax_scale: float,
) -> Tensor:  # (T,)
    """The mean over heads, and over the rows of a sequence that see a key, of softmax_j(softmax_scale q_i k_j).

    Head h reads key head h // (H / Hk). Row i sees the keys up to row_position_i of its sequence.
    """
    maps = _attend(q_rows, k, cu_seqlens_q, cu_seqlens_k, row_position, softmax_scale)
    parts = [m.probabilities.sum(dim=(0, 1, 2)) / m.observers for m in maps]
    return torch.cat(parts) if parts else k.new_zeros(0, dtype=torch.promote_types(k.dtype, torch.float32))


def attention_rows_backward(
    grad: Tensor,  # (T,)
    q_rows: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    row_position: Tensor | None,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:  # like q_rows, k
    """The gradient of `attention_rows` to q_rows and k, exactly."""
    grad_q, grad_k = [], []
    for m in _attend(q_rows, k, cu_seqlens_q, cu_seqlens_k, row_position, softmax_scale):
        through = grad[m.keys] / m.observers  # of every probability of a key
        mean = (m.probabilities * through).sum(dim=-1, keepdim=True)
        d_scores = m.probabilities * (through - mean)
        keys = k[m.keys].to(m.scaled.dtype)
        grad_q.append(torch.einsum("hgrn,nhd->rhgd", d_scores, keys).flatten(1, 2) * softmax_scale)
        grad_k.append(torch.einsum("hgrn,rhgd->nhd", d_scores, m.scaled))
    return (
        torch.cat(grad_q).to(q_rows.dtype) if grad_q else torch.zeros_like(q_rows),
        torch.cat(grad_k).to(k.dtype) if grad_k else torch.zeros_like(k),
    )
