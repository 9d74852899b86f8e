# SPDX-License-Identifier: Apache-2.0
"""Ragged attention for any transformers model: `model.set_attn_implementation("madtp")` after `import madtp`.

Importing this module registers "madtp" with `transformers.AttentionInterface` and `AttentionMaskInterface`.
Padding leaves the batch before `madtp_kernels.varlen_attention` runs, so it costs nothing and takes no part.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, prepare_padding_mask, sdpa_mask
from transformers.utils import is_tracing

from madtp_kernels import varlen_attention

NAME = "madtp"

# What an attention may ask of its implementation that neither the ragged op nor SDPA computes.
_UNSUPPORTED = ("s_aux", "sinks", "block_indices", "cache", "output_attentions")

# A module whose forward takes no other sequence than `hidden_states` attends to itself.
_SELF_ATTENTION = {
    *("self", "hidden_states", "attention_mask", "past_key_values", "position_embeddings", "position_ids"),
    *("cache_position", "output_attentions", "use_cache", "kwargs"),
}


class _Sequences(NamedTuple):
    """The sequences of a padded (B, N) batch, and the slots in it that their tokens have."""

    cu_seqlens: Tensor  # (B+1,) int32
    slots: Tensor | None  # (T,) int64 into the B*N slots; None keeps all of them

    @classmethod
    def every(cls, batch: int, length: int, device: torch.device) -> _Sequences:
        return cls(torch.arange(batch + 1, dtype=torch.int32, device=device) * length, None)

    @classmethod
    def where(cls, real: Tensor) -> _Sequences:  # (B, N) bool
        lengths = real.sum(dim=1, dtype=torch.int32)
        cu_seqlens = nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        return cls(cu_seqlens, real.flatten().nonzero().squeeze(1))

    def from_padded(self, heads: Tensor) -> Tensor:  # (B, H, N, D) -> (T, H, D)
        tokens = heads.transpose(1, 2).flatten(0, 1)
        return tokens if self.slots is None else tokens.index_select(0, self.slots)

    def to_padded(self, tokens: Tensor, batch: int, length: int) -> Tensor:  # (T, H, D) -> (B, N, H, D)
        if self.slots is not None:
            tokens = tokens.new_zeros(batch * length, *tokens.shape[1:]).index_copy(0, self.slots, tokens)
        return tokens.unflatten(0, (batch, length))


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,  # a tensor of a static cache
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs,
) -> Tensor | None:
    """The mask "madtp" attends under, in the cheapest form that says it; called by transformers' mask builders.

    Returns:
        None: the module's `is_causal` says it all, exactly where SDPA's mask is None;
        (B, M) bool, the real tokens: causal self-attention with padding;
        (B, 1, 1, M) int32: causal attention of which the last query stands at the last key, in a sliding window whose
            size stands at the real tokens, and 0 at the others (windows, several queries on a cache);
        (B, 1, 1, M) bool, the real keys: every query sees the same ones (padding, one query on a cache);
        (B, 1, N, M) bool, who sees whom: everything else (chunks, blocks of an image, custom patterns).
    """
    whole = local_size is None or kv_length < local_size  # else a window or chunk hides something
    together = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length  # no slots that wait
    probe = torch.empty(0, device=kwargs.get("device", "cpu")) if attention_mask is None else attention_mask
    readable = _is_readable(probe)
    if allow_is_causal_skip and q_length > 1 and together and readable:
        real = prepare_padding_mask(attention_mask, kv_length, kv_offset)
        real = None if real is None else real[:, kv_offset : kv_offset + kv_length].bool()
        if whole and q_length == kv_length:
            return None if real is None or real.all() else real
        if whole or (_is_window(mask_function, local_size) and (real is None or _is_one_run(real))):
            if real is None:
                real = torch.ones(batch_size, kv_length, dtype=torch.bool, device=kwargs.get("device", "cpu"))
            # Of four dimensions, or transformers takes it for padding that it has to make a mask of.
            return (real.int() * (kv_length if local_size is None or whole else local_size))[:, None, None]
    may_skip = readable or attention_mask is None  # where padding is not to be looked for
    return sdpa_mask(
        batch_size=batch_size,
        q_length=1 if whole and allow_is_bidirectional_skip else q_length,  # its rows are all alike
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip and may_skip,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip and may_skip,
        local_size=local_size,
        **kwargs,
    )


def _is_readable(tensor: Tensor) -> bool:
    """Whether it has values, which it has not under `torch.compile`, on the meta device, or as a fake tensor."""
    return not (tensor.is_meta or is_tracing(tensor))


def is_windowed(mask: Tensor) -> bool:
    """Whether it is a mask (B, 1, 1, M) of causal attention in a window, as `attention_mask` makes it."""
    return mask.dtype == torch.int32 and mask.ndim == 4 and mask.shape[1:3] == (1, 1)


def _is_window(mask_function: Callable[..., Any], size: int | None) -> bool:
    """Whether it is the sliding window of this size, and not chunks or something else: it is asked at its edges."""
    zero, one, last = (torch.tensor(position) for position in (0, 1, size))
    try:
        seen = [bool(mask_function(zero, zero, *pair)) for pair in ((last, one), (last, zero), (zero, one))]
    except (RuntimeError, IndexError):  # it reads tables of this batch
        return False
    return seen == [True, False, False]


def _is_one_run(real: Tensor) -> bool:
    """Whether padding lies before or behind the tokens of each sequence, so that counting tokens counts columns."""
    return bool(((real[:, 1:] & ~real[:, :-1]).sum(1) + real[:, :1].sum(1) <= 1).all())


def attention_forward(
    module: nn.Module,
    query: Tensor,  # (B, H, N, D)
    key: Tensor,  # (B, Hk, M, D)
    value: Tensor,  # (B, Hk, M, D)
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention of a transformers module, ragged inside. H is a multiple of Hk: grouped heads share keys and values.

    What the ragged op does not have runs exactly on `torch.nn.functional.scaled_dot_product_attention`: dropout,
    additive masks and position biases, masks that differ between queries other than causal ones and sliding windows,
    values of another head dim, and padding under `torch.compile`, on the meta device and in fake tensors (a size
    without it depends on the data). So does a single query, a generated token: leaving padding out would copy its whole
    cache. With soft caps, which SDPA has not, these run as eager attention does, all scores at once.

    Padding queries get zeros in causal attention, and in bidirectional one where the module can do nothing else
    (`hidden_states` is the only sequence its forward takes); elsewhere they attend like real queries. Sequences
    without a real key get zeros.

    Args:
        attention_mask: what `madtp.attention_interface.attention_mask` returns, or any mask SDPA takes.

    Returns:
        out (B, N, H, D), and None: there are no attention weights.

    Raises:
        ValueError: the module asks for attention sinks, key blocks, a paged cache or attention weights, or a mask of
            two dimensions is not (B, M) bool, with as many keys as queries at least.
    """
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(f'{name} must be unset with attn_implementation="{NAME}"; set "eager" for this model')
    softcap = kwargs.get("softcap") or 0.0
    real, window = None, None  # (B, M), of causal attention
    if attention_mask is not None and is_windowed(attention_mask):
        window = int(attention_mask.max())
        attention_mask = attention_mask[:, 0, 0] > 0
    if attention_mask is not None and attention_mask.ndim == 2:
        _check_real_tokens(attention_mask, query, key)
        real = attention_mask
    # A mask of real tokens is that of a causal mask, whatever a module that may have others says of itself.
    causal = real is not None or (is_causal if is_causal is not None else getattr(module, "is_causal", True))
    if not _runs_ragged(query, key, value, attention_mask, dropout, position_bias):
        if real is not None:
            attention_mask = real[:, None, None] & seen_columns(query.shape[2], key.shape[2], window, query.device)
        if softcap:
            if attention_mask is None and causal:
                attention_mask = seen_columns(query.shape[2], key.shape[2], None, query.device)
            return _capped_attention(query, key, value, attention_mask, dropout, scaling, softcap), None
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=causal,
            position_bias=position_bias,
        )

    batch, _, queries, _ = query.shape
    causal = causal and queries > 1 and (attention_mask is None or real is not None)
    if causal and attention_mask is None:  # an empty static cache: its later slots are unseen
        key, value = key[:, :, :queries], value[:, :, :queries]
    queried, read = _sequences(module, query, key, attention_mask)
    out = varlen_attention(
        queried.from_padded(query),
        read.from_padded(key),
        read.from_padded(value),
        queried.cu_seqlens,
        None if queried is read else read.cu_seqlens,
        max_seqlen_q=queries,
        max_seqlen_k=key.shape[2],
        softmax_scale=scaling,
        causal=causal,
        window_size=(-1 if window is None else window - 1, -1),
        softcap=softcap,
    )
    return queried.to_padded(out, batch, queries), None


