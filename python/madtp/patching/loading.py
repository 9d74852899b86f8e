# SPDX-License-Identifier: Apache-2.0
"""What `quantizer` does to a model around the loading of its weights: patches it, and looks at what arrived."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from madtp.dtp.settings import EXTRA_STATE
from madtp.handles import find_handle
from madtp.hwp.packing import Epilogue, Sparse24Linear, replace_linear
from madtp.models.registry import family_of
from madtp.patching.handle import patch
from madtp.patching.names import CONFIG_FILE, STATE_FILE
from madtp.patching.state import ModelError, Settings, check_files, read_checksums, unreadable

WHERE = f"quantization_config of {CONFIG_FILE}"

logger = logging.get_logger(__name__)


def prepare(model: PreTrainedModel, values: Any, checkpoint_files: Sequence[str] | None = None) -> None:
    """Patches a model without weights as the `quantization_config` says, with empty packed layers.

    Args:
        values: as config.json has them.
        checkpoint_files: the weights; where madtp.json lies beside, they have to have its checksums.

    Raises:
        ModelError: they have not, the values are damaged, or do not fit the model.
    """
    settings = Settings.from_dict(values, WHERE)
    if checkpoint_files:
        directory = Path(checkpoint_files[0]).parent
        if (directory / STATE_FILE).exists():
            check_files(directory, [Path(file).name for file in checkpoint_files], read_checksums(directory))
    family, kind = family_of(model), type(model).__name__
    saved = ", ".join(getattr(model.config, "architectures", None) or ()) or "the class it was saved as"
    if family is None:
        if settings.sparse24:
            raise ModelError(
                f"{kind} must be a class that madtp.patch knows, for its packed layers: load it as {saved}"
            )
        logger.warning(f"madtp.patch knows no {kind}, which is loaded as it is; it was saved as {saved}")
        return
    if family.towers.keys() != settings.branches.keys():
        raise ModelError(f"{kind} must have branches {', '.join(settings.branches)}: load it as {saved}")
    try:
        patch(model, settings.config).settings.set(settings.branches)
        for name, epilogue in settings.sparse24.items():
            found = Epilogue(*(None if part is None else _find(model, part) for part in epilogue))
            replace_linear(model, _find(model, name), None, found)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise unreadable(WHERE, error) from error
    # Weights of an earlier version have no settings, and those of config.json are what counts.
    model._keys_to_ignore_on_load_missing = {*(model._keys_to_ignore_on_load_missing or ()), EXTRA_STATE}


def finish(model: PreTrainedModel, values: Any) -> None:
    """Raises ModelError where a packed layer or the alignment guide got no weights, or such as cannot be."""
    if (handle := find_handle(model)) is None:
        return
    del model._keys_to_ignore_on_load_missing
    vars(handle.settings).pop("_extra_state", None)  # where transformers puts what it holds to be missing
    for name, tensor in _ours(model):
        if not getattr(tensor, "_is_hf_initialized", False):
            raise ModelError(
                f"weights must hold {name} as {CONFIG_FILE} describes it; for the dense model remove {WHERE}"
            )
    try:
        for name, module in model.named_modules():
            if isinstance(module, Sparse24Linear):
                module.sparse_weight.check_indices(f"{name}.indices")
    except ValueError as error:
        raise unreadable("weights", error) from error
    handle.settings.set(Settings.from_dict(values, WHERE).branches)


def _find(model: PreTrainedModel, name: str) -> str:
    """The name of a module in this model, which may be the base of the saved one, or one with a head on it."""
    prefix = f"{model.base_model_prefix}."
    modules = dict(model.named_modules())
    candidates = (name, name.removeprefix(prefix), prefix + name)
    return next((candidate for candidate in candidates if candidate in modules), name)


def _ours(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    for name, module in model.named_modules():
        if isinstance(module, Sparse24Linear) or name == "madtp_guide" or name.startswith("madtp_guide."):
            for part in (module.named_parameters(name, recurse=False), module.named_buffers(name, recurse=False)):
                yield from part
