# SPDX-License-Identifier: Apache-2.0
"""Input channels in an order in which an N:M mask takes less magnitude away.

The idea is that of Pool and Yu (NeurIPS 2021): which weights share a group is free to choose, as long as the layer
before puts its outputs in the same order. In an MLP that is the order of its hidden channels; the model computes the
same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from madtp.hwp.modules import ModuleTree, linears, shared_reason, write_parameters, write_unsupported_reason
from madtp_kernels import Pattern, nm_mask
from madtp_kernels.checks import require

MLPS = (("fc1", "fc2"), ("intermediate.dense", "output.dense"))  # how Hugging Face names the two Linear of an MLP
MIN_GAIN = 1e-6  # of a pair's kept score, below which rounding could swap for ever


class Permutation(NamedTuple):
    """order (C,) int64: new channel j is old channel order[j]. before, after: share of the score an N:M mask keeps."""

    order: Tensor
    before: float
    after: float


def search_permutation(
    weight: Tensor, pattern: Pattern | str, *, score: Tensor | None = None, rounds: int = 64
) -> Permutation:
    """Looks for an order of the input channels in which the N:M mask keeps more.

    The groups of m meet in pairs, as in a tournament where everyone meets everyone: in each round every group meets one
    other, and the two swap the channels whose swap helps most, if any does. Ends early when a whole tournament went by
    without a swap. Deterministic, and never worse than the order that was.

    Args:
        weight: (N, C) floating point, no NaN; C a multiple of m.
        score: (N, C) >= 0, what to keep; None takes |weight|.
        rounds: bounds the time: each takes about 2 N C m comparisons.

    Raises:
        ValueError: an argument breaks a rule.
    """
    n, m = Pattern.parse(pattern)
    require(isinstance(weight, Tensor) and weight.ndim == 2, "weight", "a 2-dimensional tensor", weight)
    require(isinstance(rounds, int) and rounds >= 0, "rounds", "an integer of at least 0", rounds)
    before = _share_kept(weight, n, m, score)
    columns = weight.shape[-1]
    order = torch.arange(columns, device=weight.device).view(-1, m)  # (G, m)
    if n < m:
        scores = (weight.detach().abs() if score is None else score).float()
        groups = scores.T.reshape(columns // m, m, len(weight)).contiguous()  # (G, m, N)
        idle = 0
        for first, second in _tournament(len(groups), rounds, weight.device):
            idle = 0 if _swap(groups, order, first, second, n) else idle + 1
            if idle >= len(groups):
                break
    order = order.flatten()
    after = _share_kept(weight[:, order], n, m, None if score is None else score[:, order])
    if after <= before:
        return Permutation(torch.arange(columns, device=weight.device), before, before)
    return Permutation(order, before, after)


def fold_permutation(first: nn.Linear, second: nn.Linear, order: Tensor) -> None:
    """Reorders the channels between two Linear modules with an elementwise function between them, in place.

    The outputs of `first` (rows of its weight, bias) and the inputs of `second` (columns) take the new order, so what
    `second` returns stays the same.

    Raises:
        ValueError: the modules do not fit each other, a weight or bias is no parameter of its own (parametrized, pruned
            by torch), or order is no permutation of the channels.
    """
    channels = first.out_features
    require(second.in_features == channels, "second", f"of {channels} in_features like first's outputs", repr(second))
    ok = order.shape == (channels,) and torch.equal(order.sort().values.cpu(), torch.arange(channels))
    require(ok, "order", f"a permutation of {channels} channels", order)
    for what, module, name in (("first", first, "weight"), ("first", first, "bias"), ("second", second, "weight")):
        reason = write_unsupported_reason(module, name)
        require(reason is None, what, "a Linear whose parameters can be written", reason)
    write_parameters(_folded(first, second, order, {}))


def _folded(
    first: nn.Linear, second: nn.Linear, order: Tensor, values: Mapping[Tensor, Tensor]
) -> dict[Tensor, Tensor]:
    """What the parameters become, of the values that they have: those given, or their own."""
    rows = [parameter for parameter in (first.weight, first.bias) if parameter is not None]
    changed = {parameter: values.get(parameter, parameter.detach())[order] for parameter in rows}
    return changed | {second.weight: values.get(second.weight, second.weight.detach())[:, order]}


def mlp_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """The names of (first, second) Linear of every MLP of the model, by the names of `MLPS` and matching sizes."""
    modules = dict(model.named_modules())
    pairs = []
    for parent in modules:
        for names in MLPS:
            first, second = (f"{parent}.{name}" if parent else name for name in names)
            one, other = modules.get(first), modules.get(second)
            if isinstance(one, nn.Linear) and isinstance(other, nn.Linear) and one.out_features == other.in_features:
                pairs.append((first, second))
    return pairs


def permute_mlps(
    model: nn.Module,
    pattern: Pattern | str,
    pairs: Iterable[tuple[str, str]] | None = None,
    *,
    rounds: int = 64,
) -> dict[str, Permutation]:
    """Searches and folds a permutation into every MLP, before its weights are pruned; the model computes what it did.

    Args:
        pairs: names of (first, second) Linear with nothing but an elementwise function (and dropout) between them, the
            output of the first used nowhere else; None takes `mlp_pairs(model)`.

    Returns:
        by the name of the second, its `Permutation`.

    Raises:
        ValueError: a module does not exist, does not fit the pattern, shares its weight with another module, or is
            registered at two places. Weights are written when all permutations are known.
    """
    pattern = Pattern.parse(pattern)
    pairs, tree = mlp_pairs(model) if pairs is None else list(pairs), ModuleTree(model)
    linears(model, [second for _, second in pairs], pattern)
    linears(model, [first for first, _ in pairs], Pattern(1, 1))
    for first, second in pairs:
        reason = write_unsupported_reason(tree[first], "bias") or shared_reason(tree[first], "bias", tree)
        for name in (first, second):
            places = [names[0] for names in tree.places(tree[name]).values()]
            reason = reason or (f"{name!r} that is {' and '.join(places)}" if len(places) > 1 else None)
        require(reason is None, "pairs", f"of Linears that no other MLP uses, as ({first!r}, {second!r})", reason)
    found: dict[str, Permutation] = {}
    values: dict[Tensor, Tensor] = {}
    for first, second in pairs:
        one, other = cast(nn.Linear, tree[first]), cast(nn.Linear, tree[second])
        weight = values.get(other.weight, other.weight)
        found[second] = search_permutation(weight, pattern, rounds=rounds)
        values |= _folded(one, other, found[second].order, values)
    write_parameters(values)
    return found


def _share_kept(weight: Tensor, n: int, m: int, score: Tensor | None) -> float:
    mask = nm_mask(weight, n, m, score=score)
    scores = (weight.detach().abs() if score is None else score).double()
    return (scores * mask).sum().item() / max(scores.sum().item(), 1e-300)


def _tournament(players: int, rounds: int, device: torch.device):
    """Yields pairs (first (P,), second (P,)) of players, each in one at most: the circle method of round robins."""
    circle = list(range(players)) + [None] * (players % 2)
    for _ in range(rounds if players > 1 else 0):
        half = len(circle) // 2
        pairs = [p for p in zip(circle[:half], reversed(circle[half:]), strict=True) if None not in p]
        yield torch.tensor(pairs, device=device).T
        circle.insert(1, circle.pop())


def _swap(groups: Tensor, order: Tensor, first: Tensor, second: Tensor, n: int) -> bool:
    """One round: every pair of groups (P,), (P,) makes its best swap. Returns whether there was one.

    A group without its channel i keeps the sum of its n best but max(x_i - (n+1)-th best, 0), and a newcomer y adds
    max(y - n-th best of the rest, 0): so what a swap changes is a sum over rows of four such terms.
    """
    a, b = groups[first], groups[second]  # (P, m, N)
    (loss_a, rest_a, kept_a), (loss_b, rest_b, kept_b) = _without(a, n), _without(b, n)
    gain = -(loss_a[:, :, None] + loss_b[:, None, :])  # (P, i, j)
    for i in range(groups.shape[1]):
        gain[:, i] += (b - rest_a[:, i, None]).clamp_min_(0).sum(-1)
        gain[:, :, i] += (a - rest_b[:, i, None]).clamp_min_(0).sum(-1)
    best, where = gain.flatten(1).max(1)
    better = best > MIN_GAIN * (kept_a + kept_b)
    channel_a, channel_b = where // groups.shape[1], where % groups.shape[1]
    into, out = (first[better], channel_a[better]), (second[better], channel_b[better])
    for channels in (groups, order):
        channels[into], channels[out] = channels[out], channels[into]
    return bool(better.any())


def _without(group: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """group (P, m, N) -> per channel its loss (P, m) and the n-th best of the rest (P, m, N); kept sum (P,)."""
    best = group.topk(n + 1, dim=1).values
    last, following = best[:, n - 1, None], best[:, n, None]
    loss = (group - following).clamp_min_(0).sum(-1)
    return loss, torch.where(group >= last, following, last), best[:, :n].sum((1, 2))
