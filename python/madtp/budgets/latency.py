# SPDX-License-Identifier: Apache-2.0
"""What pruning saves in time on this device: the costs by which budgets are chosen for a latency target.

Source: docs/method.md, cooperative optimisation, step 3 with a latency_reduction.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from madtp.budgets.prunable import linear_of
from madtp.budgets.records import Sensitivities, Times
from madtp.handles import handle_of
from madtp.hwp import Sparse24Linear, linear
from madtp.inference import evaluating, leading_size
from madtp.profiling.timing import medians
from madtp_kernels import sparse24_prune
from madtp_kernels.sparse24.weight import supports_shape

ROUNDS = 7  # of the whole model at every temperature


def time_parts(
    dense: nn.Module, patched: nn.Module, sensitivities: Sensitivities, batch: Mapping[str, Tensor]
) -> Times:
    """Times the parts that `sensitivities` knows the harm of.

    Args:
        dense: the model as it was given.
        patched: a copy of it, patched, at temperature 0.
        batch: without shared images, where the models are.
    """
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
        saved = _saved_by_packing(patched, sensitivities.weights, batch)
    tokens = {
        branch: (found["patched"], *(found[branch, point.temperature] for point in points[1:]))
        for branch, points in sensitivities.tokens.items()
    }
    return Times(found["dense"], found["patched"], tokens, {name: 1e3 * s / samples for name, s in saved.items()})


def _saved_by_packing(model: nn.Module, names: Iterable[str], batch: Mapping[str, Tensor]) -> dict[str, float]:
    """Seconds a Linear takes less as a 2:4 layer, at the rows it meets in a forward of the batch; 0 where it does not.

    Layers of one shape at as many rows are timed once.
    """
    modules = {name: linear_of(model, name) for name in names}
    rows: defaultdict[str, list[int]] = defaultdict(list)  # by module, of each of its calls
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: rows[name].append(inputs[0].shape[:-1].numel()))
        for name, module in modules.items()
    ]
    try:
        model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    kinds = {(count, modules[name].weight.shape): modules[name] for name, counts in rows.items() for count in counts}
    gains = {kind: _gain(module, kind[0]) for kind, module in kinds.items()}
    return {name: sum(gains[count, module.weight.shape] for count in rows[name]) for name, module in modules.items()}


def _gain(module: nn.Linear, rows: int) -> float:
    out_features, in_features = module.weight.shape
    if not rows or not supports_shape(out_features, in_features):  # which `pack` leaves dense
        return 0.0
    packed = Sparse24Linear(sparse24_prune(module.weight.detach()), module.bias)
    x = torch.randn(rows, in_features, dtype=module.weight.dtype, device=module.weight.device)
    found = medians({"dense": lambda: linear(module, x), "packed": lambda: packed(x)}, x.device)
    return max(found["dense"] - found["packed"], 0.0)
