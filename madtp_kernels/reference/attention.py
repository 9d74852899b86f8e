# SPDX-License-Identifier: Apache-2.0
"""Attention over ragged sequences, with the importance statistics that token pruning needs.

Source: MADTP (Cao et al., CVPR 2024, arXiv 2403.02991), section 3.3; docs/method.md gives S_cls and S_self.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from madtp_kernels.ragged import pad, summary_rows, unpad


class _Maps(NamedTuple):
    """The padded intermediates that forward and backward share; B sequences, at most Nq and Nk rows."""

    queries: Tensor  # (B, Nq, H, D), scaled
    keys: Tensor  # (B, Nk, H, D), those of a group repeated
    values: Tensor  # (B, Nk, H, D), likewise
    slopes: Tensor | None  # (B, H, Nq, Nk) derivative of the soft cap
    probabilities: Tensor  # (B, H, Nq, Nk), zeros in the row of a query that sees no key
    out: Tensor  # (B, Nq, H, D)
    lse: Tensor  # (B, H, Nq)
    visible: Tensor  # (B, Nq, Nk) bool
    real_queries: Tensor  # (B, Nq) bool
    masked: bool  # whether some keys are hidden from some queries


def _attend(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale,
    causal, window_left, window_right, softcap, alibi_slopes,
) -> _Maps:  # fmt: skip
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    queries, real_queries = pad(q.to(wide) * softmax_scale, cu_seqlens_q, max_seqlen_q)
    keys, real_keys = pad(k.to(wide).repeat_interleave(group, dim=1), cu_seqlens_k, max_seqlen_k)
    values, _ = pad(v.to(wide).repeat_interleave(group, dim=1), cu_seqlens_k, max_seqlen_k)
    distance = _distances(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    visible = real_keys[:, None, :].expand(-1, max_seqlen_q, -1)
    if causal or window_right >= 0:
        visible = visible & (distance >= -(0 if causal else window_right))
    if window_left >= 0:
        visible = visible & (distance <= window_left)
    scores, slopes = torch.einsum("bihd,bjhd->bhij", queries, keys), None
    if softcap > 0:
        bent = (scores / softcap).tanh()
        scores, slopes = softcap * bent, 1 - bent**2
    if alibi_slopes is not None:
        slope = alibi_slopes.to(wide).expand(cu_seqlens_q.numel() - 1, -1)
        scores = scores - slope[:, :, None, None] * distance.abs()[:, None]
    # A finite floor keeps the softmax defined where nothing is seen; padding rows are dropped by `unpad`.
    scores = scores.masked_fill(~visible[:, None], torch.finfo(wide).min)
    probabilities = scores.softmax(dim=-1)
    lse = scores.logsumexp(dim=-1)
    blind = ~visible.any(dim=-1)[:, None]  # (B, 1, Nq)
    probabilities = probabilities.masked_fill(blind[..., None], 0)
    lse = lse.masked_fill(blind, -torch.inf)
    out = torch.einsum("bhij,bjhd->bihd", probabilities, values)
    masked = causal or window_left >= 0 or window_right >= 0
    return _Maps(queries, keys, values, slopes, probabilities, out, lse, visible, real_queries, masked)


def _distances(cu_seqlens_q, cu_seqlens_k, max_seqlen_q: int, max_seqlen_k: int) -> Tensor:
    """(B, Nq, Nk): how far key j lies before query i; the last query stands at the last key."""
    device = cu_seqlens_q.device
    shift = cu_seqlens_k.diff() - cu_seqlens_q.diff()
    position = torch.arange(max_seqlen_q, device=device) + shift[:, None]
    return position[:, :, None] - torch.arange(max_seqlen_k, device=device)


class _Sharing(NamedTuple):
    """What the statistics need of the maps."""

    is_summary: Tensor  # (B, N) bool
    counted: Tensor  # (B, N, N) bool: pairs (i, j) that enter `received_attention`
    observers: Tensor  # (B, N) or 1: what `received_attention` is divided by
    norms: Tensor  # (B, N, H) ||O||
    head_share: Tensor  # (B, N, H) ||O[h,j]|| / sum_h ||O[h,j]||
    from_summary: Tensor  # (B, N, H) P[h,s,j]


def _share_heads(maps: _Maps, cu_seqlens, summary_index, rows: int) -> _Sharing:
    is_summary, _ = pad(summary_rows(cu_seqlens, summary_index, rows), cu_seqlens, maps.out.shape[1])
    counted = (maps.real_queries & ~is_summary)[:, :, None] & maps.visible
    observers = counted.sum(dim=1).clamp_min(1) if maps.masked else torch.ones_like(is_summary, dtype=torch.int64)
    norms = torch.linalg.vector_norm(maps.out, dim=-1)
    head_share = norms / norms.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(norms.dtype).tiny)
    from_summary = (maps.probabilities * is_summary[:, None, :, None]).sum(dim=2).transpose(1, 2)
    return _Sharing(is_summary, counted, observers, norms, head_share, from_summary)


def varlen_attention(
    q: Tensor,  # (Tq, H, D)
    k: Tensor,  # (Tk, Hk, D)
    v: Tensor,  # (Tk, Hk, D)
    cu_seqlens_q: Tensor,  # (B+1,) int32
    cu_seqlens_k: Tensor,  # (B+1,) int32
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_left: int,  # -1: no bound
    window_right: int,
    softcap: float,  # 0: none
    alibi_slopes: Tensor | None,  # (H,) or (B, H) float32
    summary_index: Tensor | None,  # (B,) int32
    return_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Softmax attention inside each sequence: P[h,i] = softmax over the keys j that query i sees of

    softcap tanh(softmax_scale q_i k_j / softcap) - alibi_slopes[h] |p_i - j|, at p_i = i + Nk - Nq: the last query
    stands at the last key. It sees p_i - window_left <= j <= p_i + window_right, and j <= p_i where causal.
    Head h reads key head h // (H / Hk). With statistics (self-attention only) also, per token j,

    summary_attention_j = sum_h P[h,s,j] ||O[h,j]|| / sum_h ||O[h,j]||
    received_attention_j = sum over queries i != s of max_h P[h,i,j]; masked: divided by the number that see j.

    -> out (Tq, H, D), zeros for a query that sees no key; summary_attention (Tk,) and received_attention (Tk,), empty
    without statistics; and lse (H, Tq), the logarithm of the sum that the softmax divides by, -inf where it is empty.
    """
    maps = _attend(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale,
        causal, window_left, window_right, softcap, alibi_slopes,
    )  # fmt: skip
    out = unpad(maps.out, cu_seqlens_q, q.shape[0]).to(q.dtype)
    lse = unpad(maps.lse.transpose(1, 2), cu_seqlens_q, q.shape[0]).T.contiguous()
    if not return_stats:
        return out, maps.out.new_empty(0), maps.out.new_empty(0), lse
    sharing = _share_heads(maps, cu_seqlens_q, summary_index, q.shape[0])
    summary_attention = (sharing.from_summary * sharing.head_share).sum(dim=-1)  # (B, N)
    received_attention = (maps.probabilities.amax(dim=1) * sharing.counted).sum(dim=1) / sharing.observers  # (B, N)
    summary_attention = unpad(summary_attention, cu_seqlens_q, q.shape[0])
    received_attention = unpad(received_attention, cu_seqlens_q, q.shape[0])
    return out, summary_attention, received_attention, lse


