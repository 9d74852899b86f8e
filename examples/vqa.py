# SPDX-License-Identifier: Apache-2.0
"""Questions about images, answered with fewer tokens: the shipped BLIP on easy-vqa, pruned without training.

python examples/vqa.py --keep-rate 0.7
"""

import sys

import torch
from without_training import compare, parser

from madtp.data.easy_vqa import EasyVqa
from madtp.data.errors import DataError
from madtp.tasks.vqa import VqaTask, load_dense


def main() -> None:
    options = parser(__doc__).parse_args()
    model, tokenizer = load_dense()
    task, data = VqaTask(tokenizer), EasyVqa("test", tokenizer, limit=options.samples)

    @torch.no_grad()
    def show(model):
        answer = task.answers[task.predict(model, task.collate([data[0]]))[0]]
        print(f"  {data.questions[0][0]} {answer}")

    compare(model, task, data, options.keep_rate, show)


if __name__ == "__main__":
    try:
        main()
    except (DataError, ValueError) as error:
        sys.exit(f"error: {error}")
