# SPDX-License-Identifier: Apache-2.0
"""BLIP for NLVR2 (Li et al., ICML 2022): is a statement about two images true? Hugging Face has no such model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BlipConfig, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel
from transformers.models.blip.modeling_blip import BlipPreTrainedModel
from transformers.models.blip.modeling_blip_text import BlipTextSelfAttention
from transformers.utils import ModelOutput, can_return_tuple

from madtp.dtp.ragged import RaggedBatch, RepeatedSequences
from madtp.dtp.step import PruningStep
from madtp.models.encoder import attend
from madtp.models.family import CompressedModel
from madtp.models.tower import tokens_left
from madtp.models.towers import BERT_ENCODER, BLIP_TEXT


@dataclass
class NLVROutput(ModelOutput):
    """loss: scalar, with labels. logits: (B, 2), of false and true.

    hidden_states and attentions, if asked for, are of the vision encoder: of the first images, then of the second ones.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class TwinOutput(nn.Module):
    """Two attended features, each through its Linear; their mean, or with `merge` one more Linear of both."""

    def __init__(self, config, merge: bool):
        super().__init__()
        width = config.hidden_size
        self.dense0, self.dense1 = nn.Linear(width, width), nn.Linear(width, width)
        self.merge_layer = nn.Linear(2 * width, width) if merge else None
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, first: Tensor, second: Tensor, residual: Tensor) -> Tensor:
        both = self.dense0(first), self.dense1(second)
        merged = sum(both) / 2 if self.merge_layer is None else self.merge_layer(torch.cat(both, dim=-1))
        return self.LayerNorm(self.dropout(merged) + residual)


class TwinCrossAttention(nn.Module):
    """In the place of a BlipTextAttention: a cross-attention for each of two images."""

    def __init__(self, config, merge: bool):
        super().__init__()
        self.self0, self.self1 = (BlipTextSelfAttention(config, is_cross_attention=True) for _ in range(2))
        self.output = TwinOutput(config, merge)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: tuple[Tensor, Tensor], **_) -> tuple[Tensor, None]:
        """encoder_hidden_states: the features of both images, each (B, N, C)."""
        attended = (
            module(hidden_states, encoder_hidden_states=image)[0]
            for module, image in zip((self.self0, self.self1), encoder_hidden_states, strict=True)
        )
        return self.output(*attended, hidden_states), None


class BlipForNLVR(BlipPreTrainedModel):
    """A BLIP vision encoder on two images, and a text encoder whose every layer reads both.

    In the last half of the text layers the two attended features are merged by a Linear, in the first half averaged.

    Args:
        config: a BlipConfig; `text_config.encoder_hidden_size` is the width of the vision encoder.
    """

    config_class = BlipConfig

    def __init__(self, config: BlipConfig):
        super().__init__(config)
        vision, text = cast(BlipVisionConfig, config.vision_config), cast(BlipTextConfig, config.text_config)
        self.vision_model = BlipVisionModel(vision)
        self.text_encoder = BlipTextModel(text, add_pooling_layer=False)
        for i, layer in enumerate(self.text_encoder.encoder.layer):
            layer.crossattention = TwinCrossAttention(text, merge=i >= text.num_hidden_layers // 2)
        self.classifier = nn.Sequential(
            nn.Linear(text.hidden_size, text.hidden_size), nn.ReLU(), nn.Linear(text.hidden_size, 2)
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_encoder.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs,
    ) -> NLVROutput:
        """pixel_values (B, 2, 3, H, W), input_ids and attention_mask (B, L), labels (B,) 0 or 1."""
        batch = input_ids.shape[0]
        if pixel_values.ndim != 5 or pixel_values.shape[:2] != (batch, 2):
            raise ValueError(f"pixel_values must be of shape ({batch}, 2, 3, H, W), got {tuple(pixel_values.shape)}")
        images = pixel_values.transpose(0, 1).flatten(0, 1)  # first images, then second ones
        kwargs["return_dict"] = True  # what the parts return
        vision = self.vision_model(images, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        both = self._halves(vision.last_hidden_state, batch)
        text = self.text_encoder(input_ids, attention_mask, encoder_hidden_states=both, **kwargs)
        logits = self.classifier(self._summary_features(text.last_hidden_state))
        return NLVROutput(
            loss=None if labels is None else F.cross_entropy(logits, labels),
            logits=logits,
            hidden_states=vision.hidden_states,
            attentions=vision.attentions,
        )

    def _halves(self, features: Tensor, batch: int) -> tuple[Any, ...]:
        """What the text reads of the first images and of the second ones."""
        return features.chunk(2)

    def _summary_features(self, features: Tensor) -> Tensor:
        """(B, C): the first token of each statement."""
        return features[:, 0]


class RaggedBlipForNLVR(CompressedModel, BlipForNLVR):
    """BlipForNLVR with pruned encoders."""

    def _halves(self, features: Tensor, batch: int) -> tuple[Any, ...]:
        return tuple(half.in_order() for half in tokens_left(features).split(batch))

    def _summary_features(self, features: Tensor) -> Tensor:
        return tokens_left(features).summary_features()


RaggedBlipForNLVR.__name__ = BlipForNLVR.__name__  # what a saved model says it is


def _attention_of(image: int) -> tuple[tuple[str, str, str], str]:
    path = f"crossattention.self{image}"
    return (f"{path}.query", f"{path}.key", f"{path}.value"), f"crossattention.output.dense{image}"


TWIN_ATTENTIONS = tuple(map(_attention_of, range(2)))


def _twin_cross_attention(
    layer: nn.Module,
    batch: RaggedBatch,
    keys: tuple[RepeatedSequences, RepeatedSequences],
    step: PruningStep,
    head_dim: int,
) -> Tensor:
    """(T, C)"""
    attended = []
    for (qkv, _), image in zip(TWIN_ATTENTIONS, keys, strict=True):
        attended.append(attend(layer, qkv, batch, image, step, head_dim))
    return attrgetter("crossattention.output")(layer)(*attended, batch.x)


TEXT = replace(BLIP_TEXT, encoder=replace(BERT_ENCODER, cross=_twin_cross_attention, cross_attentions=TWIN_ATTENTIONS))
