# SPDX-License-Identifier: Apache-2.0
"""Tiny decoders that read images, with random weights, and prompts for them: what `madtp.patch(keep=)` is tested on.

A prompt batch has two samples with padding on the left, one image in the first and two in the second; float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import transformers as hf

IMAGE, VIDEO, PAD, BEGIN, END = 7, 8, 0, 5, 6
TEXT = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP = TOWER | {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 4, "num_hidden_layers": 3}
SIGLIP = TOWER | {"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 4, "vision_use_head": False}
PIXTRAL = TOWER | {"model_type": "pixtral", "image_size": 16, "patch_size": 4, "head_dim": 16}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
GRID = [[16, 32], [32, 16], [32, 32]]


class VlmCase(NamedTuple):
    """A family.

    Args:
        make: the model.
        pixels: (generator) -> the arguments of its images, three of them.
        plain: whether attention alone carries tokens, so that hiding is removing.
        chunks: whether transformers itself prefills in chunks as it does whole.
        static: whether transformers itself runs a static cache.
        beams: whether transformers itself gives each beam its images, where a sample has several.
        video: whether a video is tested.
    """

    make: Callable[[], Any]
    pixels: Callable[[torch.Generator], dict[str, Any]]
    plain: bool = True
    chunks: bool = True
    static: bool = True
    beams: bool = True
    video: bool = False


def _text(kind: str, **more: Any) -> dict[str, Any]:
    return TEXT | {"model_type": kind} | more


def _qwen(kind: str, **more: Any):
    mrope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}} | more
    vision = {"depth": 3, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}
    wide = vision | {"num_heads": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48}
    if kind == "Qwen2VL":
        vision |= {"num_heads": 2, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    elif kind == "Qwen2_5_VL":
        vision = wide | {"window_size": 16, "fullatt_block_indexes": [1]}
    else:
        mrope |= {"head_dim": 8}
        vision = wide | {"num_position_embeddings": 64}
        if not kind.startswith("Qwen3_5"):
            vision |= {"deepstack_visual_indexes": [0, 1]}
    config = getattr(hf, f"{kind}Config")(
        text_config=TEXT | mrope,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=BEGIN,
        vision_end_token_id=END,
    )
    return getattr(hf, f"{kind}ForConditionalGeneration")(config)


def _qwen3_5(kind: str = "Qwen3_5", **more: Any):
    heads = more | {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
    heads |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    return _qwen(kind, layer_types=["linear_attention", "full_attention", "linear_attention"], **heads)


def _exaone():
    """Whose tower shares key heads."""
    vision = {"depth": 3, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}
    vision |= {"num_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "out_hidden_size": 32}
    vision |= {"intermediate_size": 48, "window_size": 16, "fullatt_block_indexes": [1]}
    text = _text("exaone4", sliding_window=None, layer_types=["full_attention"] * 3)
    config = hf.Exaone4_5_Config(text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO)
    return hf.Exaone4_5_ForConditionalGeneration(config)


def _in_float64(model: Any) -> Any:
    """With experts that run in it."""
    model.set_experts_implementation("eager")
    return model


def _llava(vision: dict[str, Any] = CLIP, **more: Any):
    config = hf.LlavaConfig(vision_config=vision, text_config=_text("llama"), image_token_index=IMAGE, **more)
    return hf.LlavaForConditionalGeneration(config)


def _vipllava():
    config = hf.VipLlavaConfig(
        vision_config=CLIP, text_config=_text("llama"), image_token_index=IMAGE, vision_feature_layers=[-2, 1]
    )
    return hf.VipLlavaForConditionalGeneration(config)


def _llava_next():
    text = _text("mistral", sliding_window=None)
    config = hf.LlavaNextConfig(
        vision_config=CLIP, text_config=text, image_token_index=IMAGE, image_grid_pinpoints=GRID
    )
    return hf.LlavaNextForConditionalGeneration(config)


def _onevision():
    config = hf.LlavaOnevisionConfig(
        vision_config=SIGLIP,
        text_config=_text("qwen2"),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=GRID,
    )
    return hf.LlavaOnevisionForConditionalGeneration(config)


def _internvl(**more: Any):
    vision = TOWER | {"image_size": [16, 16], "patch_size": [2, 2]} | more
    config = hf.InternVLConfig(
        vision_config=vision, text_config=_text("qwen2"), image_token_id=IMAGE, image_seq_length=16
    )
    return hf.InternVLForConditionalGeneration(config)


def _idefics(kind: str):
    vision = TOWER | {"image_size": 32, "patch_size": 4}
    config = getattr(hf, f"{kind}Config")(
        vision_config=vision, text_config=_text("llama"), image_token_id=IMAGE, scale_factor=2
    )
    return getattr(hf, f"{kind}ForConditionalGeneration")(config)


def _paligemma(kind: str):
    text = _text(kind, head_dim=8)
    if kind == "gemma2":
        text |= {"sliding_window": 6, "num_hidden_layers": 4}
    config = hf.PaliGemmaConfig(
        vision_config=SIGLIP | {"projection_dim": 32},
        text_config=text,
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
        vocab_size=97,
    )
    return hf.PaliGemmaForConditionalGeneration(config)


def _gemma3():
    layers = ["sliding_attention", "full_attention"] * 2
    text = TEXT | {"head_dim": 8, "sliding_window": 12, "num_hidden_layers": 4, "layer_types": layers}
    config = hf.Gemma3Config(
        vision_config=SIGLIP | {"patch_size": 2},
        text_config=text,
        image_token_index=IMAGE,
        boi_token_index=BEGIN,
        eoi_token_index=END,
        mm_tokens_per_image=16,
    )
    return hf.Gemma3ForConditionalGeneration(config)


def _florence2():
    text = {"model_type": "bart", "vocab_size": 97, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2}
    text |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    text |= {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    text |= {"max_position_embeddings": 128, "forced_eos_token_id": None}
    vision = {"embed_dim": [8, 16], "depths": [1, 1], "patch_size": [3, 3], "patch_stride": [2, 2]}
    vision |= {"patch_padding": [1, 1], "patch_prenorm": [False, True], "num_heads": [2, 2], "num_groups": [2, 2]}
    vision |= {"window_size": 4, "projection_dim": 32, "max_position_embeddings": 20}
    return hf.Florence2ForConditionalGeneration(
        hf.Florence2Config(text_config=text, vision_config=vision, image_token_id=IMAGE)
    )


def _cohere(kind: str, **more: Any):
    text = _text("cohere2", head_dim=8, sliding_window=64)
    config = getattr(hf, f"{kind}Config")(
        vision_config=SIGLIP, text_config=text, image_token_id=IMAGE, downsample_factor=2, **more
    )
    return getattr(hf, f"{kind}ForConditionalGeneration")(config)


def _mistral3():
    text = _text("mistral", head_dim=8, sliding_window=None)
    config = hf.Mistral3Config(vision_config=PIXTRAL, text_config=text, image_token_index=IMAGE, spatial_merge_size=2)
    return hf.Mistral3ForConditionalGeneration(config)


def _glm4v(kind: str = "Glm4v", **more: Any):
    vision = {"depth": 2, "num_heads": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48}
    vision |= {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "image_size": 16, "in_channels": 3}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
    config = getattr(hf, f"{kind}Config")(
        vision_config=vision,
        text_config=TEXT | {"rope_parameters": rope} | more,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=BEGIN,
        image_end_token_id=END,
    )
    return getattr(hf, f"{kind}ForConditionalGeneration")(config)


def _deepseek():
    config = hf.DeepseekVLConfig(vision_config=SIGLIP, text_config=_text("llama"), image_token_id=IMAGE)
    return hf.DeepseekVLForConditionalGeneration(config)


def _janus():
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    vision |= {"projection_dim": 32, "mlp_ratio": 2}
    tokens = {"embed_dim": 8, "num_embeddings": 16, "double_latent": False, "latent_channels": 8, "base_channels": 32}
    tokens |= {"channel_multiplier": [1], "num_patches": 4, "projection_dim": 32, "num_hidden_layers": 1}
    config = hf.JanusConfig(
        vision_config=vision,
        vq_config=tokens | {"image_token_embed_dim": 8},
        text_config=_text("llama"),
        image_token_id=IMAGE,
    )
    return hf.JanusForConditionalGeneration(config)


def _lfm2():
    text = _text("lfm2", layer_types=["conv", "full_attention", "conv"], block_ff_dim=48, conv_L_cache=3)
    vision = TOWER | {
        "model_type": "siglip2_vision_model",
        "patch_size": 4,
        "num_patches": 16,
        "vision_use_head": False,
    }
    config = hf.Lfm2VlConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, downsample_factor=2, projector_hidden_size=32
    )
    return hf.Lfm2VlForConditionalGeneration(config)


def _naflex(generator: torch.Generator) -> dict[str, Any]:
    shapes = torch.tensor([[4, 8], [4, 4], [6, 4]])
    real = torch.arange(32) < shapes.prod(1)[:, None]
    return {"pixel_values": _draw(generator, 3, 32, 48), "spatial_shapes": shapes, "pixel_attention_mask": real.long()}


def _grids(generator: torch.Generator) -> dict[str, Any]:
    grids = torch.tensor([[1, 8, 4], [1, 4, 4], [1, 4, 8]])
    return {"pixel_values": _draw(generator, int(grids.prod(1).sum()), 96), "image_grid_thw": grids}


def _squares(generator: torch.Generator) -> dict[str, Any]:
    return {"pixel_values": _draw(generator, 3, 3, 16, 16)}


def _sized(generator: torch.Generator) -> dict[str, Any]:
    return _squares(generator) | {"image_sizes": torch.tensor([[16, 16], [16, 8], [16, 16]])}


def _anyres(generator: torch.Generator) -> dict[str, Any]:
    sizes = torch.tensor([[32, 16], [16, 16], [24, 32]])
    return {"pixel_values": _draw(generator, 3, 5, 3, 16, 16), "image_sizes": sizes}


def _tiles(generator: torch.Generator) -> dict[str, Any]:
    pixels = _draw(generator, 2, 2, 3, 32, 32)
    pixels[0, 1] = 0  # a tile of padding
    return {"pixel_values": pixels}


def _draw(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.double)


CASES = {
    "Qwen2-VL": VlmCase(lambda: _qwen("Qwen2VL"), _grids, video=True),
    "Qwen2.5-VL": VlmCase(lambda: _qwen("Qwen2_5_VL"), _grids, video=True),
    "Qwen3-VL": VlmCase(lambda: _qwen("Qwen3VL"), _grids, video=True),
    "LLaVA": VlmCase(_llava, _squares),
    "VipLLaVA": VlmCase(_vipllava, _squares),
    "LLaVA-NeXT": VlmCase(_llava_next, _anyres),
    "OneVision": VlmCase(_onevision, _anyres, video=True),
    "InternVL": VlmCase(_internvl, _squares),
    "SmolVLM": VlmCase(lambda: _idefics("SmolVLM"), _tiles),
    "Idefics3": VlmCase(lambda: _idefics("Idefics3"), _tiles),
    "Aya Vision": VlmCase(lambda: _cohere("AyaVision", vision_feature_layer=-1), _squares),
    "Cohere2 Vision": VlmCase(lambda: _cohere("Cohere2Vision", alignment_intermediate_size=32), _squares),
    "Mistral 3": VlmCase(_mistral3, _sized),
    "Janus": VlmCase(_janus, _squares),
    "GLM-4V": VlmCase(_glm4v, _grids, beams=False),
    "PaliGemma": VlmCase(lambda: _paligemma("gemma"), _squares, chunks=False),
    "PaliGemma 2": VlmCase(lambda: _paligemma("gemma2"), _squares, chunks=False, static=False),
    "Florence-2": VlmCase(_florence2, _squares, plain=False),
    "Gemma 3": VlmCase(_gemma3, _squares, plain=False, chunks=False),
}

# Towers that other cases do not have, for the seam inside of them.
TOWER_CASES = {
    "LLaVA with SigLIP": VlmCase(
        lambda: _llava(SIGLIP, vision_feature_layer=-1, vision_feature_select_strategy="full"), _squares
    ),
    "LLaVA with Pixtral": VlmCase(
        lambda: _llava(PIXTRAL, vision_feature_layer=-1, vision_feature_select_strategy="full"), _sized
    ),
    "EXAONE 4.5": VlmCase(_exaone, _grids),
    "Qwen3-VL MoE": VlmCase(lambda: _in_float64(_qwen("Qwen3VLMoe", **EXPERTS, num_experts=4)), _grids),
    "Qwen3.5": VlmCase(_qwen3_5, _grids, plain=False),
    "Qwen3.5 MoE": VlmCase(lambda: _in_float64(_qwen3_5("Qwen3_5Moe", **EXPERTS, num_experts=4)), _grids, plain=False),
    "GLM-4.6V": VlmCase(lambda: _glm4v("Glm46V", model_type="glm4v_text"), _grids),
    "GLM-4.5V": VlmCase(
        lambda: _in_float64(_glm4v("Glm4vMoe", **EXPERTS, n_routed_experts=4, n_group=1, topk_group=1)), _grids
    ),
    "DeepSeek-VL": VlmCase(_deepseek, _squares),
    "LFM2-VL": VlmCase(_lfm2, _naflex, plain=False, static=False),
    "InternVL 6B": VlmCase(lambda: _internvl(use_qk_norm=True, norm_type="rms_norm"), _squares),
}
TOWERS = [name for name in (*CASES, *TOWER_CASES) if name != "Florence-2"]
DECODERS = [name for name in CASES if name != "Florence-2"]  # whose layers read the prompt
QUICK = ("Qwen2.5-VL", "LLaVA", "SmolVLM")  # that are no slow tests
GREEDY = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
LAYERS_BY_HAND = [name for name in DECODERS if name != "PaliGemma 2"]  # whose layers a test runs one by one


def vlm_table() -> str:
    """What the tests show of each family, for docs/models.md."""
    header = ("model", "all kept", "some kept", "beams", "video", "static cache", "prefill in chunks", "gradients")
    header += ("prefill seam", "vision seam")
    rows = [header, ("---",) * len(header)]
    for name, case in CASES.items():
        decodes = name != "Florence-2"
        rows.append(
            (
                name,
                "yes",
                "as hidden" if case.plain else "by hand",
                "yes" if case.beams else "one image a sample",
                "yes" if case.video else "",
                ("yes" if case.static else "not in transformers") if decodes else "reads no prompt",
                ("yes" if case.chunks else "not in transformers") if decodes else "reads no prompt",
                "yes" if case.plain else "",
                "as hidden" + ", by hand" * (name in LAYERS_BY_HAND) if decodes else "reads no prompt",
                "by hand" if name in TOWERS else "refused",
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def make_vlm(name: str):
    """In eval mode and float64, with weights large enough for tokens to differ."""
    torch.manual_seed(0)
    model = (CASES | TOWER_CASES)[name].make()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    model.generation_config.pad_token_id = PAD
    return model.double().eval()


def vlm_batch(name: str, model, seed: int = 1, right: bool = False) -> dict[str, Any]:
    """The arguments of a forward of two samples, with one image and with two."""
    generator = torch.Generator().manual_seed(seed)
    pixels = (CASES | TOWER_CASES)[name].pixels(generator)
    with torch.no_grad():
        rows = model.base_model.get_image_features(**pixels, return_dict=True).pooler_output
    counts = [len(part) for part in rows]
    if name in ("SmolVLM", "Idefics3"):  # of samples, the second with two tiles
        counts = [16, 16, 16]

    def words(count: int) -> list[int]:
        return torch.randint(20, 97, (count,), generator=generator).tolist()

    def image(number: int) -> list[int]:
        return [BEGIN] + [IMAGE] * counts[number] + [END]

    samples = [words(3) + image(0) + words(5), words(2) + image(1) + words(3) + image(2) + words(9)]
    if name.startswith("PaliGemma"):  # images come first, without marks
        samples = [[IMAGE] * counts[0] + [1] + words(5), [IMAGE] * (counts[1] + counts[2]) + [1] + words(9)]
    width = max(map(len, samples))
    padded = [row + [PAD] * (width - len(row)) if right else [PAD] * (width - len(row)) + row for row in samples]
    ids = torch.tensor(padded)
    inputs = {"input_ids": ids, "attention_mask": (ids != PAD).long(), **pixels}
    if "image_grid_thw" in inputs and name != "EXAONE 4.5":  # whose positions are those of text
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    if name.startswith("PaliGemma"):
        inputs["token_type_ids"] = torch.zeros_like(ids)  # all of the prompt sees all of it
    if name == "Gemma 3":
        inputs["token_type_ids"] = (ids == IMAGE).long()
    return inputs


def mixed_prompt(name: str, model) -> tuple[dict[str, Any], list[int]]:
    """Two samples, left-padded: an image, and a video with an image; and the tokens of each."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.double)

    if name == "OneVision":
        pixels = {"pixel_values": draw(2, 3, 3, 16, 16), "image_sizes": torch.tensor([[16, 16], [16, 16]])}
        videos = {"pixel_values_videos": draw(1, 2, 3, 16, 16)}
    else:
        pixels = {"pixel_values": draw(48, 96), "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 8]])}
        videos = {"pixel_values_videos": draw(48, 96), "video_grid_thw": torch.tensor([[3, 4, 4]])}
        if name == "Qwen2.5-VL":
            videos["second_per_grid_ts"] = torch.ones(1)
    images = [len(part) for part in model.base_model.get_image_features(**pixels, return_dict=True).pooler_output]
    encoded = {key: value for key, value in videos.items() if key != "second_per_grid_ts"}
    frames = sum(len(part) for part in model.base_model.get_video_features(**encoded, return_dict=True).pooler_output)
    video = [BEGIN, *[VIDEO] * frames, END]
    if name == "Qwen3-VL":  # a run for each frame
        video = [token for _ in range(3) for token in (30, BEGIN, *[VIDEO] * (frames // 3), END)]
    first = [20, 21, BEGIN, *[IMAGE] * images[0], END, 22, 23]
    second = [24, *video, 25, BEGIN, *[IMAGE] * images[1], END, 26, 27, 28]
    width = max(len(first), len(second))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in (first, second)])
    inputs = {"input_ids": ids, "attention_mask": (ids != PAD).long(), **pixels, **videos}
    if name != "OneVision":
        inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    return inputs, [images[0], frames, images[1]]


def families(quick=QUICK, of=CASES):
    """A test of each of these families; those that are not quick are slow tests."""
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in of]
    )


def stays(importance, temperature):
    """The places of an image's tokens (n,) that are above the threshold of the method without MAG, by hand."""
    values = importance.double()
    deviation = (values - values.mean()).square().mean().sqrt()
    if deviation == 0:
        return torch.arange(len(values))
    threshold = ((values.mean() - values) / deviation / temperature).softmax(0) @ values
    goes = values <= threshold
    return torch.arange(len(values)) if goes.sum() < 2 else (~goes).nonzero().flatten()


def close(a, b):
    """Rotary tables, eager softmax and the logits of `generate` are float32."""
    torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-5)


def answers(out):
    return torch.stack(out.logits)
