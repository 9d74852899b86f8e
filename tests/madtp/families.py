# SPDX-License-Identifier: Apache-2.0
"""A tiny model of every family, with random weights, and inputs for it: what the family tests run on."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import transformers as hf
from torch import Tensor, nn

import madtp
from madtp.models import BlipForNLVR

SHAPE = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 2}
IMAGE = SHAPE | {"image_size": 16, "patch_size": 4}
VOCABULARY = 40
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BERT = SHAPE | NO_DROPOUT | {"vocab_size": VOCABULARY, "max_position_embeddings": 16}
CLIP_TEXT = SHAPE | {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "eos_token_id": 39, "bos_token_id": 38}
SIGLIP_TEXT = SHAPE | {"vocab_size": VOCABULARY, "max_position_embeddings": 9, "projection_size": 32}
BLIP_TEXT = BERT | {"encoder_hidden_size": 32, "label_smoothing": 0.0, "bos_token_id": 2, "eos_token_id": 3}
BLIP_TEXT |= {"sep_token_id": 3, "pad_token_id": 0}
LENGTHS = (9, 6, 3, 9)
END_OF_TEXT = 39


class Case(NamedTuple):
    """A model, its inputs, and which of its outputs are those of a sample, in the order of the batch."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    outputs: tuple[str, ...]
    generates: bool = False


def randomised(model: nn.Module) -> nn.Module:
    """Biases and LayerNorms are drawn too; weights are large enough for attention to have preferences."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model.eval()


def blip_config() -> hf.BlipConfig:
    return hf.BlipConfig(text_config=BLIP_TEXT, vision_config=IMAGE, projection_dim=32, image_text_hidden_size=16)


def pixels(*leading: int, seed: int = 1) -> Tensor:
    return torch.randn(*leading, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def text(padded: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(4, 37, (4, 9), generator=generator)
    mask = (torch.arange(9) < torch.tensor(LENGTHS if padded else (9,) * 4)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def clip_text() -> dict[str, Tensor]:
    """End-of-text is the last real token, and pads, as CLIP's tokenizer does it."""
    inputs = text()
    ends = torch.arange(9) >= torch.tensor(LENGTHS)[:, None] - 1
    return inputs | {"input_ids": inputs["input_ids"].masked_fill(ends, END_OF_TEXT)}


def images_and(words: Callable[[], dict[str, Tensor]]) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"pixel_values": pixels(4)} | words()


def dual(vision: nn.Module, words: nn.Module) -> nn.Module:
    return hf.VisionTextDualEncoderModel(vision_model=vision, text_model=words)


def blip2(kind: type[nn.Module]) -> nn.Module:
    qformer = SHAPE | NO_DROPOUT | {"encoder_hidden_size": 32, "vocab_size": VOCABULARY, "cross_attention_frequency": 1}
    qformer |= {"use_qformer_text_input": kind is hf.Blip2ForImageTextRetrieval}
    language = {"hidden_size": 32, "ffn_dim": 64, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 40}
    language |= {"model_type": "opt", "word_embed_proj_dim": 32, "max_position_embeddings": 32, "dropout": 0.0}
    config = hf.Blip2Config(
        vision_config=IMAGE, qformer_config=qformer, text_config=language, num_query_tokens=4, image_token_index=39
    )
    return kind(config)


def blip2_inputs() -> dict[str, Tensor]:
    ids = torch.cat((torch.full((4, 4), 39), torch.arange(4, 9).expand(4, 5)), dim=1)
    return {"pixel_values": pixels(4), "input_ids": ids, "attention_mask": torch.ones_like(ids)}


IMAGES = lambda: {"pixel_values": pixels(4)}  # noqa: E731
UNPADDED = lambda: {"input_ids": text(False)["input_ids"]}  # noqa: E731
CLIP = {"text_config": CLIP_TEXT, "vision_config": IMAGE, "projection_dim": 16}
SIGLIP = {"text_config": SIGLIP_TEXT, "vision_config": IMAGE}
BOTH = ("image_embeds", "text_embeds")
TOWER = ("last_hidden_state", "pooler_output")

