# SPDX-License-Identifier: Apache-2.0
"""How much a model's answers change when one part of it is pruned: what the budgets of the branches are chosen by.

Source: docs/method.md, cooperative optimisation, steps 1 and 2.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from madtp.budgets.prunable import linear_of, prunable_linears
from madtp.budgets.records import Sensitivities, TokenPoint, WeightUnit, WidthPoint, WidthUnit
from madtp.config import CompressionConfig
from madtp.handles import handle_of
from madtp.hwp import InputStatistics, Pattern, prune_one_shot, rounding_sensitivity
from madtp.inference import evaluating, leading_size
from madtp.profiling.inputs import input_statistics
from madtp.profiling.macs import Profile, branch_of, counted_macs, profile_batches
from madtp.tasks.task import Task
from madtp.training.losses import JointLoss
from madtp.width import WidthPart, narrowed, uniform_width, width_parts

TEMPERATURES = 9  # between the bounds of the config, at which a branch is looked at first
MAX_GAP = 0.12  # between the shares of neighbouring points; a wider one is looked into
MAX_POINTS = 20  # of a branch, the one with all tokens not counted
WIDTHS = 4  # of a part that are looked at, beside all of it
INPUTS_AT_A_TIME = 16  # Linears whose Gram matrices are in memory


class Calibration:
    """A patched model on calibration batches: the distillation loss of whatever is done to it, dense answers given.

    The loss is that of the joint training without task and alignment: vision L_vis + text L_txt + kd T^2 KL.

    Args:
        model: patched, dense weights; it is at temperature 0 between measurements.
        batches: without shared images, where the model is.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        batches: Sequence[dict[str, Tensor]],
        config: CompressionConfig,
    ):
        self.model, self.handle, self.task, self.config = model, handle_of(model), task, config
        self.batches = batches
        self.sizes = [leading_size(batch) for batch in batches]
        weights = config.vision_weight, config.text_weight, config.kd_weight, config.kd_temperature
        self.loss = JointLoss(0.0, *weights)
        self.handle.set_temperature(0)
        with evaluating(model), self.handle.inference():
            self.taught = [self._answers(batch) for batch in batches]

    def distill_loss(self) -> float:
        """The distillation loss of the model as it is now, mean over the samples; 0 for the dense one."""
        total = 0.0
        with evaluating(self.model), self.handle.inference():
            for batch, size, (taught, mask, before) in zip(self.batches, self.sizes, self.taught, strict=True):
                logits, _, after = self._answers(batch)
                features = {branch: (after[branch], before[branch]) for branch in after}
                nothing = logits.new_zeros((), dtype=torch.float32)
                loss, _ = self.loss(nothing, summary_features=features, logits=(logits, taught), mask=mask)
                total += size * loss.item()
        return total / sum(self.sizes)

    def inputs(self, modules: Iterable[str]) -> dict[str, InputStatistics]:
        """What these Linears meet in the model as it is now, with Gram matrices."""
        return input_statistics(self.model, modules, self.batches, gram=True)

    @contextmanager
    def masked(self, modules: Iterable[str], inputs: Mapping[str, InputStatistics] | None = None) -> Iterator[None]:
        """A context in which these Linears are N:M; dense weights come back to the bit.

        The kept weights make up for those that go (`madtp.hwp.prune_one_shot`, correct): training would do the same,
        and what it cannot mend is what counts. A Linear that the batches do not reach keeps its largest weights.

        Args:
            inputs: of all of them; None collects them, some Linears at a time, the former ones N:M.
        """
        modules = list(modules)
        before = {name: linear_of(self.model, name).weight.detach().clone() for name in modules}
        try:
            for start in range(0, len(modules), INPUTS_AT_A_TIME):
                names = modules[start : start + INPUTS_AT_A_TIME]
                met = self.inputs(names) if inputs is None else inputs
                fed = [name for name in names if met[name].weight_sum > 0]
                prune_one_shot(self.model, self.config.pattern, fed, met, correct=True)
                prune_one_shot(self.model, self.config.pattern, [name for name in names if name not in fed])
            yield
        finally:
            with torch.no_grad():
                for name, weight in before.items():
                    linear_of(self.model, name).weight.copy_(weight)

    @contextmanager
    def narrowed(
        self, widths: Mapping[str, int], inputs: Mapping[str, InputStatistics] | None = None
    ) -> Iterator[None]:
        """A context in which these parts have so many heads or channels left; what was comes back to the bit.

        Args:
            inputs: of the Linears that read the parts; None collects them, some parts at a time, the former ones
                narrow.
        """
        with narrowed(self.model, widths, self.batches, statistics=inputs):
            yield

    @contextmanager
    def at(self, temperatures: Mapping[str, float]) -> Iterator[None]:
        """A context with these temperatures, 0 for branches that are not named."""
        try:
            self.handle.set_temperature(temperatures)
            yield
        finally:
            self.handle.set_temperature(0)

    def _answers(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None, dict[str, list[Tensor]]]:
        """What is compared: logits, the rows of them that count, and the summary tokens by branch."""
        logits, mask = self.task.logits(self.model(**batch), batch)
        return logits, mask, self.handle.summary_features


