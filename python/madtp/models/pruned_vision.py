# SPDX-License-Identifier: Apache-2.0
"""A base model whose vision tower loses units: `get_image_features` and `get_video_features` give the tokens of those
that are left, and say which these are.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from madtp.models.patch_rows import distinct_units, patch_rows
from madtp.models.prompt import MODALITIES
from madtp.models.vision_connectors import CONNECTORS, Connector
from madtp.models.vision_packing import Packing
from madtp.models.vision_run import run_tower
from madtp.models.vision_seam import VisionSeam
from madtp.models.vision_towers import TOWERS, VisionTower


@dataclass
class TowerOutput(BaseModelOutputWithPooling):
    """What is left of images: `pooler_output` is a list, (n, D) an image, `deepstack_features` by layer such a list.

    Beside its fields, `madtp_left` says which units these are, and `madtp_joined` whether the model reads one tensor of
    all images.
    """

    pooler_output: list[Tensor] | None = None  # type: ignore[assignment]  # where that of most is a tensor
    deepstack_features: list[list[Tensor]] | None = None


class PrunedVision(nn.Module):
    """Mixed into the class of the base model."""

    madtp_vision: VisionSeam
    config: Any
    image_newline: Any

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if (parts := vars(cls).get("madtp_parts")) is None:  # a mixin, and not what it is mixed into
            return
        for modality in MODALITIES:
            name = f"get_{modality}_features"
            if hasattr(parts[0], name):
                setattr(cls, name, _pruned(getattr(parts[0], name), modality))

    def _encode(self, modality: str, arguments: Mapping[str, Any]) -> TowerOutput:
        connector, tower, spec = parts_of(self)
        side, layers = connector.side(self), len(attrgetter(spec.layers)(tower))
        given, tiles = connector.prepare(self, arguments, modality)
        rows = spec.rows(tower, given, side, tiles)
        packing = Packing.of(self, arguments, tiles) if connector.packed else None
        if packing is not None:
            rows = packing.of_places(rows)
        distinct, tolerance = None, self.madtp_vision.keep.duplicates
        if tolerance is not None:
            patches = patch_rows(tower, spec, given, side, tiles)
            distinct = distinct_units(patches if packing is None else packing.of_places(patches), tolerance)
        numbers, deep = connector.taken(self, layers), spec.deep(tower)
        features, record = run_tower(tower, spec, self.madtp_vision, rows, {*numbers, *deep}, distinct)
        if connector.hidden(self) is None and spec.norm is not None:
            features[layers] = attrgetter(spec.norm)(tower)(features[layers])
        read = [features[number] for number in numbers]
        tokens = connector.project(self, read[0] if len(read) == 1 else torch.cat(read, -1))
        if packing is not None:
            record, tokens = packing.tokens(record, tokens, self.image_newline)
        left = [int(part.sum()) for part in record.kept[-1].split(record.lengths)]
        output = TowerOutput(pooler_output=list(tokens.split(left)))
        if deep:
            mergers = zip(tower.deepstack_merger_list, deep, strict=True)
            output.deepstack_features = [list(m(features[n].flatten(0, 1)).split(left)) for m, n in mergers]
        output.madtp_left, output.madtp_joined = record, connector.joined
        return output


def _pruned(source: Callable[..., Any], modality: str) -> Callable[..., Any]:
    """`get_image_features`, or that of videos, of a patched class."""
    signature = inspect.signature(source)

    @functools.wraps(source)
    def get_features(self, *args, **kwargs):
        if self.madtp_vision.here.dense:
            return source(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs).arguments
        arguments = {**bound, **bound.pop("kwargs", {})}
        for name in ("vision_feature_layer", "vision_feature_layers", "vision_feature_select_strategy"):
            if arguments.get(name) not in (None, (own := getattr(self.config, name, None))):
                raise ValueError(
                    f"{name} must be that of the config, {own!r}, at the vision seam, got {arguments[name]!r}"
                )
        output = self._encode(modality, arguments)
        return output if arguments.get("return_dict", True) else output.to_tuple()

    return get_features


def parts_of(base: Any) -> tuple[Connector, Any, VisionTower]:
    """Of a base model that has a vision seam: how it reads its tower, the tower, and what is known of that."""
    connector = CONNECTORS[base.config.model_type]
    tower = getattr(base, connector.tower)
    return connector, tower, TOWERS[tower.config.model_type]


def depth_of(base: Any) -> int:
    """How many layers of the tower run."""
    connector, tower, spec = parts_of(base)
    return max([*connector.taken(base, len(attrgetter(spec.layers)(tower))), *spec.deep(tower)])
