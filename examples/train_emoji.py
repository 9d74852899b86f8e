# SPDX-License-Identifier: Apache-2.0
"""Train the dense model of an emoji task: a small BLIP for captions or statements, real towers for retrieval.

    python examples/train_emoji.py --task captioning --out runs/emoji-captioning
    python examples/train_emoji.py --task nlvr --out runs/emoji-nlvr --vision runs/emoji-captioning
    python examples/train_emoji.py --task retrieval --out runs/emoji-retrieval --steps 100

The model is judged on concepts it has not seen, drawn by vendors it has seen and by one it has not.
"""

import argparse
import sys
import time
from pathlib import Path

from transformers import (
    BitImageProcessor,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    set_seed,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from madtp.data import pretrained
from madtp.data.emoji import SHIFTED, VENDORS, Emoji, EmojiCaptions, EmojiPairs, EmojiRetrieval, build_tokenizer
from madtp.data.errors import DataError
from madtp.tasks import small_models as dense
from madtp.tasks.captioning import CaptioningTask
from madtp.tasks.nlvr import NlvrTask
from madtp.tasks.retrieval import RetrievalTask

DATA = {"retrieval": EmojiRetrieval, "nlvr": EmojiPairs, "captioning": EmojiCaptions}
TASKS = {"retrieval": RetrievalTask, "nlvr": NlvrTask, "captioning": CaptioningTask}
SIZES = {"retrieval": pretrained.IMAGE_SIZE, "nlvr": 64, "captioning": 64}
RATES = {"retrieval": 1e-5, "nlvr": 5e-4, "captioning": 1e-3}
STEPS = {"retrieval": 0, "nlvr": 3000, "captioning": 2000}
BATCH = {"retrieval": 32, "nlvr": 64, "captioning": 64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="0 keeps the model as it starts")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--vision", type=Path, help="nlvr: the captioning model whose vision encoder to start from")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    name, steps = options.task, STEPS[options.task] if options.steps is None else options.steps

    set_seed(options.seed)
    source, size = Emoji(), SIZES[name]
    tokenizer = pretrained.tokenizer() if name == "retrieval" else build_tokenizer()
    many = {"pairs": max(steps, 1) * BATCH[name]} if name == "nlvr" else {"renders": 1 if name == "retrieval" else 8}
    train = DATA[name]("train", tokenizer, size, source=source, seed=options.seed, **many)
    if name == "retrieval":
        model, mean, std = dense.retrieval_model(train), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        processor = BitImageProcessor(size={"shortest_edge": size}, crop_size=size, image_mean=mean, image_std=std)
    else:
        vision = None if options.vision is None else BlipForConditionalGeneration.from_pretrained(options.vision)
        model = (
            dense.captioning_model(tokenizer) if name == "captioning" else dense.nlvr_model(tokenizer, vision=vision)
        )
        processor = BlipImageProcessor(size={"height": size, "width": size}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    task = TASKS[name](tokenizer, processor)
    start = time.perf_counter()
    if steps:
        dense.train(
            model,
            task,
            train,
            steps=steps,
            batch_size=BATCH[name],
            learning_rate=options.learning_rate or RATES[name],
            output_dir=options.out / "checkpoints",
            seed=options.seed,
        )
    minutes = (time.perf_counter() - start) / 60

    model.save_pretrained(options.out)
    task.save_processor(options.out)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters, {steps} steps, {minutes:.1f} min")
    for what, vendors in (("test", VENDORS), ("test, unseen vendor", SHIFTED)):
        data = DATA[name]("test", tokenizer, size, source=source, vendors=vendors, seed=options.seed)
        figures = ", ".join(f"{metric} {value:.4f}" for metric, value in task.evaluate(model, data).items())
        print(f"{what}, {len(data)} samples: {figures}")


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"error: {error}")
