# SPDX-License-Identifier: Apache-2.0
"""Decoders that read images: the time to the first token and of a short answer, with image tokens pruned at each seam.

Weights and images are random, in the shapes of published models. `--set tiles=4` cuts the image of SmolVLM2 into
others; `--set tower_layers=4 --set decoder_layers=4` measures shallower models.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import transformers as hf
from torch import Tensor, nn

import madtp
from benchmarks.entries.models import EAGER, SDPA, sharing_weights, weight_bytes
from benchmarks.entry import Case, Entry, Thunk, Unavailable
from benchmarks.peers import openvino

ANSWER = 16  # tokens
TOLERANCE = 2e-3  # relative, of the logits, in float32
PREFILL_LAYER = 2
IMAGE_ID, PAD_ID, WORD_IDS = 3, 0, (10, 900)


def _smolvlm(case: Case) -> nn.Module:
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "image_size": 512}
    text = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9}
    text |= {"num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49280, "pad_token_id": PAD_ID}
    config = hf.SmolVLMConfig(
        vision_config=vision | {"patch_size": 16, "num_hidden_layers": case["tower_layers"]},
        text_config=text | {"num_hidden_layers": case["decoder_layers"]},
        image_token_id=IMAGE_ID,
        scale_factor=4,
    )
    return hf.SmolVLMForConditionalGeneration(config)


def _smolvlm_inputs(case: Case, draw: Callable[..., Tensor]) -> dict[str, Tensor]:
    """An image cut into tiles, and itself; each is 64 tokens behind a mark."""
    tiles = case["tiles"] + 1
    words = [WORD_IDS[0]] * 3
    prompt = sum(([*words, *[IMAGE_ID] * 64] for _ in range(tiles)), []) + _words(case)
    return {"input_ids": torch.tensor([prompt]), "pixel_values": draw(1, tiles, 3, 512, 512)}


def _llava(case: Case) -> nn.Module:
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "image_size": 336}
    vision |= {"model_type": "clip_vision_model", "patch_size": 14, "projection_dim": 768}
    text = {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14}
    text |= {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True, "pad_token_id": PAD_ID}
    config = hf.LlavaConfig(
        vision_config=vision | {"num_hidden_layers": case["tower_layers"]},
        text_config=text | {"num_hidden_layers": case["decoder_layers"]},
        image_token_index=IMAGE_ID,
    )
    return hf.LlavaForConditionalGeneration(config)


def _llava_inputs(case: Case, draw: Callable[..., Tensor]) -> dict[str, Tensor]:
    prompt = [WORD_IDS[0], *[IMAGE_ID] * 576, *_words(case)]
    return {"input_ids": torch.tensor([prompt]), "pixel_values": draw(1, 3, 336, 336)}


def _qwen2_vl(case: Case) -> nn.Module:
    text = {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2}
    text |= {"vocab_size": 151936, "pad_token_id": PAD_ID, "num_hidden_layers": case["decoder_layers"]}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}}
    config = hf.Qwen2VLConfig(
        text_config=text,
        vision_config={"depth": case["tower_layers"], "hidden_size": text["hidden_size"]},
        image_token_id=IMAGE_ID,
        tie_word_embeddings=True,
    )
    return hf.Qwen2VLForConditionalGeneration(config)


def _qwen2_vl_inputs(case: Case, draw: Callable[..., Tensor]) -> dict[str, Tensor]:
    """A square image in patches of 14 pixels, of which four make a token."""
    side = case["pixels"] // 14
    ids = torch.tensor([[WORD_IDS[0], *[IMAGE_ID] * (side * side // 4), *_words(case)]])
    return {
        "input_ids": ids,
        "pixel_values": draw(side * side, 3 * 2 * 14 * 14),  # each patch is there twice, as two frames
        "image_grid_thw": torch.tensor([[1, side, side]]),
        "mm_token_type_ids": (ids == IMAGE_ID).int(),
    }


def _words(case: Case) -> list[int]:
    low, high = WORD_IDS
    return [low + 7 * i % (high - low) for i in range(case["words"])]


class Shape(NamedTuple):
    build: Callable[[Case], nn.Module]
    inputs: Callable[[Case, Callable[..., Tensor]], dict[str, Tensor]]


SHAPES = {
    "SmolVLM2-256M": Shape(_smolvlm, _smolvlm_inputs),
    "LLaVA, 0.5B decoder": Shape(_llava, _llava_inputs),
    "Qwen2-VL-2B": Shape(_qwen2_vl, _qwen2_vl_inputs),
}
CASES = [
    {"model": "SmolVLM2-256M", "tiles": 12, "words": 60, "tower_layers": 12, "decoder_layers": 30},
    {"model": "LLaVA, 0.5B decoder", "words": 60, "tower_layers": 24, "decoder_layers": 24},
    {
        **{"model": "Qwen2-VL-2B", "pixels": 504, "words": 60, "tower_layers": 32, "decoder_layers": 28},
        "dtype": "bfloat16",
    },
]
SEAMS: dict[str, Callable[[float], dict[str, Any]]] = {
    "tower": lambda share: {"vision": share},
    "projector": lambda share: {"projector": share},
    "prefill": lambda share: {"prefill": {PREFILL_LAYER: share}},
}
KEEPS: dict[str, Mapping[str, Any]] = {
    "madtp dense": {"projector": 1.0},
    **{f"madtp {seam} 1/{part}": of(1 / part) for seam, of in SEAMS.items() for part in (2, 4)},
}


class Models:
    """A random model, and patched ones that share its weights."""

    def __init__(self, case: Case, device: torch.device):
        torch.manual_seed(0)
        self.dtype = getattr(torch, case.get("dtype", "float32")) if device.type == "cpu" else torch.bfloat16
        self.plain = SHAPES[case["model"]].build(case).eval().requires_grad_(False).to(device, self.dtype)
        self.plain.generation_config.eos_token_id = None
        self.patched: dict[str, nn.Module] = {}

    def with_attention(self, name: str) -> nn.Module:
        model = sharing_weights(self.plain)
        model.set_attn_implementation(name)
        return model

    @functools.cached_property
    def sdpa(self) -> nn.Module:
        return self.with_attention("sdpa")

    def keeping(self, provider: str) -> nn.Module:
        if provider not in self.patched:
            model = self.with_attention("sdpa")
            madtp.patch(model, keep=KEEPS[provider])
            self.patched[provider] = model
        return self.patched[provider]


class DecoderInputs(NamedTuple):
    models: Models
    tensors: dict[str, Tensor]


@functools.lru_cache(maxsize=1)
def _models(device: torch.device, **case: Any) -> Models:
    return Models(case, device)


def decoder_inputs(case: Case, device: torch.device, seed: int) -> DecoderInputs:
    models = _models(device, **{key: value for key, value in case.items() if key not in ("tiles", "pixels", "words")})
    generator = torch.Generator().manual_seed(seed)
    tensors = SHAPES[case["model"]].inputs(case, lambda *shape: torch.randn(shape, generator=generator))
    tensors["pixel_values"] = tensors["pixel_values"].to(models.dtype)
    tensors["attention_mask"] = torch.ones_like(tensors["input_ids"])
    return DecoderInputs(models, {name: tensor.to(device) for name, tensor in tensors.items()})


def first_token(model: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
    """(1, V): the logits that the first token of an answer is chosen by, with a cache for those that follow."""
    with torch.inference_mode():
        return model(**tensors, use_cache=True, logits_to_keep=1).logits[:, -1]


def answer(model: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
    """(1, ANSWER) token ids, greedy."""
    out = model.generate(**tensors, max_new_tokens=ANSWER, min_new_tokens=ANSWER, do_sample=False)  # type: ignore[operator]
    return out[:, tensors["input_ids"].shape[1] :]


class Images(nn.Module):
    """Tower and projector, from pixels to what takes the places of an image."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.model

    def forward(self, pixel_values: Tensor) -> Tensor:  # -> (image tokens, C)
        features: Any = self.model.get_image_features(pixel_values=pixel_values).pooler_output  # type: ignore[operator]
        return torch.cat([image.flatten(0, -2) for image in features])


