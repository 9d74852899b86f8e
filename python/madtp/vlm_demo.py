# SPDX-License-Identifier: Apache-2.0
"""The demo of decoders that read images: the shipped LLaVA on mosaics, its image tokens pruned at every seam.

Nothing is trained and nothing is fetched. What is compared answers the same questions, and takes turns on the clock.
"""

from __future__ import annotations

import copy
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from madtp.choices import DEMO_PICTURE, DEMO_SHARE
from madtp.compression import versions
from madtp.data.mosaics import Mosaics, kind_of
from madtp.dtp.keep import Keep
from madtp.files import atomic_write, require_writable
from madtp.inference import evaluating
from madtp.models.prompt import token_of
from madtp.patching.handle import patch
from madtp.profiling.timing import medians
from madtp.progress import Progress
from madtp.reporting import visualize
from madtp.reporting.tables import markdown_table
from madtp.tasks.small_vlms import load_small_vlm
from madtp.tasks.vlm import VlmTask

DENSE, PICTURED = "dense", "half at each seam"
RECORDS = 1200  # of the test set, unless a limit says fewer
TIMED, ROUNDS = 16, 9  # prompts at a time, and rounds of the clock
SHOWN = 8  # questions with their answers, and rows of the picture
LAYER = 2  # of the decoder, behind which its seam is


def keeps(share: float) -> dict[str, dict[str, Any]]:
    """What is compared with the dense model, by name."""
    return {
        "tower, most attended to": {"vision": share},
        "tower, random": {"vision": Keep(share, rule="random")},
        "projector, far from each other": {"projector": share},
        "projector, random": {"projector": Keep(share, rule="random")},
        "decoder, by the question": {"prefill": {LAYER: share}},
        "decoder, random": {"prefill": {LAYER: Keep(share, rule="random")}},
        PICTURED: {"vision": 0.5, "projector": 0.5, "prefill": {LAYER: 0.5}},
    }


