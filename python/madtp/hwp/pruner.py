# SPDX-License-Identifier: Apache-2.0
"""N:M masks grown during training.

The optimiser keeps the dense weight and the forward pass sees the masked one, so a weight pruned early can come back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from madtp.hwp.masking import MASKINGS, Masking
from madtp.hwp.modules import linears
from madtp.hwp.scores import activation_score, norms_of
from madtp_kernels import Pattern, nm_mask
from madtp_kernels.checks import require


class WeightPruner:
    """Masks Linear weights N:M while they train, by magnitude or by |W| ||x||.

    Gradients reach every weight of the dense tensor (straight-through), and pruned ones also feel `decay` * weight:
    what stays pruned fades and the mask settles. This is SR-STE (Zhou et al., ICLR 2021, arXiv 2102.04010). The decay
    is part of the gradient: k accumulated backward passes add it k times. Other maskings are in `madtp.hwp.masking`.

    Args:
        model: its parameters keep their identity, so optimisers made before or after work.
        pattern: such as "2:4".
        modules: names of Linear modules in the model, such as `select_modules(...).selected`.
        schedule: "one_shot" is N:M from the start; "gradual" takes one more of every m away at a time, in equal steps
            over the first `ramp` of the training: dense -> 3:4 -> 2:4.
        total_steps: optimiser steps of the training; only "gradual" reads it.
        refresh_interval: steps between two choices of the masks.
        decay: lambda of SR-STE, or of the reweighted penalty.
        masking: None is SR-STE. "reweighted" pulls the weights that the pattern has no room for towards 0 over the
            first `ramp` of a gradual schedule, which then goes N:M at once. "s_ste" shrinks the weights that stay by
            the largest that goes, so that nothing jumps where two change places. Both go by |W|.
        norms: module name -> (in_features,), the norms of its inputs, such as `collect_inputs` measures; the masks then
            keep the largest |W| ||x||. None keeps the largest |W|.

    Raises:
        ValueError: a module does not exist, does not fit the pattern, shares its weight with another module, has a
            weight that is computed from others (parametrized, or pruned by torch) or not finite, or has no norms among
            those given. The model is as it was.
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
        masking: Literal["reweighted", "s_ste"] | None = None,
        norms: Mapping[str, Tensor] | None = None,
    ):
        if schedule not in ("gradual", "one_shot"):
            raise ValueError(f'schedule must be "gradual" or "one_shot", got {schedule!r}')
        if schedule == "gradual" and total_steps < 1:
            raise ValueError(f"total_steps must be at least 1 for the gradual schedule, got {total_steps}")
        if refresh_interval < 1:
            raise ValueError(f"refresh_interval must be at least 1, got {refresh_interval}")
        require(masking in MASKINGS, "masking", "None, reweighted or s_ste", repr(masking))
        if masking is not None and norms is not None:
            raise ValueError(f'norms must be None with masking "{masking}", which goes by magnitude')
        if masking == "reweighted" and schedule != "gradual":
            raise ValueError(f'schedule must be "gradual" with masking "reweighted", got {schedule!r}')
        self.pattern, self.masking = Pattern.parse(pattern), MASKINGS[masking]
        self.refresh_interval = refresh_interval
        self.ramp_steps = ramp * total_steps if schedule == "gradual" else 0
        self.modules = linears(model, modules, self.pattern)
        self.norms = None
        if norms is not None:
            self.norms = {name: norms_of(name, module, norms) for name, module in self.modules.items()}
        self.kept = dict.fromkeys(self.modules, self.pattern.m)  # of every m weights, by module
        try:
            for module in self.modules.values():
                parametrize.register_parametrization(module, "weight", self.masking(module.weight, self.pattern, decay))
            self.step(0)
        except BaseException:
            self.remove()
            raise

    def step(self, step: int) -> None:
        """Bring masks up to date before optimiser step `step` (from 0): `refresh`, then `advance` those behind."""
        self.refresh(step)
        self.advance(self.behind(step), step)

    def behind(self, step: int) -> list[str]:
        """Modules whose masks keep more than the schedule says."""
        scheduled = self._scheduled(step)
        return [name for name, kept in self.kept.items() if kept > scheduled]

    def advance(self, names: Iterable[str], step: int) -> None:
        """Give these modules masks of the pattern that the schedule says."""
        self._mask(dict.fromkeys(names, self._scheduled(step)))

    def refresh(self, step: int) -> None:
        """Choose the masks anew that are as sparse as before, where it is time for it."""
        if step % self.refresh_interval == 0:
            dense = self.masking.shrinks_first
            self._mask({name: kept for name, kept in self.kept.items() if kept < self.pattern.m or dense})

    def masks(self, names: Iterable[str]) -> dict[str, tuple[int, Tensor]]:
        """What `restore` brings back: by module, weights kept of every m, and a copy of the mask."""
        return {name: (self.kept[name], _masking_of(self.modules[name]).mask.clone()) for name in names}

    def restore(self, masks: Mapping[str, tuple[int, Tensor]]) -> None:
        for name, (kept, mask) in masks.items():
            _masking_of(self.modules[name]).update(_dense(self.modules[name]), mask)
            self.kept[name] = kept

    @property
    def current(self) -> Pattern:
        """The pattern of the least sparse mask now; "4:4" is dense."""
        return Pattern(max(self.kept.values(), default=self.pattern.n), self.pattern.m)

    def finalize(self) -> float:
        """Bake the masks of the final pattern into the weights; see `bake`."""
        self._mask({name: self.pattern.n for name, kept in self.kept.items() if kept != self.pattern.n})
        return _bake(self.modules.values())

    def remove(self) -> None:
        """Give every module its dense weight back."""
        for module in self.modules.values():
            if is_masked(module):
                _unmask(module, keep_mask=False)

    def _scheduled(self, step: int) -> int:
        n, m = self.pattern
        progress = min(step / self.ramp_steps, 1) if self.ramp_steps else 1
        return m - math.floor((m - n) * (progress // 1 if self.masking.shrinks_first else progress))

    def _mask(self, kept: Mapping[str, int]) -> None:
        masks = {}
        for name, count in kept.items():
            module: Any = self.modules[name]
            if is_masked(module):
                weight = _dense(module)
                score = None if self.norms is None else activation_score(weight, self.norms[name])
                masks[name] = nm_mask(weight, count, self.pattern.m, score=score)
        for name, mask in masks.items():  # all are known to be well
            _masking_of(self.modules[name]).update(_dense(self.modules[name]), mask)
        self.kept |= kept


def bake(model: nn.Module) -> float:
    """Make the masked weights the weights, for every module a `WeightPruner` masks in the model (a deepcopy too).

    Returns:
        the share of the magnitude kept: sum |w| over kept weights / sum |w| over all; 1 when nothing was masked.
    """
    return _bake(list(model.modules()))


def _bake(modules: Iterable[Any]) -> float:
    kept = total = 0.0
    for module in filter(is_masked, modules):
        kept += module.weight.detach().abs().sum(dtype=torch.float64).item()
        total += _dense(module).detach().abs().sum(dtype=torch.float64).item()
        _unmask(module, keep_mask=True)
    return kept / total if total else 1.0


def _unmask(module: nn.Module, *, keep_mask: bool) -> None:
    # torch gives a parametrized module a class of its own and takes it apart here; a deepcopy still shares that class.
    shared = type(module)
    members = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, members)
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=keep_mask)
    for name in [name for name in module._parameters if name != "weight"]:  # a Linear has its weight first
        module._parameters[name] = module._parameters.pop(name)


def _dense(module: Any) -> Tensor:
    weight: Tensor = module.parametrizations.weight.original
    return weight


def _masking_of(module: Any) -> Masking:
    masking: Masking = module.parametrizations.weight[0]
    return masking


def is_masked(module: Any) -> bool:
    """Whether a `WeightPruner` masks the weight of the module."""
    return parametrize.is_parametrized(module, "weight") and isinstance(_masking_of(module), Masking)
