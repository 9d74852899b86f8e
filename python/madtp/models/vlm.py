# SPDX-License-Identifier: Apache-2.0
"""Which decoders can lose image tokens of their prompt, and what is mixed into their class."""

from __future__ import annotations

import inspect
from typing import Any

import transformers as hf
from torch import nn

from madtp.models.florence2 import PrunedFlorence2
from madtp.models.prompt import MODALITIES, token_of
from madtp.models.pruned_prompt import PrunedPrompt

MIXINS = {hf.Florence2ForConditionalGeneration: PrunedFlorence2}  # by class, of those that need another than most
HIDDEN_STATES = ("fuyu", "llama4")  # model types that read other fields of an encoder's output than its pooler_output


def mixin_of(model: nn.Module) -> Any:
    """The mixin for a model that `unsupported_reason` has nothing against."""
    return next((mixin for kind, mixin in MIXINS.items() if isinstance(model, kind)), PrunedPrompt)


def unsupported_reason(model: nn.Module) -> str | None:
    """Why the prompt of a model cannot lose image tokens, or None."""
    if not isinstance(model, hf.PreTrainedModel) or not model.can_generate():
        return "it must be a Hugging Face class with a language head"
    takes = "mm_encoder_outputs" in inspect.signature(model.forward).parameters
    if not takes and not isinstance(model, tuple(MIXINS)):
        return "its forward must take mm_encoder_outputs"
    if not hasattr(model, "_prepare_multimodal_encoder_kwargs_for_generation"):
        return "its transformers must encode images before it generates"
    if all(token_of(model.config, modality) is None for modality in MODALITIES):
        return "its config must have an image_token_id or a video_token_id"
    if model.config.model_type in HIDDEN_STATES:
        return "its forward must read pooler_output, and reads hidden states of the tower"
    if not any(hasattr(model.base_model, f"get_{modality}_features") for modality in MODALITIES):
        return "its base model must have get_image_features or get_video_features"
    return None
