# SPDX-License-Identifier: Apache-2.0
"""Plan: what a compression run aims at, as a file that can be read and edited."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from os import PathLike
from typing import Any, Literal, cast

import yaml

from madtp.choices import ALLOCATIONS, WEIGHT_DTYPES
from madtp.files import atomic_write
from madtp.files.yaml_files import read_yaml
from madtp.migration import PLAN_NAMES, PLAN_VERSION, migrate_plan
from madtp_kernels.bounded_file import ODD_VALUES, one_line
from madtp_kernels.renamed import renamed


@renamed(**PLAN_NAMES)
@dataclass(frozen=True)
class Plan:
    """What a compression run aims at; readable and editable as YAML.

    Args:
        macs_reduction: share of the dense MACs to save, counted; with a latency_reduction, what that comes to.
        tokens: for each branch that can prune, the share of its MACs that its tokens may spend: 1 keeps all tokens, and
            the branch is not pruned. What it counts in the end is this share of what it counts with all tokens and
            with its 2:4 Linears at half.
        sparse_modules: names of the Linears that go N:M.
        allocation: how it was chosen.
        latency_reduction: share of the dense model's time to save, on the device that it was chosen on; None: the
            target is macs_reduction.
        predicted: {"params_reduction", "distill_loss"}: share of the parameters that go to zero, and the sum of what
            each part does to the distillation loss by itself. With a latency_reduction also {"dense_ms", "ms"}: time
            per sample of the dense model, as measured, and of what is planned.
        compared: what this plan and the others at the same budget did to the distillation loss on the calibration data
            before any training, by allocation; those that cannot reach the budget are not there.
        weight_dtypes: name of a Linear -> the dtype that its weight is rounded to in the end, "int8" or "fp8", the same
            for all; Linears that are not named keep theirs. None: the config says it for all.
        rounding_errors: name of a Linear -> the relative error of its outputs in that dtype
            (`madtp.hwp.rounding_sensitivity`), by which weight_dtypes was chosen; Linears that the calibration data do
            not reach are not there.
        widths: name of the Linear that reads the heads of an attention or the channels of an MLP -> how many of them
            stay (`madtp.width`); others stay whole.
    """

    macs_reduction: float
    tokens: dict[str, float]
    sparse_modules: tuple[str, ...]
    allocation: str = "joint"
    latency_reduction: float | None = None
    predicted: dict[str, float] = field(default_factory=dict)
    compared: dict[str, float] = field(default_factory=dict)
    weight_dtypes: dict[str, str] | None = None
    rounding_errors: dict[str, float] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _is_share(self.macs_reduction) or self.macs_reduction == 1:
            raise ValueError(f"macs_reduction must be a number in [0, 1), got {self.macs_reduction!r}")
        if self.latency_reduction is not None and (
            not _is_share(self.latency_reduction) or self.latency_reduction == 1
        ):
            raise ValueError(f"latency_reduction must be a number in [0, 1) or null, got {self.latency_reduction!r}")
        if not isinstance(self.tokens, Mapping) or not all(_is_share(s) and s > 0 for s in self.tokens.values()):
            raise ValueError(f"tokens must give each branch a share in (0, 1], got {self.tokens!r}")
        names = self.sparse_modules
        if not isinstance(names, Sequence) or isinstance(names, str) or not all(isinstance(n, str) for n in names):
            raise ValueError(f"sparse_modules must be a list of module names, got {names!r}")
        if self.allocation not in ALLOCATIONS:
            raise ValueError(f"allocation must be one of {', '.join(ALLOCATIONS)}, got {self.allocation!r}")
        object.__setattr__(self, "sparse_modules", tuple(names))
        dtypes = {} if self.weight_dtypes is None else self.weight_dtypes
        if not isinstance(dtypes, Mapping) or not all(isinstance(name, str) for name in dtypes):
            raise ValueError(f"weight_dtypes must map names of Linears to dtypes or be null, got {dtypes!r}")
        for name, dtype in dtypes.items():
            if dtype not in WEIGHT_DTYPES:
                raise ValueError(f"weight_dtypes of {name} must be {' or '.join(WEIGHT_DTYPES)}, got {dtype!r}")
        if len(set(dtypes.values())) > 1:
            raise ValueError(f"weight_dtypes must be of one dtype, got {', '.join(sorted(set(dtypes.values())))}")
        if not isinstance(self.widths, Mapping) or not all(
            isinstance(name, str) and type(width) is int and width >= 1 for name, width in self.widths.items()
        ):
            raise ValueError(f"widths must map names of Linears to numbers of at least 1, got {self.widths!r}")
        for field_name in ("predicted", "compared", "rounding_errors"):
            value = getattr(self, field_name)
            if not isinstance(value, Mapping) or not all(isinstance(number, int | float) for number in value.values()):
                raise ValueError(f"{field_name} must map names to numbers, got {value!r}")

    @property
    def weight_dtype(self) -> Literal["int8", "fp8"] | None:
        """What weights are rounded to; None: the config says it, or none is."""
        return cast(Any, next(iter((self.weight_dtypes or {}).values()), None))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON and YAML."""
        return asdict(self) | {"sparse_modules": list(self.sparse_modules)}

    def save(self, path: str | PathLike) -> None:
        """Writes YAML, whole or not at all; its "version" is that of the format."""
        atomic_write(path, yaml.safe_dump({"version": PLAN_VERSION} | self.to_dict(), sort_keys=False, width=120))

    @classmethod
    def load(cls, path: str | PathLike) -> Plan:
        """The plan of a file that `save` of this version or of an earlier one wrote, perhaps edited.

        Raises:
            ValueError: the file is no plan, or of a newer version; the message names what is wrong. OSError: there is
                no such file.
        """
        try:
            values = read_yaml(path)
        except ValueError as error:
            raise ValueError(f"plan {path} {error}") from error
        if isinstance(values, dict):
            values = migrate_plan(values, f"plan {path}")
        known = {entry.name for entry in fields(cls)}
        if not isinstance(values, dict) or not {"macs_reduction", "tokens", "sparse_modules"} <= set(values) <= known:
            got = one_line(", ".join(values)) if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"plan {path} must have the fields {', '.join(sorted(known))}, got {got}")
        try:
            return cls(**values)
        except ODD_VALUES as error:
            raise ValueError(f"plan {path}: {one_line(error)}") from error

    def require_fit(self, branches: Iterable[str], modules: Iterable[str]) -> None:
        """Raises ValueError unless it gives tokens to these branches, does something, and names Linears of these."""
        if set(self.tokens) != set(branches):
            raise ValueError(f"plan must give tokens to {', '.join(branches)}, got {', '.join(self.tokens)}")
        rounds = bool(self.weight_dtypes)
        whole = all(share == 1 for share in self.tokens.values()) and not self.widths
        if whole and not self.sparse_modules and not rounds:
            raise ValueError(f"plan must give a branch fewer tokens than all or name a Linear, got {self.tokens}")
        unknown = sorted(set(self.sparse_modules) - set(modules))
        if unknown:
            raise ValueError(f"plan must name Linears that may go N:M, got {unknown[0]!r}")
        unknown = sorted(set(self.weight_dtypes or ()) - set(modules))
        if unknown:
            raise ValueError(f"weight_dtypes of the plan must name Linears that may go N:M, got {unknown[0]!r}")


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
