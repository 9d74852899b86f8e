# SPDX-License-Identifier: Apache-2.0
"""A 2:4 weight in its canonical form: the two kept values of every four columns, and where they stand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from madtp_kernels.checks import check_tensor, require
from madtp_kernels.layouts import KeepsLayouts
from madtp_kernels.nm_masks import nm_mask
from madtp_kernels.reference.sparse24 import sparse24_to_dense

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OUT_MULTIPLE, IN_MULTIPLE = 8, 16  # of which the sizes of a weight are multiples: sparse24_supports_shape in C++
ASCENDING = (0b0100, 0b1000, 0b1001, 0b1100, 0b1101, 0b1110)  # the valid nibbles: i0 | i1 << 2 with i0 < i1

_STALE = (-1, -1)  # versions that no tensors have

_layouts: dict[str, Callable[[Sparse24Weight], Any]] = {}


def supports_shape(out_features: int, in_features: int) -> bool:
    """Whether a weight of this shape can be a `Sparse24Weight`."""
    return out_features % OUT_MULTIPLE == 0 and in_features % IN_MULTIPLE == 0


def register_layout(backend: str, pack: Callable[[Sparse24Weight], Any]) -> None:
    """Makes `pack` what `Sparse24Weight.layout(backend)` computes: the form in which the kernels of `backend` read."""
    _layouts[backend] = pack


class Sparse24Weight(KeepsLayouts):
    """A Linear weight (N, C) with at most 2 non-zeros in every aligned 4 columns. `sparse24_compress` makes one.

    Args:
        values: (N, C/2) float32, bfloat16, float16 or float64: what the two positions of each group hold.
        indices: (N, C/8) uint8 on the same device. Byte b of a row holds group 2b in its low nibble and group 2b+1 in
            the high one; a nibble is i0 | i1 << 2 with i0 < i1, the columns of the two values inside their group.

    Both are kept, not copied, so they can be the buffers of a module. N is a multiple of 8, C of 16.

    What was packed for a backend is packed again after either was written to or assigned. torch counts no write through
    `.data`, through NumPy, by another process, or to a tensor made in inference mode: call `forget()` after one.

    Raises:
        ValueError: a dtype, shape or device breaks its rule, here or when assigned. What the indices hold is not read;
            `check_indices` does, and so does loading a pickle, as `torch.load` may of any file.
    """

    _kind = "a 2:4"

    values: Tensor
    indices: Tensor
    _transposed: tuple[tuple[int, int] | None, Sparse24Weight] | None  # versions, W^T

    def __init__(self, values: Tensor, indices: Tensor) -> None:
        _check_parts(values, indices)
        fields = {"values": values, "indices": indices, "fast_paths": {}, "_packed": {}, "_transposed": None}
        self.__dict__.update(fields)

    def __setattr__(self, name: str, value: Any) -> None:
        # Here and not in properties, which would cost every call of a small layer: it reads them and never assigns.
        if name in ("values", "indices"):
            _check_parts(**{"values": self.values, "indices": self.indices, name: value})
            super().__setattr__("fast_paths", {})
            super().__setattr__("_packed", {})
            if self._transposed is not None:
                super().__setattr__("_transposed", (_STALE, self._transposed[1]))
        super().__setattr__(name, value)

    @property
    def shape(self) -> torch.Size:
        """(N, C) of the dense weight."""
        return torch.Size((self.values.shape[0], 2 * self.values.shape[1]))

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes of values and indices."""
        return self.values.nbytes + self.indices.nbytes

    def to_dense(self) -> Tensor:
        """(N, C): the weight that was compressed, bit by bit, but that -0.0 became 0.0."""
        return sparse24_to_dense(self.values, self.indices)

    def positions(self) -> Tensor:
        """(N, C/4, 2) int64: the columns of the kept values inside their groups."""
        shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=self.device)
        return ((self.indices[..., None] >> shifts) & 3).long().view(self.shape[0], self.shape[1] // 4, 2)

    def to(self, *args: Any, **kwargs: Any) -> Sparse24Weight:
        """As `torch.Tensor.to`: a device, a dtype, or both; itself when nothing changes."""
        with torch.inference_mode(False):  # whose tensors do not count what is written to them
            values = self.values.to(*args, **kwargs)
            if values is self.values:
                return self
            if values.dtype != self.dtype:
                values = values.masked_fill(values == 0, 0)  # an underflow can leave -0.0
            moved = Sparse24Weight(values, self.indices.to(values.device))
        if (transposed := self.transposed) is not None:
            moved.__setstate__(transposed.to(*args, **kwargs))
        return moved

    def keep_transposed(self) -> Sparse24Weight:
        """Keeps W^T in its 2:4 form too, through which `sparse24_linear` computes the gradient of its x; returns self.

        The weight has to be 2:4 along both dimensions, as `transposable_mask` makes one. It takes as much memory
        again, and its layout with the first gradient. Copies, in memory or pickled, and what `to` returns keep theirs;
        files of `save_sparse24` do not. After values or indices were written to, W^T is made anew.

        Raises:
            ValueError: N is not a multiple of 16, or a column has more than 2 non-zeros in 4 aligned rows: names the
                first. Host reads.
        """
        self.__setstate__(_transpose(self))
        return self

    @property
    def transposed(self) -> Sparse24Weight | None:
        """W^T (C, N), where `keep_transposed` was called."""
        if self._transposed is None:
            return None
        state, (kept, transposed) = self._versions(), self._transposed
        if kept == state or (state is None and kept != _STALE):
            return transposed
        transposed = _transpose(self)
        self._transposed = state, transposed
        return transposed

    def check_indices(self, name: str = "indices") -> None:
        """Raises ValueError for the first nibble whose columns do not ascend. Reads the indices on the host."""
        check_nibbles(self.indices, name)

    def _versions(self) -> tuple[int, int] | None:
        if torch.compiler.is_compiling():
            return None
        try:
            return self.values._version, self.indices._version
        except RuntimeError:  # an inference tensor counts none; to ask first would cost every call of a small layer
            return version(self.values), version(self.indices)

    def forget(self) -> None:
        self.values = self.values

    def _packers(self) -> dict[str, Callable[[Sparse24Weight], Any]]:
        return _layouts

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_pickle, (self.values, self.indices, self.transposed)  # a copy packs its own layouts

    def __deepcopy__(self, memo: dict[int, Any]) -> Sparse24Weight:
        copied = Sparse24Weight(copy.deepcopy(self.values, memo), copy.deepcopy(self.indices, memo))
        if (transposed := self.transposed) is not None:
            copied.__setstate__(copy.deepcopy(transposed, memo))
        return copied

    def __setstate__(self, transposed: Sparse24Weight) -> None:  # pickles of 0.1 call it too
        self._transposed = self._versions(), transposed

    def __repr__(self) -> str:
        return f"Sparse24Weight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


def _check_parts(values: Tensor, indices: Tensor) -> None:
    check_tensor("values", values, 2, DTYPES)
    check_tensor("indices", indices, 2, (torch.uint8,))
    rows, half = values.shape
    rule = f"(N, C/2) with N a multiple of {OUT_MULTIPLE} and C of {IN_MULTIPLE}"
    require(supports_shape(rows, 2 * half), "values", rule, values)
    ok = indices.shape == (rows, half // 4) and indices.device == values.device
    require(ok, "indices", f"(N, C/8) = {(rows, half // 4)} on {values.device} like values", indices)


def check_nibbles(indices: Tensor, name: str) -> None:
    """Raises ValueError for the first nibble of indices (N, C/8) whose columns do not ascend. A host read."""
    valid = torch.zeros(16, dtype=torch.bool)
    valid[list(ASCENDING)] = True
    nibbles = torch.stack((indices & 15, indices >> 4), dim=2).flatten(1)  # (N, C/4)
    wrong = ~valid.to(indices.device)[nibbles.long()]
    if wrong.any():
        row, group = wrong.nonzero()[0].tolist()
        nibble = int(nibbles[row, group])
        got = f"{nibble & 3}, {nibble >> 2} at row {row}, group {group}"
        require(False, name, "two ascending columns for every group", got)


def _from_pickle(values: Tensor, indices: Tensor, transposed: Sparse24Weight | None) -> Sparse24Weight:
    """What a pickle calls, and all that `torch.load(weights_only=True)` may: so it trusts nothing that it is handed."""
    weight = Sparse24Weight(values, indices)
    if not weight.indices.is_meta:
        weight.check_indices()
    if transposed is not None:
        ok = isinstance(transposed, Sparse24Weight) and transposed.shape == weight.shape[::-1]
        ok = ok and transposed.dtype == weight.dtype and transposed.device == weight.device
        require(ok, "transposed", f"W^T, {weight.dtype} on {weight.device} of {tuple(weight.shape[::-1])}", transposed)
        weight.__setstate__(transposed)
    return weight


torch.serialization.add_safe_globals([_from_pickle])


def sparse24_compress(weight: Tensor) -> Sparse24Weight:
    """A dense weight that is 2:4 already -> its canonical form.

    Args:
        weight: (N, C) float32, bfloat16, float16 or float64, no NaN, with at most 2 non-zeros in every aligned 4
            columns (-0.0 is zero); N a multiple of 8, C of 16. `sparse24_prune` makes any weight so.

    Returns:
        `Sparse24Weight` on the device of weight, detached. A group with fewer non-zeros keeps the lowest free columns.

    Raises:
        ValueError: an argument breaks a rule; names the first group with more than 2 non-zeros. Two host reads.
    """
    check_dense(weight)
    rows, columns = weight.shape
    weight = weight.detach()
    kept = nm_mask(weight, 2, 4)
    lost = (weight != 0) & ~kept
    if lost.any():
        row, column = lost.nonzero()[0].tolist()
        group = weight[row, column // 4 * 4 :][:4]
        got = f"{int(group.count_nonzero())} at row {row}, group {column // 4} (columns {column // 4 * 4} and on)"
        require(False, "weight", "2:4, at most 2 non-zeros in every aligned 4 columns", got)
    with torch.inference_mode(False):  # whose tensors do not count what is written to them
        values = weight[kept].view(rows, columns // 2) + 0.0  # -0.0 becomes 0.0
        return Sparse24Weight(values, pack_positions(kept))


def check_dense(weight: Tensor) -> None:
    """The metadata of a weight that can become a `Sparse24Weight`."""
    check_tensor("weight", weight, 2, DTYPES)
    rule = f"(N, C) with N a multiple of {OUT_MULTIPLE} and C of {IN_MULTIPLE}"
    require(supports_shape(*weight.shape), "weight", rule, weight)


def pack_positions(kept: Tensor) -> Tensor:
    """A mask (N, C) with exactly 2 in every aligned 4 columns -> the indices (N, C/8) of a `Sparse24Weight`."""
    rows, columns = kept.shape
    places = torch.arange(4, device=kept.device, dtype=torch.uint8).repeat(columns // 4).expand(rows, columns)
    first, second, third, fourth = places[kept].view(rows, columns // 8, 4).unbind(-1)
    return first | second << 2 | third << 4 | fourth << 6


def _transpose(weight: Sparse24Weight) -> Sparse24Weight:
    rule = f"(N, C) with N a multiple of {IN_MULTIPLE} to be kept transposed"
    require(supports_shape(*reversed(weight.shape)), "weight", rule, weight.values)
    with torch.inference_mode(False):  # or W^T could not be saved for a backward
        dense = weight.to_dense().detach()
        count = (dense != 0).unflatten(0, (-1, 4)).sum(1)  # (N/4, C)
        if (count > 2).any():
            group, column = (count > 2).nonzero()[0].tolist()
            rule = "2:4 along its columns too, at most 2 non-zeros in every aligned 4 rows (see transposable_mask)"
            got = f"{int(count[group, column])} at column {column}, rows {4 * group} to {4 * group + 3}"
            require(False, "weight", rule, got)
        return sparse24_compress(dense.t())


def version(tensor: Tensor) -> int:
    """A number that grows when the tensor is written to in place; inference tensors count none."""
    return 0 if tensor.is_inference() else tensor._version
