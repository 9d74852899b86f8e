# SPDX-License-Identifier: Apache-2.0
"""Encoders made of attention and MLP, described by where their parts are, and run on ragged batches.

Source of the pruning step in each block: MADTP (Cao et al., CVPR 2024, arXiv 2403.02991), section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from madtp.dtp.branch import Branch
from madtp.dtp.ragged import RaggedBatch, RepeatedSequences, split_heads
from madtp.dtp.step import PruningStep
from madtp.hwp.packing import linear, residual_linear
from madtp_kernels.ragged import sequence_ids


@dataclass(frozen=True)
class Encoder:
    """Where the parts of an encoder's blocks are: dotted attribute paths, from a block unless said otherwise.

    A block is x + attention(norm1(x)), then x + mlp(norm2(x)); with `post_norm` it is norm1(x + attention(x)), then
    norm2(x + mlp(x)). Tokens are pruned in between.
    """

    blocks: str  # the ModuleList of blocks, from the tower
    qkv: tuple[str, ...]  # the Linears of query, key and value, or the one that gives all three, in this order
    out: str  # the Linear after attention
    norm1: str
    norm2: str
    mlp: tuple[str, ...]  # Linear, activation, Linear; or the one module that is the MLP
    post_norm: bool = False
    scale1: str | None = None  # modules after `out` and after the MLP that multiply by a learned vector
    scale2: str | None = None
    dropout1: str | None = None  # dropout at the same places; nn.Dropout, or one that drops the path of a sample
    dropout2: str | None = None
    causal: bool = False
    # After the pruning step of a post_norm block, where keys are given: (block, batch, keys, step, heads) -> (T, C)
    cross: Callable[[nn.Module, RaggedBatch, Any, PruningStep, int], Tensor] | None = None


@dataclass(frozen=True)
class CrossAttention:
    """norm(x + out(attention from x to the keys)): paths from a block."""

    query: str
    key: str
    value: str
    out: str
    norm: str
    dropout: str | None = None

    def __call__(
        self, layer: nn.Module, batch: RaggedBatch, keys: RepeatedSequences, step: PruningStep, heads: int
    ) -> Tensor:
        """-> (T, C)"""
        attended = attend(layer, (self.query, self.key, self.value), batch, keys, step, heads)
        return attrgetter(self.norm)(layer)(add(layer, self.out, None, self.dropout, attended, batch.x, batch))


def attend(
    layer: nn.Module,
    qkv: tuple[str, str, str],
    batch: RaggedBatch,
    keys: RepeatedSequences,
    step: PruningStep,
    heads: int,
) -> Tensor:
    """(T, H*D): attention from the tokens to the keys."""
    sources = batch.x, keys.x, keys.x
    q, k, v = (split_heads(attrgetter(path)(layer)(x), heads) for path, x in zip(qkv, sources, strict=True))
    return step.attention(q, k, v, batch, keys)[0]


def encode(
    tower: Any,
    spec: Encoder,
    batch: RaggedBatch,
    branch: Branch,
    keys: Any = None,
    record: list[RaggedBatch] | None = None,
) -> RaggedBatch:
    """Runs the blocks of a tower; each prunes its tokens where the branch's temperature is above 0.

    keys: what cross-attention reads, in towers that have it; without, it is left out.
    record: gets the tokens that enter the first block and those that leave each.
    """
    step, left = branch.begin(batch)
    heads = tower.config.num_attention_heads
    if record is not None:
        record.append(batch)
    for layer in attrgetter(spec.blocks)(tower):
        batch = layer(batch, spec, step, heads, keys)
        left.end_block(batch)
        if record is not None:
            record.append(batch)
    return batch.with_x(connected(batch.x, branch.guide.parameters_of(branch.name)))


class RaggedBlock(nn.Module):
    """Mixed into the class of a block while its tower is patched: `encode` calls it as the module it is, with whatever
    others have hooked onto it."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "forward" in vars(cls):  # Hugging Face has wrapped it in a checkpoint of its own, which is none of batches
            del cls.forward

    def forward(self, batch, *args, **kwargs):
        """A ragged batch -> the tokens that are left; what is no ragged batch is for the block of Hugging Face."""
        if not isinstance(batch, RaggedBatch):
            return super().forward(batch, *args, **kwargs)
        spec, step, heads, keys = args
        return _checkpointed(self, partial(block, self, spec, step=step, heads=heads), batch, keys)


