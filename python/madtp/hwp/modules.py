# SPDX-License-Identifier: Apache-2.0
"""Which Linear modules of a model go N:M, and what their weights hold."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from madtp_kernels.nm_patterns import Pattern, is_pattern


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a module name, or a module it is inside of, matches one of the shell-style patterns."""
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for pattern in patterns)


class Place(NamedTuple):
    """Where a module is: an attribute of another."""

    parent: nn.Module
    attribute: str


class ModuleTree:
    """The modules of a model by every name they have, and the names and parameters that they share."""

    def __init__(self, model: nn.Module):
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self._names: defaultdict[int, list[str]] = defaultdict(list)
        self._holders: defaultdict[int, dict[int, list[str]]] = defaultdict(dict)
        for name, module in self.modules.items():
            self._names[id(module)].append(name)
            for parameter in module._parameters.values():
                if parameter is not None:
                    self._holders[id(parameter)][id(module)] = self._names[id(module)]

    def __getitem__(self, name: str) -> nn.Module:
        return self.modules[name]

    def __contains__(self, name: str) -> bool:
        return name in self.modules

    def linears(self) -> dict[str, nn.Linear]:
        """Every Linear once, by the first of its names."""
        first = ((name, module) for name, module in self.modules.items() if self._names[id(module)][0] == name)
        return {name: module for name, module in first if isinstance(module, nn.Linear)}

    def names(self, module: nn.Module) -> list[str]:
        """All that the module is registered under, in the order of the model; none for one that is not of the model."""
        return self._names.get(id(module), [])

    def place(self, name: str) -> Place:
        parent, _, attribute = name.rpartition(".")
        return Place(self.modules[parent], attribute)

    def places(self, module: nn.Module) -> dict[Place, list[str]]:
        """The names of a module by where it is: those through one parent, whatever that is called, are one place."""
        found: defaultdict[Place, list[str]] = defaultdict(list)
        for name in self.names(module):
            found[self.place(name)].append(name)
        return found

    def sharers(self, module: nn.Module, parameter: nn.Parameter) -> list[str]:
        """Other modules that hold this parameter of a module."""
        holders = self._holders[id(parameter)]
        return [name for holder, names in holders.items() if holder != id(module) for name in names]


class SparseModules(NamedTuple):
    """Which Linear modules of a model go N:M."""

    selected: list[str]
    dense: dict[str, str]  # name -> why it stays dense


def select_modules(
    model: nn.Module, pattern: Pattern | str, *, include: Iterable[str] = ("*",), exclude: Iterable[str] = ()
) -> SparseModules:
    """Every Linear that `pattern` fits and whose name matches `include` and not `exclude`, in model order.

    A module that has several names is there once, under the first; any of them may match.
    """
    pattern, include, exclude = Pattern.parse(pattern), tuple(include), tuple(exclude)
    tree = ModuleTree(model)
    selected, dense = [], {}
    for name, module in tree.linears().items():
        names = tree.names(module)
        chosen = any(matches(n, include) for n in names) and not any(matches(n, exclude) for n in names)
        reason = mask_unsupported_reason(module, pattern, tree) if chosen else "excluded"
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
    """The named modules, all checked before any is touched; one that is named twice is there once."""
    tree, found = ModuleTree(model), dict[str, nn.Linear]()
    for name, module in require_linears("modules", names, tree).items():
        reason = mask_unsupported_reason(module, pattern, tree)
        if reason is None and module.weight.is_meta:
            reason = "weight is on the meta device"
        if reason:
            raise ValueError(f"modules must fit pattern {pattern}, got {name!r}: {reason}")
        if not any(module is known for known in found.values()):
            found[name] = module
    return found


def require_linears(
    what: str, names: Iterable[str], tree: ModuleTree, others: type[nn.Module] = nn.Linear
) -> dict[str, Any]:
    """The named modules; raises ValueError for the first that is no Linear of the model, nor of the other kind."""
    if isinstance(names, str):
        raise ValueError(f"{what} must be a list of names, got str {names!r}")
    found = {name: tree.modules.get(name) for name in names}
    for name, module in found.items():
        if not isinstance(module, nn.Linear | others):
            kind = f"a {type(module).__name__}" if module is not None else "no module of the model"
            raise ValueError(f"{what} must name Linear modules, got {name!r}, which is {kind}")
    return found


def mask_unsupported_reason(module: nn.Linear, pattern: Pattern, tree: ModuleTree) -> str | None:
    """Why a Linear cannot be masked: a mask on one of two modules that share a weight would untie them."""
    reason = write_unsupported_reason(module, "weight")
    if reason is not None:
        return reason
    if module.in_features % pattern.m:
        return f"in_features {module.in_features} is not a multiple of {pattern.m}"
    return shared_reason(module, "weight", tree)


def write_unsupported_reason(module: nn.Module, name: str) -> str | None:
    """Why what is written to a parameter of a module would not be what its forward computes with."""
    if parametrize.is_parametrized(module, name):
        return f"{name} is parametrized already"
    if name not in module._parameters:  # torch.nn.utils.prune, and its old weight_norm and spectral_norm
        sources = ", ".join(other for other in module._parameters if other.startswith(f"{name}_"))
        return f"{name} is computed from {sources or 'something else'} at every call"
    parameter = module._parameters[name]
    if parameter is None:
        return None
    if type(parameter) is not nn.Parameter:  # quantized, sharded, not initialized yet
        return f"{name} is a {type(parameter).__name__}"
    return None if parameter.is_floating_point() else f"{name} is {str(parameter.dtype).removeprefix('torch.')}"


def shared_reason(module: nn.Module, name: str, tree: ModuleTree) -> str | None:
    """Why a parameter of a module is not its own."""
    parameter = module._parameters[name]
    others = [] if parameter is None else tree.sharers(module, parameter)
    return f"{name} is shared with {', '.join(others)}" if others else None


def write_parameters(values: Mapping[Tensor, Tensor]) -> None:
    """Copies every value into its parameter, or none of them where one cannot be written."""
    before: dict[Tensor, Tensor] = {}
    with torch.no_grad():
        try:
            for parameter, value in values.items():
                saved = parameter.detach().clone()
                parameter.copy_(value)
                before[parameter] = saved
        except BaseException:
            for parameter, saved in before.items():
                parameter.copy_(saved)
            raise
