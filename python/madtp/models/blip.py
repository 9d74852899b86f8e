# SPDX-License-Identifier: Apache-2.0
"""BLIP (Li et al., ICML 2022) on ragged batches: its text encoder and decoders read the image tokens that are left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.blip.modeling_blip import (
    BlipForConditionalGenerationModelOutput,
    BlipImageTextMatchingModelOutput,
    BlipTextVisionModelOutput,
)
from transformers.utils import can_return_tuple

from madtp.dtp.ragged import RaggedBatch, RepeatedSequences
from madtp.models.arguments import described
from madtp.models.family import CompressedModel
from madtp.models.tower import tokens_left


def image_keys(
    images: RaggedBatch,
    texts: int,
    image_index: Tensor | None = None,
    names: tuple[str, str] = ("questions", "images"),
) -> RepeatedSequences:
    """What each of some texts reads of ragged images; image_index (Q,) says which of them."""
    if image_index is None and texts != images.num_sequences:
        what, which = names
        raise ValueError(
            f"image_index must say which of {images.num_sequences} {which} each of {texts} {what} is about"
        )
    if image_index is not None and image_index.shape != (texts,):
        raise ValueError(f"image_index must be of shape ({texts},), got {tuple(image_index.shape)}")
    return images.in_order() if image_index is None else images.repeated(image_index)


def token_ids(ids: Any, device: torch.device) -> Tensor:
    """(Q, L) token ids, which `generate` takes as lists too, as in Hugging Face."""
    if not isinstance(ids, list):
        return ids
    try:
        return torch.tensor(ids, dtype=torch.long, device=device)
    except (TypeError, ValueError):
        raise ValueError(f"input_ids must be token ids of shape (Q, L), got {described(ids)} of another form") from None


class MaskedCrossAttention(nn.Module):
    """Mixed into the cross-attentions of a BLIP decoder: they see the mask that Hugging Face drops on the way.

    There BlipTextAttention gets it as `attention_mask`, but the module that attends reads `encoder_attention_mask`; so
    an answer would depend on how far its question was padded.
    """

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs):
        return super().forward(hidden_states, encoder_attention_mask=attention_mask, **kwargs)


@dataclass
class QuestionAnsweringOutput(BlipTextVisionModelOutput):
    """As in Hugging Face, and logits (Q, L, V) of the answer decoder, which the tuple of `return_dict=False` lacks."""

    logits: Tensor | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(value for name, value in self.items() if name != "logits")


class BlipForQuestionAnswering(CompressedModel, transformers.BlipForQuestionAnswering):
    """The Hugging Face model with pruned encoders. The answer decoder is untouched.

    Keeps its class name, so a saved model says which Hugging Face class reads it.
    """

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        image_index: Tensor | None = None,
        **kwargs,
    ) -> QuestionAnsweringOutput:
        """As in Hugging Face, and `image_index` (Q,) int64: the image each question is about (None: its own).

        Images are (I, 3, H, W); questions that share one share its encoding.
        """
        if labels is None and decoder_input_ids is None:
            raise ValueError("labels or decoder_input_ids must be given; to answer without either, call generate")
        kwargs["return_dict"] = True  # what the parts return
        vision: Any = self.vision_model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        question, mask = self._read(input_ids, attention_mask, vision, image_index, **kwargs).to_padded()
        answer = self.text_decoder(
            input_ids=labels if decoder_input_ids is None else decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=question,
            encoder_attention_mask=mask,
            labels=labels,
            reduction="mean",
            **kwargs,
        )
        return QuestionAnsweringOutput(
            loss=None if labels is None else answer.loss.mean(),
            image_embeds=vision.last_hidden_state,
            last_hidden_state=vision.last_hidden_state,
            hidden_states=vision.hidden_states,
            attentions=vision.attentions,
            logits=answer.logits,
        )

    @torch.no_grad()
    def generate(  # type: ignore[override]  # Hugging Face's own is none of GenerationMixin's either
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        image_index: Tensor | None = None,
        **generate_kwargs,
    ) -> Tensor:
        """Token ids of the answers, by the generation of the decoder, which sees no padding."""
        question, mask = self.encode_questions(
            input_ids, pixel_values, attention_mask, interpolate_pos_encoding, image_index
        )
        text: Any = self.config.text_config
        decoder: Any = self.text_decoder  # transformers declares its `generate` for models of another protocol
        return decoder.generate(
            input_ids=torch.full((question.shape[0], 1), self.decoder_start_token_id, device=question.device),
            eos_token_id=text.sep_token_id,
            pad_token_id=text.pad_token_id,
            encoder_hidden_states=question,
            encoder_attention_mask=mask,
            **generate_kwargs,
        )

    def encode_questions(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        image_index: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What the answer decoder reads: the tokens of every question that are left, (Q, L, C), and their mask."""
        vision = self.vision_model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, return_dict=True)
        return self._read(input_ids, attention_mask, vision, image_index, return_dict=True).to_padded()

    def _read(self, input_ids, attention_mask, vision, image_index, **kwargs) -> RaggedBatch:
        """The tokens of questions that read their images."""
        texts = token_ids(input_ids, vision.last_hidden_state.device)
        keys = image_keys(tokens_left(vision.last_hidden_state), texts.shape[0], image_index)
        text = self.text_encoder(texts, attention_mask, encoder_hidden_states=keys, **kwargs)
        return tokens_left(text.last_hidden_state)


