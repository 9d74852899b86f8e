# SPDX-License-Identifier: Apache-2.0
"""Weights that were pruned in one shot are fitted to what the dense model does, without labels or training.

Attention and MLP of every block are fitted one after the other, in the order of the forward, on what the compressed
model gives them: with the errors of the parts before, and with the tokens that are left there.

Source: reconstruction of attention and MLP in turn, arXiv 2510.14444; docs/method.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import Cache

from madtp.handles import handle_of
from madtp.hwp.modules import linears, write_parameters
from madtp.inference import evaluating
from madtp.models.encoder import BlockCall, RaggedBlock, attention_part, mlp_part, pruning_part
from madtp_kernels import Pattern
from madtp_kernels.checks import require

RATE = 0.05  # of the mean magnitude of a weight, by which a step moves it at first
LEAST = 1e-4  # of that magnitude: biases may be zeros


@dataclass(frozen=True)
class Reconstruction:
    """Of one part: the sum of squared differences from the dense part's outputs, over that of their squares."""

    before: float
    after: float


def reconstruct_blocks(
    student: nn.Module,
    dense: nn.Module,
    modules: Collection[str],
    batches: Iterable[Mapping[str, Any]],
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
    require(type(steps) is int and steps > 0, "steps", "a positive integer", steps)
    batches = list(batches)
    require(len(batches) > 0, "batches", "at least one", "none")
    chosen = set(linears(student, modules, Pattern(1, 1)))
    found: dict[str, Reconstruction] = {}
    with ExitStack() as contexts:
        contexts.enter_context(torch.inference_mode(False))
        contexts.enter_context(torch.autocast(next(student.parameters()).device.type, enabled=False))
        contexts.enter_context(handle_of(student).inference())
        for model in (student, dense):
            contexts.enter_context(evaluating(model))
        for name in _blocks(student, chosen, batches[0]):
            block, reference = student.get_submodule(name), dense.get_submodule(name)
            inside: dict[str, Any] = {p: m for p, m in block.named_modules() if _joined(name, p) in chosen}
            parts = _ragged_parts if isinstance(block, RaggedBlock) else _whole
            for part in parts(block, _calls(student, block, batches), set(inside)):
                fitted = [inside[path] for path in inside if path in part.linears]
                if fitted:
                    found[_joined(name, part.name)] = _fit(part.run, block, reference, fitted, len(batches), steps)
    return found


def _joined(*names: str) -> str:
    return ".".join(name for name in names if name)


Run = Callable[[nn.Module, int], Tensor]  # the student's block or the dense one, and the number of a batch
Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a module is called with


class _Part(NamedTuple):
    name: str  # in its block
    linears: set[str]  # paths from the block
    run: Run


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
    with ExitStack() as hooks:
        for path in {block_of(name) for name in chosen}:
            seen = partial(lambda path, *_: order.setdefault(path), path)
            hooks.callback(student.get_submodule(path).register_forward_pre_hook(seen).remove)
        with torch.no_grad():
            student(**batch)
    return list(order)


class _Reached(Exception):
    """The block is called: what comes after it need not run."""


def _calls(student: nn.Module, block: nn.Module, batches: Sequence[Mapping[str, Any]]) -> list[Call]:
    """What a forward of every batch calls the block with, the first time."""
    calls: list[Call] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))
        raise _Reached

    hook = block.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for batch in batches:
            with torch.no_grad(), suppress(_Reached):
                student(**batch)
    finally:
        hook.remove()
    return calls


def _whole(block: nn.Module, calls: list[Call], chosen: set[str]) -> Iterator[_Part]:
    def run(module: nn.Module, i: int) -> Tensor:
        # A cache would grow with every call.
        args, kwargs = tree_map(lambda value: None if isinstance(value, Cache) else value, calls[i])
        output = module(*args, **kwargs)
        return output if isinstance(output, Tensor) else output[0]

    yield _Part("", chosen, run)


