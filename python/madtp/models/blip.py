"""BLIP (Li et al., ICML 2022) on packed tokens: vision encoder, text encoder with cross-attention, answer decoder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn
from transformers.utils import ModelOutput

from madtp.dtp import Branch
from madtp.hwp import residual_linear
from madtp.models.family import CompressedModel, Family
from madtp.packed import Packed, Repeated, split_heads


def encode_vision(model: nn.Module, pixel_values: Tensor, branch: Branch, interpolate_pos_encoding: bool) -> Packed:
    """A BlipVisionModel on (B, 3, H, W): every block prunes between its attention and its MLP."""
    branch.begin()
    hidden = model.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
    packed = Packed.from_padded(hidden)
    for layer in model.encoder.layers:
        attention = layer.self_attn
        qkv = attention.qkv(layer.layer_norm1(packed.x)).unflatten(-1, (3, attention.num_heads, -1))
        out, stats = branch.attention(*qkv.unbind(1), packed, statistics=branch.prunes)
        x = residual_linear(attention.projection, out, packed.x)
        packed, normed = branch.prune_norm(packed, x, stats, layer.layer_norm2)
        hidden = layer.mlp.activation_fn(layer.mlp.fc1(normed))
        packed = packed.with_x(residual_linear(layer.mlp.fc2, hidden, packed.x))
        branch.end_block(packed)
    return packed.with_x(model.post_layernorm(packed.x))


def encode_text(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, images: Repeated, branch: Branch
) -> Packed:
    """A BlipTextModel as encoder on (B, L) token ids: prunes between self-attention and cross-attention."""
    branch.begin()
    packed = Packed.from_padded(model.embeddings(input_ids), attention_mask)
    for layer in model.encoder.layer:
        attention = layer.attention.self
        q, k, v = (
            split_heads(project(packed.x), attention.num_attention_heads)
            for project in (attention.query, attention.key, attention.value)
        )
        out, stats = branch.attention(q, k, v, packed, statistics=branch.prunes)
        packed = branch.prune(packed, _add_norm(layer.attention.output, out, packed.x), stats)
        cross = layer.crossattention.self
        q, k, v = (
            split_heads(project(source), cross.num_attention_heads)
            for project, source in ((cross.query, packed.x), (cross.key, images.x), (cross.value, images.x))
        )
        out, _ = branch.attention(q, k, v, packed, images)
        x = _add_norm(layer.crossattention.output, out, packed.x)
        packed = packed.with_x(_add_norm(layer.output, layer.intermediate(x), x))
        branch.end_block(packed)
    return packed


def _add_norm(output: nn.Module, hidden: Tensor, residual: Tensor) -> Tensor:
    """A BlipTextOutput or BlipTextSelfOutput: LayerNorm(dropout(dense(hidden)) + residual)."""
    if output.training:
        return output(hidden, residual)
    return output.LayerNorm(residual_linear(output.dense, hidden, residual))


@contextmanager
def cross_attention_masks(decoder: nn.Module) -> Iterator[None]:
    """Lets a BlipTextLMHeadModel see its `encoder_attention_mask`, which Hugging Face drops on the way.

    There BlipTextAttention gets the mask of its cross-attention as `attention_mask`, but the module that attends reads
    `encoder_attention_mask`; so an answer would depend on how far its question was padded.
    """

    def hand_over(module, args, kwargs):
        return args, kwargs | {"encoder_attention_mask": kwargs.get("attention_mask")}

    hooks = [
        layer.crossattention.self.register_forward_pre_hook(hand_over, with_kwargs=True)
        for layer in decoder.bert.encoder.layer
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class QuestionAnsweringOutput(ModelOutput):
    """loss: scalar, with labels. logits: (Q, L, V) of the answer decoder."""

    loss: Tensor | None = None
    logits: Tensor | None = None


class BlipForQuestionAnswering(CompressedModel, transformers.BlipForQuestionAnswering):
    """The Hugging Face model with pruned encoders. The answer decoder is untouched.

    Keeps its class name, so a saved model says which Hugging Face class reads it.
    """

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

        Images are (I, 3, H, W); questions that share one share its encoding. Returns loss and logits.
        """
        if labels is None and decoder_input_ids is None:
            raise ValueError("labels or decoder_input_ids must be given; to answer without either, call generate")
        question, mask = self._encode(
            input_ids, pixel_values, attention_mask, interpolate_pos_encoding, image_index
        ).to_padded()
        with cross_attention_masks(self.text_decoder):
            answer = self.text_decoder(
                input_ids=labels if decoder_input_ids is None else decoder_input_ids,
                attention_mask=decoder_attention_mask,
                encoder_hidden_states=question,
                encoder_attention_mask=mask,
                labels=labels,
                reduction="mean",
            )
        loss = None if labels is None else answer.loss.mean()
        return QuestionAnsweringOutput(loss=loss, logits=answer.logits)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        image_index: Tensor | None = None,
        **generate_kwargs,
    ) -> Tensor:
        """Token ids of the answers, by the generation of the decoder, which sees no padding."""
        question, mask = self._encode(
            input_ids, pixel_values, attention_mask, interpolate_pos_encoding, image_index
        ).to_padded()
        text = self.config.text_config
        with cross_attention_masks(self.text_decoder):
            return self.text_decoder.generate(
                input_ids=torch.full((question.shape[0], 1), self.decoder_start_token_id, device=question.device),
                eos_token_id=text.sep_token_id,
                pad_token_id=text.pad_token_id,
                encoder_hidden_states=question,
                encoder_attention_mask=mask,
                **generate_kwargs,
            )

    def _encode(self, input_ids, pixel_values, attention_mask, interpolate_pos_encoding, image_index) -> Packed:
        questions, images = input_ids.shape[0], pixel_values.shape[0]
        if image_index is None and questions != images:
            raise ValueError(f"image_index must say which of {images} images each of {questions} questions is about")
        if image_index is not None and image_index.shape != (questions,):
            raise ValueError(f"image_index must be of shape ({questions},), got {tuple(image_index.shape)}")
        branches = self.madtp_handle.pruning
        vision = encode_vision(self.vision_model, pixel_values, branches["vision"], interpolate_pos_encoding)
        keys = vision.in_order() if image_index is None else vision.repeated(image_index)
        return encode_text(self.text_encoder, input_ids, attention_mask, keys, branches["text"])


BLIP_VQA = Family(
    source=transformers.BlipForQuestionAnswering,
    compressed=BlipForQuestionAnswering,
    branches={"vision": ("vision_model",), "text": ("text_encoder",), "decoder": ("text_decoder",)},
    pruned={"vision": "vision_config", "text": "text_config"},
    dense_modules=("text_decoder",),
    activations={
        "vision_model.encoder.layers.*.mlp.fc1": "activation_fn",
        "text_encoder.encoder.layer.*.intermediate.dense": "intermediate_act_fn",
    },
)
