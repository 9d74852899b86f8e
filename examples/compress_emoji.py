# SPDX-License-Identifier: Apache-2.0
"""Compresses the dense model of an emoji task: tokens and weights pruned in one training with distillation.

    python examples/train_emoji.py --task captioning --out runs/emoji-captioning
    python examples/compress_emoji.py --task captioning --model runs/emoji-captioning --out runs/compressed

Writes report.json, report.md, report.html and model/, which `madtp.from_pretrained` loads.
"""

import argparse
import sys
from pathlib import Path

from train_emoji import BATCH, DATA, RATES, SIZES, TASKS
from transformers import AutoTokenizer, BlipForConditionalGeneration, VisionTextDualEncoderModel

import madtp
from madtp.data.emoji import Emoji
from madtp.data.errors import DataError
from madtp.models import BlipForNLVR
from madtp.reporting import report
from madtp.tasks.loading import load_image_processor

MODELS = {
    "retrieval": VisionTextDualEncoderModel,
    "nlvr": BlipForNLVR,
    "captioning": BlipForConditionalGeneration,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--model", type=Path, required=True, help="what train_emoji.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--macs", type=float, default=0.5, help="share of the counted MACs to save")
    parser.add_argument("--steps", type=int, default=1000, help="of the training")
    parser.add_argument("--limit", type=int, help="only the first items of each split")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    options = parser.parse_args()
    name = options.task
    model, tokenizer = MODELS[name].from_pretrained(options.model), AutoTokenizer.from_pretrained(options.model)
    source = Emoji()
    train, test = (
        DATA[name](split, tokenizer, SIZES[name], source=source, limit=options.limit) for split in ("train", "test")
    )
    width = model.config.vision_config.hidden_size
    config = madtp.CompressionConfig(macs_reduction=options.macs, alignment_tokens=32, alignment_dim=width)
    result = madtp.compress(
        model,
        TASKS[name](tokenizer, load_image_processor(options.model)),
        train,
        test,
        config,
        output_dir=options.out,
        training={"max_steps": options.steps, "per_device_train_batch_size": BATCH[name], "learning_rate": RATES[name]},
        resume=options.resume,
    )
    report.write(result.report, options.out, command=" ".join(sys.argv))
    print(f"{options.out / 'report.md'}\n{result.path}")


if __name__ == "__main__":
    try:
        main()
    except (DataError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
