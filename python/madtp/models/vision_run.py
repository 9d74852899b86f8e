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
    tower: Any, spec: VisionTower, seam: VisionSeam, rows: Rows, taken: Collection[int]
) -> tuple[dict[int, Tensor], TowerRecord]:
    """-> by how many layers had run, for each number `taken`, the features (U', m, C) of the units that are left at the
    end, and which these are.

    The last layers, whose features nobody takes, do not run.
    """
    selection = UnitSelection(seam, rows.lengths, rows.x.device)
    features = {0: rows.x} if 0 in taken else {}
    for number, layer in enumerate(attrgetter(spec.layers)(tower)[: max(taken)]):
        windows = rows.windows is not None and number not in spec.whole(tower)
        ends = rows.windows if windows and rows.windows is not None else rows.ends
        call = AttentionCall(ends, rows.longest, spec.summary, selection.watches(number))
        rows = rows.with_x(run_layer(layer, rows, call))
        importance = None if call.stats is None else rows.importance(_received(call.stats, seam))
        units = rows.units(rows.x).flatten(1) if selection.prunes(number) and selection.needs_features else None
        if (alive := selection.prune(number, importance, units)) is not None:
            rows, index = rows.keep(alive)
            features = {taken: x[index] for taken, x in features.items()}
        if number + 1 in taken:
            features[number + 1] = rows.x
    return {number: rows.units(x) for number, x in features.items()}, selection.record


def _received(stats: AttentionStats, seam: VisionSeam) -> Tensor:
    return stats.summary_attention if seam.keep.rule == "cls" else stats.received_attention
