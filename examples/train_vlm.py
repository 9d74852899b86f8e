# SPDX-License-Identifier: Apache-2.0
"""Trains a small LLaVA or Qwen2-VL on mosaics; the LLaVA is the one of `madtp demo --vlm`.

Words have codes, vectors of the decoder's width, and are embedded as these to begin with. The tower and the projector
learn to give at each token of an image the codes of what is there, of its colour and of its place. The decoder learns
to answer from codes that are right, which needs no tower, and two heads of its third layer are told where to look.
Then both go on together, from pictures to answers. The first two stages may run side by side.

    python examples/train_vlm.py llava tower --out runs/mosaics-llava
    python examples/train_vlm.py llava decoder --out runs/mosaics-llava
    python examples/train_vlm.py llava both --out runs/mosaics-llava
"""

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling

from madtp.data.conversations import IMAGE
from madtp.data.mosaics import (
    CHARACTERS,
    COLORS,
    ICONS,
    ORDINALS,
    PLACES,
    ROWS,
    SHAPES,
    SIDE,
    VOCABULARY,
    Mosaics,
    kind_of,
)
from madtp.tasks.small_vlms import PATCH, SMALL_VLMS, WIDTH
from madtp.tasks.vlm import VlmTask

NAMES = ["", *SHAPES, *ICONS, *CHARACTERS]  # of what is at a token, "" for nothing
SORTS = (len(NAMES), 1 + len(COLORS), 1 + len(PLACES[3]) + len(ROWS) * len(ORDINALS))  # of names, colours and places
SHARPNESS = 10.0  # of the tower's choice between codes
TOKENS = SIDE // PATCH  # of a side
TURNS = 8
TEST = 400  # records that are looked at in the end
EASY = 150  # steps of the decoder in which it sees grids of 2 x 2 alone
STEPS = {"tower": 400, "decoder": 1000, "both": 150}
BATCHES = {"tower": 32, "decoder": 4, "both": 8}
POINTED = (2, 2)  # the layer of the decoder, counted from 0, and how many of its heads are told where to look
RATES = {"tower": 1e-3, "decoder": 2e-3, "both": 1e-3}
SCHEDULES = {"tower": "cosine", "decoder": "constant_with_warmup", "both": "cosine"}  # the last goes down for both


def word_codes() -> dict[str, Tensor]:
    """Of each word of the vocabulary, (WIDTH,), of length 1."""
    generator = torch.Generator().manual_seed(0)
    return {word: F.normalize(torch.randn(WIDTH, generator=generator), dim=0) for word in VOCABULARY}


def codes() -> list[Tensor]:
    """Of names, colours and places: (how many, WIDTH), those of the words for them; what nothing has is 0."""
    words = word_codes()
    corners = [place.split() for place in PLACES[3]] + [[row, ordinal] for row in ROWS for ordinal in ORDINALS]
    parts = ([[name] for name in NAMES[1:]], [[color] for color in COLORS], corners)
    nothing = torch.zeros(WIDTH)
    return [
        torch.stack([nothing, *(sum((words[word] for word in said), nothing) / len(said) ** 0.5 for said in part)])
        for part in parts
    ]


def targets(data: Mosaics, index: int) -> Tensor:
    """(3, T) int64: at the middle of each token the number of what is there, of its colour, of its place."""
    found = torch.zeros(3, TOKENS, TOKENS, dtype=torch.long)
    middle = (torch.arange(TOKENS) + 0.5) * SIDE / TOKENS
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
    return found.flatten(1)


def tower_loss(model, task: VlmTask, data: Mosaics, numbers: list[int]) -> Tensor:
    """How far what the projector gives is from the codes."""
    images = [data.mosaic(number).draw() for number in numbers]
    pixels = dict(task.processor.image_processor(images, return_tensors="pt"))
    features = torch.cat(list(model.model.get_image_features(**pixels).pooler_output)).view(-1, WIDTH)
    wanted = torch.stack([targets(data, number) for number in numbers], dim=1).flatten(1)  # (3, B * T)
    loss = features.new_zeros(())
    right = features.new_zeros(features.shape)
    for of, table in zip(wanted, codes(), strict=True):
        there = of > 0  # where nothing is, no code is near
        loss = loss + F.cross_entropy(SHARPNESS * features[there] @ table[1:].T, of[there] - 1)
        right = right + table[of]
    return loss + 2 * (features - right).square().sum(1).mean()


@contextmanager
def codes_in_place_of_the_tower(model, data: Mosaics, numbers: list[int]) -> Iterator[None]:
    """A context in which images are encoded as the codes of what is in them, a little off."""
    tables, found = codes(), []
    for number in numbers:
        exact = sum(table[of] for table, of in zip(tables, targets(data, number), strict=True))
        found.append(exact + 0.03 * torch.randn_like(exact))
    output = BaseModelOutputWithPooling(pooler_output=found)
    model.model.get_image_features = lambda *_, **__: output
    try:
        yield
    finally:
        del model.model.get_image_features