class Prefill(nn.Module):
    """The decoder, from a prompt's embeddings to the logits behind it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.decoder, self.head = model.model.get_decoder(), model.lm_head  # type: ignore[operator]

    def forward(self, inputs_embeds: Tensor) -> Tensor:  # (1, T, C) -> (1, V)
        return self.head(self.decoder(inputs_embeds=inputs_embeds, use_cache=False).last_hidden_state[:, -1])


def on_openvino(i: DecoderInputs) -> Thunk:
    """Without the cache that a second token would need."""
    pixels, ids = i.tensors["pixel_values"], i.tensors["input_ids"]
    if pixels.device.type != "cpu":
        raise Unavailable("OpenVINO is compared on CPUs")
    if "image_grid_thw" in i.tensors:
        raise Unavailable("it is given a tower that takes pixels alone")
    embed = i.models.sdpa.get_input_embeddings()  # type: ignore[operator]
    images = openvino.load(openvino.convert(Images(i.models.sdpa), pixels), "f32")
    prefill = openvino.load(openvino.convert(Prefill(i.models.sdpa), embed(ids)), "f32")
    places = ids == IMAGE_ID

    def run() -> Tensor:
        with torch.inference_mode():
            prompt = embed(ids)
            prompt[places] = torch.from_numpy(images(pixels.numpy()))
            return torch.from_numpy(prefill(prompt.numpy())).clone()

    return run


Task = Callable[[nn.Module, dict[str, Tensor]], Tensor]


def providers(task: Task) -> dict[str, Callable[[DecoderInputs], Thunk]]:
    def plain(attention: str) -> Callable[[DecoderInputs], Thunk]:
        def prepare(i: DecoderInputs) -> Thunk:
            model = i.models.sdpa if attention == "sdpa" else i.models.with_attention(attention)
            return lambda: task(model, i.tensors)

        return prepare

    def ours(name: str) -> Callable[[DecoderInputs], Thunk]:
        def prepare(i: DecoderInputs) -> Thunk:
            model = i.models.keeping(name)
            return lambda: task(model, i.tensors)

        return prepare

    peers = {EAGER: plain("eager"), SDPA: plain("sdpa")}
    if task is first_token:
        peers["OpenVINO"] = on_openvino
    return peers | {name: ours(name) for name in KEEPS}


PRUNING = [name for name in KEEPS if name != "madtp dense"]


def check_first(i: DecoderInputs, result: Tensor, provider: str) -> None:
    """Without pruning: Hugging Face's logits. With: as many image tokens as were asked for."""
    if provider in PRUNING:
        return check_counts(i, result, provider)
    expected = first_token(i.models.sdpa, i.tensors).float()
    error = ((result.float() - expected).norm() / expected.norm()).item()
    assert error <= (TOLERANCE if i.models.dtype == torch.float32 else 5e-2), f"relative error {error:.1e}"
    return None


