# SPDX-License-Identifier: Apache-2.0
"""Weights that were pruned in one shot are fitted to what the dense model does, without labels or training.

Attention and MLP of every block are fitted one after the other, in the order of the forward, on what the compressed
model gives them: with the errors of the parts before, and with the tokens that are left there.

Source: reconstruction of attention and MLP in turn, arXiv 2510.14444; docs/method.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import Cache

from madtp.handles import handle_of
from madtp.hwp.modules import linears
from madtp.hwp.packed_linear import linear as run_linear
from madtp.inference import evaluating
from madtp.models.encoder import BlockCall, RaggedBlock, attention_part, mlp_part, pruning_part
from madtp_kernels import Pattern

RATE = 0.02  # of the mean magnitude of a weight, that one step moves it by at first


@dataclass(frozen=True)
class Reconstruction:
    """Of one part: sum of squared differences from the dense part, over the squares of what that adds to its input."""

    before: float
    after: float


def reconstruct_blocks(
    student: nn.Module,
    dense: nn.Module,
    modules: Collection[str],
    batches: Sequence[Mapping[str, Any]],
    *,
    steps: int,
) -> dict[str, Reconstruction]:
    """Fits the weights that are not zero, and the biases, of Linear modules in place.

    A part is the attention, the cross-attention or the MLP of a block of a patched tower, what else is in a list of
    blocks (a layer of a decoder) as a whole, or a Linear by itself. Its loss is the squared difference from the dense
    part on the same inputs.

    Args:
        student: the patched model, whose modules were pruned; its temperatures say which tokens there are.
        dense: the same before, patched too.
        modules: names of Linear modules. Zeros stay zeros.
        batches: what the model is called with.
        steps: of Adam, for each part; its rate falls to 0 along a cosine.

    Returns:
        By part, in the order of the forward. A part that did not get better is left as it was.

    Raises:
        ValueError: steps is no positive integer, there are no batches, or a module is no Linear.
    """
    if not (isinstance(steps, int) and steps > 0):
        raise ValueError(f"steps must be a positive integer, got {steps!r}")
    if not batches:
        raise ValueError("batches must hold at least one, got none")
    chosen = set(linears(student, modules, Pattern(1, 1)))
    found: dict[str, Reconstruction] = {}
    with evaluating(student), evaluating(dense), handle_of(student).inference():
        for name in _blocks(student, chosen, batches[0]):
            block, model = student.get_submodule(name), dense.get_submodule(name)
            inside = {path: module for path, module in block.named_modules() if f"{name}.{path}".rstrip(".") in chosen}
            parts = _ragged_parts if isinstance(block, RaggedBlock) else _whole
            for part, paths, run in parts(block, _calls(student, block, batches), set(inside)):
                fitted = [inside[path] for path in paths]
                if fitted:
                    found[".".join(filter(None, (name, part)))] = _fit(run, block, model, fitted, len(batches), steps)
    return found


def _blocks(student: nn.Module, chosen: Collection[str], batch: Mapping[str, Any]) -> list[str]:
    """Where the chosen modules are, each in one of them, in the order in which a forward gets there."""
    listed = {
        f"{path}.{child}".lstrip(".")
        for path, modules in student.named_modules()
        if isinstance(modules, nn.ModuleList)
        for child, _ in modules.named_children()
    }

    def block_of(name: str) -> str:
        steps = name.split(".")
        above = (".".join(steps[:length]) for length in range(1, len(steps)))
        return next((path for path in above if path in listed), name)

    order: dict[str, None] = {}
    with _hooked({block_of(name): student.get_submodule(block_of(name)) for name in chosen}, order.setdefault):
        with torch.no_grad():
            student(**batch)
    return list(order)


@contextmanager
def _hooked(modules: Mapping[str, nn.Module], seen: Callable[[str], Any]) -> Iterator[None]:
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: (seen(name), None)[1])
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Reached(Exception):
    pass


def _calls(student: nn.Module, block: nn.Module, batches: Sequence[Mapping[str, Any]]) -> list[tuple[tuple, dict]]:
    """The arguments with which a forward of every batch calls the block at first."""
    calls: list[tuple[tuple, dict]] = []

    def stop(module, args, kwargs):
        calls.append((args, kwargs))
        raise _Reached

    handle = block.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for batch in batches:
            with torch.no_grad():
                try:
                    student(**batch)
                except _Reached:
                    pass
    finally:
        handle.remove()
    return calls


Run = Callable[[nn.Module, int], Tensor]  # the student's block or the dense one, and the number of a batch


def _whole(block: nn.Module, calls: list, chosen: set[str]) -> Iterator[tuple[str, set[str], Run]]:
    def run(module: nn.Module, i: int) -> Tensor:
        # A cache would grow with every call.
        args, kwargs = tree_map(lambda value: None if isinstance(value, Cache) else value, calls[i])
        output = run_linear(module, *args) if isinstance(module, nn.Linear) else module(*args, **kwargs)
        return output if isinstance(output, Tensor) else output[0]

    yield "", chosen, run


def _ragged_parts(block: nn.Module, calls: list, chosen: set[str]) -> Iterator[tuple[str, set[str], Run]]:
    """Each is fitted before the next is asked for."""
    features = [args[:-1] for args, _ in calls]
    call: list[BlockCall] = [args[-1] for args, _ in calls]
    spec, heads = call[0].spec, call[0].heads
    entering = [c.rows.with_x(x[0]) for c, x in zip(call, features, strict=True)]
    attention, mlp = chosen & {*spec.qkv, spec.out}, {p for p in chosen if _within(p, spec.mlp)}
    yield "attention", attention, lambda layer, i: attention_part(layer, spec, entering[i], call[i].step, heads)[0]

    def left(i: int):
        with torch.no_grad():
            attended = attention_part(block, spec, entering[i], call[i].step, heads)
            return pruning_part(block, spec, entering[i], *attended, call[i].step)

    after = [left(i) for i in range(len(calls))]
    keys = [c.with_keys(x[1:]) for c, x in zip(call, features, strict=True)]
    cross = spec.cross if spec.post_norm and keys[0] is not None else None
    if cross is not None:
        yield "cross", chosen - attention - mlp, lambda layer, i: cross(layer, after[i][0], keys[i], call[i].step, heads)
        with torch.no_grad():
            rows = [cross(block, after[i][0], keys[i], call[i].step, heads) for i in range(len(calls))]
        after = [(batch.with_x(x), x) for (batch, _), x in zip(after, rows, strict=True)]
    yield "mlp", mlp, lambda layer, i: mlp_part(layer, spec, *after[i])


def _within(path: str, places: Collection[str]) -> bool:
    return any(path == place or path.startswith(f"{place}.") for place in places)


def _fit(
    run: Run, block: nn.Module, dense: nn.Module, modules: Sequence[nn.Linear], count: int, steps: int
) -> Reconstruction:
    with torch.no_grad():
        targets = [run(dense, i) for i in range(count)]
    masks = {module: module.weight != 0 for module in modules}
    parameters = [p for module in modules for p in (module.weight, module.bias) if p is not None]
    scale = sum(target.float().square().sum().item() for target in targets)
    before_fit = [p.detach().clone() for p in parameters]

    def error(i: int) -> Tensor:
        return (run(block, i) - targets[i]).float().square().sum()

    def total() -> float:
        with torch.no_grad():
            return sum(error(i).item() for i in range(count)) / max(scale, 1e-30)

    before = total()
    groups = [{"params": [p], "lr": RATE * max(p.detach().abs().mean().item(), 1e-4)} for p in parameters]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    grads = [p.requires_grad for p in parameters]
    for p in parameters:
        p.requires_grad_(True)
    for step in range(steps):
        with torch.enable_grad():
            loss = error(step % count) / scale
        for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.grad = gradient
        for module, mask in masks.items():
            module.weight.grad *= mask
        optimizer.step()
        schedule.step()
    for p, grad in zip(parameters, grads, strict=True):
        p.requires_grad_(grad)
        p.grad = None
    after = total()
    if not after < before:
        with torch.no_grad():
            for p, value in zip(parameters, before_fit, strict=True):
                p.copy_(value)
        after = before
    return Reconstruction(before, after)
