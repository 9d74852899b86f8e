# SPDX-License-Identifier: Apache-2.0
"""One forward of a decoder that prunes inside: what its layers hold of the prompt, and what they are called with.

Masks and rotary tables are made once by the model, for all columns of the prompt; a layer gets those of its columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from madtp.dtp.keep_rules import Candidates
from madtp.models.prefill_masks import decoding_mask, prompt_mask, seen_by
from madtp.models.prefill_seam import ImageMap, PrefillRecord, PrefillSeam
from madtp_kernels import attention_rows

ROWS = 64  # of a map of attention that are made at once, for what tokens receive
ROWS_OF_OP = 512  # which makes no map, but where it runs as its reference


@dataclass(frozen=True)
class HeldPrompt:
    """What a cache holds of a pruned prompt.

    Args:
        width: columns of the prompt as it entered.
        slots: by layer, as `PrefillRecord.slots`.
        complete: by layer, whether no sample has less than another, which would be padding.
    """

    width: int
    slots: Mapping[int, Tensor]
    complete: Mapping[int, bool]


class PromptRun:
    """A prompt is read.

    Args:
        record: of the prompt, each sample once; it is filled in.
        copies: how often each sample is in the batch, one behind the other: beams.
        known: whether the record says already what is kept: the prompt is read anew, and what follows it.
        width: columns of what is read, those of the prompt and of what follows it.
    """

    def __init__(self, seam: PrefillSeam, record: PrefillRecord, copies: int, width: int, known: bool):
        self.seam, self.record, self.copies, self.known = seam, record, copies, known
        self.keep = seam.keep  # as it is now, whatever is set while the prompt is read
        more = width - record.real.shape[1]
        self.real = F.pad(record.real, (0, more), value=True)
        images = record.images
        self.images = ImageMap(F.pad(images.numbers, (0, more), value=-1), F.pad(images.places, (0, more)), images[2])
        self.right = bool((~self.real[:, -1]).any())  # the padding is on the right
        self.slots: Tensor | None = None  # (B, N) of each sample once; None: all columns
        self.entered = record.entered()
        self.importance: Tensor | None = None  # (B, N)
        self._held: dict[int, Tensor] = {}
        self._masks: dict[tuple[int, int], tuple[Tensor | None, Tensor | None]] = {}

    def watches(self, layer: int) -> bool:
        """Whether the importance of attention in a layer is asked for."""
        keep = self.keep.get(layer + 1)
        return keep is not None and not self.known and (keep.needs_importance or callable(keep.rule))

    def observe(
        self, layer: int, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, softcap: float | None
    ) -> None:
        """Takes down the importance of the tokens of a layer, (B, N), for the seam behind it.

        Args:
            query, key: (B, H, N, D), (B, Hk, M, D) as they are attended; H is a multiple of Hk, and M more than N in
                a static cache alone.
            mask: of the attention.
        """
        with torch.no_grad():
            slots, length = self._current().to(query.device), query.shape[2]
            query, key = query[:: self.copies].detach(), key[:: self.copies, :, :length].detach()
            mask = None if mask is None else mask[:: self.copies] if len(mask) > 1 else mask
            plain = mask is None and softcap is None and bool((slots >= 0).all())
            if self.keep[layer + 1].rule == "received":
                places = torch.arange(length, device=slots.device).expand_as(slots)
                parts = places.split(ROWS_OF_OP if plain else ROWS, dim=1)
            else:
                parts = (_last(slots),)
            total = torch.zeros(slots.shape, dtype=torch.promote_types(query.dtype, torch.float32), device=slots.device)
            for rows in parts:
                if plain:
                    total += _causal_attention(query, key, rows, scaling)
                    continue
                weights = _attention(query, key, rows, seen_by(mask, rows, slots), scaling, softcap)
                total += (weights * (slots.gather(1, rows) >= 0)[..., None]).sum(1)
            self.importance = total

    def enter(
        self, layer: int, hidden: Tensor, kwargs: dict[str, Any], cache: Any, form: str, window: int | None
    ) -> Tensor:
        """The hidden states of what a layer holds, (B, N, D); its other arguments are changed in place."""
        if layer in self.keep:
            hidden = self._prune(layer, hidden)
        if self.slots is None:
            return hidden
        self._held[layer] = self.slots
        slots = self.slots.repeat_interleave(self.copies, 0)
        index = slots.clamp(min=0)
        kwargs["position_embeddings"] = tuple(_columns(table, index) for table in kwargs["position_embeddings"])
        if (positions := kwargs.get("position_ids")) is not None:
            axes = positions.shape[:-2]  # of GLM-4.5V, time and places
            positions = positions.expand(*axes, len(index), -1)
            kwargs["position_ids"] = positions.gather(-1, index.expand(*axes, *index.shape))
        given, count = kwargs.get("attention_mask"), slots.shape[1]
        static = getattr(cache, "is_compileable", False)
        keys = int(cache.get_mask_sizes(count)[0]) if static else count
        if (key := (id(given), keys)) not in self._masks:
            self._masks[key] = given, prompt_mask(given, slots, keys, form, hidden.dtype)
        kwargs["attention_mask"] = self._masks[key][1]
        return hidden

    def labels(self, labels: Tensor) -> Tensor:
        """(B, S) of the prompt -> (B, N) of what the last layer holds; -100 elsewhere."""
        if self.slots is None:
            return labels
        slots = self.slots.repeat_interleave(self.copies, 0).to(labels.device)
        return labels.gather(1, slots.clamp(min=0)).masked_fill(slots < 0, -100)

    def finish(self) -> HeldPrompt | None:
        """What a cache holds after the last layer; None where it holds all."""
        if not self.known:
            self.record.slots, self.record.columns = self._held, self._current()
        if not self._held:
            return None
        different = {id(slots): slots for slots in self._held.values()}
        copied = {key: slots.repeat_interleave(self.copies, 0) for key, slots in different.items()}
        complete = {key: bool((slots >= 0).all()) for key, slots in different.items()}
        keys = {layer: id(slots) for layer, slots in self._held.items()}
        return HeldPrompt(
            self.real.shape[1],
            {layer: copied[key] for layer, key in keys.items()},
            {layer: complete[key] for layer, key in keys.items()},
        )

    def columns(self) -> Tensor:
        """(B, S) int64: what the first layer holds, -1 for padding; of each row of the batch."""
        return self._columns().repeat_interleave(self.copies, 0)

    def _columns(self) -> Tensor:
        return torch.arange(self.real.shape[1], device=self.real.device).masked_fill(~self.real, -1)

    def _current(self) -> Tensor:
        return self._columns() if self.slots is None else self.slots

    def _prune(self, layer: int, hidden: Tensor) -> Tensor:
        slots = self._current()
        images = self.images.at(slots)
        candidates = images.numbers >= 0
        if self.known:
            kept = F.pad(self.record.kept[layer], (0, self.real.shape[1] - self.record.real.shape[1]))
            keep = kept.gather(1, slots.clamp(min=0)) & candidates
        else:
            keep = self._choose(layer, hidden, images)
            width = self.real.shape[1]
            kept = F.pad(torch.zeros_like(self.real), (0, 1))  # the last column is for what is none
            kept = kept.scatter(1, slots.where(slots >= 0, width), keep)[:, :width]
            self.record.kept[layer] = self.record.real & (self.record.images.numbers >= 0) & kept
        if bool((keep | ~candidates).all()):
            return hidden
        alive = (slots >= 0) & (keep | ~candidates)
        self._masks.clear()
        if self.record.hidden:
            self.slots = slots.masked_fill(~alive, -1)
            return hidden
        count = int(alive.sum(1).max())
        if self.right:
            order = (~alive).byte().argsort(dim=1, stable=True)[:, :count]
        else:
            order = alive.byte().argsort(dim=1, stable=True)[:, slots.shape[1] - count :]
        self.slots = slots.gather(1, order).masked_fill(~alive.gather(1, order), -1)
        return _columns(hidden, order.repeat_interleave(self.copies, 0))

    def _choose(self, layer: int, hidden: Tensor, images: ImageMap) -> Tensor:
        """(B, N) bool, the image tokens that stay."""
        which = (images.numbers >= 0).flatten().nonzero().flatten()
        which = which[images.numbers.flatten()[which].argsort(stable=True)]  # image by image
        lengths = images.counts(images.numbers >= 0)
        features = hidden[:: self.copies].flatten(0, 1)[which.to(hidden.device)].detach()
        importance = None if self.importance is None else self.importance.flatten()[which.to(self.importance.device)]
        self.importance = None
        chosen = self.seam.choose(layer, self.keep[layer], Candidates(features, lengths, importance), self.entered)
        keep = torch.zeros(images.numbers.numel(), dtype=torch.bool, device=images.numbers.device)
        keep[which] = chosen.to(keep.device)
        return keep.view_as(images.numbers)


class DecodingRun:
    """New tokens follow a pruned prompt.

    Args:
        held: what the cache has of it.
        real: (B, W) bool, what is no padding of the prompt and all that follows it; None: all that follows.
    """

    def __init__(self, held: HeldPrompt, real: Tensor | None):
        self.held, self.real = held, real
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}

    def watches(self, layer: int) -> bool:
        return False

    def enter(
        self, layer: int, hidden: Tensor, kwargs: dict[str, Any], cache: Any, form: str, window: int | None
    ) -> Tensor:
        """As `PromptRun.enter`: the mask of a layer is that of the columns it holds."""
        slots, queries = self.held.slots.get(layer), hidden.shape[1]
        if slots is None:
            return hidden
        key = id(slots), window
        if key not in self._masks:
            columns, since = self._held_columns(slots, cache, queries)
            first = self.held.width + since
            new = torch.arange(first, first + queries, device=slots.device)
            sees_all = queries == 1 and window is None and self.real is None and self.held.complete[layer]
            sees_all = sees_all and columns.shape[1] == slots.shape[1] + since + 1  # a static cache has empty keys
            self._masks[key] = None if sees_all else decoding_mask(columns, new, window, form, hidden.dtype)
        kwargs["attention_mask"] = self._masks[key]
        return hidden

    def labels(self, labels: Tensor) -> Tensor:
        return labels

    def _held_columns(self, slots: Tensor, cache: Any, queries: int) -> tuple[Tensor, int]:
        """(B, M), the columns of a layer's keys, new ones among them, and how many followed the prompt before."""
        since = int(cache.get_seq_length()) - slots.shape[1]
        keys, total = int(cache.get_mask_sizes(queries)[0]), slots.shape[1] + since + queries
        behind = torch.arange(max(keys, total) - slots.shape[1], device=slots.device) + self.held.width
        behind = behind.expand(len(slots), -1)
        if self.real is not None and self.real.shape[1] > self.held.width:
            real = self.real[:, self.held.width :]
            real = F.pad(real, (0, max(behind.shape[1] - real.shape[1], 0)), value=True)[:, : behind.shape[1]]
            behind = behind.masked_fill(~real, -1)
        columns = torch.cat([slots, behind], 1)
        # A sliding window holds the last ones alone; a static cache has empty ones behind, later than any query.
        return columns[:, total - keys : total] if keys < total else columns[:, :keys], since