def check_answer(i: DecoderInputs, result: Tensor, provider: str) -> None:
    """Without pruning: the tokens of Hugging Face, in float32; in other dtypes rounding may choose others."""
    assert result.shape == (1, ANSWER), f"an answer of {tuple(result.shape)}"
    if provider in PRUNING:
        return check_counts(i, result, provider)
    if i.models.dtype == torch.float32 and provider != SDPA:
        expected = answer(i.models.sdpa, i.tensors)
        assert torch.equal(result, expected), f"{int((result != expected).sum())} of {ANSWER} tokens are others"
    return None


def check_counts(i: DecoderInputs, result: Tensor, provider: str) -> None:
    assert result.isfinite().all(), "the logits are not finite"
    handle: Any = i.models.keeping(provider).madtp_handle
    wanted = handle.counts(**i.tensors)
    for seam, found in handle.selections.items():
        left = _lengths(found)
        assert left == wanted[seam], f"{seam} keeps {left}, and {wanted[seam]} were asked for"


def _lengths(found: Any) -> Any:
    """Of tensors, as they are nested."""
    if isinstance(found, Mapping):
        return {key: _lengths(value) for key, value in found.items()}
    return [len(part) if isinstance(part, Tensor) else _lengths(part) for part in found]


ENTRIES = tuple(
    Entry(
        name=name,
        summary=summary,
        cases=CASES,
        inputs=decoder_inputs,
        providers=providers(task),
        baseline=SDPA,
        gate=gate,
        bytes=weight_bytes,
        sets=1,
        rounds=5,
        seconds=60,
        packages=("transformers", "openvino"),
        memory=False,
    )
    for name, summary, task, gate in (
        ("decoders_first_token", "time to the first token of decoders that read an image", first_token, check_first),
        ("decoders_answer", f"an answer of {ANSWER} tokens of decoders that read an image", answer, check_answer),
    )
)
