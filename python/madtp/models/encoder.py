"""Encoders made of attention and MLP, described by where their parts are, and run on packed tokens.

Source of the pruning step in each block: MADTP (Cao et al., CVPR 2024, arXiv 2403.02991), section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from madtp.dtp.branch import Branch
from madtp.dtp.ragged import Packed, Repeated, split_heads
from madtp.hwp import linear, residual_linear
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
    # After the pruning step of a post_norm block, where keys are given: (block, tokens, keys, branch, heads) -> (T, C)
    cross: Callable[[nn.Module, Packed, Any, Branch, int], Tensor] | None = None


@dataclass(frozen=True)
class CrossAttention:
    """norm(x + out(attention from x to the keys)): paths from a block."""

    query: str
    key: str
    value: str
    out: str
    norm: str
    dropout: str | None = None

    def __call__(self, layer: nn.Module, packed: Packed, keys: Repeated, branch: Branch, heads: int) -> Tensor:
        """-> (T, C)"""
        attended = attend(layer, (self.query, self.key, self.value), packed, keys, branch, heads)
        return attrgetter(self.norm)(layer)(add(layer, self.out, None, self.dropout, attended, packed.x, packed))


def attend(
    layer: nn.Module, qkv: tuple[str, str, str], packed: Packed, keys: Repeated, branch: Branch, heads: int
) -> Tensor:
    """(T, H*D): attention from the tokens to the keys."""
    sources = packed.x, keys.x, keys.x
    q, k, v = (split_heads(attrgetter(path)(layer)(x), heads) for path, x in zip(qkv, sources, strict=True))
    return branch.attention(q, k, v, packed, keys)[0]


def encode(
    tower: nn.Module,
    spec: Encoder,
    packed: Packed,
    branch: Branch,
    keys: Any = None,
    record: list[Packed] | None = None,
) -> Packed:
    """Runs the blocks of a tower; each prunes its tokens where the branch's temperature is above 0.

    keys: what cross-attention reads, in towers that have it; without, it is left out.
    record: gets the tokens that enter the first block and those that leave each.
    """
    branch.begin(packed)
    heads = tower.config.num_attention_heads
    if record is not None:
        record.append(packed)
    for layer in attrgetter(spec.blocks)(tower):
        packed = _checkpointed(layer, lambda p, layer=layer: block(layer, spec, p, branch, heads, keys), packed)
        branch.end_block(packed)
        if record is not None:
            record.append(packed)
    return packed


def block(layer: nn.Module, spec: Encoder, packed: Packed, branch: Branch, heads: int, keys: Any) -> Packed:
    """One block on packed tokens. A pure function of `packed`, so that it can run again for its gradient."""
    part = lambda path: attrgetter(path)(layer)  # noqa: E731
    normed = packed.x if spec.post_norm else part(spec.norm1)(packed.x)
    q, k, v = _project(layer, spec, normed, heads, packed.total)
    out, stats = branch.attention(q, k, v, packed, causal=spec.causal, statistics=branch.prunes)
    x = add(layer, spec.out, spec.scale1, spec.dropout1, out, packed.x, packed)
    if spec.post_norm:
        packed = branch.prune(packed, part(spec.norm1)(x), stats)
        if keys is not None and spec.cross is not None:
            packed = packed.with_x(spec.cross(layer, packed, keys, branch, heads))
        normed = packed.x
    else:
        packed, normed = branch.prune_norm(packed, x, stats, part(spec.norm2))
    hidden = normed
    for path in spec.mlp[:-1]:
        hidden = linear(part(path), hidden, packed.total)
    x = add(layer, spec.mlp[-1], spec.scale2, spec.dropout2, hidden, packed.x, packed)
    return packed.with_x(part(spec.norm2)(x) if spec.post_norm else x)


def _project(layer: nn.Module, spec: Encoder, x: Tensor, heads: int, total: Tensor | None) -> tuple[Tensor, ...]:
    """x (T, C) -> q, k, v, each (T, H, D)"""
    projected = [linear(attrgetter(path)(layer), x, total) for path in spec.qkv]
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
    packed: Packed,
) -> Tensor:
    """residual + dropout(scale(module(hidden))), in one kernel where the module is packed 2:4."""
    module, after = attrgetter(path)(layer), []
    if scale is not None:
        after.append(attrgetter(scale)(layer))
    if dropout is not None and layer.training:
        after.append(attrgetter(dropout)(layer))
    after = [step for step in after if not isinstance(step, nn.Identity)]
    if not after:
        return residual_linear(module, hidden, residual, packed.total)
    y = module(hidden)
    for step in after:
        y = _drop_paths(step, y, packed) if hasattr(step, "drop_prob") else step(y)
    return y + residual


def _drop_paths(path: nn.Module, y: Tensor, packed: Packed) -> Tensor:
    """Stochastic depth: all the tokens of a sample, or none."""
    keep = 1 - path.drop_prob
    kept = torch.empty(packed.batch, 1, device=y.device, dtype=y.dtype).bernoulli_(keep).div_(keep)
    return y * kept[sequence_ids(packed.cu_seqlens, y.shape[0])]


def _checkpointed(layer: nn.Module, run: Callable[[Packed], Packed], packed: Packed) -> Packed:
    """run(packed), whose activations are computed again in the backward pass where the model asks for it."""
    if not (getattr(layer, "gradient_checkpointing", False) and layer.training):
        return run(packed)
    result: list[Packed] = []

    def tensors(x: Tensor) -> tuple[Tensor, ...]:
        after = run(packed.with_x(x))
        result.append(after)
        return (after.x,) if after.aligned is None else (after.x, after.aligned)

    x, *aligned = layer._gradient_checkpointing_func(tensors, packed.x)
    return replace(result[0], x=x, aligned=aligned[0] if aligned else None)
