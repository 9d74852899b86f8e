# SPDX-License-Identifier: Apache-2.0
"""Decoders that read mosaics, pruned at every seam by every rule: training-free, trained, and at equal time.

    python -m experiments.run llava
    python -m experiments.run llava --seams projector --rules divprune --shares 0.25
    python -m experiments.run qwen2_vl --kinds trained equal_time --seeds 0 1 2

Every row is written to experiments/results/PRESET/seams-MODEL.json as soon as it is there; the same command goes on
after what is in the file. The LLaVA is the one that ships; the Qwen2-VL is trained by examples/train_vlm.py into
--work/seams-qwen2_vl first.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.utils import logging

import madtp
from madtp.compression import versions
from madtp.data.errors import DataError
from madtp.data.mosaics import Mosaics, kind_of
from madtp.dtp.keep_rules import random
from madtp.inference import evaluating
from madtp.models.prompt import token_of
from madtp.profiling.prompt_cost import prompt_cost
from madtp.profiling.timing import seconds, take_turns
from madtp.tasks.small_vlms import SMALL_VLMS, load_small_vlm
from madtp.tasks.vlm import VlmTask

from .results import FOLDER, Results

SHARES = (1 / 4, 1 / 9, 1 / 2)  # what is compared first comes first
RULES = {  # by seam; random and uniform are what others have to beat
    "projector": ("random", "uniform", "divprune", "text", "cdpruner", "cdpruner_negative", "tome"),
    "prefill": ("random", "uniform", "fastv", "received", "divprune"),
    "vision": ("random", "uniform", "received", "cls", "divprune"),
}
PREFILL_LAYER = 2
TRAINED = {"projector": "divprune", "prefill": "fastv", "vision": "received"}  # the rule of each seam that is trained
TRAINED_AT = 1 / 9
EQUAL_TIME_AT = 1 / 4  # the share of the tower whose time the decoder's seam has to meet
KINDS = ("training_free", "equal_time", "trained")
RECORDS = 1000  # of the test set
BATCH = 50  # of an evaluation
TIMED, ROUNDS = 16, 7  # prompts of a forward that is timed, and rounds
STEPS, TRAINING_BATCH, RATE = 60, 8, 5e-4  # of a compression
KEY = ("variant", "share", "seed")


class Row(NamedTuple):
    """kind: of `KINDS`, or "dense". share: that is left of each image; None where a time says it."""

    kind: str
    seam: str
    rule: str
    share: float
    seed: int

    @property
    def variant(self) -> str:
        return self.kind if self.kind == "dense" else f"{self.kind} {self.seam} {self.rule}"


def keep_of(seam: str, rule: str, amount: float | int, seed: int = 0) -> dict[str, Any]:
    """What `madtp.patch` is given: another draw of random for every seed."""
    chosen: Any = partial(random, seed=seed) if rule == "random" else rule
    keep = madtp.Keep(amount, rule=chosen)
    return {seam: {PREFILL_LAYER: keep} if seam == "prefill" else keep}


def rows(model: str, kinds: Sequence[str], seams, rules, shares, seeds) -> Iterator[Row]:
    """In the order in which they are measured. Rules without chance in them have one row, of seed 0."""
    yield Row("dense", "", "", 1.0, 0)
    if "training_free" in kinds:
        for share in shares:
            for seam in seams:
                for rule in RULES[seam]:
                    if (rules and rule not in rules) or (rule == "cls" and model != "llava"):  # which has a CLS token
                        continue
                    for seed in seeds if rule == "random" else [0]:
                        yield Row("training_free", seam, rule, share, seed)
    if "equal_time" in kinds:
        for rule in ("fastv", "received"):
            yield Row("equal_time", "prefill", rule, EQUAL_TIME_AT, 0)
    if "trained" in kinds:
        for seed in seeds:
            for seam in seams:
                yield Row("trained", seam, TRAINED[seam], TRAINED_AT, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=SMALL_VLMS)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seams", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--rules", nargs="+", help="only these, training-free")
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of random rules and of trainings")
    parser.add_argument("--records", type=int, default=RECORDS, help="of the test set")
    parser.add_argument("--work", type=Path, default=Path("runs/experiments"), help="the model and what is in progress")
    parser.add_argument("--results", type=Path, default=FOLDER)
    options = parser.parse_args()
    logging.set_verbosity_error()
    work = options.work / "cpu"
    model, processor = prepared(options.model, work)
    task = VlmTask(processor, batch_size=BATCH)
    test = Mosaics("test", processor, limit=options.records)
    head = {"model": options.model, "records": len(test), "parameters": sum(p.numel() for p in model.parameters())}
    head |= {"machine": f"CPU, {platform.machine()}"}
    results = Results(options.results / "cpu" / f"seams-{options.model}.json", head, KEY)
    items: list[dict] = []
    for row in rows(options.model, options.kinds, options.seams, options.rules, options.shares, options.seeds):
        key = row.variant, round(row.share, 4), row.seed
        if results.find(*key) is not None:
            continue
        items = items or [test[i] for i in range(len(test))]
        began = time.perf_counter()
        found = measured(row, model, task, items, work / f"seams-{options.model}-{row.variant.replace(' ', '-')}")
        minutes = round((time.perf_counter() - began) / 60, 2)
        results.add(dict(zip(KEY, key, strict=True)) | found | {"minutes": minutes, "versions": versions()})
        print(f"{row.variant} {row.share:.3f} seed {row.seed}: {found['accuracy']:.4f}, {minutes} min", flush=True)


def prepared(name: str, work: Path) -> tuple[nn.Module, Any]:
    """The dense model and its processor. Raises DataError where it is to be trained first."""
    if name == "llava":
        return load_small_vlm()
    folder = work / f"seams-{name}"
    if not (folder / "config.json").exists():
        raise DataError(f"{name} not found at {folder}: run `python examples/train_vlm.py {name} --out {folder}`")
    return load_small_vlm(folder, name)


def measured(row: Row, model: Any, task: VlmTask, items: list[dict], output: Path) -> dict:
    """Of a row: what is right, item by item and by kind of question, cost and time to the first token."""
    prompts = task.prompts(items[:TIMED])
    if row.kind == "dense":
        return outcomes(task, model, items) | {"cost": first_token_macs(model, {}, prompts)}
    if row.kind == "trained":
        return trained(row, model, task, items, output)
    keep, more = keep_of(row.seam, row.rule, row.share, row.seed), {}
    if row.kind == "equal_time":
        count, more = same_time(row, model, prompts)
        keep = keep_of(row.seam, row.rule, count)
    cost = first_token_macs(model, keep, prompts)
    handle = madtp.patch(model, keep=keep)
    try:
        more |= {"times": times(model, handle, prompts)} if not more else {}
        return outcomes(task, model, items) | {"cost": cost} | more
    finally:
        handle.remove()


def trained(row: Row, model: Any, task: VlmTask, items: list[dict], output: Path) -> dict:
    """Tokens alone pruned, the model trained with them gone, its dense self for a teacher."""
    config = madtp.CompressionConfig(
        macs_reduction=0.01,  # amounts alone say what goes
        keep=keep_of(row.seam, row.rule, row.share),
        pattern="4:4",
        hwp_schedule="one_shot",
        seed=row.seed,
    )
    training = {"max_steps": STEPS, "per_device_train_batch_size": TRAINING_BATCH, "learning_rate": RATE}
    training |= {"save_strategy": "no", "disable_tqdm": True, "logging_steps": 10}
    data = Mosaics("train", task.processor)
    result = madtp.compress(model, task, data, None, config, output_dir=output, training=training)
    losses = [entry["loss"] for entry in result.report["training"]]
    return outcomes(task, result.model, items) | {"loss": losses, "steps": STEPS}


def outcomes(task: VlmTask, model: nn.Module, items: list[dict]) -> dict:
    """accuracy, that by kind of question, and right: a digit for each item, 1 for a right answer."""
    order = sorted(range(len(items)), key=lambda i: len(items[i]["input_ids"]) - items[i]["answer_begin"])
    right = [""] * len(items)
    with evaluating(model):
        for start in range(0, len(order), BATCH):  # answers of one length are together
            chosen = order[start : start + BATCH]
            said = task.predictions(model, [items[i] for i in chosen])
            for i, (answer, wanted) in zip(chosen, said, strict=True):
                right[i] = str(int(answer == wanted))
    kinds: dict[str, list[int]] = {}
    for item, digit in zip(items, right, strict=True):
        kinds.setdefault(kind_of(item["question"]), []).append(int(digit))
    by_kind = {kind: round(statistics.fmean(of), 4) for kind, of in sorted(kinds.items())}
    return {"accuracy": right.count("1") / len(right), "kinds": by_kind, "right": "".join(right)}


def first_token_macs(model: Any, keep: dict, prompts: dict) -> dict[str, float]:
    """Multiply-adds to the first token of a prompt, in all and of the tower."""
    count = len(prompts["input_ids"])
    cost = prompt_cost(model, keep, **prompts)
    return {"first_token": cost.first_token / count, "tower": cost.vision / count}


def times(model: Any, handle: Any, prompts: dict) -> dict[str, float]:
    """Milliseconds to the first token of a prompt, dense and pruned, which take turns: medians."""

    def run() -> object:
        with torch.inference_mode():
            return model(**prompts, use_cache=True, logits_to_keep=1)

    def dense() -> object:
        with handle.dense():
            return run()

    with evaluating(model):
        found = take_turns(
            {"dense": lambda: seconds(dense, model.device), "pruned": lambda: seconds(run, model.device)}, ROUNDS
        )
    return {name: 1e3 * statistics.median(of) / len(prompts["input_ids"]) for name, of in found.items()}


def same_time(row: Row, model: Any, prompts: dict) -> tuple[int, dict]:
    """How many image tokens the decoder may keep in the time that the tower's seam takes at `row.share`: the largest
    count that is as fast, by bisection; 1 where none is. And the times."""

    def timed(keep: dict) -> dict[str, float]:
        handle = madtp.patch(model, keep=keep)
        try:
            return times(model, handle, prompts)
        finally:
            handle.remove()

    tower = timed(keep_of("vision", TRAINED["vision"], row.share))
    goal = tower["pruned"] / tower["dense"]
    low, high, found = 1, prompts["input_ids"][0].tolist().count(token_of(model.config, "image")), {}
    while high - low > 1:
        middle = (low + high) // 2
        spent = timed(keep_of(row.seam, row.rule, middle))
        fast = spent["pruned"] / spent["dense"] <= goal
        low, high = (middle, high) if fast else (low, middle)
    spent = timed(keep_of(row.seam, row.rule, low))
    found = {"count": low, "tower_times": tower, "times": spent, "reached": spent["pruned"] / spent["dense"] <= goal}
    return low, found
