# SPDX-License-Identifier: Apache-2.0
"""What every patched class with a language head has, whichever seam it is mixed in for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation import GenerationMode
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS

from madtp.handles import handle_of
from madtp.models.arguments import Arguments
from madtp.models.prompt import has_images, run_lengths

DYNAMIC = "hybrid"  # of the names of static caches the one that `generate` takes for none
FIRST_POSITION = {"paligemma": 1}  # by model type, of what counts its positions from another number than 0


class PatchedHead(nn.Module):
    """Base of the mixins for the class with the language head: `_forward(arguments by name)` is in place of its
    forward, and calls it as `super().forward`."""

    madtp_arguments: Arguments
    config: Any
    generation_config: Any

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if (parts := vars(cls).get("madtp_parts")) is None:  # a mixin, and not what it is mixed into
            return
        source, mixin = parts
        cls.madtp_arguments = Arguments.of(source.forward)

        def forward(self, *args, **kwargs):
            return mixin._forward(self, self.madtp_arguments.bound(type(self).__name__, args, kwargs))

        forward.__doc__ = source.forward.__doc__
        # `generate`, trainers and pipelines ask it which inputs there are.
        forward.__signature__ = cls.madtp_arguments.signature  # type: ignore[attr-defined]
        cls.forward = forward

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """That of the Hugging Face class, which makes a plain model or patches it, as the files say."""
        kinds = (kind for kind in cls.__mro__ if issubclass(kind, PreTrainedModel))
        return next(kind for kind in kinds if not issubclass(kind, PatchedHead)).from_pretrained(*args, **kwargs)

    def save_pretrained(self, save_directory, *args, **kwargs):
        write = super().save_pretrained  # type: ignore[misc]  # that of Hugging Face
        options = inspect.signature(write).bind(save_directory, *args, **kwargs).arguments
        handle_of(self).save(write, {**options, **options.pop("kwargs", {})})

    def generate(self, *args, **kwargs):
        if has_images(kwargs):
            config = args[1] if len(args) > 1 else kwargs.get("generation_config")
            configs = [self.generation_config] if config is None else [config, self.generation_config]
            names = (each.cache_implementation for each in configs)  # where the given one has none, the model's holds
            name = kwargs.get("cache_implementation", next(filter(None, names), None))
            if name != DYNAMIC and name in ALL_STATIC_CACHE_IMPLEMENTATIONS:
                handle_of(self).check_fixed("cache_implementation")  # type: ignore[attr-defined]  # of a decoder
            self._check_cache_kind(kwargs)
        return super().generate(*args, **kwargs)  # type: ignore[misc]  # that of Hugging Face

    def _check_cache_kind(self, kwargs: Mapping[str, Any]) -> None:
        """Raises ValueError for a static cache where a seam decides by what it sees."""
        if getattr(kwargs.get("past_key_values"), "is_compileable", False):
            handle_of(self).check_fixed("past_key_values")  # type: ignore[attr-defined]

    def _encoded(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments with encoded images in place of pixels, as `generate` makes them."""
        outputs = dict(kwargs.get("mm_encoder_outputs") or {})
        return self._prepare_multimodal_encoder_kwargs_for_generation(  # type: ignore[operator]
            {**kwargs, "mm_encoder_outputs": outputs}
        )

    def _positions(self, input_ids: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """What the model's forward would take by itself, of the whole prompt."""
        base: Any = self.base_model
        if hasattr(base, "compute_3d_position_ids"):
            names = inspect.signature(base.compute_3d_position_ids).parameters
            given = {name: kwargs.get(name) for name in names}
            positions = base.compute_3d_position_ids(**{**given, "input_ids": input_ids, "inputs_embeds": None})
            if positions is not None:
                return positions
        elif hasattr(base, "get_rope_index"):
            raise ValueError(f"position_ids must be given to {type(self).__name__}, which makes them inside, got none")
        first = FIRST_POSITION.get(self.config.model_type, 0)
        return torch.arange(first, first + input_ids.shape[1], device=input_ids.device)[None]

    def _check_prompt(self, input_ids: Tensor | None, kwargs: Mapping[str, Any]) -> None:
        if input_ids is None or kwargs.get("inputs_embeds") is not None:
            raise ValueError("input_ids must be given with images, and no inputs_embeds: by them images are found")
        if (outputs := kwargs.get("mm_encoder_outputs")) is not None and not isinstance(outputs, Mapping):
            raise ValueError(f"mm_encoder_outputs must be a dict by modality, got {type(outputs).__name__}")
        self._check_cache_kind(kwargs)
        mask = kwargs.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != input_ids.shape):
            got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"attention_mask must be {tuple(input_ids.shape)}, as input_ids, got {got}")

    def _required(self) -> list[str]:
        """The arguments that the forward of the class has no default for."""
        parameters = list(self.madtp_arguments.signature.parameters.values())[1:]
        kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        return [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind not in kinds]


def check_assistance(generation_mode: GenerationMode, dense: bool) -> None:
    """Raises ValueError where decoding is assisted and a prompt is pruned."""
    if generation_mode == GenerationMode.ASSISTED_GENERATION and not dense:
        raise ValueError("generate must not be assisted on a pruned prompt, got an assistant or prompt lookup")


def check_follows(pruned: bool, images: bool, decoding: bool, dense: bool) -> None:
    """Raises ValueError where a call cannot follow what its cache holds.

    Args:
        pruned: whether that is a pruned prompt.
        images: whether the call has images.
        decoding: whether it may be a step of decoding, and is no `generate`.
    """
    if (pruned and (images or not decoding)) or (images and not dense):
        what = "a pruned prompt, which the given one does not continue" if pruned else "a prompt"
        raise ValueError(
            f"past_key_values must be empty, got a cache that holds {what}: give the whole conversation anew"
        )


def features_of(output: Any, modality: str, placeholders: Tensor) -> list[Tensor]:
    """The tokens of each image, (n, D), as the projector gives them; of those in one row, by the runs of the prompt."""
    pooled = getattr(output, "pooler_output", None)
    if pooled is None:
        raise ValueError(f"mm_encoder_outputs must hold the pooler_output of {modality}, got {type(output).__name__}")
    if isinstance(pooled, Tensor) and pooled.ndim == 2:
        runs = run_lengths(placeholders)
        return list(pooled.split(runs)) if sum(runs) == len(pooled) else [pooled]
    return [part.flatten(0, -2) for part in pooled]
