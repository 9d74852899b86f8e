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
from madtp.hwp.packed_linear import activated_linear, linear, residual_linear
from madtp_kernels import AttentionStats
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
    # After the pruning step of a post_norm block, where keys are given: (block, batch, keys, step, head_dim) -> (T, C)
    cross: Callable[[nn.Module, RaggedBatch, Any, PruningStep, int], Tensor] | None = None
    # The attentions in there: of each the Linears of query, key and value, and the one after it.
    cross_attentions: tuple[tuple[tuple[str, str, str], str], ...] = ()

    @property
    def attentions(self) -> tuple[tuple[tuple[str, ...], str], ...]:
        """All attentions of a block: the Linears before the heads, and the one after them."""
        return ((self.qkv, self.out), *self.cross_attentions)


def containers(spec: Encoder) -> set[str]:
    """Paths from a block of the modules around its parts, "" for itself: what a patched tower does in their place."""
    parts = (*spec.qkv, spec.out, spec.norm1, spec.norm2, *spec.mlp, spec.scale1, spec.scale2)
    names = [part.split(".") for part in parts if part is not None]
    return {".".join(name[:length]) for name in names for length in range(len(name))}


@dataclass(frozen=True)
class CrossAttention:
    """norm(x + out(attention from x to the keys)): paths from a block."""

    query: str
    key: str
    value: str
    out: str
    norm: str
    dropout: str | None = None

    @property
    def attention(self) -> tuple[tuple[str, str, str], str]:
        """As `Encoder.cross_attentions` has it."""
        return (self.query, self.key, self.value), self.out

    def __call__(
        self, layer: nn.Module, batch: RaggedBatch, keys: RepeatedSequences, step: PruningStep, head_dim: int
    ) -> Tensor:
        """-> (T, C)"""
        attended = attend(layer, (self.query, self.key, self.value), batch, keys, step, head_dim)
        return attrgetter(self.norm)(layer)(add(layer, self.out, None, self.dropout, attended, batch.x, batch))


def attend(
    layer: nn.Module,
    qkv: tuple[str, str, str],
    batch: RaggedBatch,
    keys: RepeatedSequences,
    step: PruningStep,
    head_dim: int,
) -> Tensor:
    """(T, H*D): attention from the tokens to the keys."""
    sources = batch.x, keys.x, keys.x
    q, k, v = (split_heads(linear(attrgetter(path)(layer), x), head_dim) for path, x in zip(qkv, sources, strict=True))
    return step.attention(q, k, v, batch, keys)[0]


def head_dim_of(config: Any) -> int:
    """The size of a head, which stays where heads are removed."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def encode(
    tower: Any,
    spec: Encoder,
    batch: RaggedBatch,
    branch: Branch,
    keys: Any = None,
    record: list[RaggedBatch] | None = None,
) -> RaggedBatch:
    """Runs the blocks of a tower; each from the branch's first layer on prunes its tokens, where the temperature is
    above 0.

    keys: what cross-attention reads, in towers that have it; without, it is left out.
    record: gets the tokens that enter the first block and those that leave each.
    """
    step, left = branch.begin(batch)
    features = [key.x for key in (keys if isinstance(keys, tuple) else () if keys is None else (keys,))]
    rows = batch.without_features()
    if record is not None:
        record.append(batch)
    for number, layer in enumerate(attrgetter(spec.blocks)(tower)):
        call = BlockCall(spec, step.at_layer(number), head_dim_of(tower.config), keys, rows)
        x, aligned, rows = layer(batch.x, *features, call)
        batch = replace(rows, x=x, aligned=aligned)
        left.end_block(batch)
        if record is not None:
            record.append(batch)
    return batch.with_x(connected(batch.x, branch.guide.parameters_of(branch.name)))


@dataclass(frozen=True)
class BlockCall:
    """What a block is called with beside the features of its tokens and of its keys."""

    spec: Encoder
    step: PruningStep
    head_dim: int  # blocks may differ in how many heads they have left (`madtp.width`), and all heads are of one size
    keys: Any  # as of `encode`
    rows: RaggedBatch  # what the tokens are, without their features

    def __call__(self, layer: nn.Module, x: Tensor, *features: Tensor) -> tuple[Tensor, Tensor | None, RaggedBatch]:
        """-> the features that are left, MAG's of the block if they are collected, and what the tokens are."""
        keys = self.with_keys(features)
        after = block(layer, self.spec, self.rows.with_x(x), keys, self.step, self.head_dim)
        return after.x, after.aligned, after.without_features()

    def with_keys(self, features: tuple[Tensor, ...]) -> Any:
        """`keys`, of these features."""
        if isinstance(self.keys, tuple):
            return tuple(replace(key, x=feature) for key, feature in zip(self.keys, features, strict=True))
        return None if self.keys is None else replace(self.keys, x=features[0])


