# SPDX-License-Identifier: Apache-2.0
"""from_pretrained(): a saved compressed model, ready to prune."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from madtp.building import check_counts, elements_of, no_larger_than
from madtp.files.directories import whole_copy
from madtp.files.reading import require_files, tensor_shapes
from madtp.migration import packed_key_mapping
from madtp.models.registry import FAMILIES
from madtp.models.versions import check_transformers
from madtp.patching.names import CONFIG_FILE, STATE_FILE, weight_files
from madtp.patching.quantizer import check_device_map
from madtp.patching.state import (
    ModelError,
    check_files,
    not_a_model,
    read_checksums,
    read_json,
    read_settings,
    unreadable,
)
from madtp_kernels.bounded_file import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def from_pretrained(
    directory: str | os.PathLike,
    *,
    dtype: str | torch.dtype | None = None,
    torch_dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    attn_implementation: Any = None,
    variant: str | None = None,
    subfolder: str = "",
    use_safetensors: bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    token: str | bool | None = None,
    revision: str = "main",
) -> PreTrainedModel:
    """Loads a compressed model that `save_pretrained` wrote: weights, alignment tokens, settings of the branches.

    The classes of transformers load it too, with the arguments of theirs. This function also finds the class, refuses
    what is not complete and as it was written, and reads the directories of earlier versions.

    Args:
        directory: a folder, or the id of a model on the Hugging Face Hub.
        dtype: None or "auto" is the one it was saved in. torch_dtype: its older name.
        device_map: a device, or what names one: a patched model is not split.
        attn_implementation: of the parts that are not pruned.
        variant: of `save_pretrained`.
        subfolder: where in the directory the model is.
        use_safetensors: there is no other format.
        cache_dir, force_download, local_files_only, token, revision: of a model on the Hub.

    Returns:
        the patched model, in eval mode, ready to prune.

    Raises:
        ModelError: the directory lacks something, is not as it was written, or of another version or class; says what
            to do. ValueError: an argument breaks its rule. RuntimeError: transformers is too old.
    """
    check_transformers()
    dtype = model_dtype(torch_dtype if dtype is None else dtype)
    check_device_map(device_map)
    if use_safetensors not in (None, True):
        raise ValueError(f"use_safetensors must be None or True, got {use_safetensors!r}")
    hub = {
        "cache_dir": cache_dir,
        "force_download": force_download,
        "local_files_only": local_files_only,
        "token": token,
        "revision": revision,
        "subfolder": subfolder,
    }
    folder, local = _folder(directory, hub)
    before = _identity(folder)
    _refuse_compressed_tensors(folder)
    settings, old = read_settings(folder)
    kind = model_class(folder, decoder=settings.keep is not None)
    options = {"attn_implementation": attn_implementation} if attn_implementation is not None else {}
    try:
        require_files(folder)
        check_counts(read_json(folder, CONFIG_FILE))
        held = _held(folder, _weights(folder, directory, {} if local else hub, variant))
        with no_larger_than(len(held), elements_of(held)):
            config = kind.config_class.from_pretrained(folder)
            config.quantization_config = settings.to_dict()
            model, loaded = kind.from_pretrained(
                os.fspath(folder if local else directory),
                config=config,
                dtype=dtype,
                device_map=device_map,
                variant=variant,
                key_mapping=packed_key_mapping(settings.packed) if old else None,
                ignore_mismatched_sizes=True,  # which the line below names
                output_loading_info=True,
                **({} if local else hub),
                **options,
            )
    except ModelError:
        raise
    except Exception as error:  # every reader (json, safetensors, transformers) has its own kind
        raise unreadable(directory, error) from error
    if _identity(folder) != before:
        raise ModelError(f"{directory} was written to while it was read: load it again")
    mismatched = {name for name, *_ in loaded["mismatched_keys"]}
    wrong = sorted({*loaded["missing_keys"], *loaded["unexpected_keys"], *mismatched})
    if wrong:
        raise ModelError(f"{directory}: weights must match {CONFIG_FILE}, {len(wrong)} do not (first: {wrong[0]})")
    return model


def _refuse_compressed_tensors(folder: Path) -> None:
    """Raises ModelError for a folder of compressed-tensors, which has a function of its own."""
    if (folder / STATE_FILE).exists() or not (folder / CONFIG_FILE).exists():
        return
    config = read_json(folder, CONFIG_FILE)
    values = config.get("quantization_config") if isinstance(config, dict) else None
    if isinstance(values, dict) and values.get("quant_method") == "compressed-tensors":
        raise ModelError(f"{folder} is of compressed-tensors: load it with madtp.load_compressed_tensors")


def _identity(folder: Path) -> tuple[int, ...]:
    """Of what was saved there: every save writes a new madtp.json."""
    try:
        found = os.stat(folder / STATE_FILE)
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def model_dtype(dtype: Any) -> Any:
    if dtype is None or dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype
    if not isinstance(dtype, str) or not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f'dtype must be one of torch, its name, or "auto", got {dtype!r}')
    return getattr(torch, dtype)


def _folder(directory: str | os.PathLike, hub: dict[str, Any]) -> tuple[Path, bool]:
    """Where the files are that say what the model is, fetched where `directory` is a model on the Hub; whether it is a
    folder of this machine, and no such model."""
    local = Path(directory)
    if not isinstance(directory, str) or local.is_dir() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", directory):
        return whole_copy(local / hub["subfolder"]), True
    from transformers.utils import cached_file

    try:
        cached_file(directory, CONFIG_FILE, **hub)
        return Path(str(cached_file(directory, STATE_FILE, **hub))).parent, False
    except OSError as error:
        raise not_a_model(directory, ValueError(str(error).splitlines()[0])) from error


def _weights(folder: Path, directory: str | os.PathLike, hub: dict[str, Any], variant: str | None) -> list[Path]:
    """The files of weights of a variant, by madtp.json, fetched where `hub` says from where.

    Raises:
        ModelError: the index, which transformers follows, names others.
    """
    from transformers.utils import cached_file

    part = "" if variant is None else f".{variant}"
    checksums, index = read_checksums(folder), f"model.safetensors.index{part}.json"
    of_variant = weight_files(re.escape(part))
    names = [name for name in checksums if of_variant.fullmatch(name) and name != index]
    if os.path.lexists(folder / index):
        if index in checksums:  # those before 0.2 have none
            check_files(folder, [index], checksums)
        shards = read_json(folder, index)["weight_map"].values()
        if not {*shards} <= {*names}:
            raise ModelError(f"{folder}: weight_map of {index} must name files that {STATE_FILE} has checksums of")
    return [Path(str(cached_file(os.fspath(directory), name, **hub))) if hub else folder / name for name in names]


def _held(folder: Path, files: list[Path]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """`tensor_shapes` of the files. Raises ModelError where they are not as they were written."""
    try:
        return tensor_shapes(files)
    except (OSError, ValueError) as error:
        for file in files:
            check_files(file.parent, [file.name], read_checksums(folder))
        raise unreadable(folder, error) from error


def model_class(directory: Path, decoder: bool) -> Any:
    """The class a directory was saved as: one of `FAMILIES`, or any decoder of transformers."""
    try:
        kind = str(read_json(directory, CONFIG_FILE)["architectures"][0])
    except (KeyError, TypeError, IndexError) as error:
        raise not_a_model(directory, error) from error
    by_name = {family.source.__name__: family.source for family in FAMILIES if family.source is not None}
    if decoder and kind.isidentifier():
        found = getattr(transformers, kind, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    if kind not in by_name:
        raise ModelError(f"{directory} must hold one of {one_line(', '.join(by_name))}, got {one_line(kind, 80)}")
    return by_name[kind]
