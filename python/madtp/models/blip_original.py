# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of the BLIP project (Li et al., ICML 2022) as Hugging Face models: VQA, NLVR, captions, retrieval."""

from __future__ import annotations

import math
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

from madtp.building import no_larger_than
from madtp.models.blip_nlvr import BlipForNLVR
from madtp_kernels.bounded_file import ODD_VALUES, one_line, require_regular

KINDS: dict[str, type[hf.PreTrainedModel]] = {
    "vqa": hf.BlipForQuestionAnswering,
    "nlvr": BlipForNLVR,
    "caption": hf.BlipForConditionalGeneration,
    "retrieval": hf.BlipForImageTextRetrieval,
}
HEAD_DIM = 64  # of every published model
POSITIONS = "vision_model.embeddings.position_embedding"

# In this order, on the names of the checkpoint.
_RENAMES = (
    (r"^visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", POSITIONS),
    (r"^visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual_encoder\.norm\.", "vision_model.post_layernorm."),
    (r"^visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision_model.encoder.layers.\1.layer_norm\2."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision_model.encoder.layers.\1.self_attn.qkv."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision_model.encoder.layers.\1.self_attn.projection."),
    (r"^visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision_model.encoder.layers.\1.mlp."),
    (r"^cls_head\.", "classifier."),
)
# Of the training: momentum encoders, queues, and the temperature of the contrastive loss; and what is a constant.
_UNUSED = re.compile(r"^(visual_encoder_m|text_encoder_m|vision_proj_m|text_proj_m)\.|_queue$|^temp$|\.position_ids$")


def from_original(
    path: str | os.PathLike, *, kind: str, config: hf.BlipConfig | None = None, image_size: int | None = None
) -> nn.Module:
    """Reads a .pth file of the BLIP project.

    Args:
        path: holds a state dict, or {"model": state dict}; loaded without running any code in it.
        kind: vqa, nlvr, caption or retrieval. A checkpoint without twin cross-attentions becomes an NLVR model by
            giving both images its one cross-attention; the layers that merge them, and the classifier where there is
            none, are then new.
        config: of the model; None reads the sizes off the weights, with heads of 64.
        image_size: of the images to come, pixels; the position table is interpolated (bicubic). None: the checkpoint's.

    Returns:
        the Hugging Face model (`BlipForNLVR` for nlvr), in eval mode.

    Raises:
        ValueError: kind is unknown, the file is no such checkpoint, or weights are left over, missing, more than they
            say or of a wrong shape; the first is named. FileNotFoundError: there is no file.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    path = Path(path)
    weights = _read(path)
    try:
        config = config or _config(weights, image_size)
    except ODD_VALUES as error:
        raise ValueError(
            f"path must hold weights that sizes can be read off, {path} has none ({one_line(error)})"
        ) from error
    fresh: set[str] = set()
    if kind == "nlvr" and not any(".crossattention.self0." in name for name in weights):
        weights = _doubled(weights)
        fresh = {"merge_layer", "classifier"}
    try:
        with no_larger_than(len(weights), sum(weight.numel() for weight in weights.values())):
            model = KINDS[kind](config)
    except (RuntimeError, *ODD_VALUES) as error:
        raise ValueError(f"path must hold the weights of a model that can be built ({one_line(error)})") from error
    vision: Any = config.vision_config
    side = vision.image_size // vision.patch_size
    if side < 1:
        raise ValueError(f"image_size must be at least {vision.patch_size}, got {vision.image_size}")
    weights[POSITIONS] = interpolated(weights[POSITIONS], side)
    return _loaded(model, weights, fresh)


def _read(path: Path) -> dict[str, Tensor]:
    """The weights of a file by the names that they have here."""
    if not os.path.lexists(path):
        raise FileNotFoundError(f"path must be a .pth file of the BLIP project, got {path}")
    try:
        size = require_regular(path)
        _check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle can raise anything
        raise ValueError(f"path must be a .pth file of the BLIP project, got {path} ({one_line(error)})") from error
    state = state.get("model", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or "visual_encoder.pos_embed" not in state:
        raise ValueError(f"path must hold the weights of a BLIP model (visual_encoder.pos_embed), {path} has none")
    weights = {name: value for name, value in state.items() if not isinstance(name, str) or not _UNUSED.search(name)}
    for name, value in weights.items():
        plain = isinstance(name, str) and isinstance(value, Tensor) and value.layout is torch.strided
        plain = plain and value.is_floating_point() and not value.is_meta
        if not plain or value.nbytes > min(size, value.untyped_storage().nbytes()):
            what = one_line(repr(name), 80)
            raise ValueError(f"path must hold floating-point tensors by name, each of its own bytes; {what} is none")
    return {_renamed(name): value for name, value in weights.items()}


def _check_archive(path: Path) -> None:
    """Raises ValueError for an archive with files that are larger than itself; torch writes them as they are."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            packed = next((entry for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED), None)
            if packed is not None:
                raise ValueError(f"{one_line(packed.filename, 80)} must not be compressed")


