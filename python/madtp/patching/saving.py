# SPDX-License-Identifier: Apache-2.0
"""save_pretrained() of a patched model: what Hugging Face writes, settings in its config.json, and madtp.json."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from torch import Tensor, nn

from madtp.files import atomic_directory, file_sha256
from madtp.hwp.packing import epilogues_of, schemes_of
from madtp.patching.names import ANY_VARIANT, CONFIG_FILE, WEIGHTS_FIELD, weight_files
from madtp.patching.state import ModelError, Packed, read_checksums, write_checksums
from madtp.width.parts import FULL, width_parts
from madtp_kernels.bounded_file import one_line

if TYPE_CHECKING:
    from madtp.patching.handle import Handle
    from madtp.patching.vlm_handle import VlmHandle


def save(
    handle: Handle | VlmHandle,
    write: Callable[..., None],
    save_directory: str | os.PathLike,
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> None:
    """Saves a patched model, or refuses before anything is written.

    The directory has all of it or what was there before (`madtp.files.directories`). What is left of an earlier save of
    the same variant goes; all else that lies there stays.

    Args:
        write: `save_pretrained` of Hugging Face, bound to the model.
        state_dict: None takes that of the model. Settings that it carries are saved, else those of the model.
        options: the others of `save_pretrained`, by name.

    Raises:
        ValueError: an argument cannot be followed: names it. OSError: the directory cannot be written.
    """
    model: Any = handle.model
    if getattr(model, "_hf_peft_config_loaded", False):  # adapters alone are written then
        write(save_directory, is_main_process, state_dict, **options)
        return
    _check_options(save_directory, options)
    adapted = next((name for name, module in model.named_modules() if hasattr(module, "base_layer")), None)
    if adapted is not None:
        raise ValueError(
            f"model must have no adapters inside, got one at {adapted}: save the PeftModel, or merge or unload"
        )
    # Names are those of the modules, and not those of the files that the model once came from.
    options = {**options, "save_original_format": False}
    if not is_main_process:  # which has a part in gathering at most
        write(save_directory, is_main_process, state_dict, **options)
        return
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError("model must not be quantized by another method, which config.json has no place for")
    schemes = schemes_of(model)
    packed = {name: Packed(schemes[name], epilogue) for name, epilogue in epilogues_of(model).items()}
    settings, state_dict = handle.saved(packed, state_dict)
    _refuse_unsaid_widths(model)
    with atomic_directory(save_directory, _Staying(options.get("variant")), CONFIG_FILE) as folder:
        model.config.quantization_config = settings.to_dict()
        try:
            write(folder, is_main_process, state_dict, **options)
        except SafetensorError as error:  # of a full disk, too
            raise OSError(f"{os.fspath(save_directory)} cannot be written ({one_line(error)})") from error
        finally:
            del model.config.quantization_config
        if packed or settings.widths:
            _refuse_without_madtp(folder / CONFIG_FILE, model.config.sub_configs)


def _check_options(directory: str | os.PathLike, options: Mapping[str, Any]) -> None:
    if os.path.isfile(directory):
        raise ValueError(f"save_directory must be a directory, got the file {os.fspath(directory)}")
    remedies = {
        "push_to_hub": (False, "call model.push_to_hub(repo_id), which saves and uploads"),
        "distributed_checkpoint": (False, "torch.distributed.checkpoint saves a state dict, settings included"),
        "save_original_format": (False, "weights have the names of their modules"),
        "safe_serialization": (True, "weights are written as safetensors"),
    }
    for name, (only, remedy) in remedies.items():
        if options.get(name) not in (None, only):
            raise ValueError(f"{name} must be {only} for a patched model, got {options[name]!r}: {remedy}")
    variant = options.get("variant")
    if variant is not None and not (isinstance(variant, str) and re.fullmatch(r"[\w.-]+", variant)):
        raise ValueError(f"variant must be a part of a file name, such as fp16, got {variant!r}")
    size = options.get("max_shard_size", "50GB")
    try:
        split_torch_state_dict_into_shards({}, max_shard_size=size)
        ok = isinstance(size, str) or (isinstance(size, int) and size > 0)
    except ValueError:
        ok = False
    if not ok:
        raise ValueError(f'max_shard_size must be a number of bytes or such as "5GB", got {size!r}')


_WEIGHTS = weight_files(ANY_VARIANT)


def files_of_user(folder: Path, directory: Path) -> list[str]:
    """What stays of an old directory under a new model of whatever kind: all but weights, and files of new ones."""
    present = os.listdir(directory) if directory.is_dir() else []
    return [name for name in present if not _WEIGHTS.fullmatch(name)]


def complete_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], **ours: Tensor) -> dict[str, Tensor]:
    """A copy with what is `ours` in it. Raises ValueError where it is not a state dict of the model."""
    complete = {**ours, **state_dict}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    expected = set(model.state_dict())
    wrong = sorted((expected - complete.keys() - tied) | (complete.keys() - expected))
    if wrong:
        raise ValueError(f"state_dict must be one of the model, {len(wrong)} keys are not (first: {wrong[0]})")
    return complete


def _refuse_unsaid_widths(model: nn.Module) -> None:
    """Raises ValueError where heads or channels are gone from what settings have no place for."""
    said = {model.get_submodule(part.name) for part in width_parts(model)}
    narrow = (name for name, module in model.named_modules() if hasattr(module, FULL) and module not in said)
    if (name := next(narrow, None)) is not None:
        raise ValueError(
            f"model must have all its heads and channels to be saved as a {type(model).__name__}, whose files do not "
            f"say widths, got fewer at {name}"
        )


def _refuse_without_madtp(path: Path, parts: Iterable[str]) -> None:
    """Makes transformers raise where madtp is not imported, before it looks for weights.

    Of a method that it does not know it only warns, and the weight of an int8 layer may have the shape of a Linear's.
    So config.json names no file of weights but says what to do, which is part of the error; `quantizer` looks past it.
    The configs inside get it too, by which a tower would be loaded alone.

    Args:
        path: of config.json; it is written here since a config drops the field when it is saved.
        parts: names of the configs inside.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    name = ", ".join(config.get("architectures") or ())
    for values in (config, *(config.get(part) for part in parts)):
        if isinstance(values, dict):
            values[WEIGHTS_FIELD] = f"layers made by madtp, `import madtp` and load {name or 'the whole model'}"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class _Staying:
    """What of an old directory stays beside a new save of a variant; writes the checksums of both."""

    def __init__(self, variant: str | None) -> None:
        self.of_variant = weight_files("" if variant is None else re.escape(f".{variant}"))
        self.checksums: dict[str, str] = {}

    def __call__(self, folder: Path, directory: Path) -> list[str]:
        """The names. Nobody else writes to `directory`, which may not be there."""
        names = [name for name in os.listdir(folder) if name == CONFIG_FILE or self.of_variant.fullmatch(name)]
        self.checksums = self.checksums or {name: file_sha256(folder / name) for name in sorted(names)}
        present = os.listdir(directory) if directory.is_dir() else []
        staying = [name for name in present if not self.of_variant.fullmatch(name)]
        try:
            before = read_checksums(directory)
        except ModelError:
            before = {}
        write_checksums(folder, {name: before[name] for name in staying if name in before} | self.checksums)
        return staying
