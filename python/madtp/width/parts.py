# SPDX-License-Identifier: Apache-2.0
"""Which heads and hidden channels a model has, as the descriptions of its towers say."""

from __future__ import annotations

import math
from collections.abc import Iterator
from operator import attrgetter
from typing import Any, Literal, NamedTuple

from torch import nn

from madtp.handles import find_handle
from madtp.hwp.packed_linear import PackedLinear
from madtp.models.encoder import Encoder, head_dim_of
from madtp.models.registry import family_of
from madtp.models.tower import Tower
from madtp.models.towers import tower_of

FULL = "madtp_full_width"  # of the Linear after heads or channels that were removed: how many there were
MIN_TILE, STEPS = 16, 8  # channels that all kernels take; steps that there are of the fewest channels, too


class WidthPart(NamedTuple):
    """The heads of one attention, or the hidden channels of one MLP. Linears by name."""

    name: str  # the Linear that reads them; it names the part
    kind: Literal["heads", "channels"]
    before: tuple[str, ...]  # the Linears that make them: of query, key and value, all three in one, or the MLP's first
    size: int  # columns of each: those of a head, or 1
    width: int  # how many there are
    full: int  # how many there were before some were removed


def tile(part: WidthPart) -> int:
    """What a width is rounded to: heads go one by one where a head has 16 channels or more, else as many as have 16;
    channels go by 64, by 32 or 16 where there are few."""
    if part.kind == "heads":
        return MIN_TILE // math.gcd(MIN_TILE, part.size)
    return next((size for size in (64, 32) if size * STEPS <= part.full), MIN_TILE)


def width_parts(model: nn.Module) -> list[WidthPart]:
    """The parts of all towers of a model, in its order: self-attention, cross-attention and MLP of every block.

    An MLP that is one module (SwiGLU) has no part, nor has what no tower describes, such as a decoder.

    Args:
        model: patched or not; of a known class, or a tower, or what holds some.
    """
    found: list[WidthPart] = []
    for path, tower in _towers(model):
        spec, module = tower.encoder, model.get_submodule(path)
        size, prefix = head_dim_of(module.config), f"{path}.{spec.blocks}".lstrip(".")
        for i in range(len(attrgetter(spec.blocks)(module))):
            found += _of_block(model.get_submodule(f"{prefix}.{i}"), f"{prefix}.{i}", spec, size)
    return found


def widths_of(model: nn.Module) -> dict[str, int]:
    """By name of the part how many heads or channels are left, where some were removed."""
    return {part.name: part.width for part in width_parts(model) if part.width < part.full}


def _towers(model: nn.Module) -> Iterator[tuple[str, Tower]]:
    family = getattr(find_handle(model), "family", None) or family_of(model)
    if family is not None:
        yield from ((family.path(branch), family.tower(model, branch)) for branch in family.towers)
        return
    for path, module in model.named_modules():
        spec = getattr(module, "madtp_spec", None)  # of a patched tower, which may be one of the user's
        if not isinstance(spec, Tower):
            try:
                spec = tower_of(module)
            except ValueError:  # a decoder, which is no tower
                spec = None
        if spec is not None:
            yield path, spec


def _of_block(block: nn.Module, path: str, spec: Encoder, size: int) -> Iterator[WidthPart]:
    for before, after in spec.attentions:
        yield from _part(block, path, "heads", before, after, size)
    if len(spec.mlp) == 3:
        yield from _part(block, path, "channels", spec.mlp[:1], spec.mlp[2], 1)


def _part(
    block: nn.Module, path: str, kind: Literal["heads", "channels"], before: tuple[str, ...], after: str, size: int
) -> Iterator[WidthPart]:
    """The part, where its modules are Linears that fit each other; a block may be without cross-attention."""
    modules = dict(block.named_modules())
    linears: list[Any] = [modules.get(name) for name in (*before, after)]
    if not all(isinstance(module, nn.Linear | PackedLinear) for module in linears):
        return
    columns = linears[-1].in_features
    rows = 3 * columns if kind == "heads" and len(before) == 1 else columns
    if columns % size or any(module.out_features != rows for module in linears[:-1]):
        return
    width = columns // size
    full = getattr(linears[-1], FULL, width)
    yield WidthPart(f"{path}.{after}", kind, tuple(f"{path}.{name}" for name in before), size, width, full)
