# SPDX-License-Identifier: Apache-2.0
"""What a choice of tokens, widths and 2:4 Linears costs, and what it does to the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from madtp.budgets.records import Sensitivities, Times, TokenPoint, WidthUnit

TOKEN_STEP = 0.01  # of a branch's share, in which the tokens are given away


@dataclass(frozen=True)
class Choice:
    """What is pruned, or as far as something may be."""

    shares: dict[str, float]  # of its MACs that the tokens of each branch may spend
    sparse: list[str]  # Linears that go N:M
    widths: dict[str, int] = field(default_factory=dict)  # heads or channels left, by part; others have all


class CostModel:
    """What a choice costs, and what it does to the loss, part by part.

    The cost is counted MACs, or milliseconds, per sample: what everything costs with all tokens and dense weights, less
    what each branch saves by its tokens, less what each removed head or channel and each sparse Linear saves at the
    share of its branch; a sparse Linear at the share of its own width too. Times know nothing of widths.
    """

    def __init__(self, sensitivities: Sensitivities, times: Times | None = None):
        self.weights = sensitivities.weights
        self.widths = sensitivities.widths if times is None else {}
        self.part_of = {linear: name for name, unit in self.widths.items() for linear in unit.linears}
        if times is None:
            branches = sensitivities.profile.branches
            self.full = sensitivities.profile.total.dense_macs
            self.saves = {name: unit.macs for name, unit in self.weights.items()}
            by_tokens = {
                branch: [(1 - point.share) * branches[branch].dense_macs for point in points]
                for branch, points in sensitivities.tokens.items()
            }
        else:
            self.full, self.saves = times.patched, times.weights
            by_tokens = {b: [times.patched - time for time in measured] for b, measured in times.tokens.items()}
        self.curves = {
            branch: _lower_hull(points, by_tokens[branch]) for branch, points in sensitivities.tokens.items()
        }
        self.steps = {name: _width_steps(unit) for name, unit in self.widths.items()}

    def min_share(self, branch: str) -> float:
        """What the highest temperature leaves of the branch."""
        return self.curves[branch][0][0]

    def distill_loss(self, branch: str, share: float) -> float:
        """What this share of the branch's tokens does to the distillation loss by itself."""
        shares, _, losses = self.curves[branch]
        return float(np.interp(share, shares, losses))

    def width_loss(self, name: str, width: int) -> float:
        """What this width of a part does to the distillation loss by itself."""
        steps = self.steps[name]
        return float(np.interp(width, list(steps)[::-1], list(steps.values())[::-1]))

    def loss(self, choice: Choice) -> float:
        """What a choice does to the distillation loss, if effects add up."""
        tokens = sum(self.distill_loss(branch, share) for branch, share in choice.shares.items())
        widths = sum(self.width_loss(name, width) for name, width in choice.widths.items())
        return tokens + widths + sum(self.weights[name].distill_loss for name in choice.sparse)

    def narrowest(self) -> dict[str, int]:
        """The least width of every part."""
        return {name: min(steps) for name, steps in self.steps.items() if min(steps) < self.widths[name].full}

    def left_of(self, linear: str, choice: Choice) -> float:
        """The share of a Linear that the widths of a choice leave."""
        part = self.part_of.get(linear)
        return 1.0 if part is None else choice.widths.get(part, self.widths[part].full) / self.widths[part].full

    def cost(self, choice: Choice) -> float:
        shares = choice.shares
        by_tokens = sum(np.interp(share, *self.curves[branch][:2]) for branch, share in shares.items())
        by_width = sum(
            unit.macs * (unit.full - choice.widths[name]) * shares.get(unit.branch, 1.0)
            for name, unit in self.widths.items()
            if name in choice.widths
        )
        by_weights = sum(
            self.saves[name] * self.left_of(name, choice) * shares.get(self.weights[name].branch, 1.0)
            for name in choice.sparse
        )
        return float(self.full - by_tokens - by_width - by_weights)

    def greedy(self, start: Choice, target: float, limits: Choice) -> tuple[Choice, Choice]:
        """Takes what raises the loss least per cost saved, a Linear, a step of tokens or of a width, until the target
        is met.

        Args:
            start: where it starts.
            target: cost to come down to; all that is allowed together must reach it.
            limits: the least share of each branch and width of each part, and the Linears it may take.

        Returns:
            what it came to, and what there was before the last step.
        """
        choice = before = start
        now = self.cost(choice)
        while now > target:
            priced = [(harm, now - self.cost(option), option) for harm, option in self._options(choice, limits)]
            rated = [(harm / saved, option) for harm, saved, option in priced if saved > 1e-9 * self.full]
            before, (_, choice) = choice, min(rated, key=lambda option: option[0])
            now = self.cost(choice)
        return choice, before

    def _options(self, choice: Choice, limits: Choice) -> list[tuple[float, Choice]]:
        """What each step adds to the loss, and what there is then."""
        options: list[tuple[float, Choice]] = []
        for branch, share in choice.shares.items():
            fewer = max(share - TOKEN_STEP, limits.shares[branch])
            harm = self.distill_loss(branch, fewer) - self.distill_loss(branch, share)
            options.append((harm, replace(choice, shares=choice.shares | {branch: fewer})))
        for name, least in limits.widths.items():
            now = choice.widths.get(name, self.widths[name].full)
            narrower = [width for width in self.steps[name] if least <= width < now]
            if narrower:
                harm = self.width_loss(name, narrower[0]) - self.width_loss(name, now)
                options.append((harm, replace(choice, widths=choice.widths | {name: narrower[0]})))
        for name in limits.sparse:
            if name not in choice.sparse:
                options.append((self.weights[name].distill_loss, replace(choice, sparse=[*choice.sparse, name])))
        return options

    def exactly(self, choice: Choice, target: float, fewest: Mapping[str, float], *, uniform: bool) -> Choice:
        """The shares of the branches that prune, moved together until they cost the target, as far as they go."""
        shares = choice.shares
        moving = [branch for branch, share in shares.items() if uniform or share < 1]

        def moved(step: float) -> Choice:  # 0: the fewest tokens, 1: all of them
            more = {branch: fewest[branch] + step * (1 - fewest[branch]) for branch in moving}
            if not uniform:  # giving back what the last step took too much
                more = {branch: shares[branch] + step * (1 - shares[branch]) for branch in moving}
            return replace(choice, shares=shares | more)

        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self.cost(moved(middle)) <= target else (low, middle)
        return moved(low if self.cost(moved(1.0)) > target else 1.0)


