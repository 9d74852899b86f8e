"""Hardware-aware weight pruning: N:M masks by magnitude on Linear layers, grown during training.

The optimiser keeps the dense weight and the forward pass sees the masked one, so a weight pruned early can come back.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from madtp_kernels.ops.masks import nm_mask


class Pattern(NamedTuple):
    """At most n non-zeros in every m consecutive weights along the input dimension; in text, "2:4"."""

    n: int
    m: int

    @classmethod
    def parse(cls, text: str | Pattern) -> Pattern:
        n, _, m = str(text).partition(":")
        if not (n.isdecimal() and m.isdecimal() and 1 <= int(n) <= int(m)):
            raise ValueError(f'pattern must be "n:m" with 1 <= n <= m, got {text!r}')
        return cls(int(n), int(m))

    @property
    def sparse24(self) -> bool:
        """Whether every weight of this pattern is a 2:4 weight, which is what Sparse Tensor Cores run.

        2:4 means at most 2 non-zeros in every aligned group of 4. Such a group overlaps one or more groups of m, and
        each can put min(n, overlap) non-zeros there: so 1:2, 1:4, 2:8 and 2:16 qualify, 4:8, 4:16 and 2:6 do not.
        """
        starts = range(0, math.lcm(4, self.m), 4)
        overlaps = (Counter(i // self.m for i in range(start, start + 4)).values() for start in starts)
        return all(sum(min(self.n, overlap) for overlap in group) <= 2 for group in overlaps)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


def is_pattern(weight: Tensor, pattern: Pattern | str) -> bool:
    """Whether weight (N, C) has at most n non-zeros in every m along C (-0.0 is zero); False if m does not divide C."""
    n, m = Pattern.parse(pattern)
    if weight.shape[-1] % m:
        return False
    return bool((weight.detach().unflatten(-1, (-1, m)).count_nonzero(-1) <= n).all())


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
    sharers = _sharers(model)
    selected, dense = [], {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        reason = None if matches(name, include) and not matches(name, exclude) else "excluded"
        reason = reason or _misfit(name, module, pattern, sharers)
        if reason:
            dense[name] = reason
        else:
            selected.append(name)
    return SparseModules(selected, dense)


class WeightPruner:
    """Masks Linear weights N:M by magnitude while they train.

    Gradients reach every weight of the dense tensor (straight-through), and pruned ones also feel `decay` * weight:
    what stays pruned fades and the mask settles. This is SR-STE (Zhou et al., ICLR 2021, arXiv 2102.04010). The decay
    is part of the gradient: k accumulated backward passes add it k times.

    Args:
        model: its parameters keep their identity, so optimisers made before or after work.
        pattern: such as "2:4".
        modules: names of Linear modules in the model, such as `select_modules(...).selected`.
        schedule: "one_shot" is N:M from the start; "gradual" takes one more of every m away at a time, in equal steps
            over the first `ramp` of the training: dense -> 3:4 -> 2:4.
        total_steps: optimiser steps of the training; only "gradual" reads it.
        refresh_interval: steps between two choices of the masks.
        decay: lambda of SR-STE.

    Raises:
        ValueError: a module does not exist, does not fit the pattern, or shares its weight with another module.
    """

    def __init__(
        self,
        model: nn.Module,
        pattern: Pattern | str,
        modules: Iterable[str],
        *,
        schedule: Literal["gradual", "one_shot"] = "gradual",
        total_steps: int = 0,
        refresh_interval: int = 1,
        decay: float = 2e-4,
        ramp: float = 0.5,
    ):
        if schedule not in ("gradual", "one_shot"):
            raise ValueError(f'schedule must be "gradual" or "one_shot", got {schedule!r}')
        if schedule == "gradual" and total_steps < 1:
            raise ValueError(f"total_steps must be at least 1 for the gradual schedule, got {total_steps}")
        if refresh_interval < 1:
            raise ValueError(f"refresh_interval must be at least 1, got {refresh_interval}")
        self.pattern = Pattern.parse(pattern)
        self.refresh_interval = refresh_interval
        self.ramp_steps = ramp * total_steps if schedule == "gradual" else 0
        self.modules = _linears(model, modules, self.pattern)
        for module in self.modules.values():
            parametrize.register_parametrization(module, "weight", _Masked(module.weight, decay))
        self.kept = self.pattern.m
        self.step(0)

    def step(self, step: int) -> None:
        """Bring masks up to date before optimiser step `step` (from 0)."""
        kept = self._scheduled(step)
        if kept != self.kept or (kept < self.pattern.m and step % self.refresh_interval == 0):
            self._refresh(kept)

    @property
    def current(self) -> Pattern:
        """The pattern of the masks now; "4:4" is dense."""
        return Pattern(self.kept, self.pattern.m)

    def finalize(self) -> float:
        """Bake the masks of the final pattern into the weights; see `bake`."""
        if self.kept != self.pattern.n:
            self._refresh(self.pattern.n)
        return _bake(self.modules.values())

    def remove(self) -> None:
        """Give every module its dense weight back."""
        for module in self.modules.values():
            if _is_masked(module):
                _unmask(module, keep_mask=False)

    def _scheduled(self, step: int) -> int:
        n, m = self.pattern
        progress = min(step / self.ramp_steps, 1) if self.ramp_steps else 1
        return m - math.floor((m - n) * progress)

    def _refresh(self, kept: int) -> None:
        for module in self.modules.values():
            if _is_masked(module):
                weight = module.parametrizations.weight
                weight[0].mask.copy_(nm_mask(weight.original, kept, self.pattern.m))
        self.kept = kept


def bake(model: nn.Module) -> float:
    """Make the masked weights the weights, for every module a `WeightPruner` masks in the model (a deepcopy too).

    Returns:
        the share of the magnitude kept: sum |w| over kept weights / sum |w| over all; 1 when nothing was masked.
    """
    return _bake(list(model.modules()))


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


def _bake(modules: Iterable[nn.Module]) -> float:
    kept = total = 0.0
    for module in filter(_is_masked, modules):
        kept += module.weight.detach().abs().sum(dtype=torch.float64).item()
        total += module.parametrizations.weight.original.detach().abs().sum(dtype=torch.float64).item()
        _unmask(module, keep_mask=True)
    return kept / total if total else 1.0


def _unmask(module: nn.Module, *, keep_mask: bool) -> None:
    # torch gives a parametrized module a class of its own and takes it apart here; a deepcopy still shares that class.
    shared = type(module)
    members = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, members)
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=keep_mask)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, mask: Tensor, decay: float) -> Tensor:
        ctx.save_for_backward(weight, mask)
        ctx.decay = decay
        return weight.masked_fill(~mask, 0.0)  # not a product: that would leave -0.0

    @staticmethod
    def backward(ctx, grad: Tensor):
        weight, mask = ctx.saved_tensors
        return grad + ctx.decay * weight.masked_fill(mask, 0.0), None, None


class _Masked(nn.Module):
    """The parametrization of a weight under pruning."""

    def __init__(self, weight: Tensor, decay: float):
        super().__init__()
        self.decay = decay
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool, requires_grad=False))

    def forward(self, weight: Tensor) -> Tensor:
        return _StraightThrough.apply(weight, self.mask, self.decay)


def _is_masked(module: nn.Module) -> bool:
    return parametrize.is_parametrized(module, "weight") and isinstance(module.parametrizations.weight[0], _Masked)


def _linears(model: nn.Module, names: Iterable[str], pattern: Pattern) -> dict[str, nn.Linear]:
    """The named modules, all checked before any is touched."""
    modules, found, sharers = dict(model.named_modules()), {}, _sharers(model)
    for name in names:
        module = modules.get(name)
        if not isinstance(module, nn.Linear):
            what = f"a {type(module).__name__}" if module is not None else "no module of the model"
            raise ValueError(f"modules must name Linear modules, got {name!r}, which is {what}")
        reason = _misfit(name, module, pattern, sharers)
        if reason:
            raise ValueError(f"modules must fit pattern {pattern}, got {name!r}: {reason}")
        found[name] = module
    return found


def _misfit(name: str, module: nn.Linear, pattern: Pattern, sharers: dict[int, list[str]]) -> str | None:
    """Why a Linear cannot be masked: a mask on one of two modules that share a weight would untie them."""
    if parametrize.is_parametrized(module, "weight"):
        return "weight is parametrized already"
    if module.in_features % pattern.m:
        return f"in_features {module.in_features} is not a multiple of {pattern.m}"
    others = [other for other in sharers[id(module.weight)] if other != name]
    return f"weight is shared with {', '.join(others)}" if others else None


def _sharers(model: nn.Module) -> dict[int, list[str]]:
    """Names of the modules that hold each parameter, by its id."""
    holders = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)].append(name)
    return holders
