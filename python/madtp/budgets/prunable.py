# SPDX-License-Identifier: Apache-2.0
"""Which Linears of a model a config lets go N:M."""

from __future__ import annotations

from typing import cast

from torch import nn

from madtp.config import CompressionConfig
from madtp.handles import handle_of
from madtp.hwp import SparseModules, select_modules


def prunable_linears(model: nn.Module, config: CompressionConfig) -> SparseModules:
    """Those of a patched model that the pattern fits, without what the config, the family and MAG keep dense."""
    exclude = (*config.sparse_exclude, *handle_of(model).dense_modules)
    return select_modules(model, config.pattern, include=config.sparse_include, exclude=exclude)


def linear_of(model: nn.Module, name: str) -> nn.Linear:
    """The module of one of those names, of which torch says only that it is a module."""
    return cast(nn.Linear, model.get_submodule(name))
