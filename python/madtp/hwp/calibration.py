# SPDX-License-Identifier: Apache-2.0
"""What the Linear layers of a model get to see: statistics of their inputs, collected while calibration data runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from madtp.dtp.branch import exact_capacity
from madtp.handles import find_handle
from madtp.hwp.modules import ModuleTree, matches, require_linears
from madtp_kernels import Selection, gather_merge
from madtp_kernels.ragged import sequence_ids


@dataclass
class InputStatistics:
    """Of the rows x (C,) that reached one Linear, row t with weight r_t."""

    squares: Tensor  # (C,) float64: sum_t r_t x_t^2
    gram: Tensor | None = None  # (C, C) float64: sum_t r_t x_t x_t^T, if asked for
    weight_sum: float = 0.0  # sum_t r_t
    amax: Tensor | None = None  # (C,) float32: the largest magnitude of every channel; None before the first row
    # float64: sum_t r_t max_j x_tj^2, which says what rounding every row by its largest magnitude costs.
    row_amax_squares: Tensor | None = None
    sums: Tensor | None = None  # (C,) float64: sum_t r_t x_t, where there is a gram

    @property
    def norms(self) -> Tensor:
        """(C,) float32: the root mean square of every input channel."""
        return (self.squares / max(self.weight_sum, 1e-30)).sqrt().float()

    def add(self, x: Tensor, weight: Tensor | None = None) -> None:
        """x (..., C); weight (T,) for its T rows, None: each counts 1."""
        x = x.detach().flatten(0, -2).float()
        self.weight_sum += len(x) if weight is None else weight.sum().item()
        weighted = x if weight is None else x * weight[:, None]
        self.squares += (weighted * x).sum(0, dtype=torch.float64)
        if self.gram is not None:
            self._add_products(x, weight)
        if len(x):
            magnitudes = x.abs()
            amax, rows = magnitudes.amax(0), magnitudes.amax(1).double().square()
            self.amax = amax if self.amax is None else torch.maximum(self.amax, amax)
            rows = (rows if weight is None else rows * weight).sum()
            self.row_amax_squares = rows if self.row_amax_squares is None else self.row_amax_squares + rows

    def _add_products(self, x: Tensor, weight: Tensor | None) -> None:
        """To gram and sums. Products are float32, so they are taken about the mean: about zero their rounding is that
        of the mean's square, in which what is about the mean may be lost."""
        mean = x.mean(0) if len(x) else x.new_zeros(x.shape[1])
        about = x - mean
        weighted, count = (about, len(x)) if weight is None else (about * weight[:, None], weight.sum().item())
        mean, rest = mean.double(), weighted.sum(0, dtype=torch.float64)
        cross = torch.outer(rest + 0.5 * count * mean, mean)
        assert self.gram is not None, "asked by add"
        self.gram += (weighted.T @ about).double() + cross + cross.T
        total = rest + count * mean
        self.sums = total if self.sums is None else self.sums + total

    def divide_channels(self, divisor: Tensor) -> None:
        """Makes these the statistics of x / divisor, (C,). Of the rows' largest magnitudes nothing is known then."""
        by = divisor.to(self.squares)
        self.squares /= by.square()
        if self.gram is not None:
            self.gram /= by[:, None] * by
        if self.sums is not None:
            self.sums = self.sums / by
        if self.amax is not None:
            self.amax = self.amax / divisor.to(self.amax)
        self.row_amax_squares = None


def known_inputs(name: str, statistics: Mapping[str, InputStatistics], *, gram: bool) -> InputStatistics:
    """What is known of the inputs of a module.

    Raises:
        ValueError: nothing is, or gram is asked for and was not collected.
    """
    if name not in statistics or not statistics[name].weight_sum > 0:
        raise ValueError(f"statistics must hold inputs of every module, got none of {name!r}")
    known = statistics[name]
    if gram and known.gram is None:
        raise ValueError(f"gram must be finite, got None for {name!r}: collect inputs with gram=True")
    return known


