# SPDX-License-Identifier: Apache-2.0
"""What `VlmHandle.explain` prints: seam by seam what is kept and what was, how Linears run, and what is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import groupby, pairwise
from typing import Any

from torch import nn

from madtp.dtp.keep import Keep
from madtp.hwp.packed_linear import PackedLinear
from madtp.models.prefill_seam import PrefillSeam
from madtp.models.projector_seam import ProjectorSeam, PromptRecord
from madtp.models.vision_seam import VisionSeam
from madtp.models.vlm import decoder_of
from madtp.patching.vlm_keep import PREFILL, PROJECTOR, VISION

Line = tuple[str, str, str, str]  # seam, what, value, of what

REFUSED = {
    "assisted generation": "its candidates are positions of the whole prompt",
    "a cache that holds a pruned prompt": "token ids of a conversation no longer fit it",
    "inputs_embeds with images": "placeholders are found by their ids",
    "an attention mask that is not (B, S)": "its columns go with the tokens",
}
REFUSED_BY_PREFILL = {
    "a prompt read in chunks": "its last token ranks, and is not there yet",
    "static caches of sliding windows": "they hold places by columns of the whole prompt",
    "attention other than sdpa, eager, madtp": "their masks are not known",
}


def explained(model: nn.Module, given: Mapping[str, Any], seams: Mapping[str, Any]) -> str:
    """A table.

    Args:
        given: by name, the seams that prune.
        seams: those that are mixed in.
    """
    lines: list[Line] = []
    if VISION in given:
        lines += _of_tower(given[VISION], seams[PROJECTOR].here.record)
    if PROJECTOR in seams:
        lines += _of_prompt(given, seams[PROJECTOR])
    if PREFILL in given:
        lines += _of_prefill(model, given[PREFILL])
    lines += _of_linears(model)
    lines += [("all", "refused", what, why) for what, why in REFUSED.items()]
    if PREFILL in given:
        lines += [(PREFILL, "refused", what, why) for what, why in REFUSED_BY_PREFILL.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _of_tower(seam: VisionSeam, record: PromptRecord) -> list[Line]:
    lines: list[Line] = [(VISION, "rule", seam.keep.name, f"{_amount(seam.keep)}, layers: {seam.layers}")]
    tolerance = seam.keep.duplicates
    if tolerance is not None:
        lines.append((VISION, "duplicates", str(tolerance), "by which pixels of a unit that goes may differ"))
    if record.columns is None:
        return lines
    if tolerance is not None:
        lines.append((VISION, "entered", str(sum(map(len, record.tower_entries()))), "units that are no duplicates"))
    counts = [sum(record.lengths()), *(sum(map(len, layer)) for layer in record.tower_selections())]
    lines.append((VISION, "units", f"{counts[0]} -> {counts[-1]}", f"removed, images: {len(record.lengths())}"))
    lines.append((VISION, "by layer", ", ".join(map(str, counts[1:])), "units left"))
    return lines


def _of_prompt(given: Mapping[str, Any], seam: ProjectorSeam) -> list[Line]:
    record, name = seam.here.record, PROJECTOR if PROJECTOR in given else VISION
    how = "hidden" if record.hidden else "removed"
    lines: list[Line] = []
    if PROJECTOR in given:
        lines.append((PROJECTOR, "rule", seam.keep.name, _amount(seam.keep)))
    if record.columns is None:
        return lines
    if PROJECTOR in given:
        towers = record.tower_selections()
        before = [len(places) for places in towers[-1]] if towers else record.lengths()
        after = [len(places) for places in record.selections()]
        lines.append((PROJECTOR, "tokens", f"{sum(before)} -> {sum(after)}", f"{how}, images: {len(before)}"))
    width = record.columns.shape[1]
    lines.append((name, "columns", f"{record.width} -> {width}", "of the prompt"))
    if PREFILL not in given:
        lines.append((name, "cache", str(width), "columns after the prompt"))
    return lines


def _of_prefill(model: nn.Module, seam: PrefillSeam) -> list[Line]:
    lines: list[Line] = [(PREFILL, f"rule, {n}", keep.name, f"{_amount(keep)}") for n, keep in seam.keep.items()]
    if (record := seam.here.record) is None or record.columns is None:
        return lines
    counts = [record.entered(), *map(record.images.counts, record.kept.values())]
    how = "hidden" if record.hidden else "removed"
    for layer, (before, after) in zip(record.kept, pairwise(counts), strict=True):
        what = f"{sum(before)} -> {sum(after)}"
        lines.append((PREFILL, f"tokens, {layer}", what, f"{how}, images: {len(before)}"))
    layers = len(decoder_of(model).layers)
    widths = [record.slots.get(layer, record.real).shape[1] for layer in range(layers)]
    for width, group in groupby(range(layers), widths.__getitem__):
        first, *_, last = [*group] * 2
        lines.append((PREFILL, "cache", str(width), f"columns after the prompt, layers {first} to {last}"))
    return lines


def _of_linears(model: nn.Module) -> list[Line]:
    """How many run packed, by form and backend; the others are torch's."""
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    kinds = Counter(f"{module.form} on {module.choice.backend}" for module in packed)
    return [("all", "Linears", str(count), kind) for kind, count in kinds.items()]


def _amount(keep: Keep) -> str:
    if keep.mass is not None or keep.temperature is not None:
        return f"{keep.decided_by} of each image"
    return "by itself" if keep.amount is None else f"{keep.amount} of each image"
