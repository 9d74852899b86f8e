# SPDX-License-Identifier: Apache-2.0
"""A model as what makes a vector of an image: its vision tower, and what projects that to where texts are."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

from madtp.choices import VECTORS
from madtp.config import CompressionConfig
from madtp.handles import find_handle
from madtp.inference import evaluating
from madtp.models.family import Family
from madtp.models.registry import FAMILIES, family_of
from madtp.models.towers import tower_of
from madtp.patching.handle import patch
from madtp.patching.keep_rate import check_rates, find_temperatures, kept_shares
from madtp.tasks.loading import load_image_processor, load_model, no_image_processor

VISION = "vision"
KINDS = [family.source for family in FAMILIES if family.source is not None and VISION in family.towers]
# Class -> the Linear behind its tower, by which images are compared with texts. SigLIP's tower is there already.
PROJECTIONS: dict[type[nn.Module], str] = {
    hf.CLIPModel: "visual_projection",
    hf.VisionTextDualEncoderModel: "visual_projection",
    hf.BlipForImageTextRetrieval: "vision_proj",
}


class ImageEncoder:
    """Makes a vector of each image, with the vision tower of a model alone.

    Args:
        model: of a class of `FAMILIES` with a vision tower, dense or patched; it runs in eval mode, where it is.
        image_processor: of Hugging Face: a picture -> pixel_values.
        vector: "projected": what the model compares with texts. "pooled": what its tower pools, or else the features
            of its CLS. None: the first where there is one.

    Raises:
        TypeError: the class is not known. ValueError: there is no vision tower, or no such vector.
    """

    def __init__(self, model: Any, image_processor: Any, vector: str | None = None):
        handle = find_handle(model)
        family = getattr(handle, "family", None) if handle is not None else family_of(model)
        if family is None:
            raise TypeError(
                f"model must be one of {', '.join(kind.__name__ for kind in KINDS)}, got {type(model).__name__}"
            )
        if VISION not in family.towers:
            raise ValueError(f"model must have a vision tower, got a {type(model).__name__}")
        projection = next((name for kind, name in PROJECTIONS.items() if isinstance(model, kind)), None)
        known = VECTORS if projection is not None else VECTORS[1:]
        if vector not in (None, *known):
            raise ValueError(f"vector must be {' or '.join(known)} for a {type(model).__name__}, got {vector!r}")
        self.model, self.image_processor, self.path = model, image_processor, family.path(VISION)
        self.vector = vector or known[0]
        self.projection = projection if self.vector == VECTORS[0] else None
        spec = tower_of(self.tower)
        if spec is not None and spec.summary_tokens == 0 and not getattr(self.tower, "use_head", True):
            raise ValueError(f"model must pool its images, got a {type(model).__name__} without a head")

    @property
    def tower(self) -> Any:
        return self.model.get_submodule(self.path)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def to(self, device: str) -> ImageEncoder:
        """Moves the model."""
        self.model.to(device)
        return self

    @property
    def width(self) -> int:
        """Numbers of a vector."""
        if self.projection is None:
            return self.tower.config.hidden_size
        return self.model.get_submodule(self.projection).out_features

    @property
    def temperature(self) -> float | None:
        """Of the vision tower; None: it is not patched."""
        handle = self._handle()
        return None if handle is None else handle.temperatures[VISION]

    def checksum(self) -> str:
        """SHA-256 of all weights and settings of the model, and of the settings of the image processor."""
        digest = hashlib.sha256(type(self.model).__name__.encode())
        digest.update(json.dumps(self.image_processor.to_dict(), sort_keys=True, default=str).encode())
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(memoryview(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
        return digest.hexdigest()

    def patch(self) -> None:
        """Patches the tower of a dense model, with alignment tokens that are the same each time."""
        if find_handle(self.model) is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                config = CompressionConfig(alignment_dim=self.tower.config.hidden_size)
                patch(self.tower, config, family=Family({VISION: ""}))

    def set_temperature(self, temperature: float) -> None:
        """Of the vision tower, which is patched."""
        self._handle().set_temperature({VISION: temperature})

    def set_keep_rate(self, keep_rate: float, pixels: Sequence[Tensor]) -> None:
        """Finds the temperature of the vision tower, which is patched, on a few batches of images, (B, 3, H, W)."""
        handle = self._handle()
        batches = [self._inputs(batch) for batch in pixels]
        shares = lambda: kept_shares(handle, batches, VISION)  # noqa: E731
        find_temperatures(handle, check_rates({VISION: keep_rate}, handle.pruning), shares, handle.config)

    def __call__(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, `width`) float32, on the CPU."""
        with evaluating(self.model):
            out = self.tower(**self._inputs(pixels))
            if self.projection is None:
                vectors = out.last_hidden_state[:, 0] if out.pooler_output is None else out.pooler_output
            elif isinstance(self.model, hf.BlipForImageTextRetrieval):  # which compares directions
                vectors = F.normalize(self.model.vision_proj(out.last_hidden_state[:, 0]), dim=-1)
            else:
                vectors = self.model.get_submodule(self.projection)(out.pooler_output)
        return vectors.float().cpu()

    def _handle(self) -> Any:
        return find_handle(self.tower) or find_handle(self.model)

    def _inputs(self, pixels: Tensor) -> dict[str, Any]:
        """Of the tower; positions are interpolated where the images are not of its own size."""
        weight = next(parameter for parameter in self.model.parameters() if parameter.is_floating_point())
        size = getattr(self.tower.config, "image_size", None)
        own = (size, size) if isinstance(size, int) else tuple(size or ())
        inputs: dict[str, Any] = {"pixel_values": pixels.to(weight.device, weight.dtype)}
        # DINOv2 does so unasked, and has no such argument.
        if own != tuple(pixels.shape[-2:]) and not isinstance(self.tower, hf.Dinov2Model):
            inputs["interpolate_pos_encoding"] = True
        return inputs


def load_encoder(
    directory: Path, *, vector: str | None = None, dtype: torch.dtype | None = None, device: str | None = None
) -> ImageEncoder:
    """The encoder of a folder that Hugging Face or madtp has saved.

    Raises:
        DataError, ModelError: the folder is missing or broken, holds a model of another kind, or no image processor.
        ValueError: as `ImageEncoder`, or for a device that there is not.
    """
    model = load_model(directory, KINDS, complete=True, dtype=dtype)
    processor = load_image_processor(directory)
    if processor is None:
        raise no_image_processor(directory)
    try:
        nn.Module.to(model, default_device() if device is None else device)
    except (RuntimeError, AssertionError) as error:  # of a torch without it
        raise ValueError(f"device must be one that torch can use, got {device!r} ({error})") from error
    return ImageEncoder(model, processor, vector)


def default_device() -> str:
    """The GPU of this process, as torchrun numbers them, or the CPU."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
