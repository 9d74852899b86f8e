# SPDX-License-Identifier: Apache-2.0
"""Images found by text, and texts by image, with fewer tokens: a pretrained ViT and MiniLM on emoji, without training.

    python examples/retrieval.py --keep-rate 0.6

The two towers have never seen each other: a projection between them is fitted on --fit training pictures first.
"""

import sys

import torch
from without_training import compare, parser

from madtp.data import pretrained
from madtp.data.emoji import Emoji, EmojiRetrieval
from madtp.data.errors import DataError
from madtp.tasks.retrieval import RetrievalTask
from madtp.tasks.small_models import retrieval_model


def main() -> None:
    arguments = parser(__doc__)
    arguments.set_defaults(keep_rate=0.6)  # random alignment tokens keep at most 0.69 of what this ViT sees
    arguments.add_argument("--fit", type=int, default=200, help="training pictures")
    options = arguments.parse_args()
    source, tokenizer, size = Emoji(), pretrained.tokenizer(), pretrained.IMAGE_SIZE
    train = EmojiRetrieval("train", tokenizer, size, source=source, limit=options.fit)
    data = EmojiRetrieval("test", tokenizer, size, source=source, limit=options.samples)
    task = RetrievalTask(tokenizer)

    @torch.no_grad()
    def show(model):
        batch = task.collate([data[i] for i in range(min(8, len(data)))])
        best = model(**batch).logits_per_image[0].argmax()
        print(f"  {data.captions[0]!r} is found as {data.captions[best]!r}")

    compare(retrieval_model(train), task, data, options.keep_rate, show)


if __name__ == "__main__":
    try:
        main()
    except (DataError, ValueError) as error:
        sys.exit(f"error: {error}")
