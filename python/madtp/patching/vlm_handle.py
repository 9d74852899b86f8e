# SPDX-License-Identifier: Apache-2.0
"""The controls of a decoder that was patched with `keep=`: what is left of its images, seam by seam."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from madtp.dtp.keep import Keep
from madtp.dtp.keep_rules import RULES
from madtp.hwp.packing import Epilogue, unpack
from madtp.models.mixing import change_class, check_forward, mixed
from madtp.models.projector_seam import ProjectorSeam
from madtp.models.prompt import MODALITIES, count_images, token_of
from madtp.models.vlm import mixin_of, unsupported_reason
from madtp.patching.saving import save
from madtp.patching.state import Packed, Settings

PROJECTOR = "projector"
DEFAULT_RULES = {PROJECTOR: "divprune"}  # of a plain share or count, by seam


class VlmHandle:
    """A patched decoder's controls; `madtp.patch(keep=)` makes it and the model keeps it as `model.madtp_handle`.

    Args:
        seams: by name, where image tokens are pruned; one is there so far, "projector".
    """

    pruning: Mapping[str, Any] = {}  # there are no branches with a temperature
    branches: Mapping[str, tuple[str, ...]] = {}
    epilogues: Mapping[str, Epilogue] = {}

    def __init__(self, model: nn.Module, keep: Mapping[str, Any]):
        self.model = model
        self.seams = {name: ProjectorSeam(value) for name, value in check_keep(keep).items()}
        if (reason := unsupported_reason(model)) is not None:
            raise TypeError(f"model must have a projector seam, {reason}, got {type(model).__name__}")
        for name, module in model.named_modules():
            if hasattr(module, "madtp_handle"):
                raise ValueError(f"model must have no part that is patched already, got {name or 'model'}")
        check_forward(model, "")
        source: Any = type(model)  # mypy holds a type[nn.Module] to be unhashable
        self.source = source
        change_class(model, mixed(source, mixin_of(model)))
        model.madtp_projector = self.seams[PROJECTOR]  # type: ignore[assignment]  # torch declares tensors, modules
        model.madtp_handle = self  # type: ignore[assignment]

    @property
    def keep(self) -> dict[str, Keep]:
        """By seam, what is left of each image."""
        return {name: seam.keep for name, seam in self.seams.items()}

    @property
    def selections(self) -> dict[str, list[Tensor]]:
        """Of the last prompt with images of this thread, by seam: for each image, in the order of the prompt, the
        places kept among the tokens that came to the seam, int64 ascending."""
        return {name: seam.here.record.selections() for name, seam in self.seams.items()}

    @property
    def columns(self) -> Tensor | None:
        """(B, S') int64: the places of the whole prompt that were left in the last one of this thread, -1 for padding.

        The logits of a forward are of these. None before the first prompt with images.
        """
        return self.seams[PROJECTOR].here.record.columns

    def counts(self, **inputs: Any) -> dict[str, list[int]]:
        """How many tokens of each image will be left, by seam, before anything is encoded.

        Args:
            inputs: those of a forward or of `generate`: read are `input_ids`, and shapes of pixels and grids.

        Raises:
            ValueError: what is left depends on more than lengths, or the prompt does not say where an image ends.
        """
        input_ids = inputs.get("input_ids")
        if not isinstance(input_ids, Tensor) or input_ids.ndim != 2:
            raise ValueError(f"input_ids must be a tensor (B, S), got {type(input_ids).__name__}")
        lengths: list[tuple[int, int]] = []
        config: Any = self.model.config
        for modality in MODALITIES:
            if token_of(config, modality) is not None:
                images = count_images(input_ids, config, inputs, modality)
                lengths += zip(images.begins(), images.lengths, strict=True)
        ordered = [length for _, length in sorted(lengths, key=lambda pair: pair[0])]
        return {name: seam.keep.counts(ordered) for name, seam in self.seams.items()}

    @contextmanager
    def simulated(self) -> Iterator[None]:
        """A context in which tokens are hidden and not removed, for the thread that enters it: the whole prompt, at
        its positions, with an attention mask of zeros where a token would go.

        The answers are those of pruning wherever attention alone carries tokens; sliding windows, convolutions and
        recurrent layers count the columns, and Florence-2 its positions.
        """
        with self.seams[PROJECTOR].here.counted("simulated"):
            yield

    @contextmanager
    def dense(self) -> Iterator[None]:
        """A context in which nothing is pruned, for the thread that enters it."""
        with self.seams[PROJECTOR].here.counted("dense"):
            yield

    @contextmanager
    def inference(self) -> Iterator[None]:
        """As of any handle: there is nothing that training alone computes."""
        yield

    def explain(self) -> str:
        """A table of the seams: rule and amount, tokens and columns of the last prompt of this thread, and what is
        refused, and why."""
        lines = []
        for name, seam in self.seams.items():
            keep, record = seam.keep, seam.here.record
            amount = f"mass {keep.mass}" if keep.mass is not None else keep.amount
            lines.append((name, "rule", keep.name, "by itself" if amount is None else f"{amount} of each image"))
            if record.columns is not None:
                before, after = record.lengths(), [len(places) for places in record.selections()]
                how = "hidden" if record.hidden else "removed"
                lines.append((name, "tokens", f"{sum(before)} -> {sum(after)}", f"{how}, images: {len(before)}"))
                width = record.columns.shape[1]
                lines.append((name, "columns", f"{record.width} -> {width}", "of the prompt"))
                lines.append((name, "cache", str(width), "columns after the prompt"))
        lines += [("all", "refused", what, why) for what, why in REFUSED.items()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)

    def remove(self) -> nn.Module:
        """Undoes everything: the model is of its Hugging Face class again, its Linears plain. Once done, no more."""
        if getattr(self.model, "madtp_handle", None) is not self:  # of another patch, or of none
            return self.model
        unpack(self.model)
        change_class(self.model, self.source)
        for name in ("madtp_projector", "madtp_handle"):
            delattr(self.model, name)
        return self.model

    def save(self, write: Callable[..., None], options: dict[str, Any]) -> None:
        """`save_pretrained` of the model, of which `write` is the one of Hugging Face."""
        save(self, write, **options)

    def saved(
        self, packed: dict[str, Packed], state_dict: Mapping[str, Tensor] | None
    ) -> tuple[Settings, Mapping[str, Tensor] | None]:
        """What config.json is to hold, and the state dict to write. Raises ValueError where a rule is a function."""
        keep = {name: value.to_dict() for name, value in self.keep.items()}
        return Settings(None, {}, packed, keep), state_dict


REFUSED = {
    "assisted generation": "its candidates are positions of the whole prompt",
    "a cache that holds a pruned prompt": "token ids of a conversation no longer fit it",
    "inputs_embeds with images": "placeholders are found by their ids",
    "an attention mask that is not (B, S)": "its columns go with the tokens",
}


def check_keep(keep: Mapping[str, Any]) -> dict[str, Keep]:
    """By seam. Raises ValueError for an unknown seam, a bad amount, or a rule that cannot run there."""
    if not isinstance(keep, Mapping) or not keep or set(keep) - {PROJECTOR}:
        got = ", ".join(map(str, keep)) if isinstance(keep, Mapping) else type(keep).__name__
        raise ValueError(f"keep must be a dict with the seam {PROJECTOR!r}, the only one there is, got {got or 'none'}")
    checked = {name: Keep.of(value, DEFAULT_RULES[name]) for name, value in keep.items()}
    for name, value in checked.items():
        if value.needs_importance:
            runs = ", ".join(rule for rule, entry in RULES.items() if not entry.needs_importance)
            what = f"mass {value.mass}" if value.mass is not None else f"rule {value.name!r}"
            raise ValueError(
                f"keep of {name!r} must do without the importance of attention, which is not computed there: an amount "
                f"and one of the rules {runs}, or a function; got {what}"
            )
    return checked
