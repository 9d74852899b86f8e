# SPDX-License-Identifier: Apache-2.0
"""Which decoders can lose image tokens of their prompt, and what is mixed into their class."""

from __future__ import annotations

import inspect
from operator import attrgetter
from typing import Any

import transformers as hf
from torch import nn

from madtp.models.florence2 import PrunedFlorence2
from madtp.models.prefill_layers import eager_attention
from madtp.models.prompt import MODALITIES, token_of
from madtp.models.pruned_prompt import PrunedPrompt
from madtp.models.pruned_vision import depth_of, parts_of
from madtp.models.vision_connectors import CONNECTORS, UNSOUND, UNSOUND_TOWERS, summary_reason
from madtp.models.vision_layers import attention_of
from madtp.models.vision_towers import TOWERS

MIXINS = {hf.Florence2ForConditionalGeneration: PrunedFlorence2}  # by class, of those that need another than most
HIDDEN_STATES = ("fuyu", "llama4")  # model types that read other fields of an encoder's output than its pooler_output

DECODERS = ("language_model", "text_model")  # what a base model calls its decoder
LAYER_TYPES = ("full_attention", "sliding_attention")
LAYER_ARGUMENTS = {  # of a decoder's layer, whose parts for columns are known
    *("hidden_states", "attention_mask", "position_ids", "position_embeddings", "past_key_values", "use_cache"),
    *("output_attentions", "cache_position", "kwargs"),
}


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


def decoder_of(model: nn.Module) -> Any:
    """The module whose `layers` read the prompt; None where it is not known."""
    base: Any = model.base_model
    found = next((part for name in DECODERS if (part := getattr(base, name, None)) is not None), None)
    found = getattr(found, "base_model", found)
    return found if isinstance(getattr(found, "layers", None), nn.ModuleList) else None


def prefill_unsupported_reason(model: nn.Module) -> str | None:
    """Why the layers of a model that has a projector seam cannot prune what they read, or None."""
    if model.config.is_encoder_decoder:  # type: ignore[union-attr]
        return "its decoder must read the prompt, and it has an encoder for that"
    if (decoder := decoder_of(model)) is None or not len(decoder.layers):
        return "its layers must be those of language_model or text_model"
    kinds = set(getattr(decoder.config, "layer_types", None) or ()) - set(LAYER_TYPES)
    if kinds:
        return f"its layers must have full or sliding attention, and some have {', '.join(sorted(kinds))}"
    for layer in decoder.layers:
        attention = getattr(layer, "self_attn", None)
        named = hasattr(attention, "layer_idx") and hasattr(attention, "config")
        if attention is None or not named or eager_attention(attention) is None:
            return "its layers must have a self_attn that calls the attention of transformers"
        takes = inspect.signature(layer.forward).parameters.keys()
        if "position_embeddings" not in takes or takes - LAYER_ARGUMENTS:
            return "its layers must take rotary tables and masks, and nothing else of a value for each token"
    return None


def first_prefill_layer(model: nn.Module) -> int:
    """How many layers must have run before tokens can go: one, and those that image features are added to."""
    deep = getattr(getattr(model.config, "vision_config", None), "deepstack_visual_indexes", None)
    return max(1, len(deep or ()))


def usual_prefill_layer(model: nn.Module) -> int:
    """Behind which layer a decoder prunes where nobody says: 2, as in FastV, or the first one after it whose attention
    sees all; where there is none, the nearest to 2; 0 where none may."""
    decoder = decoder_of(model)
    layers = len(getattr(decoder, "layers", (None,)))
    nearest = min(max(2, first_prefill_layer(model)), layers - 1)
    if getattr(getattr(decoder, "config", None), "layer_types", None) is None:
        return nearest
    seeing = (layer for layer in range(max(nearest, 1), layers) if window_of(decoder.config, layer - 1) is None)
    return next(seeing, nearest)


def window_of(config: Any, layer: int) -> int | None:
    """How many columns a decoder's layer sees back, by its config; None for all."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    return window if kinds is None or kinds[layer] == "sliding_attention" else None


def tower_layers(model: nn.Module) -> list[Any]:
    """The layers of the vision tower that run, of a model that `vision_unsupported_reason` has nothing against."""
    _, tower, spec = parts_of(model.base_model)
    return list(attrgetter(spec.layers)(tower))[: depth_of(model.base_model)]


def vision_unsupported_reason(model: nn.Module, rule: Any) -> str | None:
    """Why the vision tower of a model that has a projector seam cannot prune by a rule, or None."""
    base: Any = model.base_model
    kind = base.config.model_type
    if kind not in CONNECTORS:
        return UNSOUND.get(kind, f"its class must be known: of the model types {', '.join(CONNECTORS)}")
    tower: Any = getattr(base, CONNECTORS[kind].tower)
    if (tower_kind := tower.config.model_type) not in TOWERS:
        if tower_kind in UNSOUND_TOWERS:
            return UNSOUND_TOWERS[tower_kind]
        return f"its tower must be of the model types {', '.join(TOWERS)}, and is {tower_kind}"
    _, _, spec = parts_of(base)
    if (reason := summary_reason(base, spec.summary)) is not None:
        return reason
    if any(attention_of(layer) is None for layer in attrgetter(spec.layers)(tower)) or not depth_of(base):
        return "its tower must have layers that call the attention of transformers"
    if rule == "cls" and not spec.summary:
        return "its tower must have a CLS token for the rule 'cls'"
    return None