def _last(slots: Tensor) -> Tensor:
    """(B, 1) int64: the last token of each sample."""
    places = torch.arange(slots.shape[1], device=slots.device)
    return (places * (slots >= 0)).amax(1, keepdim=True)


def _causal_attention(query: Tensor, key: Tensor, rows: Tensor, scaling: float) -> Tensor:
    """(B, N) float32 or float64: what R rows of each sample attend to under a causal mask alone, summed over rows and
    heads."""
    (batch, heads, length, _), asked = query.shape, rows.shape[1]
    picked = _columns(query, rows[:, None].expand(-1, heads, -1)).transpose(1, 2).flatten(0, 1)
    samples = torch.arange(batch + 1, dtype=torch.int32, device=query.device)
    keys, places = key.transpose(1, 2).flatten(0, 1), rows.flatten().int()
    mean = attention_rows(picked, keys, samples * asked, samples * length, places, softmax_scale=scaling)
    return mean.view(batch, length) * (heads * asked)


def _attention(query: Tensor, key: Tensor, rows: Tensor, seen: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """(B, R, N) float32 or float64: what R rows of each sample attend to, summed over heads."""
    heads = query.shape[1]
    asked = _columns(query, rows[:, None].expand(-1, heads, -1)).unflatten(1, (key.shape[1], -1))  # (B, Hk, G, R, D)
    scores = (asked.flatten(2, 3) @ key.transpose(2, 3)).unflatten(2, asked.shape[2:4])
    scores = scores.to(torch.promote_types(query.dtype, torch.float32)) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~seen[:, None, None], -math.inf)
    return scores.softmax(-1).nan_to_num().sum((1, 2))


def _columns(table: Tensor, index: Tensor) -> Tensor:
    """The rows (..., B, N, D) of a table (..., B or 1, S, D); index is (B, N), or (..., B, N) for all of them."""
    table = table.expand(*table.shape[: -index.ndim - 1], *index.shape[:-1], *table.shape[-2:])
    index = index.to(table.device).expand(*table.shape[:-2], -1)
    return table.gather(-2, index[..., None].expand(*index.shape, table.shape[-1]))
