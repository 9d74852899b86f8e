# SPDX-License-Identifier: Apache-2.0
"""How many tokens of each image a seam keeps, and by which rule: what `madtp.patch(keep=)` is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from madtp.dtp.keep_rules import RULES, Candidates, Kept, Rule, checked, fewest_with_mass, name_of
from madtp.dtp.scalars import is_count, is_number, is_share
from madtp.dtp.threshold import above_threshold


@dataclass(frozen=True)
class Keep:
    """What is left of each image at a seam.

    Args:
        amount: a float in (0, 1] is a share of the tokens of each image, rounded up; an int a count per image. So
            `Keep(1.0)` keeps all, and `Keep(1)` one token.
        mass: in (0, 1], in place of amount: of each image the fewest tokens that hold this share of its importance.
        temperature: >= 0, in place of amount: of each image the tokens that are more important than the threshold of
            the method, docs/method.md; larger prunes more, and 0 keeps all. For rules that rank tokens by a number:
            `received`, `cls`, `fastv`, `text`.
        duplicates: at the seam "vision" alone: of units of an image of which no pixel differs by more than this, as the
            tower is given them, the first alone enters the tower; 0.0: those that are equal. None: all enter. Amounts
            are of all units, and of what enters no more is left. Without amount and mass all that enter stay.
        rule: a name of `madtp.dtp.keep_rules.RULES`, or a function as described there. A function may come without
            amount and mass: it gets None for the counts, and decides how many are left.

    Raises:
        ValueError: an argument breaks its rule.
    """

    amount: float | int | None = None
    mass: float | None = field(default=None, kw_only=True)
    temperature: float | None = field(default=None, kw_only=True)
    duplicates: float | None = field(default=None, kw_only=True)
    rule: str | Rule = field(default="received", kw_only=True)

    def __post_init__(self) -> None:
        if not callable(self.rule) and not (isinstance(self.rule, str) and self.rule in RULES):
            raise ValueError(f"rule must be one of {', '.join(RULES)}, or a function, got {self.rule!r}")
        if self.amount is not None:
            if not (is_share(self.amount) or is_count(self.amount)):
                raise ValueError(
                    f"amount must be a share, a float in (0, 1], or a count, an int >= 1, got {self.amount!r}"
                )
            self._set("amount", int if is_count(self.amount) else float)
        if self.mass is not None:
            if not (is_number(self.mass) and 0 < self.mass <= 1):
                raise ValueError(f"mass must be in (0, 1], got {self.mass!r}")
            self._set("mass", float)
        if self.amount is not None and self.mass is not None:
            raise ValueError(f"mass must be None with amount {self.amount!r}, got {self.mass!r}")
        if self.temperature is not None:
            self._check_temperature()
        free = self.amount is None and self.mass is None and self.temperature is None and not callable(self.rule)
        if self.duplicates is not None:
            if not (is_number(self.duplicates) and self.duplicates >= 0):
                raise ValueError(f"duplicates must be a tolerance, a number >= 0, got {self.duplicates!r}")
            self._set("duplicates", float)
            if free:
                object.__setattr__(self, "amount", 1.0)
        elif free:
            raise ValueError(f"amount, mass or temperature must be given with rule {self.rule!r}, got none of them")

    def _set(self, name: str, kind: type) -> None:
        """Makes a number plain: JSON takes none of numpy."""
        object.__setattr__(self, name, kind(getattr(self, name)))

    def _check_temperature(self) -> None:
        tau, ranking = self.temperature, [name for name, entry in RULES.items() if entry.ranks is not None]
        if tau is None or not (is_number(tau) and tau >= 0):
            raise ValueError(f"temperature must be a finite number >= 0, got {tau!r}")
        for name in ("amount", "mass"):
            if (value := getattr(self, name)) is not None:
                raise ValueError(f"temperature must be None with {name} {value!r}, got {tau!r}")
        if self.rule not in ranking:
            raise ValueError(f"rule must be one of {', '.join(ranking)} with a temperature, got {self.name!r}")
        self._set("temperature", float)

    @classmethod
    def of(cls, value: Any, rule: str) -> Keep:
        """A Keep as it is, or a plain share or count with the rule."""
        return value if isinstance(value, Keep) else cls(value, rule=rule)

    @property
    def is_fixed(self) -> bool:
        """Whether the number of tokens alone says how many are left."""
        return self.amount is not None or self.temperature == 0

    @property
    def needs_importance(self) -> bool:
        return self.mass is not None or (isinstance(self.rule, str) and RULES[self.rule].needs_importance)

    @property
    def needs_text(self) -> bool:
        return callable(self.rule) or RULES[self.rule].needs_text

    @property
    def name(self) -> str:
        """Of its rule, to be read."""
        return name_of(self.rule)

    @property
    def decided_by(self) -> str:
        """What says how many are left where they are not fixed, to be read."""
        if self.temperature is not None:
            return f"temperature {self.temperature:g}"
        return f"rule {self.name}" if self.mass is None else f"mass {self.mass}"

    def counts(self, lengths: Sequence[int]) -> list[int]:
        """How many are left of images with so many tokens: of an image at least one, and never more than it has.

        Raises:
            ValueError: what is left depends on more than lengths.
        """
        if self.temperature == 0:
            return list(lengths)
        if self.amount is None:
            raise ValueError(
                f"counts must be of a share or a count, got {self.decided_by}, which decides by what it sees"
            )
        if isinstance(self.amount, int):
            return [min(self.amount, length) for length in lengths]
        share = self.amount
        return [max(math.ceil(round(share * length, 9)), min(1, length)) for length in lengths]  # 0.1 * 30 > 3

    def choose(self, candidates: Candidates, entered: Sequence[int] | None = None) -> Kept:
        """What the rule keeps.

        Args:
            entered: tokens of each image of which the amount is a share, where some went before; None is those given.

        Raises:
            ValueError: importance is needed and there is none, or a user's function gave what no rule may.
        """
        counts = None
        if self.is_fixed:
            counts = self.counts(candidates.lengths if entered is None else entered)
            counts = [min(pair) for pair in zip(counts, candidates.lengths, strict=True)]
        elif self.mass is not None:
            counts = fewest_with_mass(candidates, self.mass)
        return self.choose_so_many(candidates, counts)

    def choose_so_many(self, candidates: Candidates, counts: Sequence[int] | None) -> Kept:
        """`choose`, with how many of each image are to stay; None where the rule, or the temperature, decides."""
        if counts == list(candidates.lengths):
            return Kept(candidates.features.new_ones(sum(counts), dtype=torch.bool), None)
        if self.temperature is not None:
            return Kept(above_threshold(self._ranks(candidates), candidates.cu_seqlens, self.temperature), None)
        rule = RULES[self.rule].choose if isinstance(self.rule, str) else self.rule
        given = rule(candidates, counts)
        if callable(self.rule):
            return checked(given, candidates, self.name, counts)
        return given if isinstance(given, Kept) else Kept(given, None)

    def _ranks(self, candidates: Candidates) -> Tensor:
        assert isinstance(self.rule, str), "a function ranks by itself"
        ranks = RULES[self.rule].ranks
        assert ranks is not None, "the others have no temperature"
        return ranks(candidates)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON. Raises ValueError where the rule is a function."""
        if not isinstance(self.rule, str):
            raise ValueError(f"rule must be one of {', '.join(RULES)} to be saved, got the function {self.name}")
        more = {name: getattr(self, name) for name in ("temperature", "duplicates")}
        more = {name: value for name, value in more.items() if value is not None}
        return {"amount": self.amount, "mass": self.mass, **more, "rule": self.rule}
