# SPDX-License-Identifier: Apache-2.0
"""Where a decoder that reads images should lose tokens: cost against harm over its seams, with nothing trained."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from madtp.dtp.keep import Keep
from madtp.dtp.scalars import is_number
from madtp.files import atomic_write, require_writable_file
from madtp.handles import find_handle
from madtp.inference import evaluating
from madtp.models.prompt import has_images
from madtp.models.vlm import first_prefill_layer, usual_prefill_layer
from madtp.patching import patch
from madtp.patching.vlm_keep import PREFILL, PROJECTOR, VISION, check_keep, saved_keep
from madtp.profiling.prompt_cost import prompt_cost

Batch = Mapping[str, Any]
SEAMS = (VISION, PROJECTOR, PREFILL)
SHARES = (1.0, 0.5, 0.25)


@dataclass(frozen=True)
class SeamPoint:
    """One setting of the seams.

    Args:
        keep: of `madtp.patch`; empty for the dense model.
        macs_share: multiply-adds to the first token, of those of the dense model.
        divergence: Kullback-Leibler, in nats, of the answers' distributions from those of the dense model.
        dominated: whether another point costs no more and harms no more, and is better in one.
    """

    keep: Mapping[str, Any]
    macs_share: float
    divergence: float
    dominated: bool


@dataclass(frozen=True)
class SeamPareto:
    """Points from the cheapest on; as a string they are a table."""

    points: tuple[SeamPoint, ...]

    @property
    def front(self) -> tuple[SeamPoint, ...]:
        """Those that no other one dominates."""
        return tuple(point for point in self.points if not point.dominated)

    def save(self, path: str | os.PathLike) -> None:
        """Writes a JSON list, an object a point."""
        require_writable_file("path", path)
        rows = []
        for point in self.points:
            keep = saved_keep(check_keep(point.keep)) if point.keep else {}
            rows.append({**vars(point), "keep": keep})
        atomic_write(path, json.dumps(rows, indent=2) + "\n")

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [(*SEAMS, "MACs", "divergence", "front")]
        for point in self.points:
            amounts = (_shown(point.keep.get(seam)) for seam in SEAMS)
            mark = "" if point.dominated else "*"
            rows.append((*amounts, f"{point.macs_share:.3f}", f"{point.divergence:.4g}", mark))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def seam_pareto(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    shares: Sequence[float] = SHARES,
    keeps: Iterable[Mapping[str, Any]] | None = None,
    prefill_layer: int | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> SeamPareto:
    """What each setting of the seams costs, and what it does to the answers on calibration prompts.

    Costs are predicted (`madtp.prompt_cost`), harm is measured: of the first token of the answer or, where a batch has
    `labels`, of every token that they ask for, the distribution is compared with that of the dense model. The model is
    patched for each setting in turn, in eval mode, and as it was in the end.

    Args:
        model: a decoder that reads images, not patched.
        batches: keyword arguments of forwards, with images.
        shares: what to keep at each seam that the model has, every combination of them; 1 leaves a seam out.
        keeps: settings, as of `madtp.patch`, in place of those; of shares and counts alone.
        prefill_layer: behind which decoder layer the prefill seam prunes; None is 2, as in FastV, or the first one
            after it that follows full attention.
        progress: wraps the settings, for a bar.

    Returns:
        points from the cheapest on, the dense model among them.

    Raises:
        ValueError: the model is patched, there are no batches, shares are not in (0, 1], keeps have a mass, a
            temperature, or a function that says how many, or a batch has no image or breaks a rule of `madtp.patch`'s
            forward. TypeError: as `madtp.prompt_cost`.
    """
    if find_handle(model) is not None:
        raise ValueError("model must not be patched already; call model.madtp_handle.remove() first")
    if isinstance(batches, Mapping):
        raise ValueError("batches must be a sequence of mappings, got one mapping: put it into a list")
    batches = list(batches)
    if not batches:
        raise ValueError("batches must hold a calibration prompt, got none")
    for batch in batches:
        if not has_images(batch):
            raise ValueError(f"batches must have images, got one with {', '.join(batch)} alone")
    inputs = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    dense_macs = sum(prompt_cost(model, {}, **batch).first_token for batch in inputs)
    settings = _settings(model, shares, prefill_layer) if keeps is None else list(keeps)
    for keep in settings:
        _check_fixed(keep)
    costs = [sum(prompt_cost(model, keep, **batch).first_token for batch in inputs) for keep in settings]
    asked = [_asked(batch) for batch in batches]
    if not any(places.any() for places in asked):
        raise ValueError("labels must ask for a token, got none but -100")
    with evaluating(model):
        dense = [_distributions(model, batch, places) for batch, places in zip(inputs, asked, strict=True)]
        found: list[tuple[Mapping[str, Any], float, float]] = [({}, 1.0, 0.0)]
        for keep, macs in zip(progress(settings), costs, strict=True):
            found.append((keep, macs / dense_macs, _divergence(model, keep, inputs, asked, dense)))
    found.sort(key=lambda point: point[1:])
    return SeamPareto(tuple(SeamPoint(*point, dominated=_is_dominated(point[1:], found)) for point in found))


def _settings(model: nn.Module, shares: Sequence[float], prefill_layer: int | None) -> list[dict[str, Any]]:
    """Every combination of shares at the seams of a model, but the dense one."""
    for share in shares:
        if not (is_number(share) and 0 < share <= 1):
            raise ValueError(f"shares must be in (0, 1], got {share!r}")
    steps = sorted({float(share) for share in shares}, reverse=True)
    layer = usual_prefill_layer(model) if prefill_layer is None else prefill_layer
    seams = [VISION, PROJECTOR]  # `prompt_cost` refuses towers that are not known
    if prefill_layer is not None or layer >= first_prefill_layer(model):  # there is a layer to prune behind
        seams.append(PREFILL)
    combined = []
    for amounts in product(steps, repeat=len(seams)):
        keep = {
            seam: {layer: share} if seam == PREFILL else share
            for seam, share in zip(seams, amounts, strict=True)
            if share < 1
        }
        if keep:
            combined.append(keep)
    return combined


def _check_fixed(setting: Mapping[str, Any]) -> None:
    """Raises ValueError for a setting whose cost is not known before it runs."""
    for seam, amounts in check_keep(setting).items() if setting else ():
        for keep in [amounts] if isinstance(amounts, Keep) else amounts.values():
            if not keep.is_fixed:
                raise ValueError(
                    "keeps must be of shares and counts, whose costs are known before they run, got "
                    f"{keep.decided_by} at {seam!r}"
                )


def _asked(batch: Batch) -> Tensor:
    """(B, S) bool: the places whose next token is compared."""
    input_ids, labels, mask = batch["input_ids"], batch.get("labels"), batch.get("attention_mask")
    if labels is not None:
        return torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))
    real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    return places == (places * real).amax(1, keepdim=True)


def _distributions(model: nn.Module, batch: Batch, asked: Tensor) -> Tensor:
    """(N, V) log probabilities at the places asked, of what a model leaves of the prompt."""
    logits, handle = model(**batch).logits, find_handle(model)
    if handle is not None:
        columns: Any = handle.columns  # type: ignore[attr-defined]  # of a decoder
        asked = asked.gather(1, columns.clamp(min=0)) & (columns >= 0)
    return logits[asked.to(logits.device)].float().log_softmax(-1)


def _divergence(
    model: nn.Module,
    keep: Mapping[str, Any],
    batches: Sequence[Batch],
    asked: Sequence[Tensor],
    dense: Sequence[Tensor],
) -> float:
    """The mean over all places asked."""
    handle, total = patch(model, keep=keep), 0.0
    try:
        for batch, places, expected in zip(batches, asked, dense, strict=True):
            found = _distributions(model, batch, places)
            if len(found) != len(expected):
                raise ValueError("labels must ask for no token that comes after one of an image, got some that do")
            total += float((expected.exp() * (expected - found)).sum())
    finally:
        handle.remove()
    return max(total / sum(map(len, dense)), 0.0)  # rounding may go below


def _is_dominated(point: Sequence[float], found: Sequence[tuple[Any, float, float]]) -> bool:
    return any(other <= point[0] and harm <= point[1] and (other, harm) != tuple(point) for _, other, harm in found)


def _shown(amount: Any) -> str:
    """Of a seam, to be read."""
    if amount is None:
        return "all"
    if isinstance(amount, Mapping):
        return ", ".join(f"{layer}: {_shown(part)}" for layer, part in amount.items())
    if not isinstance(amount, Keep):
        return f"{amount:.3g}" if isinstance(amount, float) else str(amount)
    decided = "" if amount.mass is None and amount.temperature is None else amount.decided_by
    duplicates = "" if amount.duplicates is None else f", duplicates {amount.duplicates}"
    return f"{amount.name} {amount.amount or decided}".rstrip() + duplicates
