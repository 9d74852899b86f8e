# SPDX-License-Identifier: Apache-2.0
"""Attention of Hugging Face that takes the channels of a token for those of its heads, for modules with fewer heads."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.blip.modeling_blip import BlipAttention
from transformers.models.blip_2.modeling_blip_2 import Blip2Attention

FULL_WIDTH_ONLY: tuple[type[nn.Module], ...] = (BlipAttention, Blip2Attention)


class NarrowAttention(nn.Module):
    """Mixed into those classes where heads were removed. A patched tower calls their Linears itself."""

    config: Any
    qkv: nn.Module
    projection: nn.Module
    head_dim: int
    scale: float

    def forward(self, hidden_states: Tensor, **kwargs) -> tuple[Tensor, Tensor]:
        """hidden_states (B, N, C) -> (B, N, C), and the attention maps (B, H, N, N)."""
        q, k, v = self.qkv(hidden_states).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        maps = (q @ k.transpose(-1, -2) * self.scale).softmax(-1)
        maps = F.dropout(maps, self.config.attention_dropout, self.training)
        return self.projection((maps @ v).transpose(1, 2).flatten(2)), maps
