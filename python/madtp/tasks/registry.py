"""The tasks by name, with the models, data sets and annotation files that belong to each: what a command line needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import transformers as hf
from torch import nn
from torch.utils.data import Dataset

from madtp.data.annotations import CaptionAnnotations, NlvrAnnotations, RetrievalAnnotations, VqaAnnotations
from madtp.data.easy_vqa import EasyVqa, ImagesWithQuestions
from madtp.data.emoji import EmojiCaptions, EmojiPairs, EmojiRetrieval
from madtp.data.errors import DataError
from madtp.models import BlipForNLVR
from madtp.tasks.batches import QUESTIONS_PER_IMAGE
from madtp.tasks.captioning import CaptioningTask
from madtp.tasks.nlvr import NlvrTask
from madtp.tasks.retrieval import RetrievalTask
from madtp.tasks.task import Task
from madtp.tasks.vqa import VqaTask


class Known(NamedTuple):
    models: tuple[type[nn.Module], ...]
    task: type
    data: dict[str, type]  # what --data can name -> data set
    annotations: type


TASKS = {
    "vqa": Known((hf.BlipForQuestionAnswering,), VqaTask, {"easy-vqa": EasyVqa}, VqaAnnotations),
    "retrieval": Known(
        (hf.VisionTextDualEncoderModel, hf.CLIPModel, hf.SiglipModel),
        RetrievalTask,
        {"emoji": EmojiRetrieval},
        RetrievalAnnotations,
    ),
    "nlvr": Known((BlipForNLVR,), NlvrTask, {"emoji": EmojiPairs}, NlvrAnnotations),
    "captioning": Known(
        (hf.BlipForConditionalGeneration,), CaptioningTask, {"emoji": EmojiCaptions}, CaptionAnnotations
    ),
}


class Loaded(NamedTuple):
    """train: what is trained on; calibration: single samples of it; test: what a model is judged on."""

    model: nn.Module
    task: Task
    train: Dataset
    calibration: Dataset
    test: Dataset


def load(
    name: str,
    model: Path,
    data: str,
    *,
    test: Path | None = None,
    images: Path | None = None,
    limit: int | None = None,
) -> Loaded:
    """The model of a task, from a Hugging Face folder with its tokenizer and image processor, and its data.

    Args:
        name: one of `TASKS`.
        data: a data set of the task by name, or the annotation file to train on.
        test, images: the annotation file to judge by, and the folder that image paths start from; with a file only.
        limit: only the first items of each split.

    Raises:
        DataError, ValueError: what is missing or wrong, in one line.
    """
    known = TASKS.get(name)
    if known is None:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    dense, kind = _model(known, Path(model)), None
    try:
        tokenizer = hf.AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise DataError(f"model directory {model} has no tokenizer ({str(error).splitlines()[0]})") from error
    try:
        kind = hf.AutoImageProcessor.from_pretrained(model)
    except (OSError, ValueError):  # data sets by name make their own pixels
        pass
    if data in known.data:
        if test is not None or images is not None:
            raise ValueError(f"test and images must come with an annotation file, got them with {data!r}")
        train, judged = (_named(known.data[data], split, tokenizer, dense, limit) for split in ("train", "test"))
        batched = ImagesWithQuestions(train, QUESTIONS_PER_IMAGE) if known.task is VqaTask else train
        task = known.task(tokenizer) if known.task is VqaTask else known.task(tokenizer, kind)
        return Loaded(dense, task, batched, train, judged)
    if test is None or images is None:
        raise ValueError(
            f"data must be {' or '.join(known.data)}, or an annotation file with test= and images=, got {data!r}"
        )
    if kind is None:
        raise DataError(f"model directory {model} has no image processor (preprocessor_config.json)")
    train, judged = (known.annotations(file, images, tokenizer, kind, limit=limit) for file in (data, test))
    if known.task is VqaTask:
        given = (record["answer"] for record in judged.records)
        answers = sorted({answer for each in given for answer in ([each] if isinstance(each, str) else each)})
        return Loaded(dense, VqaTask(tokenizer, answers), train, train, judged)
    return Loaded(dense, known.task(tokenizer, kind), train, train, judged)


def _named(kind: type, split: str, tokenizer, model: nn.Module, limit: int | None) -> Dataset:
    if kind is EasyVqa:
        return EasyVqa(split, tokenizer, limit=limit)
    return kind(split, tokenizer, model.config.vision_config.image_size, limit=limit)


def _model(known: Known, directory: Path) -> nn.Module:
    try:
        names = json.loads((directory / "config.json").read_text()).get("architectures") or ["nothing known"]
    except (OSError, ValueError) as error:
        raise DataError(f"model directory {directory} cannot be read ({error})") from error
    found = next((model for model in known.models if model.__name__ == names[0]), None)
    if found is None:
        wanted = " or ".join(model.__name__ for model in known.models)
        raise DataError(f"model directory {directory} must hold a {wanted}, got {names[0]}")
    try:
        return found.from_pretrained(directory).eval()
    except Exception as error:  # whatever a cut or foreign file makes of the loader
        raise DataError(f"model directory {directory} cannot be read ({str(error).splitlines()[0]})") from error
