# SPDX-License-Identifier: Apache-2.0
"""Decoders of published shapes on the meta device, with a prompt of one image, and the table of what they cost.

Configs are those of the model cards: widths, depths, heads, patches and vocabularies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers as hf

import madtp

IMAGE = 7


class Shape(NamedTuple):
    """A model.

    Args:
        make: its class and its config.
        pixels: shapes of what the processor gives, and grids.
        tokens, text: of the prompt.
    """

    make: Callable[[], tuple[Any, Any]]
    pixels: dict[str, Any]
    tokens: int
    text: int


def _qwen():
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text = {"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36}
    text |= {"num_attention_heads": 16, "num_key_value_heads": 2, "rope_parameters": rope}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048}
    vision |= {"patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}
    config = hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE)
    return hf.Qwen2_5_VLForConditionalGeneration, config


def _llava():
    vision = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "patch_size": 14}
    vision |= {"num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336}
    text = {"model_type": "llama", "vocab_size": 32064}
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    return hf.LlavaForConditionalGeneration, config


def _smolvlm():
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    text = {"model_type": "llama", "vocab_size": 49280, "hidden_size": 576, "intermediate_size": 1536}
    text |= {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = hf.SmolVLMConfig(
        vision_config=vision | {"image_size": 512, "patch_size": 16},
        text_config=text,
        image_token_id=IMAGE,
        scale_factor=4,
    )
    return hf.SmolVLMForConditionalGeneration, config


def _gemma3():
    vision = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "image_size": 896}
    vision |= {"num_hidden_layers": 27, "num_attention_heads": 16, "patch_size": 14, "vision_use_head": False}
    text = {"vocab_size": 262208, "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    text |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 1024}
    config = hf.Gemma3Config(vision_config=vision, text_config=text, image_token_index=IMAGE, mm_tokens_per_image=256)
    return hf.Gemma3ForConditionalGeneration, config


def _internvl():
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    text = {"model_type": "qwen2", "vocab_size": 151674, "hidden_size": 1536, "intermediate_size": 8960}
    text |= {"num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2}
    config = hf.InternVLConfig(
        vision_config=vision | {"image_size": [448, 448], "patch_size": [14, 14]},
        text_config=text,
        image_token_id=IMAGE,
    )
    return hf.InternVLForConditionalGeneration, config


SHAPES = {
    "Qwen2.5-VL-3B, 1036 x 756": Shape(
        _qwen, {"pixel_values": (3996, 1176), "image_grid_thw": torch.tensor([[1, 54, 74]])}, 999, 60
    ),
    "LLaVA-1.5-7B, 336 x 336": Shape(_llava, {"pixel_values": (1, 3, 336, 336)}, 576, 60),
    "SmolVLM2-256M, 13 tiles of 512": Shape(_smolvlm, {"pixel_values": (1, 13, 3, 512, 512)}, 832, 99),
    "Gemma 3 4B": Shape(_gemma3, {"pixel_values": (1, 3, 896, 896)}, 256, 60),
    "InternVL3-2B": Shape(_internvl, {"pixel_values": (1, 3, 448, 448)}, 256, 60),
}
IN_TABLE = tuple(SHAPES)[:3]
KEPT = {"1/2": 1 / 2, "1/4": 1 / 4, "1/9": 1 / 9}


def make_shape(name: str) -> tuple[Any, dict[str, Any]]:
    """The model in bfloat16 and the arguments of a forward; all but ids and grids on the meta device."""
    shape = SHAPES[name]
    kind, config = shape.make()
    with torch.device("meta"):
        model = kind(config).to(torch.bfloat16).eval()
    pixels = {
        key: torch.empty(value, device="meta", dtype=torch.bfloat16) if isinstance(value, tuple) else value
        for key, value in shape.pixels.items()
    }
    return model, {"input_ids": torch.tensor([[IMAGE] * shape.tokens + [20] * shape.text]), **pixels}


def shapes_table() -> str:
    """What the models cost, for docs/method.md."""
    rows: list[tuple[str, ...]] = [("GMAC", "tower", "projector", "prefill")]
    rows[0] += tuple(f"{seam}: {', '.join(KEPT)}" for seam in ("vision", "projector"))
    rows[0] += (f"layer 2: {', '.join(KEPT)}", "a token more", "cache, MB")
    rows.append(("---",) * len(rows[0]))
    for name in IN_TABLE:
        model, inputs = make_shape(name)
        dense = madtp.prompt_cost(model, **inputs)
        shares = []
        for make in (lambda r: {"vision": r}, lambda r: {"projector": r}, lambda r: {"prefill": {2: r}}):
            costs = [madtp.prompt_cost(model, make(share), **inputs) for share in KEPT.values()]
            shares.append(", ".join(f"{cost.first_token / dense.first_token:.2f}" for cost in costs))
        macs = (f"{amount / 1e9:.0f}" for amount in (dense.vision, dense.projector, dense.prefill))
        rows.append((name, *macs, *shares, f"{dense.decode / 1e9:.2f}", f"{dense.cache_bytes / 1e6:.1f}"))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
