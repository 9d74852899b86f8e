# SPDX-License-Identifier: Apache-2.0
"""Which modules of a decoder that reads images are its tower, its projector and its decoder: what costs are told apart
by.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import transformers as hf
from torch import nn

from madtp.models.vision_connectors import CONNECTORS
from madtp.models.vlm import DECODERS, unsupported_reason

VISION, PROJECTOR, DECODER = "vision", "projector", "decoder"
PROJECTORS = ("multi_modal_projector", "connector", "aligner")  # what base models call theirs
MERGERS = ("merger", "deepstack_merger_list", "downsample")  # of towers that make the tokens themselves


def branches_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The names of the modules of each branch; of a model without a projector seam there are no branches.

    "vision" is the tower, "projector" what is between it and the decoder, and "decoder" the language model with its
    head.
    """
    if unsupported_reason(model) is not None:
        return {}
    base: Any = model.base_model
    names = {module: name for name, module in model.named_modules()}
    tower, decoder = tower_of(base), next((getattr(base, name) for name in DECODERS if hasattr(base, name)), None)
    mergers = [part for name in MERGERS if (part := getattr(tower, name, None)) is not None]
    vision = [part for part in tower.children() if part not in mergers] if mergers else [tower]
    known = [getattr(base, name) for name in PROJECTORS if hasattr(base, name)]
    if not known and not mergers:
        known = [part for part in base.children() if part is not tower and part is not decoder]
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    parts = {VISION: vision, PROJECTOR: [*known, *mergers], DECODER: [decoder, head]}
    return {branch: _named(modules, names) for branch, modules in parts.items()}


def projectors_of(model: nn.Module) -> list[nn.Module]:
    """The modules of the branch "projector"."""
    return [model.get_submodule(name) for name in branches_of(model)[PROJECTOR]]


def tower_of(base: Any) -> Any:
    """The vision tower of a base model, by what is known of its class, or by its config; None where neither says."""
    if (connector := CONNECTORS.get(base.config.model_type)) is not None:
        return getattr(base, connector.tower)
    config = getattr(base.config, "vision_config", None)
    towers = (part for part in base.children() if isinstance(part, hf.PreTrainedModel))
    return next((part for part in towers if type(part.config) is type(config)), None)


def _named(modules: Iterable[Any], names: dict[nn.Module, str]) -> tuple[str, ...]:
    return tuple(names[module] for module in modules if module is not None)
