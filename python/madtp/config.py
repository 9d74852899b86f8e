# SPDX-License-Identifier: Apache-2.0
"""What a compression run is asked to do."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from madtp.choices import CORRECTIONS, MASKINGS, WEIGHT_DTYPES
from madtp.dtp.keep import Keep
from madtp.dtp.keep_rules import Rule, name_of
from madtp.dtp.selection_rules import METHOD, SELECTIONS, is_selection
from madtp.migration import CONFIG_NAMES, refuse_old_names
from madtp_kernels import Pattern
from madtp_kernels.renamed import renamed


@renamed(**CONFIG_NAMES)
@dataclass(frozen=True)
class CompressionConfig:
    """Targets and knobs of one compression run; plain values, so it goes to JSON and back.

    Raises:
        ValueError: a field breaks its rule; the message names it.
        TypeError: a field has its old name; the message says the new one.
    """

    # One target: share of the dense MACs to save, counted (2:4 linears half, tokens as kept), or share of the dense
    # model's time on this device. Neither is macs_reduction 0.5.
    macs_reduction: float | None = None
    latency_reduction: float | None = None
    params_reduction: float | None = None  # least share of the parameters that must go to zero; None asks for none

    # Most of the heads and of the hidden MLP channels of a block that are removed (`madtp.width`): `madtp.allocate`
    # chooses how many, without a plan it is that share of each. None: none are.
    width_reduction: float | None = None

    alignment_tokens: int = 100  # K
    alignment_dim: int = 768  # d
    # Which tokens stay: the method, or a rule to compare it with (`madtp.dtp.selection_rules`), by its name or as a
    # function like the rules of `Keep`, which no file can hold.
    selection: str | Rule = METHOD
    # Of decoders that read images alone: by seam what is left of each image, as `madtp.patch(keep=)` takes it; a Keep
    # may be a mapping of its fields. Temperatures of seams are steered to the target, amounts stay. None: a temperature
    # in the tower.
    keep: Mapping[str, Any] | None = None
    # Of decoders that read images alone: the decoder trains by LoRA adapters of this rank on its Linears that do not go
    # N:M, which are merged in the end; its other weights are frozen, but for those that go N:M. None: all train.
    lora_rank: int | None = None

    # By branch, the first layer whose tokens are pruned, counted from 0. None: the plan says it, or all layers prune.
    first_layer: Mapping[str, int] | None = None

    temperature: float = 1.0  # where the search for the tau of every branch starts
    temperature_min: float = 1e-4
    temperature_max: float = 1000.0
    controller_gain: float = 1.0
    controller_interval: int = 10  # optimiser steps between two moves of tau

    pattern: str = "2:4"
    sparse_include: tuple[str, ...] = ("*",)  # module names, shell-style; the model family adds its own exclusions
    sparse_exclude: tuple[str, ...] = ()
    # What the weights of all Linears that may go N:M are rounded to in the end; None: they stay as they are.
    weight_dtype: Literal["int8", "fp8"] | None = None
    # With a weight_dtype, how much of the outliers behind LayerNorms moves into the weights first: `alpha` of
    # `madtp.hwp.smooth`. None: nothing.
    hwp_smoothing: float | None = None
    # What the masks keep: the largest |W|, |W| ||x||, the same with tokens by their importance, or, once and before the
    # training, what reconstructs the outputs, from left to right or by ADMM (with hwp_schedule "one_shot").
    hwp_score: Literal["magnitude", "activation", "token_weighted", "second_order", "admm"] = "magnitude"
    # With either of these: steps of Adam for every part of a block, by which what is left after one shot is fitted to
    # the dense outputs, with the pruned tokens in place (`madtp.compression.reconstruction`). None: none.
    hwp_reconstruction_steps: int | None = None
    hwp_permute: bool = False  # reorder the hidden channels of MLPs first, so that the masks take less
    hwp_schedule: Literal["gradual", "one_shot"] = "gradual"
    hwp_ramp: float = 0.5  # share of the training after which the gradual schedule has the final pattern
    hwp_refresh: int = 1  # optimiser steps between two choices of the masks
    # How masks act in the training. None: hard, with the decay of SR-STE on what is pruned. "reweighted": first a
    # penalty on what the pattern has no room for (with hwp_schedule "gradual" and hwp_score "magnitude"). "s_ste":
    # soft, every weight that stays smaller by the largest that goes.
    hwp_masking: Literal["reweighted", "s_ste"] | None = None
    hwp_decay: float = 2e-4  # lambda of SR-STE, or of the reweighted penalty

    align_weight: float = 0.1
    vision_weight: float = 1.0
    text_weight: float = 10.0
    kd_weight: float = 1.0
    kd_temperature: float = 4.0

    # Share by which one move of masks or temperatures may raise the loss; what raises it more is undone and made in
    # smaller parts (`madtp.training.guard`). None: every move is made whole.
    guard_tolerance: float | None = 10.0

    seed: int = 0

    def __post_init__(self) -> None:
        if self.macs_reduction is None and self.latency_reduction is None:
            object.__setattr__(self, "macs_reduction", 0.5)
        for name in ("macs_reduction", "latency_reduction", "params_reduction", "width_reduction"):
            if getattr(self, name) is not None:
                self._number(name, lambda value: 0 <= value < 1, "a number in [0, 1)")
        one = self.macs_reduction is None or self.latency_reduction is None
        self._require("latency_reduction", one, f"None with a macs_reduction, which is {self.macs_reduction}")
        for name in ("temperature", "temperature_min", "temperature_max", "controller_gain", "kd_temperature"):
            self._number(name, lambda value: value > 0, "a positive number")
        if self.guard_tolerance is not None:
            self._number("guard_tolerance", lambda value: value > 0, "a positive number or None")
        for name in ("hwp_decay", "align_weight", "vision_weight", "text_weight", "kd_weight"):
            self._number(name, lambda value: value >= 0, "a number of at least 0")
        for name in ("alignment_tokens", "alignment_dim", "controller_interval", "hwp_refresh"):
            self._require(name, _is_int(getattr(self, name)) and getattr(self, name) >= 1, "an integer of at least 1")
        self._require("seed", _is_int(self.seed) and self.seed >= 0, "an integer of at least 0")
        self._number("hwp_ramp", lambda value: 0 <= value <= 1, "a number in [0, 1]")
        self._require("selection", is_selection(self.selection), f"one of {', '.join(SELECTIONS)}, or a function")
        rank = self.lora_rank
        self._require("lora_rank", rank is None or (_is_int(rank) and rank >= 1), "an integer of at least 1 or None")
        if self.keep is not None:
            object.__setattr__(self, "keep", _parsed_keep(self.keep))
        if self.first_layer is not None:
            first = self.first_layer
            named = isinstance(first, Mapping) and all(isinstance(name, str) for name in first)
            fits = named and all(_is_int(layer) and layer >= 0 for layer in first.values())
            self._require("first_layer", fits, "integers of at least 0 by branch, or None")
            object.__setattr__(self, "first_layer", dict(first))
        self._require("hwp_schedule", self.hwp_schedule in ("gradual", "one_shot"), '"gradual" or "one_shot"')
        scores = ("magnitude", "activation", "token_weighted", *CORRECTIONS)
        self._require("hwp_score", self.hwp_score in scores, f"one of {', '.join(scores)}")
        masking = self.hwp_masking
        self._require("hwp_masking", masking in (None, *MASKINGS), f"None or {' or '.join(MASKINGS)}")
        if masking == "reweighted":
            fits = self.hwp_schedule == "gradual" and self.hwp_score == "magnitude"
            self._require("hwp_masking", fits, 'None without hwp_schedule "gradual" and hwp_score "magnitude"')
        if masking == "s_ste":
            fits = self.hwp_score in ("magnitude", *CORRECTIONS)
            self._require("hwp_masking", fits, f"None with hwp_score {self.hwp_score!r}")
        known = self.weight_dtype is None or self.weight_dtype in WEIGHT_DTYPES
        self._require("weight_dtype", known, f"None or {' or '.join(WEIGHT_DTYPES)}")
        if self.hwp_reconstruction_steps is not None:
            steps = self.hwp_reconstruction_steps
            self._require("hwp_reconstruction_steps", _is_int(steps) and steps >= 1, "an integer of at least 1 or None")
            fits = self.hwp_score in CORRECTIONS
            self._require("hwp_reconstruction_steps", fits, f"None with hwp_score {self.hwp_score!r}")
        self._require("hwp_permute", isinstance(self.hwp_permute, bool), "true or false")
        once = self.hwp_score not in CORRECTIONS or self.hwp_schedule == "one_shot"
        self._require("hwp_schedule", once, f'"one_shot" with hwp_score "{self.hwp_score}"')
        low, high = self.temperature_min, self.temperature_max
        self._require("temperature", low <= self.temperature <= high, f"from temperature_min {low} to _max {high}")
        if self.hwp_smoothing is not None:
            self._number("hwp_smoothing", lambda value: 0 <= value <= 1, "a number in [0, 1] or None")
            self._require("hwp_smoothing", self.weight_dtype is not None, "None without a weight_dtype")
        pattern = Pattern.parse(self.pattern)
        runs = self.weight_dtype is None or pattern.sparse24 or pattern.n == pattern.m
        self._require("pattern", runs, f'2:4 or within it, or dense as "4:4", with weight_dtype {self.weight_dtype!r}')
        for name in ("sparse_include", "sparse_exclude"):
            value = getattr(self, name)
            ok = isinstance(value, tuple | list) and all(isinstance(entry, str) for entry in value)
            self._require(name, ok, "a tuple of module name patterns")
            object.__setattr__(self, name, tuple(value))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON. Raises ValueError where the selection is a function, or a rule of `keep`."""
        if callable(self.selection):
            names = ", ".join(SELECTIONS)
            raise ValueError(
                f"selection must be one of {names} to be saved, got the function {name_of(self.selection)}"
            )
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return values | {"keep": None if self.keep is None else _plain_keep(self.keep)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CompressionConfig:
        """Of values written by hand or by `to_dict`; those of an older file go through `migrate_config` first.

        Raises:
            ValueError: a name is not that of a field, or as `CompressionConfig`.
        """
        refuse_old_names(values, CONFIG_NAMES, "config")
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"config must have known fields ({', '.join(sorted(known))}), got {', '.join(unknown)}")
        return cls(**values)

    def _number(self, name: str, rule: Callable[[float], bool], words: str) -> None:
        value = getattr(self, name)
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        self._require(name, number and rule(value), words)

    def _require(self, name: str, ok: bool, rule: str) -> None:
        if not ok:
            raise ValueError(f"{name} must be {rule}, got {getattr(self, name)!r}")


