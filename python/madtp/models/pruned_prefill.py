# SPDX-License-Identifier: Apache-2.0
"""A vision-language decoder that loses image tokens behind some of its layers, while the prompt is read (FastV, Chen
et al., ECCV 2024; PyramidDrop, Xing et al., CVPR 2025).

The prompt that enters is as it was given, or as the projector seam left it, and positions are those of all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, StaticSlidingWindowLayer
from transformers.utils import ModelOutput

from madtp.models.patched_head import PatchedHead, check_assistance, check_follows, features_of
from madtp.models.prefill_layers import IMPLEMENTATIONS
from madtp.models.prefill_run import DecodingRun, HeldPrompt, PromptRun
from madtp.models.prefill_seam import ImageMap, PrefillRecord, PrefillSeam
from madtp.models.prompt import MODALITIES, find_images, find_placeholders, has_images


class PrefillCall:
    """A call of `generate` whose prompt is known.

    Args:
        record: of its prompt, each sample once.
        copies: how often each sample is in the batch.
    """

    def __init__(self, record: PrefillRecord, copies: int):
        self.record, self.copies, self.known = record, copies, False


class PrunedPrefill(PatchedHead):
    """Mixed into the class with the language head, inside of `PrunedPrompt` where both are."""

    madtp_prefill: PrefillSeam

    def generate(self, *args, **kwargs):
        """As in Hugging Face.

        Raises:
            ValueError: `past_key_values` hold a pruned prompt, or anything where there are images; decoding is
                assisted, or reads the prompt in chunks; or the prompt breaks a rule of `forward`.
        """
        here = self.madtp_prefill.here
        self._check_empty(kwargs, decoding=False)
        here.calls.append(None)
        try:
            return super().generate(*args, **kwargs)
        finally:
            here.calls.pop()

    def _forward(self, kwargs: dict[str, Any]):
        """As in Hugging Face; logits are (B, S'', V), those of the tokens that the last layer holds.

        Raises:
            ValueError: there are images, and no token ids, a mask that is not (B, S), a cache that is not empty, or of
                another kind; or an attention implementation whose masks are not known.
        """
        run, here, cache = super().forward, self.madtp_prefill.here, kwargs.get("past_key_values")
        if not here.calls:
            self._check_empty(kwargs, decoding=True)
        if (held := _held(cache)) is not None:
            mask = None if here.calls else kwargs.get("attention_mask")  # generate adds no padding to its own
            _check_width(cache, mask, kwargs.get("input_ids"))
            real = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
            with self._running(DecodingRun(held, real)):
                return run(**kwargs)
        call = here.calls[-1] if here.calls else None
        if here.dense or (here.calls and call is None):  # there are no images
            return run(**kwargs)
        if not has_images(kwargs) or (cache is not None and int(cache.get_seq_length()) > 0):  # or it is another prompt
            return run(**kwargs)
        if call is not None:
            width = kwargs["input_ids"].shape[1]
            made = PromptRun(self.madtp_prefill, call.record, call.copies, width, call.known)
            call.known = True
        else:
            kwargs = {name: value for name, value in kwargs.items() if value is not None}
            self._check_prompt(kwargs.get("input_ids"), kwargs)
            kwargs = self._read(kwargs)
            input_ids = kwargs["input_ids"]
            record = self._record(input_ids, kwargs)
            made = PromptRun(self.madtp_prefill, record, 1, input_ids.shape[1], known=False)
            kwargs = {**dict.fromkeys(self._required()), **kwargs}
        self._check_run(kwargs)
        with self._running(made):
            out = run(**kwargs)
        here.record, held = made.record, made.finish()
        values = out.values() if isinstance(out, ModelOutput) else out
        for given in (cache, *(value for value in values if isinstance(value, Cache))):
            if isinstance(given, Cache) and held is not None:
                given.madtp_prefill = held  # type: ignore[attr-defined]
                given.madtp_columns = made.columns()  # type: ignore[attr-defined]
        return out

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs):
        here = self.madtp_prefill.here
        if here.calls and not here.dense and has_images(kwargs):
            self._check_prompt(None if kwargs.get("inputs_embeds") is not None else input_ids, kwargs)
            here.calls[-1] = PrefillCall(self._record(input_ids, kwargs), expand_size)
        return super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size, is_encoder_decoder, input_ids, **kwargs
        )

    def _validate_generation_mode(self, generation_mode, generation_config, *args, **kwargs):
        check_assistance(generation_mode, self.madtp_prefill.here.dense)
        if not self.madtp_prefill.here.dense:
            if (chunk := generation_config.prefill_chunk_size) is not None:
                raise ValueError(f"prefill_chunk_size must be None where layers prune the prompt, got {chunk}")
        super()._validate_generation_mode(  # type: ignore[misc]
            generation_mode, generation_config, *args, **kwargs
        )

    def _valid_auto_compile_criteria(self, *args, **kwargs) -> bool:
        """A pruned cache has masks of its own, made on the host."""
        calls = self.madtp_prefill.here.calls
        pruned = bool(calls) and calls[-1] is not None
        return not pruned and super()._valid_auto_compile_criteria(*args, **kwargs)  # type: ignore[misc]

    def _loss_of_what_is_left(self):
        """The model's loss; labels of a prompt that is pruned are those of what is left."""
        loss, run = PreTrainedModel.loss_function.fget(self), self.madtp_prefill.here.run  # type: ignore[attr-defined]
        if run is None:
            return loss

        def of_what_is_left(logits, labels, *args, **kwargs):
            if kwargs.get("shift_labels") is not None:
                kwargs["shift_labels"] = run.labels(kwargs["shift_labels"])
            return loss(logits, None if labels is None else run.labels(labels), *args, **kwargs)

        return of_what_is_left

    loss_function = PreTrainedModel.loss_function.getter(_loss_of_what_is_left)  # type: ignore[attr-defined]

    def _check_empty(self, kwargs: Mapping[str, Any], decoding: bool) -> None:
        """Raises ValueError for a cache that its images, or a prompt that is no step of decoding, cannot follow."""
        cache = kwargs.get("past_key_values")
        if cache is None or int(cache.get_seq_length()) == 0:
            return
        check_follows(_held(cache) is not None, has_images(kwargs), decoding, self.madtp_prefill.here.dense)

    @contextmanager
    def _running(self, run: PromptRun | DecodingRun) -> Iterator[None]:
        here = self.madtp_prefill.here
        here.run, before = run, here.run
        try:
            yield
        finally:
            here.run = before

    def _read(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a prompt with its images encoded, at its positions, and with a mask."""
        input_ids, made = kwargs["input_ids"], dict(kwargs)
        if self._pruned_before() is None:
            if "position_ids" not in made:
                made["position_ids"] = self._positions(input_ids, made)
            made = self._encoded(made)
        made.setdefault("attention_mask", torch.ones_like(input_ids))
        return made

    def _record(self, input_ids: Tensor, kwargs: Mapping[str, Any]) -> PrefillRecord:
        """Of a prompt as it enters, its images encoded."""
        mask, hidden = kwargs.get("attention_mask"), bool(self.madtp_prefill.here.simulated)
        real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
        if (before := self._pruned_before()) is not None:
            images = ImageMap.of(before.input_ids, before.images).at(before.columns)
            return PrefillRecord(images, real, hidden)
        found = []
        for modality in MODALITIES:
            if (output := kwargs["mm_encoder_outputs"].get(modality)) is not None:
                placeholders = find_placeholders(input_ids, self.config, modality)
                lengths = [len(part) for part in features_of(output, modality, placeholders)]
                found.append(find_images(input_ids, self.config, modality, lengths))
        columns = torch.arange(input_ids.shape[1], device=input_ids.device).masked_fill(~real, -1)
        return PrefillRecord(ImageMap.of(input_ids, found).at(columns), real, hidden)

    def _pruned_before(self) -> Any:
        """What the projector seam left of the prompt; None where there is none."""
        projector = getattr(self, "madtp_projector", None)
        return None if projector is None else projector.here.record

    def _check_run(self, kwargs: Mapping[str, Any]) -> None:
        config: Any = self.config.get_text_config()
        if (form := config._attn_implementation) not in IMPLEMENTATIONS:
            rule = f"attn_implementation must be one of {', '.join(IMPLEMENTATIONS)} where layers prune the prompt"
            raise ValueError(f"{rule}, got {form}")
        if isinstance(kwargs.get("logits_to_keep"), Tensor):
            raise ValueError("logits_to_keep must be a number where layers prune the prompt, got places")
        layers = getattr(kwargs.get("past_key_values"), "layers", ())
        for layer in layers[min(self.madtp_prefill.keep) :]:
            if isinstance(layer, StaticSlidingWindowLayer):
                raise ValueError("past_key_values must have no static sliding window where layers prune, got one")


def _check_width(cache: Any, mask: Any, input_ids: Any) -> None:
    """Raises ValueError for a mask of a step of decoding that is not as long as what the first layer holds."""
    if not (isinstance(mask, Tensor) and mask.ndim == 2 and isinstance(input_ids, Tensor)):
        return
    width = int(cache.get_seq_length()) + input_ids.shape[1]
    if mask.shape[1] != width:
        raise ValueError(
            f"attention_mask must have {width} columns, those of the cache's first layer and of what follows: "
            f"past_key_values.madtp_columns >= 0, and ones, got {mask.shape[1]}"
        )


def _held(cache: Any) -> HeldPrompt | None:
    """What a cache holds of a pruned prompt; None where it is empty, or holds all."""
    if cache is None or (held := getattr(cache, "madtp_prefill", None)) is None:
        return None
    if int(cache.get_seq_length()) > 0:
        return held
    del cache.madtp_prefill  # of what it held before it was reset
    return None
