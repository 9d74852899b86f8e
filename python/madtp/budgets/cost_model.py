# SPDX-License-Identifier: Apache-2.0
"""What a choice of tokens and 2:4 Linears costs, and what it does to the loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from madtp.budgets.records import Sensitivities, Times, TokenPoint

TOKEN_STEP = 0.01  # of a branch's share, in which the tokens are given away
Choice = tuple[dict[str, float], list[str]]  # the share of its MACs that each branch's tokens may spend, sparse Linears


class CostModel:
    """What a choice of shares and sparse Linears costs, and what it does to the loss, part by part.

    The cost is counted MACs, or milliseconds, per sample: what everything costs with all tokens and dense weights, less
    what each branch saves by its tokens, less what each sparse Linear saves at the share of its branch.
    """

    def __init__(self, sensitivities: Sensitivities, times: Times | None = None):
        self.weights = sensitivities.weights
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

    def min_share(self, branch: str) -> float:
        """What the highest temperature leaves of the branch."""
        return self.curves[branch][0][0]

    def distill_loss(self, branch: str, share: float) -> float:
        """What this share of the branch's tokens does to the distillation loss by itself."""
        shares, _, losses = self.curves[branch]
        return float(np.interp(share, shares, losses))

    def cost(self, shares: Mapping[str, float], sparse: Iterable[str]) -> float:
        """Of the model with these shares of tokens, by branch, and these Linears at 2:4."""
        by_tokens = sum(np.interp(share, *self.curves[branch][:2]) for branch, share in shares.items())
        by_weights = sum(self.saves[name] * shares.get(self.weights[name].branch, 1.0) for name in sparse)
        return float(self.full - by_tokens - by_weights)

    def greedy(
        self,
        shares: dict[str, float],
        sparse: list[str],
        target: float,
        fewest: Mapping[str, float],
        allowed: Sequence[str],
    ) -> Choice:
        """Takes what raises the loss least per cost saved, a Linear or a step of tokens, until the target is met.

        Args:
            shares, sparse: where it starts.
            target: cost to come down to; all that is allowed together must reach it.
            fewest: the least share of each branch.
            allowed: Linears it may take.
        """
        now = self.cost(shares, sparse)
        while now > target:
            options: list[tuple[float, Choice]] = []  # what it adds to the loss, and what there is then
            for branch, share in shares.items():
                fewer = max(share - TOKEN_STEP, fewest[branch])
                changed = shares | {branch: fewer}
                options.append((self.distill_loss(branch, fewer) - self.distill_loss(branch, share), (changed, sparse)))
            for name in allowed:
                if name not in sparse:
                    options.append((self.weights[name].distill_loss, (shares, [*sparse, name])))
            priced = [(harm, now - self.cost(*choice), choice) for harm, choice in options]
            rated = [(harm / saved, choice) for harm, saved, choice in priced if saved > 1e-9 * self.full]
            _, (shares, sparse) = min(rated, key=lambda option: option[0])
            now = self.cost(shares, sparse)
        return shares, sparse

    def exactly(
        self,
        shares: Mapping[str, float],
        sparse: Sequence[str],
        target: float,
        fewest: Mapping[str, float],
        *,
        uniform: bool,
    ) -> dict[str, float]:
        """The shares of the branches that prune, moved together until they cost the target, as far as they go."""
        moving = [branch for branch, share in shares.items() if uniform or share < 1]

        def moved(step: float) -> dict[str, float]:  # 0: the fewest tokens, 1: all of them
            more = {branch: fewest[branch] + step * (1 - fewest[branch]) for branch in moving}
            if not uniform:  # giving back what the last step took too much
                more = {branch: shares[branch] + step * (1 - shares[branch]) for branch in moving}
            return dict(shares) | more

        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self.cost(moved(middle), sparse) <= target else (low, middle)
        return moved(low if self.cost(moved(1.0), sparse) > target else 1.0)


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
