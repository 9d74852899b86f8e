# SPDX-License-Identifier: Apache-2.0
"""Attention over ragged sequences that also returns the importance statistics of every token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from madtp_kernels import checks, dispatch
from madtp_kernels.checks import check_device, check_rows, check_tensor, require
from madtp_kernels.flops import flop_formula
from madtp_kernels.native import attention as native
from madtp_kernels.ops.autograd import register_autograd, register_second_order
from madtp_kernels.reference import attention as reference
from madtp_kernels.renamed import renamed

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Run = Callable[..., tuple[Tensor, ...]]


@renamed(summary="summary_attention", received="received_attention")
class AttentionStats(NamedTuple):
    """What token pruning reads off self-attention, per token; float32."""

    # (T,) S_cls: attention from the summary token, heads weighted by their share of the output norm
    summary_attention: Tensor
    # (T,) S_self before normalisation: head-maximal attention summed over the other queries
    received_attention: Tensor


@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    summary_index: Tensor | None = None,
    return_stats: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    summary_index: Tensor | None = None,
    return_stats: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, AttentionStats]: ...
@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    summary_index: Tensor | None = None,
    return_stats: bool,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, AttentionStats]: ...
@dispatch.public
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    summary_index: Tensor | None = None,
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, AttentionStats]:
    """Softmax attention inside each sequence of a ragged batch: out_i = sum_j softmax_j(softmax_scale q_i k_j) v_j.

    Masks and biases are those of flash-attention's varlen functions, by the same names. Query i of Nq stands at
    position p = i + Nk - Nq among the Nk keys: the last query at the last key. One that sees no key gets zeros; a
    sequence with queries has a key at least.

    Args:
        q: (Tq, H, D) float32, bfloat16 or float16.
        k, v: (Tk, Hk, D), dtype of q; H is a multiple of Hk, and head h reads key head h // (H / Hk).
        cu_seqlens_q: (B+1,) int32.
        cu_seqlens_k: (B+1,) int32, where keys are other rows than queries; None is self-attention.
        max_seqlen_q, max_seqlen_k: at least the longest sequence.
        softmax_scale: 1 / sqrt(D) by default; at 0 all keys that a query sees weigh the same.
        causal: a query sees no key after its position.
        window_size: a query sees `left` keys before its position and `right` after it; -1 is all of them.
        softcap: where above 0, a score s becomes softcap tanh(s / softcap).
        alibi_slopes: (H,) or (B, H) float32; slope |p - j| is taken off the score of key j, after `softcap`.
        summary_index: (B,) int32, the summary token's row inside its sequence; None is row 0, -1 is none.
        return_stats: also return the statistics of MADTP (arXiv 2403.02991, section 3.3), self-attention only.

    Returns:
        out (Tq, H, D) dtype of q, and with return_stats `AttentionStats`, each (T,) float32:
        summary_attention_j = sum_h P[h,s,j] ||O[h,j]|| / sum_h ||O[h,j]||;
        received_attention_j = sum over queries i != s of max_h P[h,i,j], under a causal mask or in a window divided by
        the number that see j.
        Differentiable in q, k and v through all three.

    Raises:
        ValueError: an argument breaks a rule. RuntimeError: the backend cannot run here.
    """
    checks.check_types(q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q)
    checks.check_optional_types(cu_seqlens_k=cu_seqlens_k, alibi_slopes=alibi_slopes, summary_index=summary_index)
    checks.check_count("max_seqlen_q", max_seqlen_q)
    checks.check_flag("causal", causal)
    checks.check_number("softcap", softcap)
    left, right = _window(window_size)
    checks.check_flag("return_stats", return_stats)
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5 if q.shape[-1] else 1.0
    else:
        checks.check_number("softmax_scale", softmax_scale)
    if cu_seqlens_k is None:
        cu_seqlens_k, max_seqlen_k = cu_seqlens_q, max_seqlen_q
        check_tensor("k", k, 3, FLOATS)
        check_rows("k", k, q.shape[0], "q (self-attention)")
    else:
        require(max_seqlen_k is not None, "max_seqlen_k", "given with cu_seqlens_k", max_seqlen_k)
        checks.check_count("max_seqlen_k", max_seqlen_k)
        require(not return_stats, "return_stats", "False in cross-attention", return_stats)
    out, *stats, _ = torch.ops.madtp.varlen_attention(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        float(softmax_scale),
        causal,
        left,
        right,
        float(softcap),
        alibi_slopes,
        summary_index,
        return_stats,
        dispatch.as_argument(backend),
    )
    return (out, AttentionStats(*stats)) if return_stats else out


def _window(window_size: Any) -> tuple[int, int]:
    ok = isinstance(window_size, tuple | list) and len(window_size) == 2
    require(ok, "window_size", "two integers, (left, right)", window_size)
    for bound in window_size:
        checks.check_count("window_size", bound)
    return tuple(window_size)


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "float softmax_scale, bool causal, int window_left, int window_right, float softcap, Tensor? alibi_slopes, "
    "Tensor? summary_index, bool return_stats, str backend"
)
# Returns out, summary_attention, received_attention and, for the backward, the log-sum-exp (H, Tq) of the scores.
torch.library.define("madtp::varlen_attention", f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)")
torch.library.define(
    "madtp::varlen_attention_backward",
    "(Tensor grad_out, Tensor grad_summary_attention, Tensor grad_received_attention, Tensor out, Tensor lse, "
    f"{_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
)


def _limits(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
    head_dim = shape[-1]
    if head_dim % 8 or not 8 <= head_dim <= 256:
        return f"head_dim must be a multiple of 8 from 8 to 256, got {head_dim}"
    return None


dispatch.register(
    "varlen_attention",
    reference=reference.varlen_attention,
    cpu=native.varlen_attention,
    triton=dispatch.triton_launcher("attention.forward", "varlen_attention"),
    limits=_limits,
)
dispatch.register(
    "varlen_attention_backward",
    reference=reference.varlen_attention_backward,
    cpu=native.varlen_attention_backward,
    triton=dispatch.triton_launcher("attention.backward", "varlen_attention_backward"),
    limits=_limits,
)


def _check(
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
) -> None:
    """All that can be told without reading a tensor."""
    check_tensor("q", q, 3, FLOATS)
    require(q.shape[1] > 0 and q.shape[2] > 0, "q", "(Tq, H, D) of at least one head and one channel", q)
    for name, value in (("k", k), ("v", v)):
        check_tensor(name, value, 3, (q.dtype,))
        heads = value.shape[1]
        fits = value.shape[2] == q.shape[2] and heads > 0 and q.shape[1] % heads == 0
        if not fits:
            require(False, name, f"of heads of {q.shape[2]}, and of {q.shape[1]} of them or a divisor of that", value)
    require(k.shape[1] == v.shape[1], "v", "of as many heads as k", v)
    check_rows("v", v, k.shape[0], "k")
    checks.check_ragged(q.shape[0], cu_seqlens_q, summary_index, "q")
    if cu_seqlens_k is not cu_seqlens_q:
        checks.check_ragged(k.shape[0], cu_seqlens_k, None, "k")
        check_rows("cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.numel(), "cu_seqlens_q")
    if return_stats:
        check_rows("k", k, q.shape[0], "q (with statistics)")
    for side in (window_left, window_right):
        require(side >= -1, "window_size", "-1 or at least 0 on either side", (window_left, window_right))
    require(0 <= softcap <= checks.MAX_FLOAT32, "softcap", "a finite number >= 0", softcap)
    if alibi_slopes is not None:
        check_tensor("alibi_slopes", alibi_slopes, alibi_slopes.ndim, (torch.float32,))
        shapes = (q.shape[1],), (cu_seqlens_q.numel() - 1, q.shape[1])
        if tuple(alibi_slopes.shape) not in shapes:
            require(False, "alibi_slopes", "of shape (H,) or (B, H)", alibi_slopes)
    require(max_seqlen_q >= 0, "max_seqlen_q", "at least 0", max_seqlen_q)
    require(max_seqlen_k >= 0, "max_seqlen_k", "at least 0", max_seqlen_k)
    checks.check_finite("softmax_scale", softmax_scale)
    ragged = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    check_device(q.device, k=k, v=v, **ragged, alibi_slopes=alibi_slopes, summary_index=summary_index)


def _check_gradients(
    grad_out: Tensor,
    grad_summary_attention: Tensor,
    grad_received_attention: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    return_stats: bool,
) -> None:
    """What the forward gave, and the gradients of it."""
    wide = torch.promote_types(q.dtype, torch.float32)
    statistics = (q.shape[0] if return_stats else 0,)
    for name, value, shape, dtype in (
        ("grad_out", grad_out, tuple(q.shape), q.dtype),
        ("grad_summary_attention", grad_summary_attention, statistics, wide),
        ("grad_received_attention", grad_received_attention, statistics, wide),
        ("out", out, tuple(q.shape), q.dtype),
        ("lse", lse, (q.shape[1], q.shape[0]), wide),
    ):
        check_tensor(name, value, len(shape), (dtype,))
        checks.check_shape(name, value, shape, "what the forward of q gives")
        check_device(q.device, **{name: value})


def _check_values(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    return_stats: bool,
    summary_index: Tensor | None,
) -> None:
    if q.device.type != "cpu":
        return
    queries = _check_lengths("q", q.shape[0], cu_seqlens_q, max_seqlen_q)
    checks.check_summary_index_values(summary_index, queries)
    if cu_seqlens_k is not cu_seqlens_q:
        keys = _check_lengths("k", k.shape[0], cu_seqlens_k, max_seqlen_k)
        starved = any(queries and not keys for queries, keys in zip(queries, keys, strict=True))
        require(not starved, "cu_seqlens_k", "of at least one key where a sequence has queries", cu_seqlens_k)
        same = not return_stats or queries == keys
        require(same, "cu_seqlens_k", "cu_seqlens_q, with statistics", cu_seqlens_k)
    else:
        _check_longest("k", queries, max_seqlen_k)


def _check_lengths(side: str, rows: int, cu_seqlens: Tensor, max_seqlen: int) -> list[int]:
    lengths = checks.check_cu_seqlens_values(f"cu_seqlens_{side}", cu_seqlens, rows)
    _check_longest(side, lengths, max_seqlen)
    return lengths


def _check_longest(side: str, lengths: list[int], max_seqlen: int) -> None:
    longest = max(lengths, default=0)
    require(max_seqlen >= longest, f"max_seqlen_{side}", f"at least the longest sequence ({longest})", max_seqlen)


def _bounds(q: Tensor, k: Tensor, max_seqlen_q: int, max_seqlen_k: int, return_stats: bool) -> tuple[int, int]:
    """max_seqlen_q and max_seqlen_k, so that nothing is allocated for rows that are not there."""
    max_seqlen_q, max_seqlen_k = min(max_seqlen_q, q.shape[0]), min(max_seqlen_k, k.shape[0])
    return (min(max_seqlen_q, max_seqlen_k),) * 2 if return_stats else (max_seqlen_q, max_seqlen_k)


@torch.library.impl("madtp::varlen_attention", "CompositeExplicitAutograd")
def _varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    causal: bool,
    left: int,
    right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    summary_index: Tensor | None,
    return_stats: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    options = scale, causal, left, right, softcap, alibi_slopes, summary_index, return_stats
    _check(q, k, v, cu_q, cu_k, max_q, max_k, *options)
    _check_values(q, k, cu_q, cu_k, max_q, max_k, return_stats, summary_index)
    run: Run = dispatch.implementation("varlen_attention", backend, q.dtype, q.device, tuple(q.shape))
    bounds = _bounds(q, k, max_q, max_k, return_stats)
    return run(q, k, v, cu_q, cu_k, *bounds, *options)


@torch.library.impl("madtp::varlen_attention_backward", "CompositeExplicitAutograd")
def _varlen_attention_backward(
    grad_out: Tensor,
    grad_summary_attention: Tensor,
    grad_received_attention: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    causal: bool,
    left: int,
    right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    summary_index: Tensor | None,
    return_stats: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    options = scale, causal, left, right, softcap, alibi_slopes, summary_index, return_stats
    _check(q, k, v, cu_q, cu_k, max_q, max_k, *options)
    given = grad_out, grad_summary_attention, grad_received_attention, out, lse
    _check_gradients(*given, q, return_stats)
    _check_values(q, k, cu_q, cu_k, max_q, max_k, return_stats, summary_index)
    run: Run = dispatch.implementation("varlen_attention_backward", backend, q.dtype, q.device, tuple(q.shape))
    bounds = _bounds(q, k, max_q, max_k, return_stats)
    return run(*given, q, k, v, cu_q, cu_k, *bounds, *options)


@torch.library.register_fake("madtp::varlen_attention")
def _(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    _check(q, k, v, *arguments[:-1])
    wide = torch.promote_types(q.dtype, torch.float32)
    statistic = q.new_empty(k.shape[0] if arguments[-2] else 0, dtype=wide)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=wide)
    return torch.empty_like(q, memory_format=torch.contiguous_format), statistic, torch.empty_like(statistic), lse


@torch.library.register_fake("madtp::varlen_attention_backward")
def _(
    grad_out: Tensor,
    grad_summary_attention: Tensor,
    grad_received_attention: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    _check(q, k, v, *arguments[:-1])
    _check_gradients(grad_out, grad_summary_attention, grad_received_attention, out, lse, q, arguments[-2])
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    (out, _, _, lse), tensors, ctx.arguments = output, inputs[:5], inputs[5:]
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(out, lse, *tensors)


def _backward(
    ctx: Any, grad_out: Tensor, grad_summary_attention: Tensor, grad_received_attention: Tensor, _: Tensor
) -> tuple[Tensor | None, ...]:
    grads = torch.ops.madtp.varlen_attention_backward(
        grad_out, grad_summary_attention, grad_received_attention, *ctx.saved_tensors, *ctx.arguments
    )
    return *grads, *(None,) * 13


register_autograd("madtp::varlen_attention", _backward, _setup_context)
# `out` and `lse` come from q, k and v, which the reference starts from, and so does its derivative.
register_second_order("madtp::varlen_attention_backward", reference.varlen_attention_backward, (0, 1, 2, 5, 6, 7))


@flop_formula(torch.ops.madtp.varlen_attention)
def _flops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    causal: bool,
    left: int,
    right: int,
    *_: object,
    out_val: object = None,
    **__: object,
) -> int:
    """Two matrix products over the query-key pairs of each sequence that are seen, 2 FLOP per multiply-add."""
    pairs = 0
    for queries, keys in zip(cu_q.diff().tolist(), cu_k.diff().tolist(), strict=True):
        position, far = torch.arange(keys - queries, keys), keys + queries
        last = position if causal else position + min(right, far) if right >= 0 else torch.full_like(position, keys - 1)
        first = position - min(left, far) if left >= 0 else torch.zeros_like(position)
        pairs += int((last.clamp(max=keys - 1) - first.clamp(min=0) + 1).clamp(min=0).sum())
    heads, head_dim = q.shape[1:]
    return 4 * pairs * heads * head_dim
