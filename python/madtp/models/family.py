# SPDX-License-Identifier: Apache-2.0
"""What the package needs to know of a model class, and what every compressed model can do."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter

from torch import nn
from transformers import PreTrainedModel

from madtp.dtp.settings import EXTRA_STATE, BranchSettings
from madtp.handles import handle_of
from madtp.hwp.packing import Epilogue
from madtp.models.encoder import Encoder
from madtp.models.tower import RaggedTower, Tower
from madtp.models.towers import TOWERS, tower_of


@dataclass(frozen=True)
class Family:
    """Which towers of a model class prune their tokens.

    Args:
        source: the Hugging Face class; a family given to `madtp.patch` may leave it out.
        towers: branch -> dotted path of its tower in the model, "" for the model itself. Where the tower is of a class
            that nothing is known of, a pair of the path and a `Tower` that describes it.
        others: branches that do not prune, for accounting: branch -> the modules it consists of.
        dense_modules: modules whose weights stay dense.
        compressed: a subclass of source with another forward, where the model needs one; of the same name.
        images_per_text: how many images each text is about; MAG averages over them.
        mixins: pattern of module names -> a class mixed into theirs while the model is patched.
    """

    towers: Mapping[str, str | tuple[str, Tower]]
    source: type[PreTrainedModel] | None = None
    others: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    dense_modules: tuple[str, ...] = ()
    compressed: type[PreTrainedModel] | None = None
    images_per_text: int = 1
    mixins: Mapping[str, type] = field(default_factory=dict)

    def path(self, branch: str) -> str:
        entry = self.towers[branch]
        return entry if isinstance(entry, str) else entry[0]

    def tower(self, model: nn.Module, branch: str) -> Tower:
        """Raises TypeError where nothing is known of the tower's class."""
        entry = self.towers[branch]
        if not isinstance(entry, str):
            return entry[1]
        module = attrgetter(entry)(model) if entry else model
        tower = tower_of(module)
        if tower is None:
            known = ", ".join(kind.__name__ for kind in TOWERS)
            raise TypeError(
                f"{entry or 'model'} must be one of {known}, or described by a Tower, got {type(module).__name__}"
            )
        return tower

    @property
    def branches(self) -> dict[str, tuple[str, ...]]:
        """Branch -> the modules it consists of, shell-style patterns."""
        return {branch: (self.path(branch) or "*",) for branch in self.towers} | dict(self.others)


def find_epilogues(path: str, tower: nn.Module, encoder: Encoder) -> dict[str, Epilogue]:
    """Name of every Linear of a tower's blocks that an activation or a LayerScale follows -> the names of those."""
    found: dict[str, Epilogue] = {}
    for i in range(len(attrgetter(encoder.blocks)(tower))):
        block = ".".join(part for part in (path, encoder.blocks, str(i)) if part)
        if len(encoder.mlp) == 3:
            first, activation, last = (f"{block}.{name}" for name in encoder.mlp)
            found[first] = Epilogue(activation)
            if encoder.scale2 is not None:
                found[last] = Epilogue(None, f"{block}.{encoder.scale2}")
        if encoder.scale1 is not None:
            found[f"{block}.{encoder.out}"] = Epilogue(None, f"{block}.{encoder.scale1}")
    return found


class CompressedModel(nn.Module):
    """Mixed into the classes of patched models: saves what loading needs beside the weights, as `patching.saving` says.

    A state dict with damaged settings of its branches is refused before any weight is touched.
    """

    madtp_settings: BranchSettings

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """That of the Hugging Face class, which makes a plain model or patches it, as the files say."""
        kinds = (kind for kind in cls.__mro__ if issubclass(kind, PreTrainedModel))
        source = next(kind for kind in kinds if not issubclass(kind, (CompressedModel, RaggedTower)))
        return source.from_pretrained(*args, **kwargs)

    def save_pretrained(self, save_directory, *args, **kwargs):
        write = super().save_pretrained  # type: ignore[misc]  # that of Hugging Face
        options = inspect.signature(write).bind(save_directory, *args, **kwargs).arguments
        handle_of(self).save(write, {**options, **options.pop("kwargs", {})})

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        key = prefix + EXTRA_STATE
        if key in state_dict:
            self.madtp_settings.parse(state_dict[key])
        super()._load_from_state_dict(state_dict, prefix, *args)