CASES = {
    "BlipForQuestionAnswering": Case(
        lambda: hf.BlipForQuestionAnswering(blip_config()),
        lambda: images_and(text)() | {"labels": torch.tensor([[2, 7, 3]]).repeat(4, 1)},
        ("logits",),
        generates=True,
    ),
    "BlipForConditionalGeneration": Case(
        lambda: hf.BlipForConditionalGeneration(blip_config()),
        lambda: {"pixel_values": pixels(4), "input_ids": text(False)["input_ids"], "labels": text(False)["input_ids"]},
        ("logits",),
        generates=True,
    ),
    "BlipForImageTextRetrieval": Case(
        lambda: hf.BlipForImageTextRetrieval(blip_config()), images_and(text), ("itm_score",)
    ),
    "BlipForNLVR": Case(
        lambda: BlipForNLVR(blip_config()),
        lambda: {"pixel_values": pixels(4, 2), "labels": torch.tensor([0, 1, 1, 0])} | text(),
        ("logits",),
    ),
    "CLIPModel": Case(lambda: hf.CLIPModel(hf.CLIPConfig(**CLIP)), images_and(clip_text), BOTH),
    "SiglipModel": Case(lambda: hf.SiglipModel(hf.SiglipConfig(**SIGLIP)), images_and(UNPADDED), BOTH),
    "VisionTextDualEncoderModel (ViT, BERT)": Case(
        lambda: dual(hf.ViTModel(hf.ViTConfig(**IMAGE)), hf.BertModel(hf.BertConfig(**BERT))), images_and(text), BOTH
    ),
    "VisionTextDualEncoderModel (DINOv2, BERT)": Case(
        lambda: dual(hf.Dinov2Model(hf.Dinov2Config(**IMAGE)), hf.BertModel(hf.BertConfig(**BERT))),
        images_and(text),
        BOTH,
    ),
    "Blip2ForConditionalGeneration": Case(
        lambda: blip2(hf.Blip2ForConditionalGeneration), blip2_inputs, ("logits",), generates=True
    ),
    "Blip2Model": Case(lambda: blip2(hf.Blip2Model), blip2_inputs, ("logits",)),
    "Blip2ForImageTextRetrieval": Case(lambda: blip2(hf.Blip2ForImageTextRetrieval), blip2_inputs, BOTH),
    "ViTForImageClassification": Case(
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**IMAGE, num_labels=3)), IMAGES, ("logits",)
    ),
    "Dinov2ForImageClassification": Case(
        lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**IMAGE, num_labels=3)), IMAGES, ("logits",)
    ),
    "BertForSequenceClassification": Case(
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**BERT, num_labels=3)), text, ("logits",)
    ),
    "BertForTokenClassification": Case(
        lambda: hf.BertForTokenClassification(hf.BertConfig(**BERT, num_labels=3)), text, ("logits",)
    ),
    "BertForMaskedLM": Case(lambda: hf.BertForMaskedLM(hf.BertConfig(**BERT)), text, ("logits",)),
    "CLIPVisionModel": Case(lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**IMAGE)), IMAGES, TOWER),
    "CLIPTextModel": Case(lambda: hf.CLIPTextModel(hf.CLIPTextConfig(**CLIP_TEXT)), clip_text, TOWER),
    "SiglipVisionModel": Case(lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**IMAGE)), IMAGES, TOWER),
    "SiglipTextModel": Case(lambda: hf.SiglipTextModel(hf.SiglipTextConfig(**SIGLIP_TEXT)), UNPADDED, TOWER),
    "ViTModel": Case(lambda: hf.ViTModel(hf.ViTConfig(**IMAGE)), IMAGES, TOWER),
    "Dinov2Model": Case(lambda: hf.Dinov2Model(hf.Dinov2Config(**IMAGE)), IMAGES, TOWER),
    "Dinov2Model (SwiGLU)": Case(lambda: hf.Dinov2Model(hf.Dinov2Config(**IMAGE, use_swiglu_ffn=True)), IMAGES, TOWER),
    "BlipVisionModel": Case(lambda: hf.BlipVisionModel(hf.BlipVisionConfig(**IMAGE)), IMAGES, TOWER),
    "BertModel": Case(lambda: hf.BertModel(hf.BertConfig(**BERT)), text, TOWER),
}
CONFIG = madtp.CompressionConfig(alignment_tokens=8, alignment_dim=24)


@functools.cache
def _built(family):
    torch.manual_seed(0)
    return randomised(CASES[family].build())


def build(family):
    return copy.deepcopy(_built(family))


def patched(family, temperature=2.0):
    model = build(family)
    torch.manual_seed(0)  # of the alignment tokens
    madtp.patch(model, CONFIG).set_temperature(temperature)
    return model


def outputs(family, model, inputs=None):
    case = CASES[family]
    with torch.no_grad():
        result = model(**(case.inputs() if inputs is None else inputs))
    return {name: result[name] for name in case.outputs}


def total(family, model, inputs=None):
    """A scalar that every output has a part in."""
    result = model(**(CASES[family].inputs() if inputs is None else inputs))
    return sum(result[name].float().sin().sum() for name in CASES[family].outputs)


def unpadded(family):
    """The samples without padding: with it, Hugging Face computes rows that mean nothing."""
    inputs = CASES[family].inputs()
    mask = inputs.get("attention_mask")
    return inputs if mask is None else {name: value[mask.all(dim=1)] for name, value in inputs.items()}
