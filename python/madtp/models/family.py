"""What the package needs to know of a model family, and what every compressed model can do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn


@dataclass(frozen=True)
class Family:
    """A Hugging Face class and its packed counterpart."""

    source: type[nn.Module]
    compressed: type[nn.Module]
    branches: Mapping[str, tuple[str, ...]]  # branch -> its modules, for accounting
    pruned: Mapping[str, str]  # branch with token pruning -> the config that holds its hidden_size
    dense_modules: tuple[str, ...]  # modules whose weights are never pruned
    activations: Mapping[str, str]  # pattern of a Linear's name -> the attribute of its parent that follows it


class CompressedModel:
    """Mixed into the packed classes: saves what `madtp.from_pretrained` needs beside the Hugging Face files."""

    def save_pretrained(self, save_directory, *args, **kwargs):
        super().save_pretrained(save_directory, *args, **kwargs)
        self.madtp_handle.save(Path(save_directory))