def varlen_attention_backward(
    grad_out: Tensor,  # (Tq, H, D)
    grad_summary_attention: Tensor,  # (Tk,)
    grad_received_attention: Tensor,  # (Tk,)
    out: Tensor,  # of the forward, as is `lse`: faster backends start from them, this one recomputes
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    summary_index: Tensor | None,
    return_stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # like q, k, v
    """Exact through the output and both statistics; the head maximum sends its gradient to the first arg-max head, and
    the norm of an output of zeros none."""
    maps = _attend(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale,
        causal, window_left, window_right, softcap, alibi_slopes,
    )  # fmt: skip
    probabilities = maps.probabilities
    d_out, _ = pad(grad_out.to(probabilities.dtype), cu_seqlens_q, max_seqlen_q)  # (B, Nq, H, D)
    d_probabilities = torch.zeros_like(probabilities)
    if return_stats:
        sharing = _share_heads(maps, cu_seqlens_q, summary_index, q.shape[0])
        d_summary = pad(grad_summary_attention, cu_seqlens_q, max_seqlen_q)[0][:, :, None]  # (B, N, 1)
        d_received = pad(grad_received_attention, cu_seqlens_q, max_seqlen_q)[0] / sharing.observers  # (B, N)

        tiny = torch.finfo(probabilities.dtype).tiny
        d_share = d_summary * sharing.from_summary  # (B, N, H)
        mean = (d_share * sharing.head_share).sum(dim=-1, keepdim=True)
        d_norms = (d_share - mean) / sharing.norms.sum(dim=-1, keepdim=True).clamp_min(tiny)
        through_norms = (d_norms / sharing.norms.clamp_min(tiny)).masked_fill(sharing.norms == 0, 0)
        d_out = d_out + through_norms[..., None] * maps.out

        through_summary = (d_summary * sharing.head_share).transpose(1, 2)[:, :, None, :]  # (B, H, 1, N)
        d_probabilities = sharing.is_summary[:, None, :, None] * through_summary
        d_maximum = d_received[:, None, :] * sharing.counted  # (B, N, N)
        maximum = probabilities.amax(dim=1)
        for head in range(probabilities.shape[1]):  # the first head that reaches the maximum takes the gradient
            best = probabilities[:, head] == maximum
            d_probabilities[:, head] += d_maximum * best
            d_maximum = d_maximum.masked_fill(best, 0)
    d_probabilities = d_probabilities + torch.einsum("bihd,bjhd->bhij", d_out, maps.values)
    mean = (d_probabilities * probabilities).sum(dim=-1, keepdim=True)
    d_scores = probabilities * (d_probabilities - mean)
    if maps.slopes is not None:
        d_scores = d_scores * maps.slopes
    d_queries = torch.einsum("bhij,bjhd->bihd", d_scores, maps.keys) * softmax_scale
    d_keys = torch.einsum("bhij,bihd->bjhd", d_scores, maps.queries)
    d_values = torch.einsum("bhij,bihd->bjhd", probabilities, d_out)
    return (
        unpad(d_queries, cu_seqlens_q, q.shape[0]).to(q.dtype),
        _sum_groups(unpad(d_keys, cu_seqlens_k, k.shape[0]), k.shape[1]).to(k.dtype),
        _sum_groups(unpad(d_values, cu_seqlens_k, v.shape[0]), v.shape[1]).to(v.dtype),
    )


def _sum_groups(gradient: Tensor, heads: int) -> Tensor:
    """(Tk, H, D) -> (Tk, heads, D): over the query heads that read the same key head."""
    return gradient.unflatten(1, (heads, -1)).sum(dim=2)
