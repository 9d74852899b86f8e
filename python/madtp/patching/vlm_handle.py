# SPDX-License-Identifier: Apache-2.0
"""The controls of a decoder that was patched with `keep=`: what is left of its images, seam by seam."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import groupby, pairwise
from typing import Any

from torch import Tensor, nn

from madtp.dtp.keep import Keep
from madtp.dtp.keep_rules import RULES
from madtp.hwp.packing import Epilogue, unpack
from madtp.models.mixing import change_class, check_forward, mixed
from madtp.models.prefill_layers import PrefillLayer, WatchedAttention
from madtp.models.prefill_seam import RULES_HERE, PrefillSeam
from madtp.models.projector_seam import ProjectorSeam
from madtp.models.prompt import MODALITIES, count_images, in_prompt_order, token_of
from madtp.models.pruned_prefill import PrunedPrefill
from madtp.models.vlm import (
    decoder_of,
    first_prefill_layer,
    mixin_of,
    prefill_unsupported_reason,
    unsupported_reason,
    window_of,
)
from madtp.patching.saving import save
from madtp.patching.state import Packed, Settings

PROJECTOR, PREFILL = "projector", "prefill"
DEFAULT_RULES = {PROJECTOR: "divprune", PREFILL: "fastv"}  # of a plain share or count, by seam
Amounts = Keep | dict[int, Keep]  # of a seam; of prefill by layer


class VlmHandle:
    """A patched decoder's controls; `madtp.patch(keep=)` makes it and the model keeps it as `model.madtp_handle`.

    Args:
        seams: by name, where image tokens are pruned: "projector", "prefill", or both.
    """

    pruning: Mapping[str, Any] = {}  # there are no branches with a temperature
    branches: Mapping[str, tuple[str, ...]] = {}
    epilogues: Mapping[str, Epilogue] = {}

    def __init__(self, model: nn.Module, keep: Mapping[str, Any]):
        self.model = model
        self._keep = check_keep(keep)
        if (reason := unsupported_reason(model)) is not None:
            raise TypeError(f"model must have a projector seam, {reason}, got {type(model).__name__}")
        self.seams: dict[str, Any] = {}
        if isinstance(projector := self._keep.get(PROJECTOR), Keep):
            self.seams[PROJECTOR] = ProjectorSeam(projector)
        if isinstance(prefill := self._keep.get(PREFILL), dict):
            _check_layers(model, prefill)
            self.seams[PREFILL] = PrefillSeam(prefill)
        for name, module in model.named_modules():
            if hasattr(module, "madtp_handle"):
                raise ValueError(f"model must have no part that is patched already, got {name or 'model'}")
        modules = [(model, mixin) for mixin in self._head_mixins()]
        if PREFILL in self.seams:
            decoder = decoder_of(model)
            modules += [(layer, PrefillLayer) for layer in decoder.layers]
            modules += [(decoder.layers[layer - 1].self_attn, WatchedAttention) for layer in self.seams[PREFILL].keep]
        names = {module: name for name, module in model.named_modules()}
        for module, _ in modules:
            check_forward(module, names[module])
        self.sources: dict[nn.Module, type] = {}
        for module, mixin in modules:
            source: Any = type(module)  # mypy holds a type[nn.Module] to be unhashable
            self.sources.setdefault(module, source)
            change_class(module, mixed(source, mixin))
        self._attach()

    def _head_mixins(self) -> list[type]:
        """From the inner one to the outer one."""
        mixins = {PREFILL: PrunedPrefill, PROJECTOR: mixin_of(self.model)}
        return [mixin for name, mixin in mixins.items() if name in self.seams]

    def _attach(self) -> None:
        model: Any = self.model  # torch declares tensors, modules
        for name, seam in self.seams.items():
            setattr(model, f"madtp_{name}", seam)
        if PREFILL in self.seams:
            decoder = decoder_of(model)
            for number, layer in enumerate(decoder.layers):
                layer.madtp_prefill = layer.self_attn.madtp_prefill = self.seams[PREFILL]
                layer.madtp_window = window_of(decoder.config, number)
        model.madtp_handle = self

    @property
    def keep(self) -> dict[str, Amounts]:
        """By seam, what is left of each image; of prefill by layer."""
        return dict(self._keep)

    @property
    def selections(self) -> dict[str, Any]:
        """Of the last prompt with images of this thread, by seam: for each image, in the order of the prompt, the
        places kept among the tokens that the projector gives it, int64 ascending. Of prefill such a list by layer."""
        found: dict[str, Any] = {}
        for name, seam in self.seams.items():
            record = seam.here.record
            found[name] = {} if record is None else record.selections()
        return found

    @property
    def columns(self) -> Tensor | None:
        """(B, S') int64: the places of the whole prompt that were left in the last one of this thread, -1 for padding.

        The logits of a forward are of these. None before the first prompt with images.
        """
        records = [self.seams[name].here.record for name in (PROJECTOR, PREFILL) if name in self.seams]
        columns = records[0] and records[0].columns
        if len(records) == 1 or columns is None or records[1] is None:
            return columns
        inside = records[1].columns
        return columns.gather(1, inside.clamp(min=0)).masked_fill(inside < 0, -1)

    def counts(self, **inputs: Any) -> dict[str, Any]:
        """How many tokens of each image will be left, by seam, before anything is encoded; of prefill by layer.

        Args:
            inputs: those of a forward or of `generate`: read are `input_ids`, and shapes of pixels and grids.

        Raises:
            ValueError: what is left depends on more than lengths, or the prompt does not say where an image ends.
        """
        input_ids = inputs.get("input_ids")
        if not isinstance(input_ids, Tensor) or input_ids.ndim != 2:
            raise ValueError(f"input_ids must be a tensor (B, S), got {type(input_ids).__name__}")
        config: Any = self.model.config
        known = [modality for modality in MODALITIES if token_of(config, modality) is not None]
        images = [count_images(input_ids, config, inputs, modality) for modality in known]
        ordered = in_prompt_order(images, (each.lengths for each in images))
        counts: dict[str, Any] = {}
        if PROJECTOR in self.seams:
            counts[PROJECTOR] = ordered = self.seams[PROJECTOR].keep.counts(ordered)
        if PREFILL in self.seams:
            counts[PREFILL] = self.seams[PREFILL].counts(ordered)
        return counts

    @contextmanager
    def simulated(self) -> Iterator[None]:
        """A context in which tokens are hidden and not removed, for the thread that enters it: the whole prompt, at
        its positions, with an attention mask of zeros where a token would go.

        The answers are those of pruning wherever attention alone carries tokens; sliding windows, convolutions and
        recurrent layers count the columns, and Florence-2 its positions.
        """
        with self._counted("simulated"):
            yield

    @contextmanager
    def dense(self) -> Iterator[None]:
        """A context in which nothing is pruned, for the thread that enters it."""
        with self._counted("dense"):
            yield

    @contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        with ExitStack() as stack:
            for seam in self.seams.values():
                stack.enter_context(seam.here.counted(name))
            yield

    @contextmanager
    def inference(self) -> Iterator[None]:
        """As of any handle: there is nothing that training alone computes."""
        yield

    def explain(self) -> str:
        """A table of the seams: rule and amount, tokens and columns of the last prompt of this thread, and what is
        refused, and why."""
        lines = []
        if PROJECTOR in self.seams:
            keep, record = self.seams[PROJECTOR].keep, self.seams[PROJECTOR].here.record
            lines.append((PROJECTOR, "rule", keep.name, _amount(keep)))
            if record.columns is not None:
                before, after = record.lengths(), [len(places) for places in record.selections()]
                how = "hidden" if record.hidden else "removed"
                lines.append((PROJECTOR, "tokens", f"{sum(before)} -> {sum(after)}", f"{how}, images: {len(before)}"))
                width = record.columns.shape[1]
                lines.append((PROJECTOR, "columns", f"{record.width} -> {width}", "of the prompt"))
                if PREFILL not in self.seams:
                    lines.append((PROJECTOR, "cache", str(width), "columns after the prompt"))
        if PREFILL in self.seams:
            lines += self._explain_prefill()
        lines += [("all", "refused", what, why) for what, why in REFUSED.items()]
        if PREFILL in self.seams:
            lines += [(PREFILL, "refused", what, why) for what, why in REFUSED_BY_PREFILL.items()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)

    def _explain_prefill(self) -> list[tuple[str, str, str, str]]:
        seam = self.seams[PREFILL]
        lines = [(PREFILL, f"rule, {n}", keep.name, f"{_amount(keep)}") for n, keep in seam.keep.items()]
        if (record := seam.here.record) is None or record.columns is None:
            return lines
        counts = [record.entered(), *map(record.images.counts, record.kept.values())]
        how = "hidden" if record.hidden else "removed"
        for layer, (before, after) in zip(record.kept, pairwise(counts), strict=True):
            what = f"{sum(before)} -> {sum(after)}"
            lines.append((PREFILL, f"tokens, {layer}", what, f"{how}, images: {len(before)}"))
        layers = len(decoder_of(self.model).layers)
        widths = [record.slots.get(layer, record.real).shape[1] for layer in range(layers)]
        for width, group in groupby(range(layers), widths.__getitem__):
            first, *_, last = [*group] * 2
            lines.append((PREFILL, "cache", str(width), f"columns after the prompt, layers {first} to {last}"))
        return lines

    def remove(self) -> nn.Module:
        """Undoes everything: the model is of its Hugging Face class again, its Linears plain. Once done, no more."""
        if getattr(self.model, "madtp_handle", None) is not self:  # of another patch, or of none
            return self.model
        unpack(self.model)
        for module, source in self.sources.items():
            change_class(module, source)
        if PREFILL in self.seams:
            for layer in decoder_of(self.model).layers:
                del layer.madtp_prefill, layer.madtp_window, layer.self_attn.madtp_prefill
        for name in self.seams:
            delattr(self.model, f"madtp_{name}")
        del self.model.madtp_handle
        return self.model

    def save(self, write: Callable[..., None], options: dict[str, Any]) -> None:
        """`save_pretrained` of the model, of which `write` is the one of Hugging Face."""
        save(self, write, **options)

    def saved(
        self, packed: dict[str, Packed], state_dict: Mapping[str, Tensor] | None
    ) -> tuple[Settings, Mapping[str, Tensor] | None]:
        """What config.json is to hold, and the state dict to write. Raises ValueError where a rule is a function."""
        return Settings(None, {}, packed, saved_keep(self.keep)), state_dict


REFUSED = {
    "assisted generation": "its candidates are positions of the whole prompt",
    "a cache that holds a pruned prompt": "token ids of a conversation no longer fit it",
    "inputs_embeds with images": "placeholders are found by their ids",
    "an attention mask that is not (B, S)": "its columns go with the tokens",
}
REFUSED_BY_PREFILL = {
    "a prompt read in chunks": "its last token ranks, and is not there yet",
    "static caches of sliding windows": "they hold places by columns of the whole prompt",
    "attention other than sdpa, eager, madtp": "their masks are not known",
}


def check_keep(keep: Mapping[str, Any]) -> dict[str, Amounts]:
    """By seam. Raises ValueError for an unknown seam, a bad amount, or a rule that cannot run there."""
    if not isinstance(keep, Mapping) or not keep or set(keep) - set(DEFAULT_RULES):
        got = ", ".join(map(str, keep)) if isinstance(keep, Mapping) else type(keep).__name__
        raise ValueError(f"keep must be a dict with the seams {PROJECTOR!r}, {PREFILL!r} or both, got {got or 'none'}")
    checked: dict[str, Amounts] = {}
    if PROJECTOR in keep:
        checked[PROJECTOR] = value = Keep.of(keep[PROJECTOR], DEFAULT_RULES[PROJECTOR])
        if value.needs_importance:
            runs = ", ".join(rule for rule, entry in RULES.items() if not entry.needs_importance)
            what = f"mass {value.mass}" if value.mass is not None else f"rule {value.name!r}"
            raise ValueError(
                f"keep of {PROJECTOR!r} must do without the importance of attention, which is not computed there: an "
                f"amount and one of the rules {runs}, or a function; got {what}"
            )
    if PREFILL in keep:
        checked[PREFILL] = _check_prefill(keep[PREFILL])
    return checked


def _check_prefill(given: Any) -> dict[int, Keep]:
    if not isinstance(given, Mapping) or not given:
        got = f"{given!r}" if isinstance(given, float | int) else type(given).__name__
        raise ValueError(
            f"keep of {PREFILL!r} must be a dict by how many layers have run, such as {{2: 0.5}}, got {got}"
        )
    for layer in given:
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 1:
            raise ValueError(f"keep of {PREFILL!r} must be by a number of layers, an int >= 1, got {layer!r}")
    checked = {layer: Keep.of(given[layer], DEFAULT_RULES[PREFILL]) for layer in sorted(given)}
    for layer, value in checked.items():
        if isinstance(value.rule, str) and value.rule not in RULES_HERE:
            raise ValueError(
                f"keep of {PREFILL!r} behind layer {layer} must have one of the rules {', '.join(RULES_HERE)}, or a "
                f"function, got {value.rule!r}"
            )
    for (before, first), (layer, value) in pairwise(checked.items()):
        one, other, where = first.amount, value.amount, f"keep of {PREFILL!r}"
        if one is not None and other is not None and type(one) is type(other) and other > one:
            raise ValueError(
                f"{where} must not grow from layer to layer, got {one} behind {before} and {other} behind {layer}"
            )
    return checked


def saved_keep(keep: Mapping[str, Amounts]) -> dict[str, Any]:
    """Plain values, ready for JSON. Raises ValueError where a rule is a function."""
    return {
        seam: value.to_dict() if isinstance(value, Keep) else {str(n): part.to_dict() for n, part in value.items()}
        for seam, value in keep.items()
    }


def loaded_keep(keep: Mapping[str, Any]) -> dict[str, Any]:
    """Of `saved_keep`. Raises ValueError and TypeError where it is none."""
    loaded: dict[str, Any] = {}
    for seam, value in keep.items():
        by_layer = seam == PREFILL
        loaded[seam] = {int(n): Keep(**part) for n, part in value.items()} if by_layer else Keep(**value)
    return loaded


def _check_layers(model: nn.Module, keep: Mapping[int, Keep]) -> None:
    """Raises TypeError for a decoder that is not known, ValueError for layers that are not there."""
    if (reason := prefill_unsupported_reason(model)) is not None:
        raise TypeError(
            f"model must have a prefill seam, {reason}, got {type(model).__name__}: Qwen-VL, LLaVA, InternVL, SmolVLM, "
            "PaliGemma, Gemma 3 and decoders like theirs have one"
        )
    first, last = first_prefill_layer(model), len(decoder_of(model).layers) - 1
    wrong = next((layer for layer in keep if not first <= layer <= last), None)
    if wrong is not None:
        raise ValueError(f"keep of {PREFILL!r} must be behind layers {first} to {last} of this model, got {wrong}")


def _amount(keep: Keep) -> str:
    if keep.mass is not None:
        return f"mass {keep.mass} of each image"
    return "by itself" if keep.amount is None else f"{keep.amount} of each image"