class BlipForConditionalGeneration(CompressedModel, transformers.BlipForConditionalGeneration):
    """The Hugging Face captioning model with a pruned vision encoder; its decoder reads the tokens that are left."""

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> BlipForConditionalGenerationModelOutput:
        """As in Hugging Face."""
        kwargs["return_dict"] = True  # what the parts return
        vision: Any = self.vision_model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        images, mask = tokens_left(vision.last_hidden_state).to_padded()
        outputs = self.text_decoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=images,
            encoder_attention_mask=mask,
            labels=labels,
            reduction="mean",
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        return BlipForConditionalGenerationModelOutput(
            loss=outputs.loss,
            logits=outputs.logits,
            image_embeds=vision.last_hidden_state,
            last_hidden_state=vision.last_hidden_state,
            hidden_states=vision.hidden_states,
            attentions=vision.attentions,
        )

    @torch.no_grad()
    def generate(  # type: ignore[override]  # Hugging Face's own is none of GenerationMixin's either
        self,
        pixel_values: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **generate_kwargs,
    ) -> Tensor:
        """Token ids of the captions, (B, L); `input_ids` (B, L) is a prompt whose last token is dropped, as there."""
        text: Any = self.config.text_config
        decoder: Any = self.text_decoder  # transformers declares its `generate` for models of another protocol
        vision = self.vision_model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, return_dict=True)
        images, mask = tokens_left(vision.last_hidden_state).to_padded()
        if input_ids is None:
            prompt = torch.full((images.shape[0], 1), text.bos_token_id, device=images.device)
        else:
            prompt = token_ids(input_ids, images.device)[:, :-1].clone()
            prompt[:, 0] = text.bos_token_id
        return decoder.generate(
            input_ids=prompt,
            eos_token_id=text.sep_token_id,
            pad_token_id=text.pad_token_id,
            attention_mask=None if attention_mask is None else attention_mask[:, :-1],
            encoder_hidden_states=images,
            encoder_attention_mask=mask,
            **generate_kwargs,
        )


class BlipForImageTextRetrieval(CompressedModel, transformers.BlipForImageTextRetrieval):
    """The Hugging Face model with pruned encoders: matching (text reads image) or contrastive (each by itself)."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        use_itm_head: bool | None = True,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        image_index: Tensor | None = None,
        **kwargs,
    ) -> BlipImageTextMatchingModelOutput:
        """As in Hugging Face: itm_score is (Q, 2) of the matching head, else (I, Q) similarities.

        `image_index` (Q,) int64: the image each text is matched with (None: its own).
        """
        kwargs["return_dict"] = True  # what the parts return
        vision: Any = self.vision_model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        images = tokens_left(vision.last_hidden_state)
        if use_itm_head:
            keys = image_keys(images, input_ids.shape[0], image_index, ("texts", "images"))
            text = self.text_encoder(input_ids, attention_mask, encoder_hidden_states=keys, **kwargs)
            score = self.itm_head(tokens_left(text.last_hidden_state).summary_features())
        else:
            text = self.text_encoder(input_ids, attention_mask, **kwargs)
            image_features = F.normalize(self.vision_proj(images.summary_features()), dim=-1)
            text_features = tokens_left(text.last_hidden_state).summary_features()
            score = image_features @ F.normalize(self.text_proj(text_features), dim=-1).T
        return BlipImageTextMatchingModelOutput(
            itm_score=score,
            last_hidden_state=vision.last_hidden_state,
            hidden_states=vision.hidden_states,
            attentions=vision.attentions,
            question_embeds=text.last_hidden_state,
        )
