# SPDX-License-Identifier: Apache-2.0
"""Weights in int8 and fp8 on disk, in a file of `weight_files`.

A `QuantizedWeight` "name" is the tensors "name.weight", "name.weight_scale" and, where it is 2:4,
"name.weight_indices": values, scale and indices of the class, under the names that the layers of `madtp.hwp` have for
them. Any other tensor is itself. "quantized" in the metadata is a JSON object, name -> scheme.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from madtp_kernels import weight_files
from madtp_kernels.bounded_file import one_line
from madtp_kernels.checks import require
from madtp_kernels.quantized.weight import SCHEMES, QuantizedWeight, is_sparse

KIND, VERSION = "quantized", "1"
VALUES, SCALE, INDICES = "weight", "weight_scale", "weight_indices"


def save_quantized(path: str | os.PathLike[str], weights: Mapping[str, QuantizedWeight | Tensor]) -> None:
    """Writes weights in int8 or fp8, and other tensors, to one file, whole or not at all.

    Of the bytes that a weight takes in float32, one of these takes a quarter, a 2:4 one 0.16. Tensors that share memory
    are written each.

    Raises:
        ValueError: a value is neither, or sparse or on meta, a weight breaks a rule of
            `QuantizedWeight.check_values`, a name is no string, or two names collide.
        OSError: the file cannot be written. ImportError: safetensors is not installed.
    """
    weight_files.check_names(weights)
    tensors = weight_files.join(_parts(weights))
    schemes = {name: weight.scheme for name, weight in weights.items() if isinstance(weight, QuantizedWeight)}
    weight_files.write(path, KIND, VERSION, schemes, tensors)


def load_quantized(path: str | os.PathLike[str]) -> dict[str, QuantizedWeight | Tensor]:
    """Reads what `save_quantized` wrote, onto the CPU.

    Raises:
        OSError: the file cannot be opened. ImportError: safetensors is not installed.
        ValueError: it is cut short, changed, of another format or version, or the tensors of a weight are not of its
            scheme, of dtypes and shapes that fit, with values from -127 to 127 (fp8: without NaN), scales positive and
            finite, and indices that ascend.
    """
    schemes, tensors = weight_files.read(path, KIND, VERSION)
    ok = isinstance(schemes, dict) and all(isinstance(s, str) and s in SCHEMES for s in schemes.values())
    got = f"{os.fspath(path)} with {one_line(schemes)}"
    require(ok, "path", f"a file of weights that are {' or '.join(SCHEMES)}", got)
    where = os.fspath(path)
    weights = {name: _weight(f"{where}: {one_line(name)}", name, of, tensors) for name, of in schemes.items()}
    return weights | tensors


def _parts(weights: Mapping[str, QuantizedWeight | Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, weight in weights.items():
        if isinstance(weight, QuantizedWeight):
            weight_files.check_storable(f"weights[{name!r}]", weight.values)
            weight.check_values(f"weights[{name!r}]")
            yield f"{name}.{VALUES}", weight.values
            yield f"{name}.{SCALE}", weight.scale
            if weight.indices is not None:
                yield f"{name}.{INDICES}", weight.indices
        else:
            require(isinstance(weight, Tensor), f"weights[{name!r}]", "a QuantizedWeight or a tensor", weight)
            weight_files.check_storable(f"weights[{name!r}]", weight)
            yield name, weight


def _weight(where: str, name: str, scheme: str, tensors: dict[str, Tensor]) -> QuantizedWeight:
    """Takes the parts of a weight out of the tensors. Raises ValueError for such as make none of this scheme."""
    parts: dict[str, Any] = {part: tensors.pop(f"{name}.{part}", None) for part in (VALUES, SCALE, INDICES)}
    given = [part for part, tensor in parts.items() if tensor is not None]
    expected = [VALUES, SCALE, INDICES] if is_sparse(scheme) else [VALUES, SCALE]
    require(given == expected, where, f"{scheme}, {', '.join(expected)}", ", ".join(given) or "nothing")
    try:
        weight = QuantizedWeight(*parts.values())
        require(weight.scheme == scheme, "values", f"those of {scheme}", weight.values)
        weight.check_values()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return weight