def find_sensitivities(
    calibration: Calibration, *, progress: Callable[[Sequence[str]], Iterable[str]] = iter
) -> Sensitivities:
    """Prunes one part after the other and looks what it does to the answers; with a weight_dtype, what that does to
    the outputs of each Linear too; with a width_reduction, what fewer heads and channels do.

    Args:
        progress: wraps the list of Linear modules and branches, for a bar.
    """
    model, handle, config = calibration.model, calibration.handle, calibration.config
    modules = prunable_linears(model, config).selected
    found = profile_batches(model, calibration.batches)
    tokens: dict[str, tuple[TokenPoint, ...]] = {}
    weights: dict[str, WeightUnit] = {}
    inputs: dict[str, InputStatistics] = {}
    n, m = Pattern.parse(config.pattern)
    parts = {f"{part.kind} of {part.name}": part for part in width_parts(model)} if config.width_reduction else {}
    widths: dict[str, WidthUnit] = {}
    met: dict[str, InputStatistics] = {}
    for name in progress([*handle.pruning, *modules, *parts]):
        if name in parts:
            part = parts[name]
            if part.name not in met:
                ahead = [other.name for other in parts.values()]
                first = ahead.index(part.name)
                met = calibration.inputs(ahead[first : first + INPUTS_AT_A_TIME])
            if met[part.name].weight_sum > 0 and (unit := _width_unit(calibration, part, met, found)) is not None:
                widths[part.name] = unit
            continue
        if name in handle.pruning:
            tokens[name] = _token_points(calibration, name, found.branches[name].dense_macs)
            continue
        weight = linear_of(model, name).weight
        macs = found.modules[name].dense_macs
        if name not in inputs:
            first = modules.index(name)
            inputs = calibration.inputs(modules[first : first + INPUTS_AT_A_TIME])
        with calibration.masked([name], inputs):
            distill_loss = max(calibration.distill_loss(), 0.0)
        error = None
        if config.weight_dtype is not None and inputs[name].weight_sum > 0:
            error = rounding_sensitivity(model, {name: inputs[name]}, dtype=config.weight_dtype)[name]
        zeroed = weight.numel() - weight.numel() * n // m
        saved = 0.5 * macs if Pattern(n, m).sparse24 else 0.0
        weights[name] = WeightUnit(branch_of((name,), handle.branches), zeroed, saved, distill_loss, error)
    return Sensitivities(found, tokens, weights, widths=widths)


def _width_unit(
    calibration: Calibration, part: WidthPart, inputs: Mapping[str, InputStatistics], found: Profile
) -> WidthUnit | None:
    """A part from all of its heads or channels to the fewest; None where it has too few to go."""
    model, points, macs = calibration.model, [WidthPoint(part.width, 0.0)], 0.0
    for i in range(1, WIDTHS + 1):
        least = uniform_width(part, 1 - (calibration.config.width_reduction or 0.0) * i / WIDTHS)
        if least >= points[-1].width:
            continue
        with calibration.narrowed({part.name: least}, inputs):
            points.append(WidthPoint(least, max(calibration.distill_loss(), 0.0)))
            if len(points) == 2:  # all cost the same
                left = sum(counted_macs(model, calibration.batches).values())
                macs = (found.total.counted_macs - left) / (part.width - least)
    if len(points) == 1:
        return None
    linears = (*part.before, part.name)
    params = sum(linear_of(model, name).weight.numel() for name in linears)
    params += sum(bias.numel() for name in part.before if (bias := linear_of(model, name).bias) is not None)
    branch = branch_of((part.name,), calibration.handle.branches)
    return WidthUnit(branch, part.width, macs, params // part.width, linears, tuple(points))


def _token_points(calibration: Calibration, branch: str, dense_macs: float) -> tuple[TokenPoint, ...]:
    """From all tokens to what the highest temperature leaves, closer together where the tokens go fast."""
    low, high = calibration.config.temperature_min, calibration.config.temperature_max

    def look(temperature: float) -> TokenPoint:
        with calibration.at({branch: temperature}):
            macs = counted_macs(calibration.model, calibration.batches)[branch]
            distill_loss = max(calibration.distill_loss(), 0.0)
        return TokenPoint(macs / dense_macs, temperature, distill_loss)

    exponents = [i / (TEMPERATURES - 1) for i in range(TEMPERATURES)]
    points = [look(low * (high / low) ** exponent) for exponent in exponents]
    while len(points) < MAX_POINTS:
        gaps = [left.share - right.share for left, right in itertools.pairwise(points)]
        widest = max(range(len(gaps)), key=gaps.__getitem__)
        if gaps[widest] <= MAX_GAP:
            break
        between = math.sqrt(points[widest].temperature * points[widest + 1].temperature)
        points.insert(widest + 1, look(between))
    kept = [TokenPoint(1.0, 0.0, 0.0)]
    for point in points:  # a share can only fall: MAG's own products cost a little where no token goes
        if point.share < kept[-1].share:
            kept.append(point)
    return tuple(kept)
