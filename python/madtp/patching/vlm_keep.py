# SPDX-License-Identifier: Apache-2.0
"""What `keep=` of a decoder may be: by seam an amount and a rule, checked, saved and loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any, cast

from torch import nn

from madtp.dtp.keep import Keep
from madtp.dtp.keep_rules import RULES
from madtp.models.prefill_seam import RULES_HERE as PREFILL_RULES
from madtp.models.prefill_seam import PrefillSeam
from madtp.models.projector_seam import ProjectorSeam
from madtp.models.vision_seam import RULES_HERE as TOWER_RULES
from madtp.models.vision_seam import VisionSeam
from madtp.models.vlm import (
    decoder_of,
    first_prefill_layer,
    prefill_unsupported_reason,
    tower_layers,
    usual_prefill_layer,
    vision_unsupported_reason,
)

VISION, PROJECTOR, PREFILL = "vision", "projector", "prefill"
ENTERED = "pixels"  # what enters a tower that leaves out duplicates, beside what is left at the seams
DEFAULT_RULES = {VISION: "received", PROJECTOR: "divprune", PREFILL: "fastv"}  # of a plain share or count, by seam
Amounts = Keep | dict[int, Keep]  # of a seam; of prefill by layer


def check_keep(keep: Mapping[str, Any]) -> dict[str, Amounts]:
    """By seam. Raises ValueError for an unknown seam, a bad amount, or a rule that cannot run there."""
    if not isinstance(keep, Mapping) or not keep or set(keep) - set(DEFAULT_RULES):
        got = ", ".join(map(str, keep)) if isinstance(keep, Mapping) else type(keep).__name__
        seams = ", ".join(map(repr, DEFAULT_RULES))
        raise ValueError(f"keep must be a dict with some of the seams {seams}, got {got or 'none'}")
    checked: dict[str, Amounts] = {}
    if VISION in keep:
        checked[VISION] = _check_vision(Keep.of(keep[VISION], DEFAULT_RULES[VISION]))
    if PROJECTOR in keep:
        checked[PROJECTOR] = value = Keep.of(keep[PROJECTOR], DEFAULT_RULES[PROJECTOR])
        _check_without_duplicates(PROJECTOR, value)
        if value.needs_importance:
            runs = ", ".join(rule for rule, entry in RULES.items() if not entry.needs_importance)
            what = f"mass {value.mass}" if value.mass is not None else f"rule {value.name!r}"
            raise ValueError(
                f"keep of {PROJECTOR!r} must do without the importance of attention, which is not computed there: an "
                f"amount and one of the rules {runs}, a temperature and the rule text, or a function; got {what}"
            )
    if PREFILL in keep:
        checked[PREFILL] = _check_prefill(keep[PREFILL])
    return checked


def _check_vision(keep: Keep) -> Keep:
    runs: tuple[str, ...] = (*TOWER_RULES, "a function")
    what = ""
    if keep.mass is not None:  # of importance, which the others do not look at
        runs, what = ("received", "cls", "a function"), " with a mass"
    if keep.temperature is not None:
        runs, what = ("received", "cls"), " with a temperature"
    if isinstance(keep.rule, str) and keep.rule not in runs:
        raise ValueError(f"keep of {VISION!r} must have as its rule{what} one of {', '.join(runs)}, got {keep.rule!r}")
    return keep


def _check_without_duplicates(seam: str, keep: Keep) -> None:
    if keep.duplicates is not None:
        raise ValueError(
            f"keep of {seam!r} must have no duplicates=, by which units do not enter the tower: it is of {VISION!r} "
            f"alone, got {keep.duplicates!r}"
        )


def _check_prefill(given: Any) -> dict[int, Keep]:
    if not isinstance(given, Mapping) or not given:
        got = f"{given!r}" if isinstance(given, float | int) else type(given).__name__
        raise ValueError(
            f"keep of {PREFILL!r} must be a dict by how many layers have run, such as {{2: 0.5}}, got {got}"
        )
    for layer in given:
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 1:
            raise ValueError(f"keep of {PREFILL!r} must be by a number of layers, an int >= 1, got {layer!r}")
    checked = {layer: Keep.of(given[layer], DEFAULT_RULES[PREFILL]) for layer in sorted(given)}
    for layer, value in checked.items():
        _check_without_duplicates(PREFILL, value)
        if isinstance(value.rule, str) and value.rule not in PREFILL_RULES:
            raise ValueError(
                f"keep of {PREFILL!r} behind layer {layer} must have one of the rules {', '.join(PREFILL_RULES)}, or a "
                f"function, got {value.rule!r}"
            )
    taus = {value.temperature for value in checked.values() if value.temperature is not None}
    if len(taus) > 1:
        raise ValueError(f"keep of {PREFILL!r} must have one temperature behind all layers, got {sorted(taus)}")
    for (before, first), (layer, value) in pairwise(checked.items()):
        one, other, where = first.amount, value.amount, f"keep of {PREFILL!r}"
        if one is not None and other is not None and type(one) is type(other) and other > one:
            raise ValueError(
                f"{where} must not grow from layer to layer, got {one} behind {before} and {other} behind {layer}"
            )
    return checked


def keep_by_temperature(model: nn.Module, seams: Iterable[str]) -> dict[str, Any]:
    """Of `check_keep`: these seams by the rules that plain amounts have there, text-guided at the projector; inside the
    decoder behind one layer."""
    of = {
        VISION: lambda: Keep(temperature=1.0),
        PROJECTOR: lambda: Keep(temperature=1.0, rule="text"),
        PREFILL: lambda: {max(usual_prefill_layer(model), 1): Keep(temperature=1.0, rule=DEFAULT_RULES[PREFILL])},
    }
    return {seam: make() for seam, make in of.items() if seam in seams}


def temperature_of(amounts: Amounts) -> float | None:
    """Of a seam; None where amounts, masses or functions decide alone."""
    keeps = [amounts] if isinstance(amounts, Keep) else amounts.values()
    return next((keep.temperature for keep in keeps if keep.temperature is not None), None)


def with_temperature(amounts: Amounts, temperature: float) -> Amounts:
    """With another one wherever there is one."""
    if isinstance(amounts, Keep):
        return amounts if amounts.temperature is None else replace(amounts, temperature=temperature)
    return {layer: cast(Keep, with_temperature(keep, temperature)) for layer, keep in amounts.items()}


def saved_keep(keep: Mapping[str, Amounts]) -> dict[str, Any]:
    """Plain values, ready for JSON. Raises ValueError where a rule is a function."""
    return {
        seam: value.to_dict() if isinstance(value, Keep) else {str(n): part.to_dict() for n, part in value.items()}
        for seam, value in keep.items()
    }


def loaded_keep(keep: Mapping[str, Any]) -> dict[str, Any]:
    """Of `saved_keep`. Raises ValueError and TypeError where it is none."""
    loaded: dict[str, Any] = {}
    for seam, value in keep.items():
        by_layer = seam == PREFILL
        loaded[seam] = {int(n): Keep(**part) for n, part in value.items()} if by_layer else Keep(**value)
    return loaded


def make_seams(model: nn.Module, keep: Mapping[str, Amounts]) -> dict[str, Any]:
    """The seams of a model, by name, of what `check_keep` returned.

    Raises:
        TypeError: the tower or the decoder of the model cannot prune. ValueError: layers that are not there.
    """
    seams: dict[str, Any] = {}
    if isinstance(vision := keep.get(VISION), Keep):
        _check_tower(model, vision)
        seams[VISION] = VisionSeam(vision, len(tower_layers(model)))
    if isinstance(projector := keep.get(PROJECTOR), Keep):
        seams[PROJECTOR] = ProjectorSeam(projector)
    if isinstance(prefill := keep.get(PREFILL), dict):
        _check_layers(model, prefill)
        seams[PREFILL] = PrefillSeam(prefill)
    return seams


def _check_tower(model: nn.Module, keep: Keep) -> None:
    """Raises TypeError for a tower that cannot prune by the rule."""
    if (reason := vision_unsupported_reason(model, keep.rule)) is not None:
        raise TypeError(f"model must have a {VISION} seam, {reason}, got {type(model).__name__}")


def _check_layers(model: nn.Module, keep: Mapping[int, Keep]) -> None:
    """Raises TypeError for a decoder that is not known, ValueError for layers that are not there."""
    if (reason := prefill_unsupported_reason(model)) is not None:
        raise TypeError(
            f"model must have a prefill seam, {reason}, got {type(model).__name__}: Qwen-VL, LLaVA, InternVL, SmolVLM, "
            "PaliGemma, Gemma 3 and decoders like theirs have one"
        )
    first, last = first_prefill_layer(model), len(decoder_of(model).layers) - 1
    wrong = next((layer for layer in keep if not first <= layer <= last), None)
    if wrong is not None:
        raise ValueError(f"keep of {PREFILL!r} must be behind layers {first} to {last} of this model, got {wrong}")
