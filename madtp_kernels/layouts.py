# SPDX-License-Identifier: Apache-2.0
"""What the kernels of a backend read of a weight, kept beside it until the weight is written to."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from madtp_kernels.checks import check_not_recorded, require


class KeepsLayouts:
    """A weight whose parts may be written to in place, what was packed of it, and which calls of it were checked."""

    _kind: ClassVar[str]  # as the error for an unknown backend names it
    values: Tensor
    # What an op keeps of the classes of calls it has checked: their layout, the backend's function and the activation.
    fast_paths: dict[tuple[object, ...], tuple[str, Callable[..., Tensor], str]]
    _packed: dict[str, tuple[Any, Any]]  # backend -> (versions, layout)

    def _versions(self) -> Any:
        """What changes when a part is written to, as far as torch counts the write; None under torch.compile."""
        raise NotImplementedError

    def _packers(self) -> Mapping[str, Callable[[Any], Any]]:
        """backend -> what packs a weight of this kind."""
        raise NotImplementedError

    def layout(self, backend: str) -> Any:
        """The weight as the kernels of `backend` read it, kept until a part of it is written to.

        Under torch.compile writes go unnoticed: what was packed stays until `forget`.

        Raises:
            ValueError: no layout is registered for `backend`. RuntimeError: a CUDA graph is being captured and the
                weight has not been packed: what a graph writes is there when it is replayed, and kept here before.
        """
        state = self._versions()
        packed = self._packed.get(backend)
        if packed is None or (state is not None and packed[0] != state):
            packers = self._packers()
            rule = f"one with {self._kind} layout ({', '.join(packers) or 'none'})"
            require(backend in packers, "backend", rule, backend)
            if state is not None:
                call = f"{self._kind} weight is packed for {backend} at its first call"
                check_not_recorded(self.values.device, call, "call it once before the capture")
            # Out of inference mode: its tensors could not be saved for a backward later.
            with contextlib.nullcontext() if state is None else torch.inference_mode(False):
                packed = self._packed[backend] = state, packers[backend](self)
        return packed[1]

    def forget(self) -> None:
        """Drops what was packed: after a write that torch does not count, or that a compiled function is to see."""
        self._packed.clear()


class LayoutsOfTensors:
    """What was packed of weights that come as tensors alone, as out of an exported program: kept as long as these live.

    It is packed again after a write that torch counts.
    """

    def __init__(self, pack: Callable[[Tensor, Tensor | None], Tensor]) -> None:
        self._pack, self._kept = pack, WeakTensorKeyDictionary()

    def __call__(self, values: Tensor, indices: Tensor | None) -> Tensor:
        if values.is_inference() or (indices is not None and indices.is_inference()):  # which count no write
            return self._pack(values, indices)
        state = values._version, None if indices is None else indices._version
        found = self._kept.get(values)
        if found is not None and found[0] == state and found[1]() is indices:
            layout: Tensor = found[2]
            return layout
        layout = self._pack(values, indices)
        self._kept[values] = state, _nothing if indices is None else weakref.ref(indices), layout
        return layout


def _nothing() -> None:
    return None
