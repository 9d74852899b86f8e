# SPDX-License-Identifier: Apache-2.0
"""What a forward of a branch leaves behind, for those who ask the handle afterwards."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from madtp.dtp.ragged import RaggedBatch
from madtp.mag import normalised


class ForwardRecord:
    """What one forward of a branch leaves behind.

    Features come with their gradients until a backward has passed through them: a model must not keep a graph.

    Args:
        entered: what the forward began with, without the features; None where there was none.
        samples_per_feature: of the branch.
    """

    def __init__(self, entered: RaggedBatch | None = None, samples_per_feature: int = 1):
        self.entered, self.samples_per_feature = entered, samples_per_feature
        self.layers: list[RaggedBatch] = []  # what is left after each block, without the features
        self.summary_features: list[Tensor] = []  # (B, C): the summary tokens after each block
        self._aligned: list[Tensor] = []

    def end_block(self, batch: RaggedBatch) -> None:
        """Remembers what a block leaves."""
        self.layers.append(batch.without_features())
        features = [batch.summary_features()]
        self.summary_features.append(features[0])
        if batch.aligned is not None:
            self._aligned.append(batch.aligned)
            features.append(batch.aligned)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # The hook is held by the graph, which this record may hold: a strong reference would close a circle that
            # no garbage collector sees.
            release = Release(self)
            for feature in (batch.x, *features):
                if feature.requires_grad:
                    feature.register_hook(release)

    def aligned(self) -> Tensor | None:
        """(B, K, d) aligned features, normalised; None if none were collected."""
        parts = self.samples_per_feature
        features = [f.unflatten(0, (parts, -1)).mean(0) if parts > 1 else f for f in self._aligned]
        return normalised(features) if features else None

    def release(self) -> None:
        """Keeps the values of the features and lets go of their graph."""
        self.summary_features = [feature.detach() for feature in self.summary_features]
        self._aligned = [feature.detach() for feature in self._aligned]


class Release:
    """A tensor hook: the backward has come by, the record, whose `release` it calls, needs no graph any more."""

    def __init__(self, record: Any):
        self.record = weakref.ref(record)

    def __call__(self, gradient: Tensor) -> None:
        record = self.record()
        if record is not None:
            record.release()
