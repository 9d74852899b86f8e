# SPDX-License-Identifier: Apache-2.0
"""How a model is run to be looked at: in eval mode, without gradients; and how many samples a batch holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A context in which the model is in eval mode and makes no gradients; every module gets its mode back."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def leading_size(inputs: Mapping[str, Any] | Sequence[Any] | Tensor) -> int:
    """Of the first tensor that is no scalar: how many samples there are.

    Raises:
        ValueError: there is no such tensor.
    """
    values: Iterable[Any] = inputs.values() if isinstance(inputs, Mapping) else inputs
    if isinstance(inputs, Tensor):
        values = (inputs,)
    for value in values:
        if isinstance(value, Tensor) and value.ndim:
            return value.shape[0]
    raise ValueError(f"inputs must hold a tensor to read the number of samples from, got {type(inputs).__name__}")