def _ragged_parts(block: nn.Module, calls: list[Call], chosen: set[str]) -> Iterator[_Part]:
    """Each is fitted before the next is asked for, which is about the tokens that are left then."""
    features: list[tuple[Tensor, ...]] = [args[:-1] for args, _ in calls]
    call: list[BlockCall] = [args[-1] for args, _ in calls]
    spec, head_dim, count = call[0].spec, call[0].head_dim, range(len(calls))
    entering = [c.rows.with_x(x) for c, (x, *_) in zip(call, features, strict=True)]

    def attend(layer: nn.Module, i: int) -> tuple[Tensor, Any]:
        return attention_part(layer, spec, entering[i], call[i].step, head_dim)

    attention = chosen & {*spec.qkv, spec.out}
    yield _Part("attention", attention, lambda layer, i: attend(layer, i)[0])
    with torch.no_grad():
        after = [pruning_part(block, spec, entering[i], *attend(block, i), call[i].step) for i in count]

    mlp = {path for path in chosen if any(path == part or path.startswith(f"{part}.") for part in spec.mlp)}
    keys = [c.with_keys(x[1:]) for c, x in zip(call, features, strict=True)]
    if (cross := spec.cross) is not None and spec.post_norm and keys[0] is not None:

        def read(layer: nn.Module, i: int) -> Tensor:
            return cross(layer, after[i][0], keys[i], call[i].step, head_dim)

        yield _Part("cross_attention", chosen - attention - mlp, read)
        with torch.no_grad():
            read_rows = [read(block, i) for i in count]
        after = [(batch.with_x(x), x) for (batch, _), x in zip(after, read_rows, strict=True)]
    yield _Part("mlp", mlp, lambda layer, i: mlp_part(layer, spec, *after[i]))


def _fit(
    run: Run, block: nn.Module, dense: nn.Module, modules: Sequence[nn.Linear], count: int, steps: int
) -> Reconstruction:
    """Fits what is not zero in the weights, and the biases, of modules of the block."""
    with torch.no_grad():
        targets = [run(dense, i) for i in range(count)]
    squares = sum(target.double().square().sum().item() for target in targets) or 1.0
    mean = squares / max(sum(target.numel() for target in targets), 1)

    def error(i: int) -> Tensor:
        return (run(block, i) - targets[i]).float().square().sum()

    def total() -> float:
        with torch.no_grad():
            return sum(error(i).item() for i in range(count)) / squares

    if (before := total()) == 0:
        return Reconstruction(0.0, 0.0)
    found = {p: p != 0 if p.ndim == 2 else None for m in modules for p in (m.weight, m.bias) if p is not None}
    parameters, masks = list(found), list(found.values())
    start = [p.detach().clone() for p in parameters]
    wide = [p.detach().to(torch.float32, copy=True) for p in parameters]  # steps are too small for 16 bits
    groups = [{"params": [p], "lr": RATE * max(p.abs().mean().item(), LEAST)} for p in wide]
    # Gradients have the scale of the outputs, whatever that is.
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-15)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    with _trained(parameters):
        for step in range(steps):
            gradients = torch.autograd.grad(error(step % count) / mean, parameters)
            if all(gradient.isfinite().all() for gradient in gradients):  # float16 may overflow
                for p, gradient, mask in zip(wide, gradients, masks, strict=True):
                    p.grad = gradient.float() if mask is None else gradient.float() * mask
                optimizer.step()
            schedule.step()
            with torch.no_grad():
                for p, value in zip(parameters, wide, strict=True):
                    p.copy_(value)
    after = total()
    if after < before:
        return Reconstruction(before, after)
    write_parameters(dict(zip(parameters, start, strict=True)))
    return Reconstruction(before, before)


@contextmanager
def _trained(parameters: Sequence[Tensor]) -> Iterator[None]:
    """A context in which gradients of these can be asked for, whether they are trained or not."""
    before = [p.requires_grad for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for p, required in zip(parameters, before, strict=True):
            p.requires_grad_(required)
