# SPDX-License-Identifier: Apache-2.0
"""Which Linear modules of a model go N:M, and what their weights hold."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn
from torch.nn.utils import parametrize

from madtp_kernels.nm_patterns import Pattern, is_pattern


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a module name, or a module it is inside of, matches one of the shell-style patterns."""
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for pattern in patterns)


class SparseModules(NamedTuple):
    """Which Linear modules of a model go N:M."""

    selected: list[str]
    dense: dict[str, str]  # name -> why it stays dense


def select_modules(
    model: nn.Module, pattern: Pattern | str, *, include: Iterable[str] = ("*",), exclude: Iterable[str] = ()
) -> SparseModules:
    """Every Linear that `pattern` fits and whose name matches `include` and not `exclude`, in model order."""
    pattern, include, exclude = Pattern.parse(pattern), tuple(include), tuple(exclude)
    sharers = sharers_of(model)
    selected, dense = [], {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        reason = None if matches(name, include) and not matches(name, exclude) else "excluded"
        reason = reason or misfit(name, module, pattern, sharers)
        if reason:
            dense[name] = reason
        else:
            selected.append(name)
    return SparseModules(selected, dense)


class LinearSparsity(NamedTuple):
    """What one Linear weight holds, as the forward pass sees it."""

    weights: int
    nonzero: int
    sparse24: bool  # at most 2 non-zeros in every aligned 4: Sparse Tensor Cores can run it


def sparsity(model: nn.Module) -> dict[str, LinearSparsity]:
    """For every Linear of the model, by name: what is zero and whether the hardware can use it."""
    report = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            weight = module.weight.detach()
            report[name] = LinearSparsity(weight.numel(), int(weight.count_nonzero()), is_pattern(weight, "2:4"))
    return report


def linears(model: nn.Module, names: Iterable[str], pattern: Pattern) -> dict[str, nn.Linear]:
    """The named modules, all checked before any is touched."""
    modules, found, sharers = dict(model.named_modules()), {}, sharers_of(model)
    for name in names:
        module = modules.get(name)
        if not isinstance(module, nn.Linear):
            what = f"a {type(module).__name__}" if module is not None else "no module of the model"
            raise ValueError(f"modules must name Linear modules, got {name!r}, which is {what}")
        reason = misfit(name, module, pattern, sharers)
        if reason:
            raise ValueError(f"modules must fit pattern {pattern}, got {name!r}: {reason}")
        found[name] = module
    return found


def misfit(name: str, module: nn.Linear, pattern: Pattern, sharers: dict[int, list[str]]) -> str | None:
    """Why a Linear cannot be masked: a mask on one of two modules that share a weight would untie them."""
    if parametrize.is_parametrized(module, "weight"):
        return "weight is parametrized already"
    if module.in_features % pattern.m:
        return f"in_features {module.in_features} is not a multiple of {pattern.m}"
    others = [other for other in sharers[id(module.weight)] if other != name]
    return f"weight is shared with {', '.join(others)}" if others else None


def sharers_of(model: nn.Module) -> dict[int, list[str]]:
    """Names of the modules that hold each parameter, by its id."""
    holders = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)].append(name)
    return holders
