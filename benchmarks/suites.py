# SPDX-License-Identifier: Apache-2.0
"""Suites: the work of one kind of model as cases of several entries, those of the whole model last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.entry import Case


@dataclass(frozen=True)
class Suite:
    """One kind of model.

    Args:
        summary: what it is.
        cases: entry -> its cases in place of the entry's own.
    """

    summary: str
    cases: Mapping[str, Sequence[Case]]


def _attention(heads: int, dtype: str = "float32") -> list[Case]:
    return [{"batch": batch, "tokens": 577, "heads": heads, "head_dim": 64, "dtype": dtype} for batch in (1, 4)]


def _prune(channels: int) -> list[Case]:
    return [{"batch": 8, "tokens": 576, "channels": channels, "alignment_tokens": 100, "keep": 0.5, "dtype": "float32"}]


def _linear(width: int, hidden: int, rows: Sequence[int]) -> list[Case]:
    layers = (
        {"in_features": width, "out_features": 3 * width, "epilogue": "bias"},
        {"in_features": width, "out_features": width, "epilogue": "residual"},
        {"in_features": width, "out_features": hidden, "epilogue": "gelu"},
        {"in_features": hidden, "out_features": width, "epilogue": "residual"},
    )
    return [{"tokens": tokens, **layer, "dtype": "float32"} for tokens in rows for layer in layers]


def _int8(width: int, hidden: int, rows: Sequence[int]) -> list[Case]:
    cases = _linear(width, hidden, rows)
    return [{key: value for key, value in case.items() if key != "epilogue"} for case in cases]


SUITES = {
    "vit-b-384": Suite(
        summary="a ViT-B on 384 x 384 pixels: 577 tokens of 768 channels, 12 heads",
        cases={
            "attention": _attention(12),
            "prune_step_layernorm": _prune(768),
            "sparse24_linear": _linear(768, 3072, (577, 289)),
            "quantized_linear": _int8(768, 3072, (577, 289)),
            "models": [
                {"model": "BLIP vision", "pixels": 384, "patch": 16, "width": 768, "layers": 12, "batch": 1},
            ],
        },
    ),
    "vit-l-336": Suite(
        summary="a ViT-L on 336 x 336 pixels: 577 tokens of 1024 channels, 16 heads",
        cases={
            "attention": _attention(16),
            "prune_step_layernorm": _prune(1024),
            "sparse24_linear": _linear(1024, 4096, (577, 289)),
            "quantized_linear": _int8(1024, 4096, (577, 289)),
            "models": [
                {"model": "CLIP vision", "pixels": 336, "patch": 14, "width": 1024, "layers": 24, "batch": 1},
            ],
        },
    ),
    "vlm": Suite(
        summary="a decoder of 0.5B with a prompt of 576 image tokens and 24 words, and a quarter of these left",
        cases={
            "sparse24_linear": _linear(896, 4864, (600, 168)),
            "quantized_linear": _int8(896, 4864, (600, 168)),
            "attention_rows": [{"decoder": "SmolVLM2-256M", "rows": 1, "dtype": "float32"}],
            "decoders_first_token": [
                {"model": "LLaVA, 0.5B decoder", "words": 24, "tower_layers": 24, "decoder_layers": 24},
            ],
        },
    ),
}
