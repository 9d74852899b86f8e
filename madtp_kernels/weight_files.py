# SPDX-License-Identifier: Apache-2.0
"""Files of weights: safetensors with a versioned header and a checksum; no pickle.

The metadata hold "format", "version", JSON that says which of the tensors make up a weight, under the kind of the file,
and "sha256", over that JSON and every tensor's name, dtype, shape and bytes in the order of the names.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from madtp_kernels.atomic_file import atomic_file
from madtp_kernels.bounded_file import ODD_VALUES, one_line, parse_json, require_regular
from madtp_kernels.checks import require


def write(
    path: str | os.PathLike[str], kind: str, version: str, weights: object, tensors: Mapping[str, Tensor]
) -> None:
    """Writes a file whole or not at all. Tensors that share memory are written each.

    Args:
        kind: the format is "madtp-<kind>".
        weights: what JSON can say of them.

    Raises:
        OSError: the file cannot be written. ImportError: safetensors is not installed.
    """
    safetensors = _safetensors()
    stored = {name: tensor.detach().cpu().resolve_conj().resolve_neg().contiguous() for name, tensor in tensors.items()}
    storages = [tensor.untyped_storage().data_ptr() for tensor in stored.values()]
    if len(set(storages)) < len(storages):  # safetensors refuses tensors that share memory
        stored = {name: tensor.clone() for name, tensor in stored.items()}
    metadata = {"format": f"madtp-{kind}", "version": version, kind: json.dumps(weights)}
    metadata["sha256"] = _checksum(metadata[kind], stored)
    try:
        with atomic_file(path) as partial:
            safetensors.torch.save_file(stored, partial, metadata)
    except (safetensors.SafetensorError, OSError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise OSError(f"{os.fspath(path)} cannot be written ({reason})") from error


def read(path: str | os.PathLike[str], kind: str, version: str) -> tuple[Any, dict[str, Tensor]]:
    """What `write` was given, on the CPU: weights, tensors.

    Raises:
        OSError: the file cannot be opened. ImportError: safetensors is not installed.
        ValueError: it is no regular file, cut short, changed, or of another format or version.
    """
    safetensors = _safetensors()
    wrong = safetensors.SafetensorError, RuntimeError, *ODD_VALUES  # RuntimeError: of torch, for an odd dtype
    try:
        require_regular(path)
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except wrong as error:
        raise _not_whole(path, kind, error) from error
    _require_header(path, metadata, kind, version)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        intact = _checksum(metadata[kind], tensors) == metadata.get("sha256")
        weights = parse_json(metadata[kind])
    except wrong as error:
        raise _not_whole(path, kind, error) from error
    require(intact, "path", "a file as it was written (its checksum does not match)", os.fspath(path))
    return weights, tensors


def check_names(weights: object) -> None:
    """Raises ValueError for what is no mapping of names."""
    require(isinstance(weights, Mapping), "weights", "a mapping of names to weights", weights)
    for name in cast(Mapping[Any, Any], weights):
        require(isinstance(name, str), "weights", "named by strings", name)


def check_storable(name: str, tensor: Tensor) -> None:
    """Raises ValueError for a tensor that has no values a file could hold."""
    ok = tensor.layout is torch.strided and not tensor.is_meta
    require(ok, name, "strided and not on meta", tensor)


def join(parts: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Name -> tensor. Raises ValueError for a name that comes twice."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in parts:
        require(name not in tensors, "weights", "of names that differ once stored", f"{name} twice")
        tensors[name] = tensor
    return tensors


def _safetensors() -> ModuleType:
    """The package, which the ops themselves do without."""
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ImportError("safetensors is needed for files of weights: pip install safetensors") from error
    return safetensors


def _not_whole(path: str | os.PathLike[str], kind: str, error: Exception) -> ValueError:
    return ValueError(f"path must be a whole madtp-{kind} file, got {os.fspath(path)} ({one_line(error)})")


def _require_header(path: str | os.PathLike[str], metadata: Mapping[str, str], kind: str, version: str) -> None:
    found = metadata.get("format"), metadata.get("version")
    got = f"{os.fspath(path)} of {one_line(f'format {found[0]}, version {found[1]}')}"
    require(found == (f"madtp-{kind}", version), "path", f"a file of format madtp-{kind}, version {version}", got)


def _checksum(weights: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(weights.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        elements = tensor.as_strided((tensor.numel(),), (1,))  # a single one may have any stride, contiguous as it is
        digest.update(elements.view(torch.uint8).numpy().data)
    return digest.hexdigest()
