# SPDX-License-Identifier: Apache-2.0
"""Statements about two images, judged with fewer tokens: BlipForNLVR on emoji, pruned without training.

    python examples/train_emoji.py --task nlvr --out runs/emoji-nlvr
    python examples/nlvr.py --model runs/emoji-nlvr

Without --model the weights are random, and so are the verdicts.
"""

import sys

import torch
from without_training import compare, parser

from madtp.data.emoji import EmojiPairs, build_tokenizer
from madtp.data.errors import DataError
from madtp.models import BlipForNLVR
from madtp.tasks.nlvr import NlvrTask
from madtp.tasks.small_models import nlvr_model


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", help="directory of a trained model")
    options = arguments.parse_args()
    tokenizer = build_tokenizer()
    model = nlvr_model(tokenizer) if options.model is None else BlipForNLVR.from_pretrained(options.model)
    task, data = NlvrTask(tokenizer), EmojiPairs("test", tokenizer, pairs=options.samples)

    @torch.no_grad()
    def show(model):
        item = data[0]
        verdict = model(**task.collate([item])).logits[0].argmax().item()
        print(f"  {tokenizer.decode(item['input_ids'], skip_special_tokens=True)}: {bool(verdict)}")

    compare(model, task, data, options.keep_rate, show)


if __name__ == "__main__":
    try:
        main()
    except (DataError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
