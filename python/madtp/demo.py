"""The demo: the shipped dense BLIP compressed on easy-vqa, then measured, pictured and compared with its dense self."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from madtp.compression import Result, compress
from madtp.config import CompressionConfig
from madtp.data.easy_vqa import EasyVqa, ImagesWithQuestions
from madtp.files import require_writable
from madtp.progress import Progress
from madtp.reporting import report, visualize
from madtp.tasks.batches import QUESTIONS_PER_IMAGE
from madtp.tasks.vqa import VqaTask, load_dense

CONFIG = CompressionConfig(macs_reduction=0.6, alignment_tokens=100, alignment_dim=128)
STEPS = 300
TRAINING = {
    "per_device_train_batch_size": 32,
    "learning_rate": 1e-3,
    "logging_steps": 10,
    "save_strategy": "steps",
    "save_steps": 50,
}
PICTURE = "tokens.png"


def run(
    output: str | Path,
    *,
    flops: float = CONFIG.macs_reduction,
    seed: int = CONFIG.seed,
    steps: int = STEPS,
    limit: int | None = None,
    resume: bool = False,
    command: str = "madtp demo",
    console: Console | None = None,
) -> Result:
    """Runs it and writes report.json, report.md, tokens.png and model/ to `output`.

    Args:
        flops: share of the counted MACs to save.
        steps: of the training.
        limit: only the first questions of each split.
        resume: go on from the last checkpoint in `output`.
        command: that the report names.
        console: where progress is shown.

    Raises:
        DataError, ValueError: what is missing or wrong, in one line.
    """
    config = replace(CONFIG, macs_reduction=flops, seed=seed)
    output = require_writable("output", output)
    progress = Progress(console)
    model, tokenizer = load_dense()
    task = VqaTask(tokenizer)
    with progress.status("reading easy-vqa"):
        train, test = (EasyVqa(split, tokenizer, limit=limit) for split in ("train", "test"))
    result = compress(
        model,
        task,
        ImagesWithQuestions(train, QUESTIONS_PER_IMAGE),
        test,
        config,
        output_dir=output,
        calibration_data=train,
        training=TRAINING | {"max_steps": steps},
        resume=resume,
        progress=progress,
    )
    visualize.picture(result.model, task, test, output / PICTURE)
    report.write(result.report, output, command=command, picture=PICTURE)
    return result
