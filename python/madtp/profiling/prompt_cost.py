# SPDX-License-Identifier: Apache-2.0
"""What a prompt with images costs in a decoder, before anything runs: read off the modules and the shapes of inputs.

A layer costs a multiply-add for each of its weights and rows, and its attention two products of every pair of rows in a
segment: what `torch.utils.flop_counter` counts, to which masks make no difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from madtp.dtp.keep import Keep
from madtp.dtp.keep_rules import RULES
from madtp.handles import find_handle
from madtp.hwp import PackedLinear
from madtp.models.bare_rows import BareRows, bare_rows, image_units
from madtp.models.prefill_seam import PrefillSeam
from madtp.models.prompt import MODALITIES, PIXELS, Images, find_images, in_prompt_order
from madtp.models.pruned_vision import parts_of
from madtp.models.vision_layers import attention_of
from madtp.models.vision_seam import PLANNED, VisionSeam, nested
from madtp.models.vision_towers import naflex_rows, pixtral_rows
from madtp.models.vlm import (
    decoder_of,
    prefill_unsupported_reason,
    tower_layers,
    unsupported_reason,
    vision_unsupported_reason,
    window_of,
)
from madtp.models.vlm_branches import projectors_of
from madtp.patching.vlm_keep import ENTERED, PREFILL, PROJECTOR, VISION, check_keep, make_seams
from madtp.profiling.macs import has_sparse24_weight

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class PromptCost:
    """Multiply-adds of a prompt, all its samples together, and the memory it leaves.

    Args:
        vision: of the tower, from pixels to its last layer.
        projector: of what makes tokens of the tower's rows.
        prefill: of the decoder that reads the prompt, with the logits of its last column alone.
        rules: of what chooses at the seams, where that is matrix products; 0 of a user's function.
        decode: of one more token of every sample.
        cache_bytes: of keys and values after the prompt, in the dtype of the model.
    """

    vision: int
    projector: int
    prefill: int
    rules: int
    decode: int
    cache_bytes: int

    @property
    def first_token(self) -> int:
        """All that runs until the first token of the answer is there."""
        return self.vision + self.projector + self.prefill + self.rules

    def __add__(self, other: PromptCost) -> PromptCost:
        """Of two prompts, one after the other."""
        names = [field.name for field in fields(self)]
        return PromptCost(**{name: getattr(self, name) + getattr(other, name) for name in names})


def prompt_cost(
    model: nn.Module,
    keep: Mapping[str, Any] | None = None,
    *,
    counts: Mapping[str, Any] | None = None,
    **inputs: Any,
) -> PromptCost:
    """What a prompt costs as the seams leave it; nothing runs, and weights are read only for zeros in a 2:4 pattern.

    The model may be on the meta device, and so may pixels. Columns of padding cost what others do. Where the units of
    a tower come in several segments, windows, frames or tiles, those that are left are taken to be spread evenly, by
    the rule "uniform"; the rules "uniform" and "random" are what they are. So are those that enter a tower which leaves
    out duplicates; pixels must have values there, if `counts` do not say how many these are. A Linear with 2:4 weights,
    packed or not, counts at half, as in `profile`.

    Args:
        model: a decoder that reads images, patched or not.
        keep: of `madtp.patch`, the seams to count with; None takes those of a patched model, {} none.
        counts: what is left of each image, as `VlmHandle.counts` says it; None computes it from the shares.
        inputs: those of a forward: `input_ids`, `attention_mask`, pixels and what says their sizes.

    Raises:
        TypeError: the model, its tower or its decoder is of no class that is known. ValueError: what is left depends on
            more than lengths, and there are no counts; counts do not fit the prompt; the prompt does not say where an
            image ends; or a layer has other weights than those of Linears and convolutions.
    """
    _check(model)
    seams = _seams(model, keep)
    prompt = _Prompt.of(model, inputs)
    if not prompt.modalities:  # a prompt without images is read as ever
        seams = {}
    _check_form(seams, counts)
    entered = _entered(model, seams, prompt, inputs, counts or {})
    left = _left(seams, prompt.lengths, entered, counts or {})
    vision = projector = rules = 0
    for modality, places in prompt.modalities.items():
        counts_of = [[layer[place] for place in places] for layer in left.get(VISION, ())]
        bare = bare_rows(model.base_model, inputs, modality, pruned=VISION in seams)
        macs, chosen = _tower(model, bare, seams.get(VISION), [entered[place] for place in places], counts_of)
        tokens = counts_of[-1] if counts_of else [prompt.lengths[place] for place in places]
        vision, rules = vision + macs, rules + chosen
        projector += sum(tokens) * sum(map(_weights, projectors_of(model)))
        if PROJECTOR in seams:
            after = [left[PROJECTOR][place] for place in places]
            rules += _products(seams[PROJECTOR].keep, tokens, after) * decoder_of(model).config.hidden_size
    prefill, chosen, decode, cache = _decoder(model, seams, prompt, left)
    return PromptCost(vision, projector, prefill, rules + chosen, decode, cache)


class _Prompt(NamedTuple):
    """A prompt before anything is pruned.

    Args:
        real: of each sample, its tokens without padding.
        width: columns.
        lengths, samples: of each image in the order of the prompt, its tokens, and the sample it is in.
        modalities: of each that there is, the places of its images in that order.
    """

    real: list[int]
    width: int
    lengths: list[int]
    samples: list[int]
    modalities: dict[str, list[int]]

    @classmethod
    def of(cls, model: nn.Module, inputs: Mapping[str, Any]) -> _Prompt:
        input_ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.is_meta:
            got = f"{tuple(input_ids.shape)} on {input_ids.device}" if isinstance(input_ids, Tensor) else input_ids
            raise ValueError(f"input_ids must be a tensor (B, S) with values, got {got}")
        if mask is not None and mask.shape != input_ids.shape:
            raise ValueError(f"attention_mask must be {tuple(input_ids.shape)}, as input_ids, got {tuple(mask.shape)}")
        input_ids = input_ids.cpu()
        batch, width = input_ids.shape
        real = [width] * batch if mask is None else mask.cpu().bool().sum(1).tolist()
        given = [m for m in MODALITIES if any(inputs.get(name) is not None for name in PIXELS[m])]
        found: list[Images] = []
        for modality in given:
            units = image_units(model.base_model, inputs, modality, pruned=False)
            found.append(find_images(input_ids, model.config, modality, units.lengths))
        lengths = in_prompt_order(found, (images.lengths for images in found))
        samples = in_prompt_order(found, ([begin // width for begin in images.begins()] for images in found))
        order = in_prompt_order(found, ([(kind, n) for n in range(len(f.lengths))] for kind, f in enumerate(found)))
        places = {image: place for place, image in enumerate(order)}
        modalities = {
            modality: [places[kind, number] for number in range(len(found[kind].lengths))]
            for kind, modality in enumerate(given)
        }
        return cls(real, width, lengths, samples, modalities)

    def alive(self, counts: Sequence[int]) -> list[int]:
        """Of each sample, its tokens where so many are left of each image."""
        alive = list(self.real)
        for sample, length, count in zip(self.samples, self.lengths, counts, strict=True):
            alive[sample] -= length - count
        return alive


def _check(model: nn.Module) -> None:
    """Raises TypeError for a model of which something is not known."""
    kind = type(model).__name__
    if (reason := unsupported_reason(model)) is not None:
        raise TypeError(f"model must be a decoder that reads images, {reason}, got {kind}")
    if (reason := prefill_unsupported_reason(model)) is not None:
        raise TypeError(f"model must have a decoder that is known, {reason}, got {kind}")
    if (reason := vision_unsupported_reason(model, None)) is not None:
        raise TypeError(f"model must have a vision tower that is known, {reason}, got {kind}")
    connector, _, spec = parts_of(model.base_model)
    if connector.packed or spec.rows is naflex_rows:
        reason = "tiles are packed with newlines" if connector.packed else "images are padded to a length"
        raise TypeError(f"model must have a vision tower that is known, its {reason}, got {kind}")


def _seams(model: nn.Module, keep: Mapping[str, Any] | None) -> dict[str, Any]:
    if keep is None:
        handle: Any = find_handle(model)
        return {} if handle is None else dict(handle.seams)
    if not keep and isinstance(keep, Mapping):
        return {}
    return make_seams(model, check_keep(keep))


def _check_form(seams: Mapping[str, Any], counts: Any) -> None:
    """Raises ValueError for counts that are not by seam."""
    if counts is not None and not isinstance(counts, Mapping):
        raise ValueError(f"counts must be a mapping by seam, as VlmHandle.counts gives it, got {type(counts).__name__}")
    names = [*seams, *([ENTERED] if _leaves_out(seams) else [])]
    if unknown := [name for name in counts or {} if name not in names]:
        raise ValueError(f"counts must be of the seams {', '.join(names) or 'there are'}, got {', '.join(unknown)}")


def _leaves_out(seams: Mapping[str, Any]) -> bool:
    """Whether duplicates do not enter the tower."""
    return VISION in seams and seams[VISION].keep.duplicates is not None


def _entered(
    model: nn.Module, seams: Mapping[str, Any], prompt: _Prompt, inputs: Mapping[str, Any], counts: Mapping[str, Any]
) -> list[int]:
    """How many units of each image enter the tower, in the order of the prompt."""
    if not _leaves_out(seams):
        return prompt.lengths
    if ENTERED in counts:
        _check_steps(ENTERED, counts[ENTERED], [counts[ENTERED]], prompt.lengths, f"{len(prompt.lengths)} images")
        return list(counts[ENTERED])
    entered = list(prompt.lengths)
    for modality, places in prompt.modalities.items():
        units = image_units(model.base_model, inputs, modality, pruned=True, duplicates=seams[VISION].keep.duplicates)
        for place, count in zip(places, units.entered, strict=True):
            entered[place] = count
    return entered


def _left(seams: Mapping[str, Any], lengths: list[int], entered: list[int], given: Mapping[str, Any]) -> dict[str, Any]:
    """What is left of each image, in the order of the prompt, as `VlmHandle.counts` says it."""
    left: dict[str, Any] = {}
    for name in (VISION, PROJECTOR, PREFILL):
        if name not in seams:
            continue
        seam = seams[name]
        keeps = seam.keep.values() if name == PREFILL else [seam.keep]
        if name in given:
            left[name] = given[name]
            _check_counts(name, given[name], seam, entered if name == VISION else lengths)
        elif dynamic := next((keep for keep in keeps if not keep.is_fixed), None):
            raise ValueError(
                f"counts must be given for {name!r}, where {dynamic.decided_by} decides by what it sees, got none"
            )
        else:
            counts = (lengths, entered) if name == VISION else (lengths,)
            left[name] = seam.keep.counts(lengths) if name == PROJECTOR else seam.counts(*counts)
        lengths = left[name][-1] if name == VISION else left[name] if name == PROJECTOR else lengths
    return left


def _check_counts(name: str, given: Any, seam: Any, lengths: Sequence[int]) -> None:
    """Raises ValueError for counts that a seam cannot leave of images with so many tokens."""
    steps, expected, fits = [given], f"{len(lengths)} images", True
    if name == VISION:
        fits = isinstance(given, list | tuple) and len(given) == seam.layers
        steps, expected = list(given) if fits else [], f"{seam.layers} layers, each of {expected}"
    elif name == PREFILL:
        fits = isinstance(given, Mapping) and set(given) == set(seam.keep)
        steps = [given[layer] for layer in seam.keep] if fits else []
        expected = f"the layers {', '.join(map(str, seam.keep))}, each of {expected}"
    _check_steps(name, given, steps if fits else [None], lengths, expected)


def _check_steps(name: str, given: Any, steps: Sequence[Any], lengths: Sequence[int], expected: str) -> None:
    """Raises ValueError for counts, step after step, that are none of so many images or that grow."""
    fits = all(isinstance(step, list | tuple) and len(step) == len(lengths) for step in steps)
    if not fits or not all(type(count) is int for step in steps for count in step):
        raise ValueError(f"counts of the seam {name!r} must be of {expected}, got {given}")
    for before, after in pairwise([list(lengths), *map(list, steps)]):
        if any(not 0 <= count <= length for length, count in zip(before, after, strict=True)):
            raise ValueError(f"counts of the seam {name!r} must not grow, got {after} of {before}")


def _tower(
    model: nn.Module,
    bare: BareRows,
    seam: VisionSeam | None,
    entered: Sequence[int],
    counts: Sequence[Sequence[int]],
) -> tuple[int, int]:
    """What the tower costs, and its rule.

    Args:
        entered: how many units of each image enter its first layer.
        counts: by layer, what is left of each image; none without a seam.
    """
    _, tower, spec = parts_of(model.base_model)
    rows = bare.rows
    macs, rules = bare.patches * _weights_of_embedding(model, tower, spec.layers), 0
    if seam is None:  # dense, layers that nobody reads run too, and a head that pools
        layers, alive = list(attrgetter(spec.layers)(tower)), []
        macs += bare.tiles * _pooling(tower, len(rows.unit) // max(bare.tiles, 1))
    else:
        rule = seam.keep.rule if isinstance(seam.keep.rule, str) and seam.keep.rule in PLANNED else "uniform"
        layers, (first, *alive) = tower_layers(model), nested(RULES[rule].choose, rows.lengths, [entered, *counts])
        rows, _ = rows.keep(first)
    before = list(entered)
    for number, layer in enumerate(layers):
        ends = spec.segments(tower, rows, number).ends
        if seam is None and spec.rows is pixtral_rows:  # a single segment of all images, told apart by a mask
            ends = torch.tensor([0, len(rows.unit)])
        attention = attention_of(layer)
        macs += len(rows.unit) * _weights(layer) + 2 * _width(attention) * int((ends.diff().long() ** 2).sum())
        if seam is not None and before != list(counts[number]):
            channels = next(part.in_features for part in attention.modules() if hasattr(part, "in_features"))
            rules += _products(seam.keep, before, counts[number]) * rows.size * channels
            (rows, _), before = rows.keep(alive[number]), list(counts[number])
    return macs, rules


def _decoder(
    model: nn.Module, seams: Mapping[str, Any], prompt: _Prompt, left: Mapping[str, Any]
) -> tuple[int, int, int, int]:
    """What the decoder costs for the prompt, its rules, a step of decoding, and the bytes of the cache."""
    decoder: Any = decoder_of(model)
    seam: PrefillSeam | None = seams.get(PREFILL)
    counts, width = prompt.lengths, prompt.width
    for name in (VISION, PROJECTOR):
        if name in seams:
            counts = left[name][-1] if name == VISION else left[name]
            width = max(prompt.alive(counts))
    head, batch = _weights(model.get_output_embeddings()), len(prompt.real)  # type: ignore[operator]
    prefill, rules, decode, held = batch * head, 0, batch * head, 0
    for number, layer in enumerate(decoder.layers):
        attention = layer.self_attn
        if seam is not None and number in seam.keep:
            after, keep = left[PREFILL][number], seam.keep[number]
            if keep.needs_importance or callable(keep.rule):  # what was attended to in the layer before
                asked = width if keep.rule == "received" else 1
                rules += batch * _width(decoder.layers[number - 1].self_attn) * asked * width
            rules += _products(keep, counts, after) * decoder.config.hidden_size
            if after != counts:
                counts, width = after, max(prompt.alive(after))
        weights, channels = _weights(layer), _width(attention)
        window = window_of(decoder.config, number)
        cached = width if window is None else min(width, window - 1)
        prefill += batch * (width * weights + 2 * channels * width**2)
        decode += batch * (weights + 2 * channels * (cached + 1))
        held += batch * cached * 2 * _heads(attention, keys=True) * attention.head_dim
    return prefill, rules, decode, held * decoder.dtype.itemsize


def _products(keep: Keep, before: Sequence[int], after: Sequence[int]) -> int:
    """Products of two rows that a rule makes where so many are left of each image; none where it has no choice."""
    if list(before) == list(after) or not isinstance(keep.rule, str):
        return 0
    return sum(map(RULES[keep.rule].products, before, after))


def _weights(module: nn.Module) -> int:
    """What a row costs in a module: each of its weights once."""
    return sum(_own_weights(part) for part in module.modules())


def _own_weights(module: nn.Module) -> int:
    if isinstance(module, PackedLinear):
        return module.packed_weight.shape.numel() // (2 if module.sparse else 1)
    if isinstance(module, nn.Linear):
        return module.weight.numel() // (2 if has_sparse24_weight(module) else 1)
    if isinstance(module, nn.Embedding | ParametrizationList):  # of a mask of a Linear's weight
        return 0
    weights = [parameter for parameter in module.parameters(recurse=False) if parameter.ndim > 1]
    if strange := [weight for weight in weights if weight.ndim > 2 and not isinstance(module, CONVOLUTIONS)]:
        shape, kind = tuple(strange[0].shape), type(module).__name__
        raise ValueError(f"model must have layers of Linears and convolutions, got a weight {shape} of a {kind}")
    return sum(weight.numel() for weight in weights)


def _weights_of_embedding(model: nn.Module, tower: Any, layers: str) -> int:
    """What a patch costs before the first layer: Linears and convolutions that are of no layer, projector or head."""
    others = [attrgetter(layers)(tower), *projectors_of(model), getattr(tower, "head", None)]
    elsewhere = {part for module in others if module is not None for part in module.modules()}
    kinds = (nn.Linear, PackedLinear, *CONVOLUTIONS)
    return sum(_own_weights(part) for part in tower.modules() if isinstance(part, kinds) and part not in elsewhere)


def _pooling(tower: Any, rows: int) -> int:
    """What a tile costs in the head of SigLIP, whose output no decoder reads: one row that attends to all."""
    head = getattr(tower, "head", None)
    attention: Any = getattr(head, "attention", None)
    if head is None or not isinstance(attention, nn.MultiheadAttention):
        return 0
    channels = attention.embed_dim
    return (
        sum(map(_weights, head.children())) + 2 * (rows - 1) * channels**2 + 2 * rows * channels
    )  # keys and values are of all rows


def _heads(attention: Any, keys: bool = False) -> int:
    named = ("num_key_value_heads",) if keys else ()
    names = (*named, "num_heads", "num_attention_heads")
    owners = (attention, attention.config)
    return next(int(n) for name in names for owner in owners if (n := getattr(owner, name, None)) is not None)


def _width(attention: Any) -> int:
    """Of all heads that ask; how many share their keys makes no difference."""
    return _heads(attention) * attention.head_dim
