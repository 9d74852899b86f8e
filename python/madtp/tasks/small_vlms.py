# SPDX-License-Identifier: Apache-2.0
"""Small decoders that read mosaics, of the shapes of LLaVA-1.5 and Qwen2-VL, before training, and their processors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

from madtp.data.mosaics import SIDE, VOCABULARY
from madtp.tasks.loading import load_model

SHIPPED = Path(__file__).parents[1] / "assets" / "mosaics-llava"
PAD, UNKNOWN, BEGIN, END = "<pad>", "<unk>", "<s>", "</s>"
MARKS = (PAD, UNKNOWN, BEGIN, END, "<image>", "<video>", "<vision>", "</vision>")
WIDTH, LAYERS, TEXT_LAYERS, HEADS, CONTEXT = 128, 5, 4, 4, 512
QWEN_LAYERS = 3  # of the tower, which sees four patches for each token
PATCH = 12  # pixels of a token of the decoder: 8 x 8 of them see a picture
INIT_STD = 0.06  # as of `small_models`: the usual 0.02 is for wider models
IMAGE_MEAN = IMAGE_STD = [0.5, 0.5, 0.5]
CHAT = (
    "{{ '<s>' }}{% for message in messages %}{{ 'USER: ' if message['role'] == 'user' else ' ' }}"
    "{% for part in message['content'] %}"
    "{{ 'IMAGE ' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{{ ' ASSISTANT:' if message['role'] == 'user' else ' </s> ' }}{% endfor %}"
)


class SmallVlm(NamedTuple):
    """kind: its class. make: the model, of random weights. processor: that belongs to it."""

    kind: type[Any]
    make: Callable[[], Any]
    processor: Callable[[], Any]


def _tokenizer() -> hf.PreTrainedTokenizerFast:
    """A word of the vocabulary is a token."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*MARKS, *VOCABULARY])}, unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=BEGIN,
        eos_token=END,
        extra_special_tokens=list(MARKS[4:]),
        model_max_length=CONTEXT,
    )


def _text() -> dict[str, Any]:
    return {
        "vocab_size": len(MARKS) + len(VOCABULARY),
        "hidden_size": WIDTH,
        "intermediate_size": 5 * WIDTH // 2,
        "num_hidden_layers": TEXT_LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": CONTEXT,
        "initializer_range": INIT_STD,
        "tie_word_embeddings": True,
        "pad_token_id": MARKS.index(PAD),
        "bos_token_id": MARKS.index(BEGIN),
        "eos_token_id": MARKS.index(END),
    }


def _llava() -> hf.LlavaForConditionalGeneration:
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": WIDTH,
        "intermediate_size": 3 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    config = hf.LlavaConfig(
        vision_config=vision,
        text_config=_text() | {"model_type": "llama"},
        image_token_index=MARKS.index("<image>"),
        tie_word_embeddings=True,
        vision_feature_layer=-1,  # a small tower has no layer to spare
    )
    return hf.LlavaForConditionalGeneration(config)


def _llava_processor() -> hf.LlavaProcessor:
    images = hf.CLIPImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=IMAGE_MEAN,
        image_std=IMAGE_STD,
    )
    return hf.LlavaProcessor(
        images,
        _tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT.replace("IMAGE", "<image>"),
    )


def _qwen2_vl() -> hf.Qwen2VLForConditionalGeneration:
    """With 16 x 16 patches of 6 pixels, of which 2 x 2 are a token of the decoder."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    vision = {"depth": QWEN_LAYERS, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": HEADS, "mlp_ratio": 3}
    vision |= {"patch_size": PATCH // 2, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}
    names = ("<image>", "<video>", "<vision>", "</vision>")
    keys = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids: dict[str, Any] = {key: MARKS.index(name) for key, name in zip(keys, names, strict=True)}
    config = hf.Qwen2VLConfig(
        text_config=_text() | {"rope_parameters": rope},
        vision_config=vision | {"initializer_range": INIT_STD},
        tie_word_embeddings=True,
        **ids,
    )
    return hf.Qwen2VLForConditionalGeneration(config)


class StillQwen2VLProcessor(hf.Qwen2VLProcessor):
    """Of images and no videos: what reads these needs torchvision, also where there are none."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **options):
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template, **options)


def _qwen2_vl_processor() -> StillQwen2VLProcessor:
    tokenizer: Any = _tokenizer()
    tokenizer.image_token, tokenizer.video_token = "<image>", "<video>"
    images = hf.Qwen2VLImageProcessorPil(
        patch_size=PATCH // 2,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": SIDE**2, "longest_edge": SIDE**2},
        image_mean=IMAGE_MEAN,
        image_std=IMAGE_STD,
    )
    return StillQwen2VLProcessor(
        images,
        tokenizer,
        chat_template=CHAT.replace("IMAGE", "<vision><image></vision>"),
    )


SMALL_VLMS = {
    "llava": SmallVlm(hf.LlavaForConditionalGeneration, _llava, _llava_processor),
    "qwen2_vl": SmallVlm(hf.Qwen2VLForConditionalGeneration, _qwen2_vl, _qwen2_vl_processor),
}


def load_small_vlm(folder: Path | str = SHIPPED, name: str = "llava") -> tuple[Any, Any]:
    """The model of a folder, in eval mode and float32, and its processor; the LLaVA that ships if none is named.

    Raises:
        DataError: the folder is missing or broken.
    """
    small = SMALL_VLMS[name]
    return load_model(folder, [small.kind], dense=True).float(), small.processor()
