# SPDX-License-Identifier: Apache-2.0
"""Where the parts of the Hugging Face encoders are: a row for each class that can be a branch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

from madtp.dtp.ragged import RaggedBatch, split_heads
from madtp.models.encoder import CrossAttention, Encoder
from madtp.models.tower import Tower
from madtp_kernels import varlen_attention

CLIP_ENCODER = Encoder(
    blocks="encoder.layers",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.out_proj",
    norm1="layer_norm1",
    norm2="layer_norm2",
    mlp=("mlp.fc1", "mlp.activation_fn", "mlp.fc2"),
)
BLIP_VISION_ENCODER = Encoder(
    blocks="encoder.layers",
    qkv=("self_attn.qkv",),
    out="self_attn.projection",
    norm1="layer_norm1",
    norm2="layer_norm2",
    mlp=("mlp.fc1", "mlp.activation_fn", "mlp.fc2"),
)
BERT_ENCODER = Encoder(
    blocks="encoder.layer",
    qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    out="attention.output.dense",
    norm1="attention.output.LayerNorm",
    norm2="output.LayerNorm",
    mlp=("intermediate.dense", "intermediate.intermediate_act_fn", "output.dense"),
    post_norm=True,
    dropout1="attention.output.dropout",
    dropout2="output.dropout",
)


def first(tower: Any, batch: RaggedBatch) -> Tensor:
    return batch.summary_features()


def pooler(tower: Any, batch: RaggedBatch) -> Tensor | None:
    """Of ViT and BERT: a Linear and an activation on the first token, where the model has them."""
    return None if tower.pooler is None else tower.pooler(batch.summary_features()[:, None])


def post_layernorm(tower: Any, batch: RaggedBatch) -> Tensor:
    return tower.post_layernorm(batch.summary_features())


def end_of_text(tower: Any, input_ids: Tensor, mask: Tensor | None) -> Tensor:
    """(B,): where CLIP pools. A vocabulary whose end-of-text id the configuration does not know has it last."""
    ends = input_ids if tower.eos_token_id == 2 else input_ids == tower.eos_token_id
    position = ends.int().argmax(dim=-1)
    # Elsewhere than on a CPU nothing is read on the host.
    if mask is not None and mask.device.type == "cpu" and not torch.compiler.is_compiling():
        if not mask.gather(1, position[:, None]).all():
            raise ValueError(
                "attention_mask must have a real end of text: CLIP pools there, got one where it is padding"
            )
    return position


def last_position(tower: Any, input_ids: Tensor, mask: Tensor | None) -> Tensor:
    """(B,): SigLIP pools the last position of the text, whatever is there."""
    if mask is not None and not mask[:, -1].all():
        raise ValueError("attention_mask must have real tokens last: SigLIP pools there, and pads without a mask")
    return input_ids.new_full((input_ids.shape[0],), input_ids.shape[1] - 1)


def head_of_last(tower: Any, batch: RaggedBatch) -> Tensor:
    return tower.head(batch.summary_features())


def no_summary(tower: Any, inputs: Tensor, mask: Tensor | None) -> Tensor:
    return torch.full((inputs.shape[0],), -1, device=inputs.device)


def attention_pooling(tower: Any, batch: RaggedBatch) -> Tensor | None:
    """SigLIP's head: a learned query attends to the tokens that are left, merged ones among them; then an MLP."""
    if not tower.use_head:
        return None
    head, attention = tower.head, tower.head.attention
    channels, head_dim = attention.embed_dim, attention.head_dim
    weight_q, weight_kv = attention.in_proj_weight.split((channels, 2 * channels))
    bias_q, bias_kv = attention.in_proj_bias.split((channels, 2 * channels))
    query = split_heads(F.linear(head.probe[0], weight_q, bias_q), head_dim).expand(batch.num_sequences, -1, -1)
    features = batch.for_op(batch.x)
    key, value = F.linear(features, weight_kv, bias_kv).unflatten(-1, (2, -1, head_dim)).unbind(1)
    out = varlen_attention(
        query,
        key,
        value,
        torch.arange(batch.num_sequences + 1, dtype=torch.int32, device=batch.x.device),
        batch.cu_seqlens,
        max_seqlen_q=1,
        max_seqlen_k=batch.max_seqlen,
    )
    pooled = attention.out_proj(out.flatten(1))  # (B, C)
    return pooled + head.mlp(head.layernorm(pooled))


