# SPDX-License-Identifier: Apache-2.0
"""What a decoder makes of its prompt, layer by layer, where tokens may be gone: what the student has in common with its
teacher, which has all of them.

Text is in both, so it is compared row by row; of the image tokens their mean is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from madtp.dtp.record import Release
from madtp.models.patched_head import PatchedHead
from madtp.models.prompt import MODALITIES, find_placeholders, has_images
from madtp.models.seam import Seam, ThreadState


class Prompt(NamedTuple):
    """A prompt as it was given: (B, S) bool, what is no padding, and what of it are image tokens."""

    real: Tensor
    images: Tensor

    @property
    def columns(self) -> Tensor:
        """(B, S) int64: all of it, -1 for padding."""
        return torch.arange(self.real.shape[1], device=self.real.device).masked_fill(~self.real, -1)


class FeatureRecord:
    """What one forward left behind; gradients go once a backward has passed.

    Args:
        layers: (B, N_l, C) each, what left a layer.
        columns: of each (B, N_l) int64, the places of the prompt that it holds, -1 for padding.
        left: those that the logits are of; None: all, of a prompt without images.
    """

    def __init__(
        self,
        prompt: Prompt | None = None,
        layers: Sequence[Tensor] = (),
        columns: Sequence[Tensor] = (),
        left: Tensor | None = None,
    ):
        self.left = left
        self.text: list[Tensor] = []  # (R, C): the rows of text, sample by sample
        self.vision: list[Tensor] = []  # (B, C): the mean of the image tokens of each prompt
        for hidden, held in zip(layers, columns, strict=True):
            assert prompt is not None, "layers are of a prompt"
            held = held.to(hidden.device)
            is_image = prompt.images.to(held.device).gather(1, held.clamp(min=0)) & (held >= 0)
            self.text.append(hidden[(held >= 0) & ~is_image])
            count = is_image.sum(1, keepdim=True).clamp(min=1)
            self.vision.append((hidden * is_image[..., None]).sum(1) / count)  # no product, which would count as MACs
        if torch.is_grad_enabled():
            release = Release(self)
            for feature in (*self.text, *self.vision):
                if feature.requires_grad:
                    feature.register_hook(release)

    def release(self) -> None:
        """Keeps the values and lets go of their graph."""
        self.text = [feature.detach() for feature in self.text]
        self.vision = [feature.detach() for feature in self.vision]


class FeatureState(ThreadState):
    """What one thread knows: the layers that have run in a forward, and what the last one left."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[Tensor] | None = None
        self.record = FeatureRecord()


class DecoderFeatures(Seam):
    """The features of a decoder that is trained, of each thread its own."""

    State = FeatureState


class RecordedLayer(nn.Module):
    """Mixed into a decoder layer: outside of gradient checkpointing, whose second run leaves nothing."""

    madtp_features: DecoderFeatures

    def __call__(self, *args, **kwargs):
        output = super().__call__(*args, **kwargs)
        if (running := self.madtp_features.here.running) is not None:
            running.append(output if isinstance(output, Tensor) else output[0])
        return output


class RecordedHead(PatchedHead):
    """Mixed into the class with the language head, outside of the seams."""

    madtp_features: DecoderFeatures

    def _forward(self, kwargs: dict[str, Any]):
        run, here, input_ids = super().forward, self.madtp_features.here, kwargs.get("input_ids")
        if any(seam.here.calls for seam in self._seams):  # it generates
            return run(**kwargs)
        here.record = FeatureRecord()
        if not isinstance(input_ids, Tensor) or not has_images(kwargs):
            return run(**kwargs)
        here.running = []
        try:
            output = run(**kwargs)
            layers = here.running
        finally:
            here.running = None
        prompt = self._prompt(input_ids, kwargs)
        found = {number: hidden for number, hidden in enumerate(layers) if number >= self._first_pruned}
        columns = [self._held(prompt, number) for number in found]
        here.record = FeatureRecord(prompt, list(found.values()), columns, self._held(prompt, len(layers) - 1))
        return output

    @property
    def _seams(self) -> list[Any]:
        names = ("madtp_projector", "madtp_prefill")
        return [seam for name in names if (seam := getattr(self, name, None)) is not None]

    @property
    def _first_pruned(self) -> int:
        """The first layer that some image tokens do not reach."""
        return 0 if hasattr(self, "madtp_projector") else min(self._seams[0].keep)

    def _prompt(self, input_ids: Tensor, kwargs: Mapping[str, Any]) -> Prompt:
        mask = kwargs.get("attention_mask")
        images = [find_placeholders(input_ids, self.config, modality) for modality in MODALITIES]
        real = torch.ones_like(images[0]) if mask is None else mask.bool()
        return Prompt(real, torch.stack(images).any(0))

    def _held(self, prompt: Prompt, layer: int) -> Tensor:
        """(B, N) int64: the places of the prompt that a layer held in the forward that just ran."""
        columns = prompt.columns
        projector, prefill = (getattr(self, name, None) for name in ("madtp_projector", "madtp_prefill"))
        if projector is not None and not projector.here.dense:
            columns = projector.here.record.columns
        if prefill is not None and not prefill.here.dense:
            slots = prefill.here.record.slots.get(layer)
            if slots is not None:
                columns = columns.gather(1, slots.clamp(min=0)).masked_fill(slots < 0, -1)
        return columns
