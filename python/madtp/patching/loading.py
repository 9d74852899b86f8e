# SPDX-License-Identifier: Apache-2.0
"""What `quantizer` does to a model around the loading of its weights: patches it, and looks at what arrived."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from madtp.building import elements_of
from madtp.dtp.settings import EXTRA_STATE
from madtp.files.reading import tensor_shapes
from madtp.handles import find_handle
from madtp.hwp.packed_linear import PackedLinear
from madtp.hwp.packing import Epilogue, replace_linear
from madtp.hwp.quantized_linear import PARTS, QuantizedLinear
from madtp.models.registry import family_of
from madtp.models.vlm import unsupported_reason
from madtp.patching.handle import patch
from madtp.patching.names import CONFIG_FILE, STATE_FILE
from madtp.patching.state import ModelError, Settings, check_files, read_checksums, unreadable
from madtp.patching.vlm_keep import loaded_keep
from madtp.width.narrow import restore_widths
from madtp_kernels.bounded_file import ODD_VALUES

# Of the parts of int8 and fp8 layers, as safetensors calls them.
FILE_DTYPES = {torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3", torch.uint8: "U8", torch.float32: "F32"}
MAX_GUIDE = 1 << 24  # elements of alignment tokens that are made whatever the weights are
WHERE = f"quantization_config of {CONFIG_FILE}"

logger = logging.get_logger(__name__)


def prepare(model: PreTrainedModel, values: Any, checkpoint_files: Sequence[str] | None = None) -> None:
    """Patches a model without weights as the `quantization_config` says, with empty packed layers.

    Args:
        values: as config.json has them.
        checkpoint_files: the weights; where madtp.json lies beside, they have to have its checksums.

    Raises:
        ModelError: they have not, the values are damaged, or do not fit the model; the files hold a quantized layer in
            another form, which would be cast.
    """
    settings = Settings.from_dict(values, WHERE)
    if checkpoint_files:
        directory = Path(checkpoint_files[0]).parent
        if (directory / STATE_FILE).exists():
            _check_written(directory, [Path(file) for file in checkpoint_files])
    family, kind = family_of(model), type(model).__name__
    saved = ", ".join(getattr(model.config, "architectures", None) or ()) or "the class it was saved as"
    known = family is not None if settings.keep is None else unsupported_reason(model) is None
    if not known:
        if settings.packed:
            raise ModelError(
                f"{kind} must be a class that madtp.patch knows, for its packed layers: load it as {saved}"
            )
        logger.warning(f"madtp.patch knows no {kind}, which is loaded as it is; it was saved as {saved}")
        return
    try:
        held = tensor_shapes(checkpoint_files or ())
    except (OSError, ValueError) as error:
        raise unreadable("weights", error) from error
    if checkpoint_files and settings.config is not None:
        size = settings.config.alignment_tokens * settings.config.alignment_dim
        if size > max(elements_of(held), MAX_GUIDE):
            raise ModelError(f"{WHERE} must be that of the weights, got more alignment tokens than there are weights")
    if settings.keep is None and family is not None and family.towers.keys() != settings.branches.keys():
        raise ModelError(f"{kind} must have branches {', '.join(settings.branches)}: load it as {saved}")
    try:
        if settings.keep is not None:
            patch(model, keep=loaded_keep(settings.keep))
        else:
            patch(model, settings.config).settings.set(settings.branches)
            restore_widths(model, {_find(model, name): width for name, width in settings.widths.items()})
        layers = {}
        for name, (scheme, epilogue) in settings.packed.items():
            found = Epilogue(*(None if part is None else _find(model, part) for part in epilogue))
            layers[name] = replace_linear(model, _find(model, name), scheme, found)
    except ODD_VALUES as error:
        raise unreadable(WHERE, error) from error
    _check_quantized(held, layers)
    if settings.keep is not None:
        return
    # Weights of an earlier version have no settings, and those of config.json are what counts.
    model._keys_to_ignore_on_load_missing = {*(model._keys_to_ignore_on_load_missing or ()), EXTRA_STATE}


def _check_written(directory: Path, files: Sequence[Path]) -> None:
    """Raises ModelError for weights that are not as they were written, or that an index says to be elsewhere."""
    if any(file.parent != directory for file in files):
        raise unreadable(directory, ValueError("weights must lie beside each other"))
    check_files(directory, [file.name for file in files], read_checksums(directory))


def finish(model: PreTrainedModel, values: Any) -> None:
    """Raises ModelError where a packed layer or the alignment guide got no weights, or such as cannot be."""
    if (handle := find_handle(model)) is None:
        return
    settings = Settings.from_dict(values, WHERE)
    if settings.keep is None:
        del model._keys_to_ignore_on_load_missing
        vars(handle.settings).pop("_extra_state", None)  # where transformers puts what it holds to be missing
    for name, tensor in _ours(model):
        if not getattr(tensor, "_is_hf_initialized", False):
            raise ModelError(
                f"weights must hold {name} as {CONFIG_FILE} describes it; for the dense model remove {WHERE}"
            )
    try:
        for name, module in model.named_modules():
            if isinstance(module, PackedLinear):
                module.check_weight(f"{name}.")
    except ValueError as error:
        raise unreadable("weights", error) from error
    if settings.keep is None:
        handle.settings.set(settings.branches)


def _check_quantized(held: Mapping[str, tuple[str, tuple[int, ...]]], layers: Mapping[str, PackedLinear]) -> None:
    """Raises ModelError where the files hold a part of a quantized layer in another dtype or shape, or not at all.

    transformers would cast the one, and make up the other.

    Args:
        held: dtypes and shapes in the files; nothing where there are none.
        layers: by their names in the files.
    """
    quantized = {name: layer for name, layer in layers.items() if isinstance(layer, QuantizedLinear)}
    if not held:
        return
    for name, layer in quantized.items():
        for part in PARTS:
            if (buffer := getattr(layer, part)) is None:
                continue
            names = (other for other, module in quantized.items() if module is layer)  # one of which is in the files
            keys = (f"{other}.{part}" for other in names)
            dtype, shape = next((held[key] for key in keys if key in held), ("nothing", ()))
            if (dtype, shape) != (FILE_DTYPES[buffer.dtype], tuple(buffer.shape)):
                rule = f"as {CONFIG_FILE} describes it, {FILE_DTYPES[buffer.dtype]} of shape {tuple(buffer.shape)}"
                raise ModelError(f"weights must hold {name}.{part} {rule}, got {dtype} {shape}")


def _find(model: PreTrainedModel, name: str) -> str:
    """The name of a module in this model, which may be the base of the saved one, or one with a head on it."""
    prefix = f"{model.base_model_prefix}."
    modules = dict(model.named_modules())
    candidates = (name, name.removeprefix(prefix), prefix + name)
    return next((candidate for candidate in candidates if candidate in modules), name)


def _ours(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear) or name == "madtp_guide" or name.startswith("madtp_guide."):
            for part in (module.named_parameters(name, recurse=False), module.named_buffers(name, recurse=False)):
                yield from part
