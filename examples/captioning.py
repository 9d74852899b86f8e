# SPDX-License-Identifier: Apache-2.0
"""Images described, with beams, from fewer tokens: BlipForConditionalGeneration on emoji, pruned without training.

    python examples/train_emoji.py --task captioning --out runs/emoji-captioning
    python examples/captioning.py --model runs/emoji-captioning

Without --model the weights are random, and so are the captions.
"""

import sys

from transformers import BlipForConditionalGeneration
from without_training import compare, parser

from madtp.data.emoji import EmojiCaptions, build_tokenizer
from madtp.data.errors import DataError
from madtp.tasks.captioning import CaptioningTask
from madtp.tasks.small_models import captioning_model


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", help="directory of a trained model")
    arguments.add_argument("--beams", type=int, default=3)
    options = arguments.parse_args()
    tokenizer = build_tokenizer()
    load = BlipForConditionalGeneration.from_pretrained
    model = captioning_model(tokenizer) if options.model is None else load(options.model)
    task = CaptioningTask(tokenizer, beams=options.beams)
    data = EmojiCaptions("test", tokenizer, limit=options.samples)

    def show(model):
        tokens = model.generate(
            pixel_values=data[0]["pixel_values"][None], num_beams=options.beams, do_sample=False, max_new_tokens=20
        )
        print(
            f"  {data[0]['references'][0]!r} is described as {tokenizer.decode(tokens[0], skip_special_tokens=True)!r}"
        )

    compare(model, task, data, options.keep_rate, show)


if __name__ == "__main__":
    try:
        main()
    except (DataError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
