# SPDX-License-Identifier: Apache-2.0
"""What is mixed into the layers of a vision tower, and into their attention, so that they run on ragged rows: nothing
of it knows a family.

A layer runs as Hugging Face wrote it, norms, rotary, gates and scales included. Only the attention it calls is another:
the ragged one, in which segments attend to themselves, and which says what each row receives.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from madtp.models.prefill_layers import Watched, eager_attention
from madtp.models.vision_rows import Rows, Segments
from madtp.models.vision_seam import VisionSeam
from madtp_kernels import AttentionStats, varlen_attention

NAME = "madtp_tower_flash"  # by a name with "flash" in it, towers call once for all segments
ATTENTION = ("self_attn", "attn", "attention")  # what a layer calls its attention


class AttentionCall:
    """What the attention of a layer runs on.

    Args:
        segments: what attends to itself.
        summary: whether each begins with a CLS.
        watched: whether `stats` are to be computed.
    """

    def __init__(self, segments: Segments, summary: bool, watched: bool):
        self.segments, self.watched = segments, watched
        self.summary: Tensor | None = None  # of each segment the first
        if watched and not summary:
            self.summary = torch.full_like(segments.ends[1:], -1)  # there is none
        self.stats: AttentionStats | None = None


class TowerLayer(nn.Module):
    """Mixed into a tower's layer: inside of gradient checkpointing, which runs it again as it was."""

    madtp_vision: VisionSeam
    madtp_names: frozenset[str]  # the arguments of the Hugging Face forward

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if (parts := vars(cls).get("madtp_parts")) is not None:
            cls.madtp_names = frozenset(inspect.signature(parts[0].forward).parameters)

    def forward(self, *args, madtp_call: AttentionCall | None = None, **kwargs):
        here = self.madtp_vision.here
        before, here.attending = here.attending, madtp_call
        try:
            return super().forward(*args, **kwargs)
        finally:
            here.attending = before


class TowerAttention(nn.Module):
    """Mixed into the attention of a tower's layers."""

    madtp_vision: VisionSeam

    @property
    def config(self) -> Any:
        config = vars(self)["config"]
        return config if self.madtp_vision.here.attending is None else Watched(config, NAME)

    @config.setter
    def config(self, config: Any) -> None:
        vars(self)["config"] = config


def attention_of(layer: nn.Module) -> Any:
    """The attention of a tower's layer; None where it is not one that calls the attention of transformers."""
    found = next((part for name in ATTENTION if (part := getattr(layer, name, None)) is not None), None)
    known = isinstance(found, nn.Module) and "config" in vars(found) and eager_attention(found) is not None
    return found if known else None


def run_layer(layer: Any, rows: Rows, call: AttentionCall) -> Tensor:
    """-> (T, C)"""
    names = layer.madtp_names
    given: dict[str, Any] = {"madtp_call": call}
    if "position_embeddings" in names:
        given["position_embeddings"] = rows.rotary
    if "cu_seqlens" in names:  # it takes rows
        return layer(rows.x, cu_seqlens=call.segments.ends, max_seqlen=call.segments.longest, **given)
    if "attention_mask" in names:
        given["attention_mask"] = None
    return layer(rows.x[None], **given)[0]


def tower_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """(1, H, T, D) each -> (1, T, H, D), of the segments of the call that runs."""
    call = module.madtp_vision.here.attending
    ends, longest = call.segments
    q, k, v = (part[0].transpose(0, 1).to(value.dtype) for part in (query, key, value))  # autocast leaves norms wide
    options = {"max_seqlen_q": min(longest, len(q)), "softmax_scale": kwargs.get("scaling")}
    if not call.watched:
        return varlen_attention(q, k, v, ends, **options)[None], None
    out, call.stats = varlen_attention(q, k, v, ends, **options, summary_index=call.summary, return_stats=True)
    return out[None], None


AttentionInterface.register(NAME, tower_attention)
