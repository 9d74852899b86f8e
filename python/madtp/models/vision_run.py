# SPDX-License-Identifier: Apache-2.0
"""A vision tower that runs on the rows of the units that are left, and leaves fewer behind each layer."""

from __future__ import annotations

from collections.abc import Collection
from operator import attrgetter
from typing import Any

from torch import Tensor

from madtp.models.vision_layers import AttentionCall, run_layer
from madtp.models.vision_rows import Rows
from madtp.models.vision_seam import TowerRecord, UnitSelection, VisionSeam
from madtp.models.vision_towers import VisionTower
from madtp_kernels import AttentionStats


def run_tower(
    tower: Any,
    spec: VisionTower,
    seam: VisionSeam,
    rows: Rows,
    taken: Collection[int],
    distinct: Tensor | None = None,
) -> tuple[dict[int, Tensor], TowerRecord]:
    """-> by how many layers had run, for each number `taken`, the features (U', m, C) of the units that are left at the
    end, and which these are.

    The last layers, whose features nobody takes, do not run.

    Args:
        distinct: (U,) bool, the units that enter the first layer; None: all.
    """
    selection = UnitSelection(seam, rows.lengths, rows.x.device, distinct)
    if distinct is not None:
        rows, _ = rows.keep(selection.alive)
    features = {0: rows.x} if 0 in taken else {}
    for number, layer in enumerate(attrgetter(spec.layers)(tower)[: max(taken)]):
        call = AttentionCall(spec.segments(tower, rows, number), spec.summary, selection.watches(number))
        rows = rows.with_x(run_layer(layer, rows, call))
        importance = None if call.stats is None else rows.importance(_importance(call.stats, selection.keep.rule))
        units = rows.units(rows.x).flatten(1) if selection.sees(number) else None
        if (alive := selection.prune(number, importance, units)) is not None:
            rows, index = rows.keep(alive)
            features = {before: x[index] for before, x in features.items()}
        if number + 1 in taken:
            features[number + 1] = rows.x
    return {number: rows.units(x) for number, x in features.items()}, selection.record


def _importance(stats: AttentionStats, rule: Any) -> Tensor:
    """(T,), of rows."""
    return stats.summary_attention if rule == "cls" else stats.received_attention