def _width_steps(unit: WidthUnit) -> dict[int, float]:
    """Width -> loss, from all to the fewest, of the convex curve below the points."""
    points = [TokenPoint(point.width / unit.full, 0.0, point.distill_loss) for point in unit.points]
    shares, _, losses = _lower_hull(points, [unit.full - point.width for point in unit.points])
    return {round(share * unit.full): loss for share, loss in reversed(list(zip(shares, losses, strict=True)))}


def _lower_hull(points: Sequence[TokenPoint], saved: Sequence[float]) -> tuple[list[float], list[float], list[float]]:
    """The convex curve of loss against cost below the points: steps along it get dearer.

    Points from all tokens to the fewest, and what each saves; one that saves no more than one with more tokens is left
    out, as times are not exact.

    Returns:
        (shares, saved, losses) from the fewest tokens on.
    """
    ahead: list[tuple[float, float, float]] = []
    for point, saving in zip(points, saved, strict=True):
        if not ahead or saving > ahead[-1][1]:
            ahead.append((point.share, saving, point.distill_loss))
    hull: list[tuple[float, float, float]] = []
    for corner in reversed(ahead):
        while len(hull) > 1 and _turns_up(*((-saving, loss) for _, saving, loss in (*hull[-2:], corner))):
            hull.pop()
        hull.append(corner)
    shares, savings, losses = (list(column) for column in zip(*hull, strict=True))
    return shares, savings, losses


def _turns_up(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])
