# SPDX-License-Identifier: Apache-2.0
"""What the forward of any supported model takes: around images and texts of the user, or drawn at random."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from madtp.handles import find_handle
from madtp.models.family import Family
from madtp.models.registry import family_of

MAX_TEXT = 64  # tokens of a random text, where a model takes more: captions and questions are no longer


def reads_text(model: PreTrainedModel) -> bool:
    """Whether its forward takes token ids."""
    return "input_ids" in inspect.signature(model.forward).parameters


def sees_images(model: PreTrainedModel) -> bool:
    """Whether its forward takes pixels."""
    return "pixel_values" in inspect.signature(model.forward).parameters


def forward_inputs(
    model: PreTrainedModel, pixel_values: Tensor | None = None, text: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Keyword arguments of a forward.

    Models with a decoder are asked to say the text they get, models that compare images get each image as often as
    they look at once, and models that stand images among the tokens of their text get room for them.

    Args:
        pixel_values: (B, 3, H, W).
        text: input_ids (B, L) and what else a tokenizer makes.
    """
    family = _family(model)
    inputs: dict[str, Tensor] = {}
    if pixel_values is not None:
        inputs["pixel_values"] = pixel_values
        if family.images_per_text > 1:
            inputs["pixel_values"] = pixel_values[:, None].repeat(1, family.images_per_text, 1, 1, 1)
    if text is not None:
        inputs |= {name: value for name, value in text.items() if name != "token_type_ids"}
        ids = inputs["input_ids"]
        config: Any = model.config  # of Hugging Face
        image_token = getattr(config, "image_token_index", None)
        if image_token is not None:
            shape = (len(ids), config.num_query_tokens)
            inputs["input_ids"] = ids = torch.cat((ids.new_full(shape, image_token), ids), dim=1)
            if "attention_mask" in inputs:
                mask = inputs["attention_mask"]
                inputs["attention_mask"] = torch.cat((mask.new_ones(shape), mask), dim=1)
        if "labels" in inspect.signature(model.forward).parameters and not hasattr(model, "classifier"):
            inputs["labels"] = ids
    return inputs


def random_inputs(model: PreTrainedModel, samples: int, *, seed: int = 0) -> dict[str, Tensor]:
    """Random pixels and tokens of the sizes of a model's own configuration; texts are of `MAX_TEXT` tokens at most.

    Returns:
        keyword arguments of a forward, of `samples` samples, where the model is.
    """
    generator, device = torch.Generator().manual_seed(seed), next(model.parameters()).device
    pixels = text = None
    if sees_images(model):
        vision = tower_config(model, "vision")
        shape = (samples, getattr(vision, "num_channels", 3), vision.image_size, vision.image_size)
        pixels = torch.randn(shape, generator=generator).to(device)
    if reads_text(model):
        vocabulary = _vocabulary(model)
        ids = torch.randint(vocabulary, (samples, _text_length(model)), generator=generator)
        end = getattr(_text_configs(model)[0], "eos_token_id", None)
        if isinstance(end, int) and end < vocabulary:
            ids[:, -1] = end  # where CLIP pools
        text = {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}
    return forward_inputs(model, pixels, text)


def tower_config(model: PreTrainedModel, branch: str) -> Any:
    """The configuration of the tower of a branch."""
    tower: Any = model.get_submodule(_family(model).path(branch))
    return tower.config


def _family(model: PreTrainedModel) -> Family:
    handle = find_handle(model)
    family = handle.family if handle is not None else family_of(model)
    if family is None:
        raise TypeError(f"model must be of a supported class, got {type(model).__name__}")
    return family


def _text_configs(model: PreTrainedModel) -> list[Any]:
    """Of all parts that embed the tokens of the text."""
    if "text" in _family(model).towers:
        return [tower_config(model, "text")]
    parts = (getattr(model.config, name, None) for name in ("text_config", "qformer_config"))
    return [part for part in parts if part is not None]


def _vocabulary(model: PreTrainedModel) -> int:
    image_token = getattr(model.config, "image_token_index", None)
    sizes = [part.vocab_size for part in _text_configs(model)]
    return min(sizes if image_token is None else [*sizes, image_token])  # it would stand for one more image


def _text_length(model: PreTrainedModel) -> int:
    lengths = (getattr(part, "max_position_embeddings", MAX_TEXT) for part in _text_configs(model))
    room = min(lengths) - (getattr(model.config, "num_query_tokens", None) or 0)
    return max(1, min(MAX_TEXT, room))