def interpolated(positions: Tensor, side: int) -> Tensor:
    """(1, 1 + n * n, C) for n x n patches and a class token -> (1, 1 + side * side, C), bicubic."""
    count = positions.shape[1] - 1 if positions.ndim == 3 and positions.shape[0] == 1 else 0
    before = math.isqrt(max(count, 0))
    if count < 1 or before**2 != count:
        raise ValueError(f"visual_encoder.pos_embed must be of a square of patches and a class token, got {count} + 1")
    if before == side:
        return positions
    grid = positions[:, 1:].unflatten(1, (before, before)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat((positions[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)


def _renamed(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name, count = re.subn(pattern, replacement, name)
        if count:
            break
    return name


def _doubled(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The cross-attention of every layer, twice: as BLIP starts NLVR from its pretrained model."""
    result = {}
    for name, value in weights.items():
        if ".crossattention.self." in name or ".crossattention.output.dense." in name:
            for twin in "01":
                place = name.replace(".crossattention.self.", f".crossattention.self{twin}.")
                result[place.replace(".output.dense.", f".output.dense{twin}.")] = value
        else:
            result[name] = value
    kept = ("vision_model.", "text_encoder.", "classifier.")
    return {name: value for name, value in result.items() if name.startswith(kept)}


def _config(weights: dict[str, Tensor], image_size: int | None) -> hf.BlipConfig:
    """The sizes of a checkpoint, read off its weights."""
    patch = weights["vision_model.embeddings.patch_embedding.weight"]  # (C, 3, P, P)
    if patch.ndim != 4 or min(patch.shape) < 1:
        raise ValueError(f"visual_encoder.patch_embed.proj.weight must be of four dimensions, got {tuple(patch.shape)}")
    size, width = patch.shape[-1], patch.shape[0]
    side = round((weights[POSITIONS].shape[1] - 1) ** 0.5)
    vision = {
        "hidden_size": width,
        "intermediate_size": weights["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": _count(weights, r"^vision_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": max(1, width // HEAD_DIM),
        "patch_size": size,
        "image_size": image_size or side * size,
    }
    text = {}
    prefix = next((p for p in ("text_encoder.", "text_decoder.bert.") if any(n.startswith(p) for n in weights)), None)
    if prefix is not None:
        words = weights[f"{prefix}embeddings.word_embeddings.weight"]
        text = {
            "vocab_size": words.shape[0],
            "hidden_size": words.shape[1],
            "encoder_hidden_size": width,
            "intermediate_size": weights[f"{prefix}encoder.layer.0.intermediate.dense.weight"].shape[0],
            "num_hidden_layers": _count(weights, rf"^{re.escape(prefix)}encoder\.layer\.(\d+)\."),
            "num_attention_heads": max(1, words.shape[1] // HEAD_DIM),
            "max_position_embeddings": weights[f"{prefix}embeddings.position_embeddings.weight"].shape[0],
        }
    shared = weights["vision_proj.weight"].shape[0] if "vision_proj.weight" in weights else 256
    return hf.BlipConfig(vision_config=vision, text_config=text, image_text_hidden_size=shared)


def _count(weights: dict[str, Tensor], pattern: str) -> int:
    """How many layers there are."""
    numbers = {match[1] for match in map(re.compile(pattern).match, weights) if match}
    if missing := {str(number) for number in range(len(numbers))} - numbers:
        raise ValueError(f"layers must be numbered from 0 on without a gap, number {min(missing)} is not there")
    return len(numbers)


def _loaded(model: hf.PreTrainedModel, weights: dict[str, Tensor], fresh: set[str]) -> nn.Module:
    """The model with the weights, all of them used; parameters with a name in `fresh` may keep their start."""
    expected = model.state_dict()
    for name, value in weights.items():
        if name not in expected:
            raise ValueError(f"path must hold the weights of a {type(model).__name__}, it has {one_line(name)} too")
        if value.shape != expected[name].shape:
            shapes = f"{tuple(expected[name].shape)}, got {tuple(value.shape)}"
            raise ValueError(f"path must hold {name} of shape {shapes}; is config that of the checkpoint?")
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    for name in expected:
        absent = name not in weights and name not in tied and not name.endswith(".position_ids")
        if absent and not any(part in name for part in fresh):
            raise ValueError(f"path must hold the weights of a {type(model).__name__}, it lacks {name}")
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    return model.eval()
