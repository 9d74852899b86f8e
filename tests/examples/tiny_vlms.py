# SPDX-License-Identifier: Apache-2.0
"""Folders as those of published decoders, with tiny random weights and all that their processors need."""

from __future__ import annotations

from pathlib import Path

import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

MARKS = ["<pad>", "<image>", "<video>", "<start>", "<end>", "</s>"]
WORDS = ["what", "is", "the", "color", "of", "shape", "?", "red", "square", "user", "assistant"]
CHAT = (
    "{% for message in messages %}user {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %} {% endfor %}{% endfor %}assistant"
)
TEXT = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 5}


def save_tiny(name: str, folder: Path) -> None:
    """Of "llava" or "qwen2_5_vl"."""
    words = {word: number for number, word in enumerate([*MARKS, "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        extra_special_tokens=MARKS[1:5],
    )
    model, processor = {"llava": _llava, "qwen2_5_vl": _qwen}[name](fast)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _llava(tokenizer):
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 4, "projection_dim": 32}
    config = hf.LlavaConfig(vision_config=vision, text_config=TEXT | {"model_type": "llama"}, image_token_index=1)
    size = {"shortest_edge": 32}
    images = hf.CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32})
    processor = hf.LlavaProcessor(
        images,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT.replace("IMAGE", "<image>"),
    )
    return hf.LlavaForConditionalGeneration(config), processor


def _qwen(tokenizer):
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision = {"depth": 2, "num_heads": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48}
    vision |= {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]}
    config = hf.Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_parameters": rope},
        vision_config=vision,
        image_token_id=1,
        video_token_id=2,
        vision_start_token_id=3,
        vision_end_token_id=4,
    )
    tokenizer.image_token, tokenizer.video_token = "<image>", "<video>"
    tokenizer.image_token_id, tokenizer.video_token_id = 1, 2
    processor = hf.Qwen2_5_VLProcessor(
        hf.Qwen2VLImageProcessor(),
        tokenizer,
        hf.Qwen2VLVideoProcessor(),
        chat_template=CHAT.replace("IMAGE", "<start><image><end>"),
    )
    return hf.Qwen2_5_VLForConditionalGeneration(config), processor
