# SPDX-License-Identifier: Apache-2.0
"""The demo: the shipped dense BLIP compressed on easy-vqa, then measured, pictured and compared with its dense self."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from madtp.choices import DEMO_PICTURE, DEMO_REDUCTION, DEMO_STEPS
from madtp.compression import Result, compress
from madtp.config import CompressionConfig
from madtp.data.easy_vqa import EasyVqa, ImagesWithQuestions
from madtp.files import require_writable
from madtp.progress import Progress
from madtp.reporting import report, visualize
from madtp.tasks.loading import load_image_processor
from madtp.tasks.vqa import DENSE_EASY_VQA, VqaTask, load_dense
from madtp_kernels.renamed import renamed

CONFIG = CompressionConfig(macs_reduction=DEMO_REDUCTION, alignment_tokens=100, alignment_dim=128)
TRAINING = {
    "per_device_train_batch_size": 32,
    "learning_rate": 1e-3,
    "logging_steps": 10,
    "save_strategy": "steps",
    "save_steps": 50,
}


@renamed(output="out", flops="macs")
def run(
    out: str | Path,
    *,
    macs: float = DEMO_REDUCTION,
    seed: int = CONFIG.seed,
    steps: int = DEMO_STEPS,
    limit: int | None = None,
    resume: bool = False,
    command: str = "madtp demo",
    console: Console | None = None,
) -> Result:
    """Runs it and writes report.json, report.md, tokens.png and model/ to `out`.

    Args:
        macs: share of the counted MACs to save.
        steps: of the training.
        limit: only the first questions of each split.
        resume: go on from the last checkpoint in `out`.
        command: that the report names.
        console: where progress is shown.

    Raises:
        DataError, ValueError: what is missing or wrong, in one line.
    """
    config = replace(CONFIG, macs_reduction=macs, seed=seed)
    out = require_writable("out", out)
    progress = Progress(console)
    model, tokenizer = load_dense()
    task = VqaTask(tokenizer, image_processor=load_image_processor(DENSE_EASY_VQA))
    with progress.status("reading easy-vqa"):
        train, test = (EasyVqa(split, tokenizer, limit=limit) for split in ("train", "test"))
    result = compress(
        model,
        task,
        ImagesWithQuestions(train),
        test,
        config,
        output_dir=out,
        calibration_data=train,
        training=TRAINING | {"max_steps": steps},
        resume=resume,
        progress=progress,
    )
    rows = min(visualize.ROWS, len(set(test.image_of)))  # a limit can leave fewer images
    visualize.picture(result.model, task, test, out / DEMO_PICTURE, rows=rows)
    report.write(result.report, out, command=command, picture=DEMO_PICTURE)
    return result
