# SPDX-License-Identifier: Apache-2.0
"""Which LayerNorms of a model are read by Linears alone, as the descriptions of its towers say."""

from __future__ import annotations

from operator import attrgetter

from torch import nn

from madtp.hwp import NormReaders
from madtp.models.encoder import Encoder
from madtp.models.tower import Tower
from madtp.models.towers import tower_of


def norm_readers(model: nn.Module) -> list[NormReaders]:
    """In every block of the model's towers: norm1 with the Linears of query, key and value, norm2 with the MLP's first.

    What a norm returns in a post_norm block is the residual as well, so those have none; nor has an MLP that is one
    module, which does with its input what it likes. Others (embeddings, cross-attention, the last of a tower) are read
    elsewhere too.

    Args:
        model: patched or not; a tower or what holds some.
    """
    found = []
    for name, module in model.named_modules():
        tower = _tower(module)
        if tower is not None and not tower.encoder.post_norm:
            path = ".".join(filter(None, (name, tower.encoder.blocks)))
            for i in range(len(attrgetter(tower.encoder.blocks)(module))):
                found += _of_block(f"{path}.{i}", tower.encoder)
    return found


def _of_block(block: str, encoder: Encoder) -> list[NormReaders]:
    found = [NormReaders(f"{block}.{encoder.norm1}", tuple(f"{block}.{path}" for path in encoder.qkv))]
    if len(encoder.mlp) > 1:
        found.append(NormReaders(f"{block}.{encoder.norm2}", (f"{block}.{encoder.mlp[0]}",)))
    return found


def _tower(module: nn.Module) -> Tower | None:
    spec = getattr(module, "madtp_spec", None)  # of a patched tower, which may be one of the user's
    if isinstance(spec, Tower):
        return spec
    try:
        return tower_of(module)
    except ValueError:  # a decoder, which is no tower
        return None
