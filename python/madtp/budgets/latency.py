# SPDX-License-Identifier: Apache-2.0
"""What pruning saves in time on this device: the costs by which budgets are chosen for a latency target.

Source: docs/method.md, cooperative optimisation, step 3 with a latency_reduction.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from madtp.budgets.prunable import linear_of
from madtp.budgets.records import Sensitivities, Times, WidthUnit
from madtp.handles import handle_of
from madtp.hwp import QuantizedLinear, Sparse24Linear, linear, pack
from madtp.inference import evaluating, leading_size
from madtp.profiling.timing import medians
from madtp_kernels import quantize, sparse24_prune
from madtp_kernels.sparse24.weight import supports_shape

ROUNDS = 7  # of the whole model at every temperature


def time_parts(
    dense: nn.Module,
    patched: nn.Module,
    sensitivities: Sensitivities,
    batch: Mapping[str, Tensor],
    quantized: Collection[str] = (),
    dtype: str = "int8",
) -> Times:
    """Times the parts that `sensitivities` knows the harm of, as the layers that will run.

    Args:
        dense: the model as it was given.
        patched: a copy of it, patched, at temperature 0.
        batch: without shared images, where the models are.
        quantized: Linears that are rounded.
        dtype: to what.
    """
    rounding = dict.fromkeys(quantized, dtype)
    rows = _rows_met(patched, [*sensitivities.weights, *_linears(sensitivities.widths)], batch)
    saved = _saved_by_packing(patched, sensitivities.weights, rows, rounding)
    narrow = _saved_by_width(patched, sensitivities.widths, rows, rounding)
    if quantized:
        patched = copy.deepcopy(patched)
        pack(patched, quantized, dtype=dtype)
    handle, device, samples = handle_of(patched), next(iter(batch.values())).device, leading_size(batch)

    def at(branch: str, temperature: float) -> None:
        handle.set_temperature({branch: temperature})
        patched(**batch)
        handle.set_temperature({branch: 0.0})

    runs: dict[Hashable, Callable[[], object]] = {"dense": lambda: dense(**batch), "patched": lambda: patched(**batch)}
    for branch, points in sensitivities.tokens.items():
        for point in points[1:]:  # the first has all tokens
            runs[branch, point.temperature] = partial(at, branch, point.temperature)
    with evaluating(dense), evaluating(patched), handle.inference():
        found = {name: 1e3 * value / samples for name, value in medians(runs, device, rounds=ROUNDS).items()}
    tokens = {
        branch: (found["patched"], *(found[branch, point.temperature] for point in points[1:]))
        for branch, points in sensitivities.tokens.items()
    }
    by_weights, by_width = ({name: 1e3 * s / samples for name, s in part.items()} for part in (saved, narrow))
    return Times(found["dense"], found["patched"], tokens, by_weights, by_width)


def _linears(units: Mapping[str, WidthUnit]) -> Iterator[str]:
    for unit in units.values():
        yield from unit.linears


def _rows_met(model: nn.Module, names: Iterable[str], batch: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Of each Linear, how many rows it meets in each of its calls in a forward of the batch."""
    modules = {name: linear_of(model, name) for name in names}
    rows: dict[str, list[int]] = {name: [] for name in modules}
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: rows[name].append(inputs[0].shape[:-1].numel()))
        for name, module in modules.items()
    ]
    with evaluating(model), handle_of(model).inference():
        try:
            model(**batch)
        finally:
            for hook in hooks:
                hook.remove()
    return rows


def _saved_by_packing(
    model: nn.Module, names: Iterable[str], rows: Mapping[str, list[int]], quantized: Mapping[str, str]
) -> dict[str, float]:
    """Seconds a Linear takes less as a 2:4 layer, at the rows it meets; 0 where it does not.

    Of those that are rounded, the rounded layer is compared with the rounded 2:4 one. Layers of one shape and dtype at
    as many rows are timed once.
    """
    gains: dict[Hashable, float] = {}
    saved = dict.fromkeys(names, 0.0)
    for name in saved:
        module, rounding = linear_of(model, name), quantized.get(name)
        for count in rows[name]:
            kind = count, module.weight.shape, rounding
            if kind not in gains:
                fits = supports_shape(*module.weight.shape)  # others are not made 2:4
                gains[kind] = _gain(module, _layers(module, rounding), count) if fits else 0.0
            saved[name] += gains[kind]
    return saved


def _saved_by_width(
    model: nn.Module, units: Mapping[str, WidthUnit], rows: Mapping[str, list[int]], quantized: Mapping[str, str]
) -> dict[str, float]:
    """Seconds that each head or channel of a part takes in the Linears around it: of the fewest that were looked at
    against all, at the rows they meet."""
    gains: dict[Hashable, float] = {}
    saved = dict.fromkeys(units, 0.0)
    for part, unit in units.items():
        least = unit.points[-1].width
        for name in unit.linears:
            module, rounding = linear_of(model, name), quantized.get(name)
            axis = 1 if name == part else 0
            size = module.weight.shape[axis] // unit.full * least
            for count in rows[name]:
                kind = count, module.weight.shape, rounding, axis, size
                if kind not in gains:
                    narrow = module.weight.detach().narrow(axis, 0, size).contiguous()
                    bias = module.bias if axis or module.bias is None else nn.Parameter(module.bias.detach()[:size])
                    both = _dense(module.weight, module.bias, rounding), _dense(narrow, bias, rounding)
                    gains[kind] = _gain(module, both, count)
                saved[part] += gains[kind] / (unit.full - least)
    return saved


def _gain(module: nn.Linear, both: tuple[Any, Any], rows: int) -> float:
    """Seconds that the second layer takes less than the first at so many rows, each of as many inputs as it takes."""
    if not rows:
        return 0.0
    columns = [layer.in_features for layer in both]
    x = torch.randn(rows, max(columns), dtype=module.weight.dtype, device=module.weight.device)
    first, second = (x[:, :count].contiguous() for count in columns)
    with torch.no_grad():
        found = medians({"before": lambda: linear(both[0], first), "after": lambda: linear(both[1], second)}, x.device)
    return max(found["before"] - found["after"], 0.0)


def _layers(module: nn.Linear, rounding: str | None) -> tuple[nn.Module, nn.Module]:
    """What runs where the weight stays dense, and where it goes 2:4."""
    weight, bias = module.weight.detach(), module.bias
    sparse = sparse24_prune(weight)
    if rounding is None:
        return module, Sparse24Linear(sparse, bias)
    packed = QuantizedLinear(quantize(sparse, f"{rounding}_24"), bias, dense_dtype=weight.dtype)
    return _dense(weight, bias, rounding), packed


def _dense(weight: Tensor, bias: nn.Parameter | None, rounding: str | None) -> nn.Module:
    """A layer of all these weights."""
    if rounding is not None:
        return QuantizedLinear(quantize(weight.detach(), rounding), bias, dense_dtype=weight.dtype)
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    layer.register_parameter("bias", bias)
    return layer