class RaggedBlock(nn.Module):
    """Mixed into the class of a block while its tower is patched: `encode` calls it as the module it is, with whatever
    others have hooked onto it.

    All that has a gradient is a tensor among its arguments and results: hooks of the backward and reentrant
    checkpoints, that of Hugging Face or another, follow nothing else.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "forward" in vars(cls):  # Hugging Face has wrapped it in a checkpoint of its own
            del cls.forward

    def forward(self, x, *args, **kwargs):
        """x (T, C), features of the keys, a `BlockCall` -> as that says; anything else is for Hugging Face's block."""
        if not (args and isinstance(args[-1], BlockCall)):
            return super().forward(x, *args, **kwargs)
        run = partial(args[-1], self)
        if getattr(self, "gradient_checkpointing", False) and self.training:
            checkpoint: Any = self._gradient_checkpointing_func
            return checkpoint(run, x, *args[:-1])
        return run(x, *args[:-1])


def block(
    layer: nn.Module, spec: Encoder, batch: RaggedBatch, keys: Any, step: PruningStep, head_dim: int
) -> RaggedBatch:
    """One block on a ragged batch. A function of nothing that changes, so that it can run again for its gradient."""
    x, stats = attention_part(layer, spec, batch, step, head_dim)
    batch, normed = pruning_part(layer, spec, batch, x, stats, step)
    if spec.post_norm and keys is not None and spec.cross is not None:
        normed = spec.cross(layer, batch, keys, step, head_dim)
        batch = batch.with_x(normed)
    return batch.with_x(mlp_part(layer, spec, batch, normed))


def attention_part(
    layer: nn.Module, spec: Encoder, batch: RaggedBatch, step: PruningStep, head_dim: int
) -> tuple[Tensor, AttentionStats | None]:
    """The first part of a block: (T, C) before tokens are pruned, and before `norm1` where that follows it."""
    normed = batch.x if spec.post_norm else attrgetter(spec.norm1)(layer)(batch.x)
    q, k, v = _project(layer, spec, normed, head_dim, batch.num_rows)
    out, stats = step.attention(q, k, v, batch, causal=spec.causal, statistics=step.prunes)
    return add(layer, spec.out, spec.scale1, spec.dropout1, out, batch.x, batch), stats


def pruning_part(
    layer: nn.Module, spec: Encoder, batch: RaggedBatch, x: Tensor, stats: AttentionStats | None, step: PruningStep
) -> tuple[RaggedBatch, Tensor]:
    """Behind `attention_part` of the batch: the tokens that stay, and what the next part reads of them (T, C)."""
    if not spec.post_norm:
        return step.prune_norm(batch, x, stats, attrgetter(spec.norm2)(layer))
    batch = step.prune(batch, attrgetter(spec.norm1)(layer)(x), stats)
    return batch, batch.x


def mlp_part(layer: nn.Module, spec: Encoder, batch: RaggedBatch, normed: Tensor) -> Tensor:
    """The last part of a block, on the tokens that are left: (T, C); normed (T, C) is what the MLP reads of them."""
    part = lambda path: attrgetter(path)(layer)  # noqa: E731
    hidden = normed
    if len(spec.mlp) == 3:
        hidden = activated_linear(part(spec.mlp[0]), part(spec.mlp[1]), normed, batch.num_rows)
    x = add(layer, spec.mlp[-1], spec.scale2, spec.dropout2, hidden, batch.x, batch)
    return part(spec.norm2)(x) if spec.post_norm else x


def _project(layer: nn.Module, spec: Encoder, x: Tensor, head_dim: int, num_rows: Tensor | None) -> tuple[Tensor, ...]:
    """x (T, C) -> q, k, v, each (T, H, D)"""
    projected = [linear(attrgetter(path)(layer), x, num_rows) for path in spec.qkv]
    if len(projected) == 1:
        return projected[0].unflatten(-1, (3, -1, head_dim)).unbind(1)
    return tuple(split_heads(y, head_dim) for y in projected)


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
    y = linear(module, hidden)
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
    graph = torch.is_grad_enabled() and not torch.jit.is_tracing()  # which compares with a run without gradients
    wanted = [p for p in parameters if p.requires_grad] if graph else []
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
