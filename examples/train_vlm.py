# SPDX-License-Identifier: Apache-2.0
"""Trains a small LLaVA or Qwen2-VL on mosaics; the LLaVA is the one of `madtp demo --vlm`.

The tower and the projector first learn what is where, token by token, as a tower is pretrained before it meets a
decoder; then the whole model learns to answer, in conversations of several turns, in rounds. The model is saved behind
every round, and `--resume` goes on behind the last.

    python examples/train_vlm.py llava --out runs/mosaics-llava
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import transformers as hf
from torch import nn
from torch.nn import functional as F

from madtp.data.mosaics import CHARACTERS, COLORS, ICONS, IN_A_ROW, PLACES, ROWS, SHAPES, SIDE, Mosaics
from madtp.tasks.small_models import train
from madtp.tasks.small_vlms import SMALL_VLMS, WIDTH
from madtp.tasks.vlm import VlmTask

NAMES = ["", *SHAPES, *ICONS, *CHARACTERS]  # of what is at a token, "" for nothing
SORTS = (len(NAMES), 1 + len(COLORS), 1 + len(PLACES[3]) + len(ROWS) * IN_A_ROW)  # of names, colours and places
TURNS = 8
TEST = 200  # records that are looked at between rounds


def targets(data: Mosaics, index: int, side: int) -> torch.Tensor:
    """(3, side, side) int64: at the middle of each token the number of what is there, of its colour, of its place."""
    found = torch.zeros(3, side, side, dtype=torch.long)
    middle = (torch.arange(side) + 0.5) * SIDE / side
    mosaic = data.mosaic(index)
    if mosaic.grid:  # a place is one where nothing is too
        places = torch.tensor([1 + PLACES[3].index(place) for place in PLACES[mosaic.grid]])
        at = (middle * mosaic.grid / SIDE).long()
        found[2] = places[at[:, None] * mosaic.grid + at[None, :]]
    for number, box in enumerate(mosaic.boxes()):
        y = (middle >= box.top) & (middle < box.top + box.height)
        x = (middle >= box.left) & (middle < box.left + box.width)
        inside = y[:, None] & x[None, :]
        found[0][inside] = NAMES.index(box.name)
        found[1][inside] = 0 if box.color is None else 1 + list(COLORS).index(box.color)
        if not mosaic.grid:
            found[2][inside] = 1 + len(PLACES[3]) + number
    return found


def pretrain(model, task: VlmTask, data: Mosaics, steps: int, batch_size: int = 32) -> None:
    """The tower and the projector, with a linear probe on every token."""
    probe = nn.Linear(WIDTH, sum(SORTS))
    weights = [*model.model.parameters(), *probe.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=1.5e-3, weight_decay=0.05)
    schedule = hf.get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    model.train()
    for step in range(steps):
        numbers = torch.randint(len(data), (batch_size,)).tolist()
        images = [data.mosaic(number).draw() for number in numbers]
        pixels = dict(task.processor.image_processor(images, return_tensors="pt"))
        features = torch.cat(list(model.model.get_image_features(**pixels).pooler_output)).view(batch_size, -1, WIDTH)
        side = round(features.shape[1] ** 0.5)
        wanted = torch.stack([targets(data, number, side) for number in numbers]).flatten(2)  # (B, 3, T)
        said = probe(features).transpose(1, 2).split(SORTS, dim=1)
        loss = sum(F.cross_entropy(of, wanted[:, sort]) for sort, of in enumerate(said))
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            right = (said[0].argmax(1) == wanted[:, 0])[wanted[:, 0] > 0].float().mean()
            print(f"tower, step {step}: loss {loss:.3f}, right {100 * right:.1f} % of what is there", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=SMALL_VLMS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tower-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=300, help="of a round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of the first round; the last has a third")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    hf.logging.set_verbosity_error()
    hf.set_seed(options.seed)
    small, began = SMALL_VLMS[options.model], time.perf_counter()
    processor = small.processor()
    task = VlmTask(processor, batch_size=32)
    data, test = Mosaics("train", processor, turns=TURNS), Mosaics("test", processor, limit=TEST)
    log = options.out / "rounds.json"
    rounds = json.loads(log.read_text()) if options.resume and log.exists() else []
    if rounds:
        model = type(small.make()).from_pretrained(options.out)
    else:
        model = small.make()
        if options.tower_steps:
            pretrain(model, task, data, options.tower_steps)
    for number in range(len(rounds), options.rounds):
        rate = options.learning_rate * 3 ** (-number / max(1, options.rounds - 1))
        more = {"batch_size": options.batch_size, "output_dir": options.out / "training", "seed": number}
        train(model, task, data, steps=options.steps, learning_rate=rate, **more)
        found = task.evaluate(model, test)
        rounds.append({"steps": options.steps, "learning_rate": rate, **found})
        print(f"round {number + 1}: {found}, {(time.perf_counter() - began) / 60:.1f} min", flush=True)
        model.save_pretrained(options.out)
        processor.save_pretrained(options.out)
        log.write_text(json.dumps(rounds, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
