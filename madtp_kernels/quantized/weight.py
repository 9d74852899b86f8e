# SPDX-License-Identifier: Apache-2.0
"""A weight in int8 or fp8, dense or 2:4, with a scale for every output feature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from madtp_kernels.checks import check_tensor, require
from madtp_kernels.layouts import KeepsLayouts
from madtp_kernels.reference.quantized import (
    FP8,
    GRIDS,
    INT8,
    MAX_IN_FEATURES,
    Grid,
    dequantize,
    grid_of,
    nearest,
    row_scale,
)
from madtp_kernels.sparse24.weight import (
    DTYPES,
    IN_MULTIPLE,
    OUT_MULTIPLE,
    Sparse24Weight,
    check_nibbles,
    sparse24_compress,
    supports_shape,
    version,
)

SCHEMES = ("int8", "int8_24", "fp8", "fp8_24")
SPARSE = "_24"  # at the end of a scheme: 2:4
DTYPES_OF_VALUES = tuple(grid.dtype for grid in GRIDS.values())
_NAMES = f"one of {', '.join(SCHEMES)}"

NAN_BYTE = 0x7F  # the bits of an e4m3 number without its sign: it has one NaN and no infinities

_layouts: dict[str, Callable[[QuantizedWeight], Any]] = {}


def register_layout(backend: str, pack: Callable[[QuantizedWeight], Any]) -> None:
    """Makes `pack` what `QuantizedWeight.layout(backend)` computes: the form in which the kernels of `backend` read."""
    _layouts[backend] = pack


def grid_of_scheme(scheme: str) -> Grid:
    """What the values of a scheme are."""
    return GRIDS[scheme.removesuffix(SPARSE)]


def is_sparse(scheme: str) -> bool:
    """Whether the weights of a scheme are 2:4."""
    return scheme.endswith(SPARSE)


def scheme_of(values: Tensor, indices: Tensor | None) -> str:
    """That of a weight of these parts."""
    name = "fp8" if grid_of(values) is FP8 else "int8"
    return name if indices is None else name + SPARSE


class QuantizedWeight(KeepsLayouts):
    """A Linear weight (N, C) of 8 bits: W[n, c] is about scale[n] * values[n, c]. `quantize` makes one.

    Args:
        values: int8 from -127 to 127, or float8_e4m3fn without NaN. Schemes "int8" and "fp8": (N, C). Schemes "int8_24"
            and "fp8_24": (N, C/2), what the two positions of each group of four columns hold.
        scale: (N,) float32, positive and finite.
        indices: of a 2:4 scheme: (N, C/8) uint8, as in `Sparse24Weight`, N a multiple of 8 and C of 16. Else None.

    C is at most 65536, so that every sum of products is an int32, or for fp8 exact in float64.

    All are kept, not copied, so they can be the buffers of a module; which tensors they are is fixed. What was packed
    for a backend is packed again after one of them was written to. torch counts no write through `.data`, through
    NumPy, by another process, or to a tensor made in inference mode: call `forget()` after one.

    Raises:
        ValueError: a dtype, shape or device breaks its rule. What they hold is read by `check_values` alone.
    """

    _kind = "a quantized"

    values: Tensor
    scale: Tensor
    indices: Tensor | None
    scheme: str

    def __init__(self, values: Tensor, scale: Tensor, indices: Tensor | None = None) -> None:
        _check_parts(values, scale, indices)
        fields = {"values": values, "scale": scale, "indices": indices, "scheme": scheme_of(values, indices)}
        self.__dict__.update(fields, fast_paths={}, _packed={})

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{name} of a QuantizedWeight cannot be assigned: make another")

    @property
    def shape(self) -> torch.Size:
        """(N, C) of the dense weight."""
        rows, columns = self.values.shape
        return torch.Size((rows, columns if self.indices is None else 2 * columns))

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes of values, indices and scale."""
        return sum(part.nbytes for part in self._parts())

    def to_dense(self) -> Tensor:
        """(N, C) float32: scale * values."""
        return dequantize(self.values, self.indices, self.scale)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """On another device; itself when it is there. The dtypes are fixed."""
        with torch.inference_mode(False):  # whose tensors do not count what is written to them
            values = self.values.to(device)
            if values is self.values:
                return self
            indices = None if self.indices is None else self.indices.to(device)
            return QuantizedWeight(values, self.scale.to(device), indices)

    def check_values(self, name: str = "weight") -> None:
        """Raises ValueError for a -128, a NaN, a scale that is not positive and finite, or indices that do not ascend.

        Reads all of them on the host: for weights that come from a file.
        """
        grid = grid_of(self.values)
        if grid is INT8:
            wrong, got = self.values == -grid.largest - 1, f"{-grid.largest - 1}"
        else:
            wrong, got = self.values.view(torch.uint8) & NAN_BYTE == NAN_BYTE, "a NaN"
        if wrong.any():
            row = int(wrong.any(1).nonzero()[0])
            require(False, f"{name}.values", f"from -{grid.largest} to {grid.largest}", f"{got} at row {row}")
        wrong = ~(self.scale.isfinite() & (self.scale > 0))
        if wrong.any():
            row = int(wrong.nonzero()[0])
            require(False, f"{name}.scale", "positive and finite", f"{float(self.scale[row])} at row {row}")
        if self.indices is not None:
            check_nibbles(self.indices, f"{name}.indices")

    def _parts(self) -> tuple[Tensor, ...]:
        parts = self.values, self.scale, self.indices
        return tuple(part for part in parts if part is not None)

    def _versions(self) -> tuple[int, int] | None:
        if torch.compiler.is_compiling():
            return None
        values, indices = self.values, self.indices  # a layout has no scales
        try:
            return values._version, 0 if indices is None else indices._version
        except RuntimeError:  # an inference tensor counts none; to ask first would cost every call of a small layer
            return version(values), 0 if indices is None else version(indices)

    def _packers(self) -> dict[str, Callable[[QuantizedWeight], Any]]:
        return _layouts

    def __reduce__(self) -> tuple[Any, ...]:
        parts: tuple[Any, ...] = self.values, self.scale, self.indices
        if grid_of(self.values) is FP8:  # as bytes: torch cannot read fp8 from a plain pickle
            parts = self.values.view(torch.uint8), self.scale, self.indices, "fp8"
        return _from_pickle, parts  # a copy packs its own layouts

    def __repr__(self) -> str:
        return f"QuantizedWeight(shape={tuple(self.shape)}, scheme={self.scheme!r}, device={self.device})"