def asked_tokens(question: str, found: Tensor) -> list[Tensor]:
    """Where the answer is: for each of its words but the end, (T,) bool; the last is for all words that follow.

    found: (3, T), of `targets`.
    """
    names, _, places = found
    words = [word for word in question.split() if word not in (IMAGE, "?")]
    corners = [None, *(place.split() for place in PLACES[3])] + [[row, which] for row in ROWS for which in ORDINALS]
    kind = kind_of(question)
    if kind == "where":
        return [names == NAMES.index(words[-1])]
    if kind == "read":
        return [places == corners.index([words[2], ordinal]) for ordinal in ORDINALS]
    if kind == "character":
        return [places == corners.index([words[-2], words[3]])]
    at = places == corners.index(words[-2:] if words[-2:] in corners else words[-1:])
    return [at & (names > 0) if (at & (names > 0)).any() else at]


def pointing_loss(
    attentions: Tensor, batch: dict[str, Tensor], data: Mosaics, numbers: list[int], image: int
) -> Tensor:
    """How little of what some heads attend to, where a word of an answer is predicted, is where the answer is.

    attentions: (B, H, S, S), of those heads.
    """
    losses = []
    for row, number in enumerate(numbers):
        found, labels = targets(data, number), batch["labels"][row]
        at = (batch["input_ids"][row] == image).nonzero().flatten()
        starts = (labels != -100).nonzero().flatten().tolist()
        starts = [start for start in starts if labels[start - 1] == -100]
        turns = data.records[number]["conversations"]
        for start, asked, said in zip(starts, turns[::2], turns[1::2], strict=True):
            where = asked_tokens(asked["value"], found)
            for word in range(len(said["value"].split())):
                mass = attentions[row, :, start + word - 1][:, at[where[min(word, len(where) - 1)]]].sum(-1)
                losses.append(-(mass + 1e-4).log().mean())
    return torch.stack(losses).mean()


def answer_loss(model, task: VlmTask, data: Mosaics, numbers: list[int], with_tower: bool) -> Tensor:
    batch = task.collate([data[number] for number in numbers])
    if with_tower:
        return model(**batch).loss
    layer, heads = POINTED
    model.set_attn_implementation("eager")
    with codes_in_place_of_the_tower(model, data, numbers):
        output = model(**batch, output_attentions=True)
    image = model.config.image_token_id
    return output.loss + pointing_loss(output.attentions[layer][:, :heads], batch, data, numbers, image)


@torch.no_grad()
def begin_with_codes(model, tokenizer) -> None:
    """Words are embedded as their codes, and attention begins by looking for what is alike, and copying it: keys as
    queries, outputs as values."""
    embedding = model.get_input_embeddings().weight
    embedding.normal_(std=WIDTH**-0.5)
    for word, code in word_codes().items():
        embedding[tokenizer.convert_tokens_to_ids(word)] = code
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        attention.k_proj.weight.copy_(attention.q_proj.weight)
        attention.o_proj.weight.copy_(attention.v_proj.weight.T)


def train(model, task: VlmTask, data: Mosaics, stage: str, steps: int, save, easy: int = EASY) -> None:
    weights = [w for name, w in model.named_parameters() if stage == "both" or is_of_tower(name) == (stage == "tower")]
    optimizer = torch.optim.AdamW(weights, lr=RATES[stage], weight_decay=0.05, betas=(0.9, 0.97))
    schedule = hf.get_scheduler(SCHEDULES[stage], optimizer, min(50, steps // 10), steps)
    model.train()
    for step in range(steps):
        numbers = torch.randint(len(data), (BATCHES[stage],)).tolist()
        if stage == "decoder" and step < easy:
            numbers = [number - number % 3 for number in numbers]
        if stage == "tower":
            loss = tower_loss(model, task, data, numbers)
        else:
            loss = answer_loss(model, task, data, numbers, with_tower=stage == "both")
            if stage == "both":  # so that characters, which few answers are about, go on being told apart
                loss = loss + tower_loss(model, task, data, numbers)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 25 == 0:
            print(f"{stage}, step {step}: loss {loss:.3f}, {time.process_time():.0f} s", flush=True)
            save()
    model.eval()
    save()


def is_of_tower(name: str) -> bool:
    return "language_model" not in name and "lm_head" not in name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=SMALL_VLMS)
    parser.add_argument("stage", choices=STEPS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help=f"of {STEPS} by stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="from what the same stage saved")
    options = parser.parse_args()
    hf.logging.set_verbosity_error()
    hf.set_seed(options.seed)
    model, processor = SMALL_VLMS[options.model].make(), SMALL_VLMS[options.model].processor()
    task = VlmTask(processor, batch_size=32)
    data = Mosaics("train", processor, turns=TURNS)
    steps = STEPS[options.stage] if options.steps is None else options.steps
    if options.stage == "both" or options.resume:
        for part in ("tower", "decoder") if options.stage == "both" else (options.stage,):
            model.load_state_dict(load_file(options.out / f"{part}.safetensors"), strict=False)
    elif options.stage == "decoder":
        begin_with_codes(model, processor.tokenizer)
    options.out.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        if options.stage == "both":
            model.save_pretrained(options.out)
        else:
            weights = {n: w for n, w in model.named_parameters() if is_of_tower(n) == (options.stage == "tower")}
            save_file(weights, options.out / f"{options.stage}.safetensors")

    train(model, task, data, options.stage, steps, save, 0 if options.resume else EASY)
    if options.stage != "both":
        return
    found = task.evaluate(model, Mosaics("test", processor, limit=TEST))
    print(f"{found}, {time.process_time() / 60:.1f} minutes of CPU", flush=True)
    model.to(torch.bfloat16).save_pretrained(options.out)
    processor.save_pretrained(options.out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
