# SPDX-License-Identifier: Apache-2.0
"""Attention masks of layers that hold some columns of a prompt: of the mask that the model made for all of them.

`slots` (B, N) int64 are the columns a layer holds, in order, -1 for none (padding, hidden tokens).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from madtp.models.arguments import HIDDEN
from madtp.models.attention_interface import is_windowed, seen_columns

KEYS_ONLY = ("madtp",)  # attention implementations that take (B, N) of real tokens in causal self-attention


def prompt_mask(
    given: Tensor | None, slots: Tensor, keys: int, implementation: str, dtype: torch.dtype
) -> Tensor | None:
    """The mask of a prompt's layer, in the form of the model's own.

    Args:
        given: that of the whole prompt: None where it is causal alone; (B, S) or (B, 1, 1, S) real tokens; (B, 1, 1, S)
            int32, those of a causal mask with the size of the window they are seen in; (B or 1, 1, S, keys) bool or
            additive, who sees whom.
        keys: of the layer, N, or more in a static cache, whose last ones are empty.
    """
    real, index = slots >= 0, slots.clamp(min=0)
    if given is None:
        if bool(real.all()):
            return None
        if implementation in KEYS_ONLY and keys == slots.shape[1]:
            return real
        seen = real[:, None, None] & seen_columns(slots.shape[1], slots.shape[1], None, slots.device)
        return _formed(F.pad(seen | _diagonal(real), (0, keys - slots.shape[1])), implementation, dtype)
    if given.ndim == 2:
        return given.gather(1, index).bool() & real
    if is_windowed(given):
        kept = (given[:, 0, 0].gather(1, index) > 0) & real
        return kept[:, None, None] & _in_window(slots, slots, int(given.max())) | _diagonal(kept)
    given = given.expand(len(slots), -1, -1, -1)
    if given.shape[2] > 1:
        given = given.gather(2, index[:, None, :, None].expand(-1, 1, -1, given.shape[3]))
    made = given.gather(3, index[:, None, None].expand(-1, 1, given.shape[2], -1))
    if made.dtype == torch.bool:
        made = made & real[:, None, None]
        if made.shape[2] > 1:
            made = made | _diagonal(real)
        return F.pad(made, (0, keys - slots.shape[1]))
    lowest = torch.finfo(made.dtype).min
    made = made.masked_fill(~real[:, None, None], lowest).masked_fill(_diagonal(real), 0)
    return F.pad(made, (0, keys - slots.shape[1]), value=lowest)


def decoding_mask(
    columns: Tensor, queries: Tensor, window: int | None, implementation: str, dtype: torch.dtype
) -> Tensor:
    """The mask of new tokens on a cache.

    Args:
        columns: (B, M), of the keys; -1 is seen by none.
        queries: (Q,) columns of the new tokens.
        window: how many columns back a token sees, itself included.
    """
    seen = (columns >= 0)[:, None, None] & _in_window(queries[None], columns, window)
    return _formed(seen, implementation, dtype)


def seen_by(mask: Tensor | None, rows: Tensor, slots: Tensor) -> Tensor:
    """(B, R, N) bool: which of a prompt's N tokens some of its rows see.

    Args:
        mask: as attention takes it, of rows that hold `slots`.
        rows: (B, R) int64.
    """
    length = slots.shape[1]
    causal = torch.arange(length, device=slots.device) <= rows[..., None]
    real = (slots >= 0)[:, None]
    if mask is None or mask.ndim == 2:
        return causal & real
    if is_windowed(mask):
        return _in_window(slots.gather(1, rows), slots, int(mask.max()))[:, 0] & real
    mask = mask[..., :length].expand(len(slots), -1, -1, -1)[:, 0]
    if mask.shape[1] > 1:
        mask = mask.gather(1, rows[..., None].expand(-1, -1, length))
    return (mask if mask.dtype == torch.bool else mask > HIDDEN) & real


def _in_window(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """(B, 1, N, M) bool: which columns `keys` (B, M) the columns `queries` (B or 1, N) see, at most `window` back."""
    query, key = queries[:, None, :, None], keys[:, None, None]
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def _diagonal(real: Tensor) -> Tensor:
    """(B, 1, N, N): rows of nothing see themselves, since a softmax over nothing is no number."""
    return torch.eye(real.shape[1], dtype=torch.bool, device=real.device) & ~real[:, None, :, None]


def _formed(seen: Tensor, implementation: str, dtype: torch.dtype) -> Tensor:
    """Additive for eager attention, which adds it; bool for the others."""
    if implementation != "eager":
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
