# SPDX-License-Identifier: Apache-2.0
"""2:4 weights on disk: safetensors with a versioned header and a checksum; no pickle.

A `Sparse24Weight` "name" is two tensors, "name.values" and "name.indices", in the form of the class, which no hardware
owns; any other tensor is itself. The metadata hold "format", "version", "sparse24" (a JSON list of the names) and
"sha256", over that list and every tensor's name, dtype, shape and bytes in the order of the names.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from types import ModuleType

import torch
from torch import Tensor

from madtp_kernels.atomic_file import atomic_file
from madtp_kernels.checks import require
from madtp_kernels.sparse24.weight import Sparse24Weight

FORMAT, VERSION = "madtp-sparse24", "1"
PARTS = ("values", "indices")


def save_sparse24(path: str | os.PathLike[str], weights: Mapping[str, Sparse24Weight | Tensor]) -> None:
    """Writes 2:4 weights and dense tensors to one file, whole or not at all.

    A 2:4 weight takes 0.53 of its dense bytes in float32, 0.56 in 16 bits. Tensors that share memory are written each.

    Raises:
        ValueError: a value is neither, a 2:4 weight's indices do not ascend, or two names collide.
        OSError: the file cannot be written. ImportError: safetensors is not installed.
    """
    safetensors = _safetensors()
    tensors: dict[str, Tensor] = {}
    sparse = [name for name, weight in weights.items() if isinstance(weight, Sparse24Weight)]
    for name, weight in weights.items():
        if isinstance(weight, Sparse24Weight):
            weight.check_indices(f"weights[{name!r}].indices")
            parts = {f"{name}.{part}": getattr(weight, part) for part in PARTS}
        else:
            require(isinstance(weight, Tensor), f"weights[{name!r}]", "a Sparse24Weight or a tensor", weight)
            parts = {name: weight}
        for key, tensor in parts.items():
            require(key not in tensors, "weights", "of names that differ once stored", f"{key} twice")
            tensors[key] = tensor.detach().cpu().contiguous()
    storages = [tensor.untyped_storage().data_ptr() for tensor in tensors.values()]
    if len(set(storages)) < len(storages):  # safetensors refuses tensors that share memory
        tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    metadata = {"format": FORMAT, "version": VERSION, "sparse24": json.dumps(sparse)}
    metadata["sha256"] = _checksum(metadata["sparse24"], tensors)
    try:
        with atomic_file(path) as partial:
            safetensors.torch.save_file(tensors, partial, metadata)
    except safetensors.SafetensorError as error:
        raise OSError(f"{os.fspath(path)} cannot be written ({error})") from error


def load_sparse24(path: str | os.PathLike[str]) -> dict[str, Sparse24Weight | Tensor]:
    """Reads what `save_sparse24` wrote, onto the CPU.

    Raises:
        OSError: the file cannot be opened. ImportError: safetensors is not installed.
        ValueError: it is cut short, changed, of another format or version, or its indices do not ascend.
    """
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _require_header(path, metadata)
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            sparse = json.loads(metadata["sparse24"])
    except (safetensors.SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"path must be a whole {FORMAT} file, got {os.fspath(path)} ({error})") from error
    intact = _checksum(metadata["sparse24"], tensors) == metadata.get("sha256")
    require(intact, "path", "a file as it was written (its checksum does not match)", os.fspath(path))
    weights = {name: Sparse24Weight(*(tensors.pop(f"{name}.{part}") for part in PARTS)) for name in sparse}
    for name, weight in weights.items():
        weight.check_indices(f"{os.fspath(path)}: indices of {name!r}")
    return weights | tensors


def _safetensors() -> ModuleType:
    """The package, which the ops themselves do without."""
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ImportError("safetensors is needed for files of 2:4 weights: pip install safetensors") from error
    return safetensors


def _require_header(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    found = metadata.get("format"), metadata.get("version")
    got = f"{os.fspath(path)} of format {found[0]}, version {found[1]}"
    require(found == (FORMAT, VERSION), "path", f"a file of format {FORMAT}, version {VERSION}", got)


def _checksum(sparse: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(sparse.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
