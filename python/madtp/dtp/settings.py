# SPDX-License-Identifier: Apache-2.0
"""What the branches of a model are set to, as plain values and as a tensor that travels with its state dict."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from madtp.dtp.scalars import is_count, is_integer, is_number
from madtp.dtp.selection_rules import METHOD, SELECTIONS, is_selection
from madtp_kernels.bounded_file import ODD_VALUES, one_line, parse_json

if TYPE_CHECKING:
    from madtp.dtp.branch import Branch

CAPACITIES = ("exact", "upper_bound")
VERSION = 1  # of the extra state
EXTRA_STATE = "madtp_settings._extra_state"  # its key in the state dict of a patched model
SIZE_MULTIPLE, MAX_BYTES = 512, 1 << 16  # of the extra state

Values = dict[str, dict[str, Any]]  # branch -> name of a setting -> its value


class BranchSettings(nn.Module):
    """The settings of the branches, by the names of `_RULES`. No parameters, no forward.

    In a state dict they are the extra state of this module: JSON as a uint8 tensor, for safetensors and accelerate
    write nothing but tensors, filled up with spaces so that it is of one size whatever the numbers. A state dict
    without it, of an earlier version, loads too: what is set stays.
    """

    def __init__(self, branches: Mapping[str, Branch]):
        super().__init__()
        self.branches = branches

    def values(self) -> Values:
        return {name: {key: getattr(branch, key) for key in _RULES} for name, branch in self.branches.items()}

    def set(self, values: Mapping[str, Mapping[str, Any]]) -> None:
        """Sets what is given. Raises ValueError as `check` does; nothing is changed then."""
        self.check(values)
        for name, given in values.items():
            for key, value in given.items():
                setattr(self.branches[name], key, _PLAIN.get(key, lambda value: value)(value))

    def check(self, values: Any) -> None:
        """Raises ValueError for values that are not of these branches, or break the rule of a setting."""
        branches = list(self.branches)
        if not isinstance(values, Mapping) or sorted(values) != sorted(branches):
            got = ", ".join(map(str, values)) if isinstance(values, Mapping) else type(values).__name__
            raise ValueError(f"settings must be for branches {', '.join(branches)}, got {got}")
        for name, given in values.items():
            if not isinstance(given, Mapping):
                raise ValueError(f"settings of {name} must be a mapping, got {type(given).__name__}")
            for key, value in given.items():
                if key not in _RULES:
                    raise ValueError(f"settings of {name} must be some of {', '.join(_RULES)}, got {key!r}")
                rule, holds = _RULES[key]
                if not holds(value):
                    raise ValueError(f"{key} of {name} must be {rule}, got {value!r}")
            first, layers = given.get("first_layer", 0), self.branches[name].layers
            if first >= layers:
                raise ValueError(f"first_layer of {name} must be below {layers}, its layers, got {first!r}")
            selection = given.get("selection", self.branches[name].selection)
            if given.get("capacity", "exact") != "exact" and selection != METHOD:
                raise ValueError(f'capacity of {name} must be "exact" with selection {selection!r}')

    def get_extra_state(self) -> Tensor:
        # A function is not JSON; a state dict without a setting leaves what is set.
        branches = {
            name: {key: value for key, value in values.items() if not callable(value)}
            for name, values in self.values().items()
        }
        text = json.dumps({"version": VERSION, "branches": branches}).encode()
        text = text.ljust(-(-len(text) // SIZE_MULTIPLE) * SIZE_MULTIPLE)
        return torch.tensor(list(text), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Any) -> None:
        self.set(self.parse(state))

    def parse(self, state: Any) -> Values:
        """The values of an extra state. Raises ValueError where it is damaged, or of other branches."""
        if not isinstance(state, Tensor) or state.dtype != torch.uint8 or state.ndim != 1:
            got = f"{state.dtype} {tuple(state.shape)}" if isinstance(state, Tensor) else type(state).__name__
            raise ValueError(f"extra state of the branches must be uint8 of one dimension, got {got}")
        try:
            if state.numel() > MAX_BYTES:
                raise ValueError(f"{state.numel()} bytes, above {MAX_BYTES}")
            saved = parse_json(bytes(state.tolist()))
            version, values = saved["version"], saved["branches"]
        except ODD_VALUES as error:
            reason = one_line(error)
            raise ValueError(f"extra state of the branches must be JSON of their settings, got {reason}") from error
        if version != VERSION:
            raise ValueError(f"extra state of the branches must be of version {VERSION}, got {version!r}")
        self.check(values)
        return values

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        if f"{prefix}_extra_state" in state_dict:
            super()._load_from_state_dict(state_dict, prefix, *args)


_PLAIN = {
    "temperature": float,
    "first_layer": int,
    "samples_per_feature": int,
}  # of the numbers that are given, which may be of numpy
_RULES = {  # setting -> its rule in words, and as a function
    "temperature": ("a finite number >= 0", lambda value: is_number(value) and value >= 0),
    "capacity": (f"one of {', '.join(CAPACITIES)}", lambda value: value in CAPACITIES),
    "selection": (f"one of {', '.join(SELECTIONS)}, or a function", is_selection),
    "first_layer": ("an integer of at least 0", lambda value: is_integer(value) and value >= 0),
    "samples_per_feature": ("an integer of at least 1", is_count),
}