def _check_parts(values: Tensor, scale: Tensor, indices: Tensor | None) -> None:
    check_tensor("values", values, 2, DTYPES_OF_VALUES)
    check_tensor("scale", scale, 1, (torch.float32,))
    rows, columns = values.shape
    in_features = columns if indices is None else 2 * columns
    require(in_features <= MAX_IN_FEATURES, "values", f"of at most {MAX_IN_FEATURES} input features", values)
    ok = tuple(scale.shape) == (rows,) and scale.device == values.device
    require(ok, "scale", f"(N,) = {(rows,)} on {values.device} like values", scale)
    if indices is not None:
        check_tensor("indices", indices, 2, (torch.uint8,))
        rule = f"(N, C/2) with N a multiple of {OUT_MULTIPLE} and C of {IN_MULTIPLE}"
        require(supports_shape(rows, 2 * columns), "values", rule, values)
        ok = tuple(indices.shape) == (rows, columns // 4) and indices.device == values.device
        require(ok, "indices", f"(N, C/8) = {(rows, columns // 4)} on {values.device} like values", indices)


def _from_pickle(values: Tensor, scale: Tensor, indices: Tensor | None, dtype: str = "int8") -> QuantizedWeight:
    """What a pickle calls, and all that `torch.load(weights_only=True)` may: so it trusts nothing that it is handed."""
    if dtype != "int8":
        require(dtype == "fp8", "dtype", "int8 or fp8", dtype)
        check_tensor("values", values, 2, (torch.uint8,))
        values = values.view(FP8.dtype)
    weight = QuantizedWeight(values, scale, indices)
    if not values.is_meta:
        weight.check_values()
    return weight


torch.serialization.add_safe_globals([_from_pickle])


def quantize(weight: Tensor | Sparse24Weight, scheme: str = "int8_24", scale: Tensor | None = None) -> QuantizedWeight:
    """Rounds a weight to int8 or fp8, with a scale for every output feature.

    The values are W / scale, rounded half to even and cut at -127 and 127, or for fp8, float8_e4m3fn, at -448 and 448.

    Args:
        weight: (N, C) float32, bfloat16, float16 or float64, finite, C at most 65536; or a `Sparse24Weight`,
            for "int8_24" and "fp8_24".
        scheme: "int8", "fp8": all of them. "int8_24", "fp8_24": a weight that is 2:4 already, as `sparse24_prune` makes
            any.
        scale: (N,) floating point, positive and finite. None: the largest magnitude of each row / 127, or / 448. A row
            of zeros gets 1; and so does one whose largest magnitude is below 2^-119, or 2^-117, which becomes zeros.

    Returns:
        `QuantizedWeight` on the device of weight, detached.

    Raises:
        ValueError: an argument breaks a rule. Host reads.
    """
    require(isinstance(scheme, str) and scheme in SCHEMES, "scheme", _NAMES, scheme)
    if isinstance(weight, Sparse24Weight):
        require(is_sparse(scheme), "scheme", "int8_24 or fp8_24 for a Sparse24Weight", scheme)
    else:
        check_tensor("weight", weight, 2, DTYPES)
    require(weight.device.type != "meta", "weight", "of values to round", "one on meta, which has none")
    wide = weight.shape[1] > MAX_IN_FEATURES
    require(not wide, "weight", f"of at most {MAX_IN_FEATURES} input features", f"{weight.shape[1]}")
    sparse: Sparse24Weight | None
    if isinstance(weight, Sparse24Weight):
        sparse, values = weight, weight.values
    else:
        sparse = sparse24_compress(weight) if is_sparse(scheme) else None
        values = weight if sparse is None else sparse.values
    values = values.detach()
    finite = bool(values.float().isfinite().all())
    require(finite, "weight", "finite in float32", "a NaN, an infinity or what becomes one")
    grid = grid_of_scheme(scheme)
    scale = row_scale(values, grid) if scale is None else _check_scale(scale, values)
    with torch.inference_mode(False):  # whose tensors do not count what is written to them
        rounded = nearest(values, scale[:, None], grid).to(grid.dtype)
        return QuantizedWeight(rounded, scale, None if sparse is None else sparse.indices.clone())


def _check_scale(scale: Tensor, weight: Tensor) -> Tensor:
    check_tensor("scale", scale, 1, DTYPES)
    ok = tuple(scale.shape) == (weight.shape[0],) and scale.device == weight.device
    require(ok, "scale", f"(N,) = {(weight.shape[0],)} on {weight.device} like weight", scale)
    scale = scale.detach().float()
    require(bool((scale.isfinite() & (scale > 0)).all()), "scale", "positive and finite in float32", "another value")
    return scale
