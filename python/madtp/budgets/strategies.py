# SPDX-License-Identifier: Apache-2.0
"""How each allocation spends a budget: what it may prune, and in which order it does.

Source: docs/method.md, cooperative optimisation, step 3.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from madtp.budgets.cost_model import Choice, CostModel
from madtp.budgets.records import WeightUnit

Shares = dict[str, float]  # of its MACs that the tokens of a branch may spend, by branch


class Strategy:
    """Prunes tokens and weights as they come: what costs the answers least per cost saved goes first."""

    prunes_tokens = True
    prunes_weights = True

    def bounds(self, costs: CostModel) -> Choice:
        """As far as it may go: the least share of each branch, and the Linears that may go N:M."""
        fewest = {branch: costs.min_share(branch) if self.prunes_tokens else 1.0 for branch in costs.curves}
        return fewest, list(costs.weights) if self.prunes_weights else []

    def required(self, units: Mapping[str, WeightUnit], zeroes: float) -> list[str]:
        """Linears that go N:M whatever the budget is: with at least so many zeros, those of least loss per zero."""
        ranked = sorted(units, key=lambda name: units[name].distill_loss / units[name].zeroed)
        counts = list(itertools.accumulate(units[name].zeroed for name in ranked))
        enough = next((i for i, count in enumerate(counts, 1) if count >= zeroes), 0)
        return ranked[:enough] if zeroes else []

    def spend(self, costs: CostModel, target: float, required: list[str]) -> Choice:
        """Shares of the branches and Linears that cost the target, or what weights alone come nearest below it."""
        fewest, allowed = self.bounds(costs)
        shares, sparse = self._taken(costs, target, required, fewest, allowed)
        return costs.exactly(shares, sparse, target, fewest, uniform=False), sparse

    def _taken(
        self, costs: CostModel, target: float, required: list[str], fewest: Shares, allowed: list[str]
    ) -> Choice:
        """The same before the last step, which goes past the target, is given back in part."""
        return costs.greedy(dict.fromkeys(fewest, 1.0), required, target, fewest, allowed)


class Joint(Strategy):
    """Where a whole Linear went past the target and all tokens are left, ends on tokens in its place."""

    def _taken(
        self, costs: CostModel, target: float, required: list[str], fewest: Shares, allowed: list[str]
    ) -> Choice:
        shares, sparse = super()._taken(costs, target, required, fewest, allowed)
        past = costs.cost(shares, sparse) < (1 - 1e-6) * target and len(sparse) > len(required)
        if past and min(shares.values()) == 1 and costs.cost(fewest, sparse[:-1]) <= target:
            return costs.greedy(shares, sparse[:-1], target, fewest, [])
        return shares, sparse


class Uniform(Strategy):
    """All Linears that can, and one share for all branches."""

    def required(self, units: Mapping[str, WeightUnit], zeroes: float) -> list[str]:
        return list(units)

    def spend(self, costs: CostModel, target: float, required: list[str]) -> Choice:
        fewest, _ = self.bounds(costs)
        return costs.exactly(dict.fromkeys(fewest, 1.0), required, target, fewest, uniform=True), required


class TokensOnly(Strategy):
    """All Linears stay dense."""

    prunes_weights = False


class WeightsOnly(Strategy):
    """All tokens stay."""

    prunes_tokens = False


STRATEGIES: dict[str, Strategy] = {
    "joint": Joint(),
    "uniform": Uniform(),
    "tokens": TokensOnly(),
    "weights": WeightsOnly(),
}