def run(
    out: str | Path,
    *,
    share: float = DEMO_SHARE,
    limit: int | None = None,
    command: str = "madtp demo --vlm",
    console: Console | None = None,
) -> dict[str, Any]:
    """Runs it and writes report.json, report.md and tokens.png to `out`; returns what report.json holds.

    Args:
        share: in (0, 1], of the tokens of each image that one seam leaves.
        limit: only the first questions of the test set.
        command: that the report names.
        console: where progress is shown.

    Raises:
        DataError, ValueError: what is missing or wrong, in one line.
    """
    settings = keeps(share)
    out, progress = require_writable("out", out), Progress(console)
    dense, processor = load_small_vlm()
    task = VlmTask(processor, batch_size=48)
    test = Mosaics("test", processor, limit=limit or RECORDS)
    models = {DENSE: dense} | {name: copy.deepcopy(dense) for name in settings}
    for name, keep in settings.items():
        patch(models[name], keep=keep)
    with progress.status("drawing"):
        items = [test[i] for i in range(len(test))]
    said = {
        name: _answers(task, model, items, lambda batches, name=name: progress(batches, name))
        for name, model in models.items()
    }
    with progress.status("timing"):
        spent = _times(models, task, items)
    rows = [_row(name, said[name], items, spent[name]) for name in models]
    shown = [
        {"question": items[i]["question"], "answer": items[i]["answer"], **{name: said[name][i] for name in models}}
        for i in test.examples(min(SHOWN, len(test) // 4 or 1))
    ]
    report = {"share": share, "records": len(items), "rows": rows, "questions": shown, "command": command}
    report |= {"threads": torch.get_num_threads(), "versions": versions()}
    visualize.picture(models[PICTURED], task, test, out / DEMO_PICTURE, rows=len(shown))
    atomic_write(out / "report.json", json.dumps(report, indent=2) + "\n")
    atomic_write(out / "report.md", markdown(report))
    return report


COLUMNS = ("", "accuracy", "of rows read", "tokens left", "ms to the first token", "dense = 1")


def table_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """For people."""
    dense = report["rows"][0]["ms_first_token"]
    return [
        (
            row["name"],
            f"{100 * row['accuracy']:.1f} %",
            f"{100 * row['kinds'].get('read', 0):.1f} %",
            f"{row['tokens']}",
            f"{row['ms_first_token']:.2f}",
            f"{row['ms_first_token'] / dense:.2f}",
        )
        for row in report["rows"]
    ]


def answer_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Questions with the right answer, that of the dense model and that of the model with all seams."""
    return [(each["question"], each["answer"], each[DENSE], each[PICTURED]) for each in report["questions"]]


ANSWERS = ("question", "right", DENSE, PICTURED)


def markdown(report: dict[str, Any]) -> str:
    """report.md"""
    packages = ", ".join(f"{package} {version}" for package, version in report["versions"].items())
    text = [
        "# Image tokens pruned in a small LLaVA, without training",
        markdown_table(COLUMNS, table_rows(report)),
        f"{report['records']:,} questions about mosaics, greedy answers. One seam leaves {report['share']:.3g} of the "
        f"64 tokens of an image; tokens left are those behind the last seam. Times are of a prompt in a forward of "
        f"{TIMED}, medians of {ROUNDS} rounds in which all take turns, {report['threads']} threads; dense is Hugging "
        "Face's model with torch's SDPA.",
        markdown_table(ANSWERS, answer_rows(report)),
        f"![Tokens kept at each seam]({DEMO_PICTURE})",
        f"- command: `{report['command']}`\n- versions: {packages}",
    ]
    return "\n\n".join(text) + "\n"


def _answers(task: VlmTask, model: Any, items: list[dict], progress) -> list[str]:
    """Item by item; answers of one length run together, so that none waits for a longer one."""
    order = sorted(range(len(items)), key=lambda i: len(items[i]["input_ids"]) - items[i]["answer_begin"])
    size, said = task.batch_size, [""] * len(items)
    with evaluating(model):
        for start in progress(range(0, len(order), size)):
            chosen = order[start : start + size]
            for i, (answer, _) in zip(chosen, task.predictions(model, [items[i] for i in chosen]), strict=True):
                said[i] = answer
    return said


def _times(models: dict[str, Any], task: VlmTask, items: list[dict]) -> dict[str, dict[str, Any]]:
    """By name: milliseconds to the first token of a prompt, and how many tokens of an image are left there."""
    prompts = task.prompts(items[:TIMED])
    count, width = prompts["input_ids"].shape

    def forward(model: Any) -> object:
        with torch.inference_mode():
            return model(**prompts, use_cache=True, logits_to_keep=1)

    for model in models.values():
        model.eval()
    runs = {name: partial(forward, model) for name, model in models.items()}
    found = medians(runs, torch.device("cpu"), rounds=ROUNDS)
    spent = {}
    for name, model in models.items():
        handle = getattr(model, "madtp_handle", None)
        if handle is None:
            tokens = prompts["input_ids"][0].tolist().count(token_of(model.config, "image"))
        else:
            _, left = handle.token_counts()
            tokens = [layers[-1][0] for layers in left.values()][-1]
        spent[name] = {"ms_first_token": 1e3 * found[name] / count, "tokens": tokens}
    return spent


def _row(name: str, said: list[str], items: list[dict], spent: dict[str, Any]) -> dict[str, Any]:
    kinds: dict[str, list[bool]] = {}
    for answer, item in zip(said, items, strict=True):
        kinds.setdefault(kind_of(item["question"]), []).append(answer == item["answer"])
    right = [one for of in kinds.values() for one in of]
    by_kind = {kind: statistics.fmean(of) for kind, of in sorted(kinds.items())}
    return {"name": name, "accuracy": statistics.fmean(right), "kinds": by_kind, **spent}