@contextmanager
def collect_inputs(
    model: nn.Module, modules: Iterable[str], *, gram: bool = False, token_weighted: bool = False
) -> Iterator[dict[str, InputStatistics]]:
    """A context in which every forward of the model adds to the statistics it yields, by module name.

    >>> with torch.no_grad(), collect_inputs(model, names) as statistics:
    ...     for batch in calibration_batches:
    ...         model(**batch)

    All rows count, padding too: a patched model has none in its pruned branches.

    Args:
        modules: names of Linear modules.
        gram: collect C x C products as well, which `reconstruct` needs.
        token_weighted: of a patched model that prunes (temperature above 0). A row weighs the importance that the last
            pruning step gave its token, or, before the first, that one; so a weight that serves tokens about to go
            counts less. The summary token weighs as much as the best token of its sequence, a merged one the merged
            importance; the weights in one call of a module are scaled to a mean of 1. Rows whose branch is not pruned,
            such as a decoder's, weigh 1, and so do rows that may be of either of two branches by their number.

    Raises:
        ValueError: a module is no Linear of the model; token_weighted and the model prunes no tokens.
    """
    linears = require_linears("modules", modules, ModuleTree(model))
    statistics = {}
    for name, module in linears.items():
        squares = torch.zeros(module.in_features, dtype=torch.float64, device=module.weight.device)
        statistics[name] = InputStatistics(squares, torch.diag(squares) if gram else None)
    with ExitStack() as stack:
        stack.enter_context(exact_capacity(model))
        add = stack.enter_context(_weighted(model, statistics)) if token_weighted else partial(_add_input, statistics)
        for name in statistics:

            def see(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], name: str = name) -> None:
                add(name, args[0] if args else kwargs["input"])

            hook = linears[name].register_forward_pre_hook(see, with_kwargs=True)
            stack.callback(hook.remove)
        yield statistics


def _add_input(statistics: Mapping[str, InputStatistics], name: str, x: Tensor) -> None:
    statistics[name].add(x)


@contextmanager
def _weighted(model: nn.Module, statistics: Mapping[str, InputStatistics]):
    """Yields add(name, x) of the token-weighted statistics."""
    handle = find_handle(model)
    branches = {} if handle is None else {name: branch for name, branch in handle.pruning.items() if branch.prunes}
    if handle is None or not branches:
        raise ValueError("model must be patched and prune tokens (temperature above 0) for token_weighted")
    weights = _TokenWeights(statistics, {name: handle.branches[name] for name in branches})
    hooks = [
        model.register_forward_pre_hook(lambda *_: weights.begin()),
        model.register_forward_hook(lambda *_: weights.end()),
    ]
    observers = {name: branch.observer for name, branch in branches.items()}
    try:
        for name, branch in branches.items():
            branch.observer = partial(weights.selected, name)
        yield weights.add
    finally:
        for hook in hooks:
            hook.remove()
        for name, branch in branches.items():
            branch.observer = observers[name]


class _TokenWeights:
    """Finds the importance of the rows that reach a module, in the order in which one forward runs."""

    def __init__(self, statistics: Mapping[str, InputStatistics], branches: Mapping[str, tuple[str, ...]]):
        self.statistics = statistics
        self.branch_of = {
            module: next((branch for branch, names in branches.items() if matches(module, names)), None)
            for module in statistics
        }
        self.begin()

    def begin(self) -> None:
        self.current: dict[str, Tensor] = {}  # branch -> (T,) of the tokens it holds now
        self.waiting: list[tuple[str, Tensor]] = []  # inputs of first blocks, before their importance is known

    def add(self, name: str, x: Tensor) -> None:
        branch = self.branch_of[name]
        if branch is not None and branch not in self.current:
            self.waiting.append((name, x.detach()))
        else:
            self._add(name, x, self.current)

    def selected(self, branch: str, importance: Tensor, selection: Selection) -> None:
        """A pruning step of the branch: what waited has its weights, and the tokens that are left theirs."""
        weight = _with_summary(importance.detach(), selection.cu_seqlens_in)
        if branch not in self.current:
            for name, x in self.waiting:
                if self.branch_of[name] == branch:
                    self._add(name, x, {branch: weight})
            self.waiting = [(name, x) for name, x in self.waiting if self.branch_of[name] != branch]
        self.current[branch] = gather_merge(weight[:, None], selection)[:, 0]

    def end(self) -> None:
        for name, x in self.waiting:
            self._add(name, x, {})
        self.begin()

    def _add(self, name: str, x: Tensor, candidates: Mapping[str, Tensor]) -> None:
        # The keys of a cross-attention are another branch's tokens: whose they are shows in their number.
        fitting = [weight for weight in candidates.values() if len(weight) == x.shape[:-1].numel()]
        if self.branch_of[name] is None or len(fitting) != 1 or not fitting[0].any():
            self.statistics[name].add(x)
        else:
            self.statistics[name].add(x, fitting[0] / fitting[0].mean())


def _with_summary(importance: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(T,): the summary token, row 0 of its sequence, has no importance of its own and gets the sequence's maximum."""
    ids = sequence_ids(cu_seqlens, len(importance)).long()
    best = importance.new_zeros(cu_seqlens.numel() - 1).scatter_reduce(0, ids, importance, "amax")
    return importance.index_copy(0, cu_seqlens[:-1].long(), best)
