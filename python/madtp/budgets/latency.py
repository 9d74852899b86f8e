# SPDX-License-Identifier: Apache-2.0
"""What pruning saves in time on this device: the costs by which budgets are chosen for a latency target.

Source: docs/method.md, cooperative optimisation, step 3 with a latency_reduction.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from madtp.budgets.prunable import linear_of
from madtp.budgets.records import Sensitivities, Times
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
    saved = _saved_by_packing(patched, sensitivities.weights, batch, dict.fromkeys(quantized, dtype))
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
    return Times(found["dense"], found["patched"], tokens, {name: 1e3 * s / samples for name, s in saved.items()})


def _saved_by_packing(
    model: nn.Module, names: Iterable[str], batch: Mapping[str, Tensor], quantized: Mapping[str, str]
) -> dict[str, float]:
    """Seconds a Linear takes less as a 2:4 layer, at the rows it meets in a forward of the batch; 0 where it does not.

    Of those that are rounded, the rounded layer is compared with the rounded 2:4 one. Layers of one shape and dtype at
    as many rows are timed once.
    """
    modules = {name: linear_of(model, name) for name in names}
    rows: defaultdict[str, list[int]] = defaultdict(list)  # by module, of each of its calls
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
        gains: dict[Hashable, float] = {}
        saved = dict.fromkeys(modules, 0.0)
        for name, module in modules.items():
            for count in rows[name]:
                kind = count, module.weight.shape, quantized.get(name)
                if kind not in gains:
                    gains[kind] = _gain(module, count, quantized.get(name))
                saved[name] += gains[kind]
    return saved


def _gain(module: nn.Linear, rows: int, rounding: str | None) -> float:
    out_features, in_features = module.weight.shape
    if not rows or not supports_shape(out_features, in_features):  # which `pack` does not make 2:4
        return 0.0
    dense, sparse = _layers(module, rounding)
    x = torch.randn(rows, in_features, dtype=module.weight.dtype, device=module.weight.device)
    found = medians({"dense": lambda: linear(dense, x), "packed": lambda: sparse(x)}, x.device)
    return max(found["dense"] - found["packed"], 0.0)


def _layers(module: nn.Linear, rounding: str | None) -> tuple[nn.Module, nn.Module]:
    """What runs where the weight stays dense, and where it goes 2:4."""
    weight, bias = module.weight.detach(), module.bias
    sparse = sparse24_prune(weight)
    if rounding is None:
        return module, Sparse24Linear(sparse, bias)
    dtype = weight.dtype
    dense = QuantizedLinear(quantize(weight, rounding), bias, dense_dtype=dtype)
    return dense, QuantizedLinear(quantize(sparse, f"{rounding}_24"), bias, dense_dtype=dtype)