def dinov2(tower: Any) -> Tower:
    """The MLP of its giant model is one module, SwiGLU."""
    encoder = Encoder(
        blocks="encoder.layer",
        qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        out="attention.o_proj",
        norm1="norm1",
        norm2="norm2",
        mlp=("mlp",) if tower.config.use_swiglu_ffn else ("mlp.fc1", "mlp.activation_fn", "mlp.fc2"),
        scale1="layer_scale1",
        scale2="layer_scale2",
        dropout1="drop_path",
        dropout2="drop_path",
    )
    return Tower(encoder, "pixel_values", first, final_norm="layernorm")


VIT_ENCODER = Encoder(
    blocks="layers",
    qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    out="attention.o_proj",
    norm1="layernorm_before",
    norm2="layernorm_after",
    mlp=("mlp.fc1", "mlp.activation_fn", "mlp.fc2"),
    dropout1="dropout",
    dropout2="dropout",
)
BLIP_CROSS = CrossAttention(
    query="crossattention.self.query",
    key="crossattention.self.key",
    value="crossattention.self.value",
    out="crossattention.output.dense",
    norm="crossattention.output.LayerNorm",
    dropout="crossattention.output.dropout",
)
BLIP_VISION = Tower(BLIP_VISION_ENCODER, "pixel_values", post_layernorm, final_norm="post_layernorm")
BERT = Tower(BERT_ENCODER, "input_ids", pooler)
BLIP_TEXT = replace(BERT, encoder=replace(BERT_ENCODER, cross=BLIP_CROSS, cross_attentions=(BLIP_CROSS.attention,)))


def bert(tower: Any) -> Tower:
    """An encoder. Raises ValueError for a decoder, whose tokens see none after them and whose keys a cache holds."""
    if tower.config.is_decoder:
        raise ValueError("config.is_decoder of a BertModel must be False: its encoder prunes, got True")
    return BERT


# A function where the description depends on the configuration of the tower.
TOWERS: dict[type[nn.Module], Tower | Callable[[Any], Tower]] = {
    hf.BlipVisionModel: BLIP_VISION,
    hf.Blip2VisionModel: BLIP_VISION,
    hf.CLIPVisionModel: Tower(CLIP_ENCODER, "pixel_values", post_layernorm, pre_norm="pre_layrnorm"),
    hf.SiglipVisionModel: Tower(
        CLIP_ENCODER,
        "pixel_values",
        attention_pooling,
        final_norm="post_layernorm",
        summary_position=no_summary,
        summary_tokens=0,
    ),
    hf.ViTModel: Tower(VIT_ENCODER, "pixel_values", pooler, final_norm="layernorm"),
    hf.Dinov2Model: dinov2,
    hf.BlipTextModel: BLIP_TEXT,
    hf.CLIPTextModel: Tower(
        replace(CLIP_ENCODER, causal=True),
        "input_ids",
        first,
        final_norm="final_layer_norm",
        summary_position=end_of_text,
        summary_tokens=1,
    ),
    hf.SiglipTextModel: Tower(
        CLIP_ENCODER,
        "input_ids",
        head_of_last,
        final_norm="final_layer_norm",
        summary_position=last_position,
        summary_tokens=1,
    ),
    hf.BertModel: bert,
}


def tower_of(module: nn.Module) -> Tower | None:
    """What is known of a Hugging Face encoder; None for any other module."""
    tower = next((tower for kind, tower in TOWERS.items() if isinstance(module, kind)), None)
    return tower if tower is None or isinstance(tower, Tower) else tower(module)
