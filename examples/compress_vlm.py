# SPDX-License-Identifier: Apache-2.0
"""Compresses a decoder that reads images: image tokens pruned in the tower and behind the projector, 2:4 weights.

The model is a LLaVA of 0.3 M parameters with random weights, made on the spot, and so is the data set, conversations
about squares in the form of LLaVA's files. It is trained for a few steps first, so that there is something to keep.

python examples/compress_vlm.py --out runs/vlm
"""

import argparse
import json
import random
import sys
from pathlib import Path

import torch
import transformers as hf
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers

import madtp
from madtp.data.conversations import Conversations
from madtp.reporting.report import markdown
from madtp.tasks.small_models import train
from madtp.tasks.vlm import VlmTask

COLORS = ("red", "green", "blue", "black")
SIDES = ("left", "right")
WORDS = (
    "<pad>",
    "<unk>",
    "<s>",
    "</s>",
    "<image>",
    "USER:",
    "ASSISTANT:",
    "what",
    "is",
    "on",
    "the",
    "?",
    *SIDES,
    *COLORS,
)
SIDE = 32  # pixels


def write_conversations(folder: Path, name: str, count: int, seed: int = 0) -> Path:
    """Pictures of two squares, and a file of a question about one of them each; returns the file."""
    draw = random.Random(f"{name} {seed}")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for number in range(count):
        colors, picture = draw.sample(COLORS, 2), Image.new("RGB", (SIDE, SIDE), "white")
        for half, color in enumerate(colors):
            left, top = half * SIDE // 2 + draw.randrange(4), draw.randrange(SIDE // 2)
            ImageDraw.Draw(picture).rectangle((left, top, left + 11, top + 11), fill=color)
        path = f"{name}{number}.png"
        picture.save(folder / "images" / path)
        which = draw.randrange(2)
        turns = [
            {"from": "human", "value": f"<image>\nwhat is on the {SIDES[which]} ?"},
            {"from": "gpt", "value": colors[which]},
        ]
        records.append({"id": str(number), "image": path, "conversations": turns})
    file = folder / f"{name}.json"
    file.write_text(json.dumps(records))
    return file


def make_processor() -> hf.LlavaProcessor:
    """With a vocabulary of the words of the questions."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=words, **marks, extra_special_tokens=["<image>"])
    images = hf.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return hf.LlavaProcessor(
        images,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )


def make_model(width: int = 64) -> hf.LlavaForConditionalGeneration:
    """As LLaVA-1.5 is, but small: 64 image tokens, 3 layers in the tower, 3 in the decoder."""
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision = shape | {"model_type": "clip_vision_model", "image_size": SIDE, "patch_size": 4}
    text = shape | {"model_type": "llama", "vocab_size": len(WORDS), "max_position_embeddings": 128}
    text |= {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=WORDS.index("<image>"))
    return hf.LlavaForConditionalGeneration(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the data, checkpoints, model and report")
    parser.add_argument("--macs", type=float, default=0.6, help="share of the multiply-adds to save")
    parser.add_argument("--dense-steps", type=int, default=60, help="of the training of the dense model")
    parser.add_argument("--steps", type=int, default=16, help="of the training that compresses it")
    parser.add_argument("--samples", type=int, default=64, help="conversations to train on; to judge by, a quarter")
    options = parser.parse_args()
    hf.logging.set_verbosity_error()
    hf.set_seed(0)
    processor, model = make_processor(), make_model()
    task = VlmTask(processor)
    data, test = (
        Conversations(write_conversations(options.out, name, count), options.out / "images", processor, max_length=128)
        for name, count in (("train", options.samples), ("test", options.samples // 4))
    )
    train(
        model,
        task,
        data,
        steps=options.dense_steps,
        batch_size=16,
        learning_rate=2e-3,
        output_dir=options.out / "dense-checkpoints",
    )
    config = madtp.CompressionConfig(
        macs_reduction=options.macs,
        keep={"vision": madtp.Keep(temperature=1.0), "projector": madtp.Keep(0.75, rule="divprune")},
        hwp_schedule="one_shot",
    )
    training = {"max_steps": options.steps, "per_device_train_batch_size": 16, "save_strategy": "no"}
    result = madtp.compress(
        model, task, data, test, config, output_dir=options.out, training=training | {"disable_tqdm": True}
    )
    (options.out / "report.md").write_text(markdown(result.report, command=" ".join(sys.argv)))
    print(markdown(result.report, command=" ".join(sys.argv)).split("\n\n## ")[0])
    print(f"the model is in {result.path}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
