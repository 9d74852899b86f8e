# SPDX-License-Identifier: Apache-2.0
"""A vision-language decoder whose prompt loses image tokens before it enters: one mixin for every class that takes
encoded images (`mm_encoder_outputs`), with no code for any family.

`forward` and `generate` encode the images, choose, and go on with a shorter prompt at the positions of the whole one.
In `generate` that happens in `_expand_inputs_for_generation`, the one method that returns both the token ids and all
other arguments, when positions and features are those of the whole prompt and lengths and caches are not made yet.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from madtp.dtp.keep_rules import Candidates, Kept
from madtp.models.patched_head import FIRST_POSITION, PatchedHead, check_assistance, check_follows, features_of
from madtp.models.projector_seam import ProjectorSeam, PromptRecord
from madtp.models.prompt import (
    MODALITIES,
    Images,
    Shortened,
    find_images,
    find_placeholders,
    has_images,
    hide,
    shorten,
    token_of,
)


class PrunedPrompt(PatchedHead):
    """Mixed into the class with the language head."""

    madtp_projector: ProjectorSeam

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if (parts := vars(cls).get("madtp_parts")) is not None:
            prepare = _at_given_positions(parts[0].prepare_inputs_for_generation)
            cls.prepare_inputs_for_generation = prepare  # type: ignore[attr-defined]

    def generate(self, *args, **kwargs):
        """As in Hugging Face: the prompt that was given, and the new tokens.

        Raises:
            ValueError: `past_key_values` hold a pruned prompt, or anything where images are to be added; decoding is
                assisted; or the prompt breaks a rule of `forward`.
        """
        self._check_cache(kwargs)
        here = self.madtp_projector.here
        here.calls.append(None)
        try:
            out = super().generate(*args, **kwargs)
        finally:
            record = here.calls.pop()
        if record is None:  # there were no images
            return out
        _mark(getattr(out, "past_key_values", None), record)
        _mark(kwargs.get("past_key_values"), record)
        if self.config.is_encoder_decoder or record.hidden or record.input_ids is None:
            return out  # the answer stands alone, or the prompt is whole
        sequences = out if isinstance(out, Tensor) else out.sequences
        prompt = record.input_ids.repeat_interleave(len(sequences) // len(record.input_ids), 0)
        whole = torch.cat([prompt.to(sequences), sequences[:, record.width - record.dropped :]], 1)
        if isinstance(out, Tensor):
            return whole
        out.sequences = whole
        return out

    def _forward(self, kwargs: dict[str, Any]):
        """As in Hugging Face, on the shorter prompt: logits are (B, S', V), and labels of pruned places do not count.

        Raises:
            ValueError: there are images, and no token ids, a mask that is not (B, S), a cache that is not empty, or
                other placeholders than tokens of the projector.
        """
        run, here = super().forward, self.madtp_projector.here
        if here.calls:
            return run(**kwargs)
        self._check_cache(kwargs, decoding=True)
        if here.dense or not has_images(kwargs):
            return run(**self._continued(kwargs))
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        self._check_prompt(kwargs.get("input_ids"), kwargs)
        return self._run_pruned(run, kwargs)

    def _run_pruned(self, run, kwargs: dict[str, Any]):
        input_ids = kwargs.pop("input_ids")
        if makes_positions := "position_ids" not in kwargs:
            kwargs["position_ids"] = self._positions(input_ids, kwargs)
        kwargs = self._encoded(kwargs)
        tensors, mask = self._tensors(kwargs), kwargs.get("attention_mask")
        before: Any = input_ids.shape[1] if mask is None else mask.bool().sum(1, keepdim=True)
        input_ids, kwargs, record = self._prune(input_ids, kwargs)
        self._join(kwargs, tensors)
        base: Any = self.base_model
        deltas, columns = getattr(base, "rope_deltas", None), record.columns
        if makes_positions and deltas is not None and columns is not None:  # decoding goes on at tokens so far + it
            after = (columns >= 0).sum(1, keepdim=True)
            base.rope_deltas = deltas + (before - after).to(deltas)
        # A forward may ask for pixels, which are encoded here.
        out = run(**{**dict.fromkeys(self._required()), "input_ids": input_ids, **kwargs})
        values = out.values() if isinstance(out, ModelOutput) else out
        for cache in (kwargs.get("past_key_values"), *(value for value in values if isinstance(value, Cache))):
            _mark(cache, record)
        return out

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs):
        here, tensors = self.madtp_projector.here, {}
        if here.calls and not (here.dense or is_encoder_decoder) and has_images(kwargs):
            given = None if kwargs.get("inputs_embeds") is not None else input_ids
            self._check_prompt(given, kwargs)
            tensors = self._tensors(kwargs)
            input_ids, kwargs, here.calls[-1] = self._prune(input_ids, kwargs)
        input_ids, kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size, is_encoder_decoder, input_ids, **kwargs
        )
        self._join(kwargs, tensors)
        return input_ids, kwargs

    def _prepare_generated_length(self, generation_config, has_default_max_length, has_default_min_length, **kwargs):
        """Lengths that were given are those of the whole prompt and the answer."""
        made = super()._prepare_generated_length(  # type: ignore[misc]
            generation_config=generation_config,
            has_default_max_length=has_default_max_length,
            has_default_min_length=has_default_min_length,
            **kwargs,
        )
        calls = self.madtp_projector.here.calls
        if calls and calls[-1] is not None and not self.config.is_encoder_decoder:
            dropped = calls[-1].dropped
            if made.max_new_tokens is None and not has_default_max_length:
                made.max_length -= dropped
            if made.min_new_tokens is None and not has_default_min_length:
                made.min_length = max(made.min_length - dropped, 0)
        return made

    def _validate_generation_mode(self, generation_mode, *args, **kwargs):
        check_assistance(generation_mode, self.madtp_projector.here.dense)
        super()._validate_generation_mode(generation_mode, *args, **kwargs)  # type: ignore[misc]

    def _prune(self, input_ids: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any], PromptRecord]:
        """The prompt without the tokens that go, its encoded images likewise, as lists, one entry an image."""
        seam, outputs = self.madtp_projector, dict(kwargs["mm_encoder_outputs"])
        record = PromptRecord(width=input_ids.shape[1], input_ids=input_ids, hidden=bool(seam.here.simulated))
        kept = torch.ones_like(input_ids, dtype=torch.bool)
        for modality in MODALITIES:
            if (output := outputs.get(modality)) is None:
                continue
            placeholders, left = (
                find_placeholders(input_ids, self.config, modality),
                getattr(output, "madtp_left", None),
            )
            features = features_of(output, modality, placeholders)
            lengths = [len(part) for part in features] if left is None else left.lengths
            images = find_images(input_ids, self.config, modality, lengths, kwargs.get("attention_mask"))
            chosen = seam.choose(self._candidates(input_ids, kwargs, features, images))
            keep = chosen.keep if left is None else left.kept[-1].masked_scatter(left.kept[-1], chosen.keep)
            kept = kept.masked_scatter(images.placeholders, keep.to(kept.device))
            outputs[modality] = (_hidden if record.hidden else _pruned)(output, features, chosen)
            record.towers.append(left)
            record.images.append(images)
            record.keeps.append(keep)
        if record.hidden:
            made: Shortened = hide(input_ids, kwargs, kept)
        else:
            made = shorten(input_ids, kwargs, kept, self._padding())
        record.columns = made.columns
        seam.here.record = record
        return made.input_ids, {**made.kwargs, "mm_encoder_outputs": outputs}, record

    def _candidates(
        self, input_ids: Tensor, kwargs: Mapping[str, Any], features: list[Tensor], images: Images
    ) -> Candidates:
        rows, lengths = torch.cat(features), [len(part) for part in features]
        if not self.madtp_projector.keep.needs_text:
            return Candidates(rows, lengths)
        words = torch.ones_like(input_ids, dtype=torch.bool)
        if kwargs.get("attention_mask") is not None:
            words &= kwargs["attention_mask"].bool()
        for token in self._placeholder_ids():
            words &= input_ids != token
        with torch.no_grad():
            text = self.get_input_embeddings()(input_ids[words].to(rows.device))  # type: ignore[operator]
        text_of = [min(begin // input_ids.shape[1], len(input_ids) - 1) for begin in images.begins()]
        return Candidates(rows, lengths, None, text, words.sum(1).tolist(), text_of)

    def _tensors(self, kwargs: Mapping[str, Any]) -> dict[str, bool]:
        """Of each modality that is pruned, whether the model reads one tensor of all images and no list."""
        if self.madtp_projector.here.simulated:
            return {}
        outputs = kwargs["mm_encoder_outputs"]
        given = {modality: outputs.get(modality) for modality in MODALITIES}
        return {
            modality: getattr(output, "madtp_joined", isinstance(getattr(output, "pooler_output", None), Tensor))
            for modality, output in given.items()
            if output is not None
        }

    def _join(self, kwargs: Mapping[str, Any], tensors: Mapping[str, bool]) -> None:
        """Images in a list are a tensor again, (1, T, D), where the model reads one; beams need the list before."""
        for modality, joined in tensors.items():
            if joined:
                output = kwargs["mm_encoder_outputs"][modality]
                output.pooler_output = torch.cat(output.pooler_output)[None]

    def _continued(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a step of decoding behind a pruned prompt, at the positions of the whole one."""
        cache = kwargs.get("past_key_values")
        dropped, ids = getattr(cache, "madtp_dropped", None), kwargs.get("input_ids")
        if dropped is None or ids is None or cache is None:
            return kwargs
        past, mask = int(cache.get_seq_length()), kwargs.get("attention_mask")
        if mask is None and bool((cache.madtp_columns < 0).any()):
            raise ValueError(
                "attention_mask must be given where the cache has padding or hidden tokens, got none: it is "
                "past_key_values.madtp_columns >= 0, and ones for what follows"
            )
        if dropped and mask is not None and mask.ndim == 2 and mask.shape[1] != past + ids.shape[1]:
            raise ValueError(
                f"attention_mask must have {past + ids.shape[1]} columns, those of the pruned prompt and of what "
                f"follows, got {mask.shape[1]}"
            )
        if kwargs.get("position_ids") is not None:
            return kwargs
        base: Any = self.base_model
        if hasattr(base, "compute_3d_position_ids"):
            deltas = getattr(base, "rope_deltas", None)
            if mask is not None and mask.ndim == 2 and deltas is not None:  # it would make those of the whole mask
                positions = mask.long().cumsum(1)[:, -ids.shape[1] :] - 1 + deltas.to(mask.device)
                kwargs = {**kwargs, "position_ids": positions.expand(3, -1, -1)}
        elif dropped:
            first = past + dropped + FIRST_POSITION.get(self.config.model_type, 0)
            kwargs = {**kwargs, "position_ids": torch.arange(first, first + ids.shape[1], device=ids.device)[None]}
        return kwargs

    def _check_cache(self, kwargs: Mapping[str, Any], decoding: bool = False) -> None:
        cache = kwargs.get("past_key_values")
        if cache is None:
            return
        if int(cache.get_seq_length()) == 0:
            for name in ("madtp_dropped", "madtp_columns"):  # of what it held before it was reset
                vars(cache).pop(name, None)
            return
        pruned = hasattr(cache, "madtp_dropped")
        check_follows(pruned, has_images(kwargs), decoding, self.madtp_projector.here.dense)

    def _placeholder_ids(self) -> list[int]:
        return [token for modality in MODALITIES if (token := token_of(self.config, modality)) is not None]

    def _padding(self) -> int:
        """A token that is no placeholder: that of padding, or the first of the vocabulary."""
        pad, placeholders = self.config.get_text_config().pad_token_id, self._placeholder_ids()
        return next(token for token in (pad, 0, 1, 2) if token is not None and token not in placeholders)


def _at_given_positions(source: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """`prepare_inputs_for_generation` of a class. Some (EXAONE 4.5) leave it to a forward to count positions, and
    those of a pruned prompt have gaps."""

    @functools.wraps(source)  # `generate` asks it which inputs there are
    def prepare(self, input_ids, *args, **kwargs):
        inputs = source(self, input_ids, *args, **kwargs)
        calls, positions, ids = self.madtp_projector.here.calls, kwargs.get("position_ids"), inputs.get("input_ids")
        counts = inputs.get("position_ids") is None and not self.config.is_encoder_decoder
        if counts and calls and calls[-1] is not None and positions is not None and ids is not None:
            inputs["position_ids"] = positions[..., -ids.shape[1] :]
        return inputs

    return prepare


def _pruned(output: Any, features: list[Tensor], chosen: Kept) -> Any:
    """A copy of an encoder's output with what is kept, as a list of rows for each image."""
    keeps = chosen.keep.split([len(part) for part in features])
    if chosen.features is None:
        rows = [part[keep] for part, keep in zip(features, keeps, strict=True)]
    else:
        rows = list(chosen.features.split([int(keep.sum()) for keep in keeps]))
    fields = {**output, "pooler_output": rows}
    if (layers := output.get("deepstack_features")) is not None:
        fields["deepstack_features"] = [_pruned_layer(layer, keeps) for layer in layers]
    return type(output)(**fields)


def _hidden(output: Any, features: list[Tensor], chosen: Kept) -> Any:
    """An encoder's output with all tokens, in which those that are kept are as the rule has changed them, and those
    that a tower has lost are zeros."""
    left = getattr(output, "madtp_left", None)
    if chosen.features is None and left is None:
        return output
    rows: Any = torch.cat(features)
    if chosen.features is not None:
        rows = rows.masked_scatter(chosen.keep[:, None], chosen.features)
    if left is not None:
        parts = left.whole(rows)
        fields = {"pooler_output": torch.stack(parts) if output.madtp_joined else parts}
        if (layers := output.get("deepstack_features")) is not None:
            fields["deepstack_features"] = [left.whole(torch.cat(layer)) for layer in layers]
    elif isinstance(output.pooler_output, Tensor):
        fields = {"pooler_output": rows.view_as(output.pooler_output)}
    else:
        parts = rows.split([len(part) for part in features])
        fields = {
            "pooler_output": [part.view_as(given) for part, given in zip(parts, output.pooler_output, strict=True)]
        }
    return type(output)(**{**output, **fields})


def _pruned_layer(layer: Any, keeps: tuple[Tensor, ...]) -> Any:
    """Of features for a layer of the decoder: rows for each image, all rows, or either behind a layer's number."""
    if isinstance(layer, Tensor):
        return layer.flatten(0, -2)[torch.cat(keeps)]
    if isinstance(layer[0], int):
        return layer[0], _pruned_layer(layer[1], keeps)
    return [part.flatten(0, -2)[keep] for part, keep in zip(layer, keeps, strict=True)]


def _mark(cache: Any, record: PromptRecord) -> None:
    """The cache knows which columns of the prompt it holds, and by how many these are fewer than were given."""
    if isinstance(cache, Cache):
        cache.madtp_dropped = record.dropped  # type: ignore[attr-defined]
        cache.madtp_columns = record.columns  # type: ignore[attr-defined]
