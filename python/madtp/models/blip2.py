# SPDX-License-Identifier: Apache-2.0
"""BLIP-2 (Li et al., ICML 2023): its vision tower prunes; the Q-Former keeps its queries and reads what is left."""

from __future__ import annotations

from torch import nn
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from madtp.models.tower import tokens_left


class RaggedQFormer(nn.Module):
    """Mixed into the Q-Former: it reads the image tokens that are left, merged ones among them, under their mask.

    Hugging Face passes it the features of all positions and a mask of ones, from half a dozen places.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # By the name of a class, Hugging Face knows of which modules `output_hidden_states` is made.
        dict.__setitem__(_CAN_RECORD_REGISTRY, str(cls), getattr(cls, "_can_record_outputs", None))

    def forward(self, *args, **kwargs):
        if (features := kwargs.get("encoder_hidden_states")) is not None:
            kwargs["encoder_hidden_states"], kwargs["encoder_attention_mask"] = tokens_left(features).to_padded()
        return super().forward(*args, **kwargs)
