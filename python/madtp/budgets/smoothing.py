# SPDX-License-Identifier: Apache-2.0
"""Smoothing of a patched model whose Linears are rounded: which of its norms, and by which inputs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from torch import Tensor, nn

from madtp.hwp import Smoothing, smooth
from madtp.models import norm_readers
from madtp.profiling.inputs import input_statistics, require_reached


def smooth_model(
    model: nn.Module, quantized: Collection[str], batches: Iterable[Mapping[str, Tensor]], alpha: float
) -> dict[str, Smoothing]:
    """`madtp.hwp.smooth` of every norm that a Linear which is rounded reads; the model computes the same.

    Args:
        model: patched.
        quantized: names of Linears.
        batches: keyword arguments of forwards, where the model is.
        alpha: of `smooth`.

    Returns:
        by the name of the norm what was done, or why it was not.

    Raises:
        ValueError: the batches do not reach one of the Linears.
    """
    wanted = set(quantized)
    pairs = [pair for pair in norm_readers(model) if wanted.intersection(pair.readers)]
    readers = [name for pair in pairs for name in pair.readers]
    statistics = input_statistics(model, readers, batches)
    require_reached(statistics)
    return smooth(model, pairs, statistics, alpha=alpha)
