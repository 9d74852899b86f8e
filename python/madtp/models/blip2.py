# SPDX-License-Identifier: Apache-2.0
"""BLIP-2 (Li et al., ICML 2023): its vision tower prunes; the Q-Former keeps its queries and reads what is left."""

from __future__ import annotations

from torch import Tensor, nn


class RaggedQFormer(nn.Module):
    """Mixed into the Q-Former: it reads the image tokens that are left, merged ones among them, under their mask.

    Hugging Face passes it the features of all positions and a mask of ones, from half a dozen places.
    """

    def forward(
        self,
        query_embeds: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **kwargs,
    ):
        images = getattr(encoder_hidden_states, "madtp_ragged", None)
        if images is not None:
            encoder_hidden_states, encoder_attention_mask = images.to_padded()
        return super().forward(
            query_embeds=query_embeds,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            **kwargs,
        )