def block(layer: nn.Module, spec: Encoder, batch: RaggedBatch, keys: Any, step: PruningStep, heads: int) -> RaggedBatch:
    """One block on a ragged batch. A function of nothing that changes, so that it can run again for its gradient."""
    part = lambda path: attrgetter(path)(layer)  # noqa: E731
    normed = batch.x if spec.post_norm else part(spec.norm1)(batch.x)
    q, k, v = _project(layer, spec, normed, heads, batch.num_rows)
    out, stats = step.attention(q, k, v, batch, causal=spec.causal, statistics=step.prunes)
    x = add(layer, spec.out, spec.scale1, spec.dropout1, out, batch.x, batch)
    if spec.post_norm:
        batch = step.prune(batch, part(spec.norm1)(x), stats)
        if keys is not None and spec.cross is not None:
            batch = batch.with_x(spec.cross(layer, batch, keys, step, heads))
        normed = batch.x
    else:
        batch, normed = step.prune_norm(batch, x, stats, part(spec.norm2))
    hidden = normed
    for path in spec.mlp[:-1]:
        hidden = linear(part(path), hidden, batch.num_rows)
    x = add(layer, spec.mlp[-1], spec.scale2, spec.dropout2, hidden, batch.x, batch)
    return batch.with_x(part(spec.norm2)(x) if spec.post_norm else x)


def _project(layer: nn.Module, spec: Encoder, x: Tensor, heads: int, num_rows: Tensor | None) -> tuple[Tensor, ...]:
    """x (T, C) -> q, k, v, each (T, H, D)"""
    projected = [linear(attrgetter(path)(layer), x, num_rows) for path in spec.qkv]
    if len(projected) == 1:
        return projected[0].unflatten(-1, (3, heads, -1)).unbind(1)
    return tuple(split_heads(y, heads) for y in projected)


def add(
    layer: nn.Module,
    path: str,
    scale: str | None,
    dropout: str | None,
    hidden: Tensor,
    residual: Tensor,
    batch: RaggedBatch,
) -> Tensor:
    """residual + dropout(scale(module(hidden))), in one kernel where the module is packed 2:4."""
    module, after = attrgetter(path)(layer), []
    if scale is not None:
        after.append(attrgetter(scale)(layer))
    if dropout is not None and layer.training:
        after.append(attrgetter(dropout)(layer))
    after = [step for step in after if not isinstance(step, nn.Identity)]
    if not after:
        return residual_linear(module, hidden, residual, batch.num_rows)
    y = module(hidden)
    for step in after:
        y = _drop_paths(step, y, batch) if hasattr(step, "drop_prob") else step(y)
    return y + residual


def _drop_paths(path: Any, y: Tensor, batch: RaggedBatch) -> Tensor:
    """Stochastic depth: all the tokens of a sample, or none."""
    keep = 1 - path.drop_prob
    kept = torch.empty(batch.num_sequences, 1, device=y.device, dtype=y.dtype).bernoulli_(keep).div_(keep)
    return y * kept[sequence_ids(batch.cu_seqlens, y.shape[0])]


def connected(x: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """x, whose gradient reaches the parameters as well, as none at all: DistributedDataParallel waits for that of each,
    whether a forward has used it or not."""
    wanted = [p for p in parameters if p.requires_grad] if torch.is_grad_enabled() else []
    return _Connected.apply(x, *wanted) if wanted else x


class _Connected(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, *parameters: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.count = len(inputs) - 1

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (*gradients, *([None] * ctx.count))

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Tensor) -> Tensor:
        return tangent.view_as(tangent)


def _checkpointed(
    layer: Any, run: Callable[[RaggedBatch, Any], RaggedBatch], batch: RaggedBatch, keys: Any
) -> RaggedBatch:
    """run(batch, keys), whose activations are computed again in the backward pass where the model asks for it.

    All that has a gradient is an argument of what runs again: a reentrant checkpoint follows nothing else.
    """
    if not (getattr(layer, "gradient_checkpointing", False) and layer.training):
        return run(batch, keys)
    read = keys if isinstance(keys, tuple) else () if keys is None else (keys,)
    result: list[RaggedBatch] = []

    def tensors(x: Tensor, *features: Tensor) -> tuple[Tensor, ...]:
        given = tuple(replace(key, x=feature) for key, feature in zip(read, features, strict=True))
        after = run(batch.with_x(x), given if isinstance(keys, tuple) else next(iter(given), None))
        result.append(after)
        return (after.x,) if after.aligned is None else (after.x, after.aligned)

    x, *aligned = layer._gradient_checkpointing_func(tensors, batch.x, *(key.x for key in read))
    return replace(result[0], x=x, aligned=aligned[0] if aligned else None)