def _check_real_tokens(mask: Tensor, query: Tensor, key: Tensor) -> None:
    batch, _, queries, _ = query.shape
    keys = key.shape[2]
    if mask.dtype != torch.bool or mask.shape != (batch, keys) or keys < queries:
        raise ValueError(
            f"attention_mask of two dimensions must be bool {(batch, keys)} of causal attention, got "
            f"{mask.dtype} {tuple(mask.shape)}, {queries} queries, {keys} keys"
        )


def _runs_ragged(query, key, value, mask, dropout, position_bias) -> bool:
    if dropout or position_bias is not None:
        return False
    if query.shape[2] == 1 < key.shape[2]:  # it would copy a whole cache for one token
        return False
    if value.shape[-1] != query.shape[-1] or key.shape[0] != query.shape[0]:  # SDPA repeats a batch of 1
        return False
    if mask is None:
        return True
    same_for_queries = mask.ndim == 2 or (mask.ndim == 4 and mask.shape[1:] == (1, 1, key.shape[2]))
    return mask.dtype == torch.bool and same_for_queries and _is_readable(mask)


def _capped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float,
) -> Tensor:
    """(B, N, H, D): softmax(softcap tanh(q k / softcap)) v, with a mask as SDPA takes it."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * (scores / softcap).tanh()
    if mask is not None:
        hidden = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, hidden) if mask.dtype == torch.bool else scores + mask
    weights = nn.functional.dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype), dropout)
    return (weights @ value).transpose(1, 2)


def seen_columns(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """(queries, keys) bool: which keys a query sees under a causal mask, in a window if one is given; the last query
    stands at the last key."""
    key = torch.arange(keys, device=device)
    position = key[keys - queries :, None]
    seen = key <= position
    return seen if window is None else seen & (key > position - window)


def _sequences(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None) -> tuple[_Sequences, _Sequences]:
    """Which queries and which keys take part; the same object when they are the same."""
    batch, _, queries, _ = query.shape
    keys = key.shape[2]
    kind: type = type(module)  # mypy holds a type[nn.Module] to be unhashable
    if mask is None:
        queried = _Sequences.every(batch, queries, query.device)
        return queried, queried if keys == queries else _Sequences.every(batch, keys, query.device)
    real = mask if mask.ndim == 2 else mask[:, 0, 0].expand(batch, -1)  # (B, M)
    read = _Sequences.where(real)
    if mask.ndim == 2 and queries < keys:
        return _Sequences.where(real[:, keys - queries :]), read
    if mask.ndim == 2 or (queries == keys and _attends_to_itself(kind)):
        return read, read
    has_key = real.any(dim=1)  # a sequence without keys has nothing to average: zeros
    if has_key.all():
        return _Sequences.every(batch, queries, query.device), read
    return _Sequences.where(has_key[:, None].expand(-1, queries)), read


@functools.cache
def _attends_to_itself(kind: type[nn.Module]) -> bool:
    """Equal lengths do not tell self-attention from cross-attention; a forward with one sequence does."""
    return inspect.signature(kind.forward).parameters.keys() <= _SELF_ATTENTION


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, attention_mask)