PREFILL = "prefill"  # the seam whose amounts are by layer


def _parsed_keep(keep: Any) -> dict[str, Any]:
    """By seam an amount or a Keep, of prefill by layer; `madtp.patch` knows which seams and layers there are."""
    if not isinstance(keep, Mapping) or not keep:
        raise ValueError(f'keep must be None or a mapping by seam, such as {{"projector": 0.5}}, got {keep!r}')
    parsed: dict[str, Any] = {}
    for seam, value in keep.items():
        if seam == PREFILL and isinstance(value, Mapping):
            parsed[seam] = {_layer(layer): _parsed_amount(seam, amount) for layer, amount in value.items()}
        else:
            parsed[seam] = _parsed_amount(seam, value)
    return parsed


def _layer(layer: Any) -> Any:
    """Keys of JSON are strings."""
    return int(layer) if isinstance(layer, str) and layer.isdecimal() else layer


def _parsed_amount(seam: str, value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    known = [field.name for field in fields(Keep)]
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise ValueError(f"keep of {seam!r} must have fields of Keep ({', '.join(known)}), got {', '.join(unknown)}")
    return Keep(**value)


def _plain_keep(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain_keep(part) for name, part in value.items()}
    return value.to_dict() if isinstance(value, Keep) else value


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
