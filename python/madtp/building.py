# SPDX-License-Identifier: Apache-2.0
"""A model that is built for saved weights grows no larger than they are: a damaged config could ask for any size."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules import module as hooks

# Saved weights are smaller than the model where they are packed, or one stands for several.
MAX_GROWTH = 8
MIN_PARAMETERS, MIN_ELEMENTS, MODULES_EACH = 1 << 10, 1 << 22, 4  # whatever is saved; modules for each parameter

MAX_COUNT, MAX_SIZE = 1 << 20, 1 << 24  # of what a config counts, and of sizes in it
_COUNTS = re.compile(r"(^|_)(num|n)_|layers?($|_)|depths?$|blocks?$|stages?$|labels$|experts|heads$")
_SIZES = re.compile(r"(^|_)(size|positions?|embeddings|dim|width|height|channels|resolution)s?($|_)")


class TooLargeError(ValueError):
    """A model asks for more parameters than its weights could fill."""


@contextmanager
def no_larger_than(tensors: int, elements: int) -> Iterator[None]:
    """A context in which this thread builds modules for weights of so many tensors and elements.

    Raises:
        TooLargeError: in the midst of building, when it becomes more than `MAX_GROWTH` times that.
    """
    limits = MIN_PARAMETERS + MAX_GROWTH * tensors, MIN_ELEMENTS + MAX_GROWTH * elements
    thread, seen = threading.get_ident(), set[tuple[int, str]]()
    parameters = modules = size = 0

    def add_parameter(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal parameters, size
        if parameter is None or threading.get_ident() != thread or (key := (id(module), name)) in seen:
            return  # a weight is registered again when it is loaded
        seen.add(key)
        parameters, size = parameters + 1, size + parameter.numel()
        if parameters > limits[0] or size > limits[1]:
            raise TooLargeError(f"config must be of a model for these weights of {elements} elements, got a larger one")

    def add_module(*of: object) -> None:
        nonlocal modules
        modules += threading.get_ident() == thread
        if modules > MODULES_EACH * limits[0]:
            raise TooLargeError(f"config must be of a model for these {tensors} weights, got one of more modules")

    handles = (
        hooks.register_module_parameter_registration_hook(add_parameter),
        hooks.register_module_module_registration_hook(add_module),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def elements_of(shapes: Mapping[str, tuple[str, Sequence[int]]]) -> int:
    """Of all tensors, by name: dtype, shape."""
    return sum(math.prod(shape) for _, shape in shapes.values())


def check_counts(config: Any, where: str = "") -> None:
    """Raises ValueError for a number of layers, labels and the like, or a size, that no model has: lists of so many are
    made before there is a parameter to count."""
    for name, value in config.items() if isinstance(config, Mapping) else ():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, Mapping):
                check_counts(number, f"{where}{name}.")
            elif isinstance(number, int | float):
                limit = MAX_COUNT if _COUNTS.search(name) else MAX_SIZE if _SIZES.search(name) else math.inf
                if number > limit and number != math.inf:
                    raise ValueError(f"{where}{name} of config must be at most {limit}, got {number}")
