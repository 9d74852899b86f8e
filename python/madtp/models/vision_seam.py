# SPDX-License-Identifier: Apache-2.0
"""The seam inside the vision tower: how many units are left behind each of its layers, and which.

A unit is the patches that become one token of the decoder. What is left falls evenly from layer to layer: of a share r
behind the last of L layers, r^(l/L) of the units are left behind layer l. Duplicates, by their pixels, may go before
the first: then the same counts hold, of which no more are left than entered. A temperature is the same behind each
layer, and leaves each image a number of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from madtp.dtp.keep import Keep
from madtp.dtp.keep_rules import RULES, Candidates, Rule, fewest_with_mass
from madtp.models.seam import Seam, ThreadState

NAME = "vision"
RULES_HERE = ("received", "cls", "divprune", "uniform", "random")
PLANNED = ("uniform", "random")  # which look at nothing: what they keep is known before the tower runs


@dataclass
class TowerRecord:
    """What a tower left of some images.

    Args:
        lengths: how many units each has.
        kept: by layer, (U,) bool, the units of all of them that were left behind it.
        entered: (U,) bool, those that entered the first layer; None: all.
        newlines: how many of them are tokens between rows of a grid, which are no units and all stay.
    """

    lengths: list[int]
    kept: list[Tensor]
    entered: Tensor | None = None
    newlines: int = 0

    @property
    def units(self) -> tuple[int, int]:
        """How many there were, and were left in the end."""
        return sum(self.lengths) - self.newlines, int(self.kept[-1].sum()) - self.newlines

    def selections(self) -> list[list[Tensor]]:
        """By layer, for each image the units kept, int64 ascending."""
        return [[part.nonzero().flatten() for part in kept.split(self.lengths)] for kept in self.kept]

    def entries(self) -> list[Tensor]:
        """For each image the units that entered, int64 ascending."""
        entered = torch.ones_like(self.kept[-1]) if self.entered is None else self.entered
        return [part.nonzero().flatten() for part in entered.split(self.lengths)]

    def whole(self, rows: Tensor) -> list[Tensor]:
        """rows (U', D) of the units left at the end -> for each image (n, D), with zeros where one is gone."""
        left = self.kept[-1]
        return list(rows.new_zeros(len(left), rows.shape[1]).masked_scatter(left[:, None], rows).split(self.lengths))


class VisionState(ThreadState):
    """What one thread knows of the seam: the attention that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.attending: Any = None


class VisionSeam(Seam):
    """Units are pruned inside the tower, behind each of its layers.

    Args:
        keep: what is left of each image behind the last layer.
        layers: how many layers run: those behind the one that the projector reads do not.
    """

    State = VisionState

    def __init__(self, keep: Keep, layers: int):
        super().__init__()
        self.keep, self.layers = keep, layers

    def counts(self, lengths: Sequence[int], entered: Sequence[int]) -> list[list[int]]:
        """By layer, how many units are left of images that have so many: of an image at least one.

        Args:
            entered: how many of them enter the first layer, which is not all where there are duplicates.

        Raises:
            ValueError: what is left depends on more than lengths.
        """
        return layer_counts(self.keep, self.layers, lengths, entered)


def layer_counts(keep: Keep, layers: int, lengths: Sequence[int], entered: Sequence[int]) -> list[list[int]]:
    """`VisionSeam.counts` of what a seam keeps."""
    last = keep.counts(lengths)
    shares = [
        keep.amount if isinstance(keep.amount, float) else n / max(length, 1)
        for n, length in zip(last, lengths, strict=True)
    ]
    return [
        [
            min(_left(length, share ** (layer / layers)), there)
            for length, share, there in zip(lengths, shares, entered, strict=True)
        ]
        for layer in range(1, layers + 1)
    ]


class UnitSelection:
    """The units that are left while a tower runs.

    Args:
        lengths: how many units each image has.
        device: of the tower.
        distinct: (U,) bool, those that enter the first layer; None: all.
    """

    def __init__(self, seam: VisionSeam, lengths: Sequence[int], device: torch.device, distinct: Tensor | None = None):
        self.keep, self.layers, self.record = seam.keep, seam.layers, TowerRecord(list(lengths), [], distinct)
        self.alive = torch.ones(sum(lengths), dtype=torch.bool, device=device) if distinct is None else distinct
        self.left = list(lengths)  # of each image
        if distinct is not None:
            self.left = [int(part.sum()) for part in distinct.split(self.left)]
        keep = self.keep  # as it is now, whatever is set while the tower runs
        seam.warn_of_large(f"the seam {NAME!r}", keep.amount, lengths)
        self._counts = layer_counts(keep, self.layers, lengths, self.left) if keep.is_fixed else None
        self._planned: list[Tensor] | None = None
        if self._counts is not None and isinstance(keep.rule, str) and keep.rule in PLANNED:
            planned = nested(RULES[keep.rule].choose, self.left, self._counts)
            self._planned = [self.alive.masked_scatter(self.alive, kept.to(device)) for kept in planned]

    def prunes(self, layer: int) -> bool:
        """Whether units may go behind a layer; layers count from 0."""
        return self._counts is None or self._counts[layer] != self.left

    def watches(self, layer: int) -> bool:
        """Whether what goes behind a layer depends on its attention."""
        return self._planned is None and self.prunes(layer) and self.keep.rule != "divprune"

    def sees(self, layer: int) -> bool:
        """Whether what goes behind a layer depends on the features of its units."""
        rule = self.keep.rule
        return self.prunes(layer) and (callable(rule) or rule == "divprune")

    def prune(self, layer: int, importance: Tensor | None, features: Tensor | None) -> Tensor | None:
        """Chooses behind a layer; to be called behind each.

        Args:
            importance: (U,), of all units, where the layer is watched.
            features: of the units that are left, (U', m C), where they are seen.

        Returns:
            (U,) bool, the units that are left; None where none can have gone.
        """
        pruned = self.prunes(layer)
        if pruned:
            planned = self._planned
            self.alive = self._chosen(layer, importance, features) if planned is None else planned[layer]
            if self._counts is None:
                self.left = [int(part.sum()) for part in self.alive.split(self.record.lengths)]
            else:
                self.left = self._counts[layer]
        self.record.kept.append(self.alive)
        return self.alive if pruned else None

    def _chosen(self, layer: int, importance: Tensor | None, features: Tensor | None) -> Tensor:
        keep, counts = self.keep, None if self._counts is None else self._counts[layer]
        importance = None if importance is None else importance[self.alive]
        rows = features if features is not None else importance
        assert rows is not None, "a rule looks at one of them"
        candidates = Candidates(rows.view(len(rows), -1), self.left, importance)
        if keep.mass is not None:
            counts = fewest_with_mass(candidates, keep.mass ** (1 / self.layers))
        chosen = keep.choose_so_many(candidates, counts)
        if chosen.features is not None:
            raise ValueError(f"rule {keep.name} must return a bool tensor in a tower, where units stay as they are")
        return self.alive.masked_scatter(self.alive, chosen.keep)


def nested(rule: Rule, lengths: Sequence[int], counts: Sequence[Sequence[int]]) -> list[Tensor]:
    """By layer, (U,) bool, what a rule keeps that looks at nothing: behind the last layer what it takes of all units,
    and from there back those, and what it takes of the others."""
    keep, before = torch.zeros(sum(lengths), dtype=torch.bool), [0] * len(lengths)
    kept = []
    for wanted in reversed(counts):
        rest = (~keep).nonzero()
        others = [length - taken for length, taken in zip(lengths, before, strict=True)]
        more = [count - taken for count, taken in zip(wanted, before, strict=True)]
        taken = rule(Candidates(rest.float(), others), more)
        keep = keep.index_fill(0, rest.flatten()[taken], True)
        kept.append(keep)
        before = list(wanted)
    return kept[::-1]


def _left(length: int, share: float) -> int:
    """A share of an image, rounded up, and at least one."""
    return max(math.ceil(round(share * length, 9)), min(1, length))
