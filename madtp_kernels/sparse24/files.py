# SPDX-License-Identifier: Apache-2.0
"""2:4 weights on disk, in a file of `weight_files`.

A `Sparse24Weight` "name" is two tensors, "name.values" and "name.indices", in the form of the class, which no hardware
owns; any other tensor is itself. "sparse24" in the metadata is a JSON list of the names.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from torch import Tensor

from madtp_kernels import weight_files
from madtp_kernels.bounded_file import one_line
from madtp_kernels.checks import require
from madtp_kernels.sparse24.weight import Sparse24Weight

KIND, VERSION = "sparse24", "1"
PARTS = ("values", "indices")


def save_sparse24(path: str | os.PathLike[str], weights: Mapping[str, Sparse24Weight | Tensor]) -> None:
    """Writes 2:4 weights and dense tensors to one file, whole or not at all.

    A 2:4 weight takes 0.53 of its dense bytes in float32, 0.56 in 16 bits. Tensors that share memory are written each.

    Raises:
        ValueError: a value is neither, or sparse or on meta, a 2:4 weight's indices do not ascend, a name is no string,
            or two names collide.
        OSError: the file cannot be written. ImportError: safetensors is not installed.
    """
    weight_files.check_names(weights)
    tensors = weight_files.join(_parts(weights))
    sparse = [name for name, weight in weights.items() if isinstance(weight, Sparse24Weight)]
    weight_files.write(path, KIND, VERSION, sparse, tensors)


def load_sparse24(path: str | os.PathLike[str]) -> dict[str, Sparse24Weight | Tensor]:
    """Reads what `save_sparse24` wrote, onto the CPU.

    Raises:
        OSError: the file cannot be opened. ImportError: safetensors is not installed.
        ValueError: it is cut short, changed, of another format or version, or the tensors of a weight are not there,
            not of dtypes and shapes that fit, or have indices that do not ascend.
    """
    names, tensors = weight_files.read(path, KIND, VERSION)
    ok = isinstance(names, list) and all(isinstance(name, str) for name in names) and len({*names}) == len(names)
    where = os.fspath(path)
    require(ok, "path", "a file with the names of its 2:4 weights, each once", f"{where} with {one_line(names)}")
    return {name: _weight(where, name, tensors) for name in names} | tensors


def _weight(path: str, name: str, tensors: dict[str, Tensor]) -> Sparse24Weight:
    """Takes the parts of a weight out of the tensors. Raises ValueError for such as make none."""
    where = f"{path}: {one_line(name)}"
    given = [part for part in PARTS if f"{name}.{part}" in tensors]
    require(given == [*PARTS], where, " and ".join(PARTS), ", ".join(given) or "nothing")
    values, indices = (tensors.pop(f"{name}.{part}") for part in PARTS)
    try:
        weight = Sparse24Weight(values, indices)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    weight.check_indices(f"{path}: indices of {one_line(repr(name))}")
    return weight


def _parts(weights: Mapping[str, Sparse24Weight | Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, weight in weights.items():
        if isinstance(weight, Sparse24Weight):
            weight_files.check_storable(f"weights[{name!r}]", weight.values)
            weight.check_indices(f"weights[{name!r}].indices")
            yield from ((f"{name}.{part}", getattr(weight, part)) for part in PARTS)
        else:
            require(isinstance(weight, Tensor), f"weights[{name!r}]", "a Sparse24Weight or a tensor", weight)
            weight_files.check_storable(f"weights[{name!r}]", weight)
            yield name, weight
