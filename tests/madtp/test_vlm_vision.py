# SPDX-License-Identifier: Apache-2.0
"""`madtp.patch(keep={"vision": ...})`: units that go inside the vision tower, family by family.

The towers are held against Hugging Face's own, whole and dense, whose attention is one of the test: plain softmax, in
which keys of units that are gone are hidden. It chooses by itself.
"""

import math

import pytest
import torch
from transformers import AttentionInterface
from transformers.vision_utils import get_vision_window_index
from vlm_families import (
    TOWERS,
    close,
    families,
    make_vlm,
    vlm_batch,
)

import madtp


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def llava():
    model = make_vlm("LLaVA")
    return model, vlm_batch("LLaVA", model)


class Oracle:
    """What a dense tower's attention does, layer after layer, with `share` of the units left at the end.

    Args:
        unit: (R,) the unit that each row is of, -1 for none, in the order of the tower's rows.
        lengths: units of each image.
        depth: layers after which some go.
    """

    def __init__(self, unit, lengths, depth, share):
        self.unit, self.lengths, self.depth, self.share = unit, lengths, depth, share
        self.alive = torch.ones(sum(lengths), dtype=torch.bool)
        self.kept, self.received, self.row = [], torch.zeros(len(unit), dtype=torch.double), 0

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        rows = slice(self.row, self.row + query.shape[0] * query.shape[2])
        unit = self.unit[rows].view(query.shape[0], -1)
        gone = (unit >= 0) & ~self.alive[unit]
        scores = (query @ key.transpose(2, 3) * scaling).masked_fill(gone[:, None, None], -torch.inf)
        p = scores.softmax(-1).nan_to_num(0)  # a segment of which nothing is left
        seen = p.amax(1).masked_fill((gone | (unit < 0))[:, :, None], 0)  # by tokens, and not by CLS
        self.received[rows] = seen.sum(1).flatten().double()
        self.row = rows.stop
        if self.row == len(self.unit):
            self.choose()
        return (p @ value).transpose(1, 2), None

    def choose(self):
        self.row = 0
        layer = len(self.kept) + 1
        if layer > self.depth:
            return
        score = torch.zeros(len(self.alive), dtype=torch.double).index_add(
            0, self.unit.clamp(min=0), self.received * (self.unit >= 0)
        )
        score = score.masked_fill(~self.alive, -1)
        kept = []
        for part, n in zip(score.split(self.lengths), self.lengths, strict=True):
            count = max(math.ceil(round(n * self.share ** (layer / self.depth), 9)), 1)
            kept.append(part.topk(count).indices.sort().values)
        self.kept.append(kept)
        ends = torch.tensor([0, *self.lengths]).cumsum(0)
        self.alive = torch.zeros_like(self.alive)
        for begin, part in zip(ends, kept, strict=False):
            self.alive[begin + part] = True


def oracle(model, inputs, share, modality="image"):
    """-> the features of each image that are left, those for layers of the decoder, and by layer what was kept."""
    base, depth = model.base_model, None
    tower = getattr(base, "visual", None) or getattr(base, "vision_tower", None) or base.vision_model
    layers = len(next(part for part in tower.modules() if isinstance(part, torch.nn.ModuleList) and len(part) > 1))
    names = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}[modality]
    pixels = {name: inputs[name] for name in names if name in inputs}
    encode = getattr(base, f"get_{modality}_features")
    whole = encode(**pixels, return_dict=True).pooler_output
    lengths = [len(part) for part in whole]
    if names[1] in inputs:
        unit = torch.arange(sum(lengths)).repeat_interleave(4)
        if hasattr(tower, "window_size"):
            index = get_vision_window_index(inputs[names[1]], 2, tower.window_size, tower.patch_size)[0]
            unit = unit.view(-1, 4)[index].flatten()
    else:
        rows = (
            tower.embeddings.patch_embedding
            if hasattr(tower.embeddings, "patch_embedding")
            else tower.embeddings.patch_embeddings.projection
        )
        side = pixels["pixel_values"].shape[-1] // rows.kernel_size[0]
        images = int((pixels["pixel_values"].flatten(0, -4) != 0).flatten(1).any(1).sum())  # without tiles of padding
        units = sum(lengths) // images
        s = round((side**2 / units) ** 0.5)
        grid = torch.arange(side) // s
        unit = (grid[:, None] * (side // s) + grid).flatten()[None] + torch.arange(images)[:, None] * units
        if hasattr(tower.embeddings, "class_embedding") or hasattr(tower.embeddings, "cls_token"):
            unit = torch.nn.functional.pad(unit, (1, 0), value=-1)
        unit = unit.flatten()
    depth = max(

            n % (layers + 1)
            for n in torch.tensor(
                getattr(base.config, "vision_feature_layer", getattr(base.config, "vision_feature_layers", -1))
            )
            .flatten()
            .tolist()

    )
    watching = Oracle(unit, lengths, depth, share)
    AttentionInterface.register("vision_oracle", watching)
    before, tower.config._attn_implementation = tower.config._attn_implementation, "vision_oracle"
    try:
        out = encode(**pixels, return_dict=True)
    finally:
        tower.config._attn_implementation = before
    left = [part[kept] for part, kept in zip(out.pooler_output, watching.kept[-1], strict=True)]
    deep = [
        [part[kept] for part, kept in zip(layer, watching.kept[-1], strict=True)]
        for layer in out.get("deepstack_features") or ()
    ]
    return left, deep, watching.kept


def features(model, inputs):
    names = ("pixel_values", "image_grid_thw")
    return model.base_model.get_image_features(**{name: inputs[name] for name in names if name in inputs})


QUICK = ("Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL", "LLaVA", "SmolVLM", "InternVL")


@families(quick=QUICK, of=TOWERS)
def test_towers_by_hand(name):
    model = make_vlm(name)
    inputs = vlm_batch(name, model)
    for share in (0.5, 0.15):
        expected, deep, kept = oracle(model, inputs, share)
        handle = madtp.patch(model, keep={"vision": share})
        out = features(model, inputs)
        assert [[a.tolist() for a in layer] for layer in out.madtp_left.selections()] == [
            [a.tolist() for a in layer] for layer in kept
        ]
        for a, b in zip(out.pooler_output, expected, strict=True):
            close(a, b)
        for layer, by_hand in zip(out.get("deepstack_features") or [], deep, strict=True):
            for a, b in zip(layer, by_hand, strict=True):
                close(a, b)
        handle.remove()
