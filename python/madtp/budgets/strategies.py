# SPDX-License-Identifier: Apache-2.0
"""How each allocation spends a budget: what it may prune, and in which order it does.

Source: docs/method.md, cooperative optimisation, step 3.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

from madtp.budgets.cost_model import Choice, CostModel
from madtp.budgets.records import WeightUnit


class Strategy:
    """Prunes tokens, widths and weights as they come: what costs the answers least per cost saved goes first."""

    prunes_tokens = True
    prunes_weights = True
    prunes_width = True  # where widths were looked at

    def bounds(self, costs: CostModel) -> Choice:
        """As far as it may go: the least share of each branch and width of each part, and the Linears that may go
        N:M."""
        fewest = {branch: costs.min_share(branch) if self.prunes_tokens else 1.0 for branch in costs.curves}
        sparse = list(costs.weights) if self.prunes_weights else []
        return Choice(fewest, sparse, costs.narrowest() if self.prunes_width else {})

    def required(self, units: Mapping[str, WeightUnit], zeroes: float) -> list[str]:
        """Linears that go N:M whatever the budget is: with at least so many zeros, those of least loss per zero."""
        ranked = sorted(units, key=lambda name: units[name].distill_loss / units[name].zeroed)
        counts = list(itertools.accumulate(units[name].zeroed for name in ranked))
        enough = next((i for i, count in enumerate(counts, 1) if count >= zeroes), 0)
        return ranked[:enough] if zeroes else []

    def spend(self, costs: CostModel, target: float, required: list[str]) -> Choice:
        """What costs the target, or what weights and widths alone come nearest below it."""
        limits = self.bounds(costs)
        start = Choice(dict.fromkeys(limits.shares, 1.0), required)
        return costs.exactly(self._taken(costs, target, start, limits), target, limits.shares, uniform=False)

    def _taken(self, costs: CostModel, target: float, start: Choice, limits: Choice) -> Choice:
        """The same before the last step, which goes past the target, is given back in part."""
        return costs.greedy(start, target, limits)[0]


class Joint(Strategy):
    """Where a whole Linear or width went past the target and all tokens are left, ends on tokens in its place; where
    widths may go, only if that costs the answers less."""

    def _taken(self, costs: CostModel, target: float, start: Choice, limits: Choice) -> Choice:
        taken, before = costs.greedy(start, target, limits)
        past = costs.cost(taken) < (1 - 1e-6) * target and before is not taken
        tokens = replace(before, shares=limits.shares)
        if past and min(taken.shares.values()) == 1 and costs.cost(tokens) <= target:
            exact = costs.greedy(before, target, Choice(limits.shares, []))[0]
            return exact if not limits.widths or costs.loss(exact) < costs.loss(taken) else taken
        return taken


class Uniform(Strategy):
    """All Linears that can, all parts as narrow as they may be, and one share for all branches."""

    def required(self, units: Mapping[str, WeightUnit], zeroes: float) -> list[str]:
        return list(units)

    def spend(self, costs: CostModel, target: float, required: list[str]) -> Choice:
        limits = self.bounds(costs)
        start = Choice(dict.fromkeys(limits.shares, 1.0), required, limits.widths)
        return costs.exactly(start, target, limits.shares, uniform=True)


class TokensOnly(Strategy):
    """All Linears stay as they are."""

    prunes_weights = False
    prunes_width = False


class WeightsOnly(Strategy):
    """All tokens, heads and channels stay."""

    prunes_tokens = False
    prunes_width = False


class WidthOnly(Strategy):
    """All tokens stay, and all weights of what is left."""

    prunes_tokens = False
    prunes_weights = False


class WidthThenWeights(Strategy):
    """All tokens stay; widths go first, as far as they may, then weights: filters first, then weights."""

    prunes_tokens = False

    def _taken(self, costs: CostModel, target: float, start: Choice, limits: Choice) -> Choice:
        narrow = replace(start, widths=limits.widths)
        if costs.cost(narrow) <= target:
            return costs.greedy(start, target, replace(limits, sparse=[]))[0]
        return costs.greedy(narrow, target, limits)[0]


STRATEGIES: dict[str, Strategy] = {
    "joint": Joint(),
    "uniform": Uniform(),
    "tokens": TokensOnly(),
    "weights": WeightsOnly(),
    "width": WidthOnly(),
    "width_weights": WidthThenWeights(),
}
