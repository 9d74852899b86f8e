# SPDX-License-Identifier: Apache-2.0
"""The tasks by name, with the models, data sets and annotation files that belong to each: what a command line needs.

A new task is a row of `TASKS`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import transformers as hf
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from madtp.data.annotations import (
    MAX_LENGTH,
    Annotations,
    CaptionAnnotations,
    NlvrAnnotations,
    RetrievalAnnotations,
    VqaAnnotations,
)
from madtp.data.conversations import Conversations
from madtp.data.easy_vqa import EasyVqa, ImagesWithQuestions
from madtp.data.emoji import EmojiCaptions, EmojiPairs, EmojiRetrieval
from madtp.data.errors import DataError
from madtp.data.mosaics import Mosaics
from madtp.models.blip_nlvr import BlipForNLVR
from madtp.tasks.captioning import CaptioningTask
from madtp.tasks.loading import (
    architecture,
    load_context,
    load_image_processor,
    load_model,
    load_processor,
    load_tokenizer,
    names_of,
    no_image_processor,
)
from madtp.tasks.nlvr import NlvrTask
from madtp.tasks.retrieval import RetrievalTask
from madtp.tasks.task import Task
from madtp.tasks.vlm import VlmTask
from madtp.tasks.vqa import VqaTask


class NamedData(NamedTuple):
    """A data set that is fetched or drawn.

    read: (split, tokenizer, size of the images in pixels, limit) -> single samples. train: what the samples of the
    training split are trained on as.
    """

    read: Callable[[str, Any, int, int | None], Dataset]
    train: Callable[[Any], Dataset] = lambda samples: samples


def _easy_vqa(split: str, tokenizer, size: int, limit: int | None) -> EasyVqa:
    return EasyVqa(split, tokenizer, limit=limit)  # its images have one size


def _emoji(kind: type) -> NamedData:
    return NamedData(lambda split, tokenizer, size, limit: kind(split, tokenizer, size, limit=limit))


class TaskEntry(NamedTuple):
    """What belongs to a task.

    models: the Hugging Face classes it is for. make: (tokenizer, image processor or None, the data it is judged on) ->
    the task. data: by name; the first is the default. annotations: the reader of the user's files. reads_text: whether
    the models do; without, the tokenizer is None everywhere. one_processor: whether one object makes prompts of texts
    and images; it is in the place of the tokenizer everywhere.
    """

    models: tuple[type[PreTrainedModel], ...]
    make: Callable[[Any, Any, Any], Task]
    data: dict[str, NamedData]
    annotations: type[Annotations]
    reads_text: bool = True
    one_processor: bool = False


TASKS = {
    "vqa": TaskEntry(
        models=(hf.BlipForQuestionAnswering,),
        make=lambda tokenizer, images, data: VqaTask(tokenizer, data.answers, image_processor=images),
        data={"easy-vqa": NamedData(_easy_vqa, ImagesWithQuestions)},
        annotations=VqaAnnotations,
    ),
    "retrieval": TaskEntry(
        models=(hf.VisionTextDualEncoderModel, hf.CLIPModel, hf.SiglipModel),
        make=lambda tokenizer, images, data: RetrievalTask(tokenizer, images),
        data={"emoji": _emoji(EmojiRetrieval)},
        annotations=RetrievalAnnotations,
    ),
    "nlvr": TaskEntry(
        models=(BlipForNLVR,),
        make=lambda tokenizer, images, data: NlvrTask(tokenizer, images),
        data={"emoji": _emoji(EmojiPairs)},
        annotations=NlvrAnnotations,
    ),
    "captioning": TaskEntry(
        models=(hf.BlipForConditionalGeneration,),
        make=lambda tokenizer, images, data: CaptioningTask(tokenizer, images),
        data={"emoji": _emoji(EmojiCaptions)},
        annotations=CaptionAnnotations,
    ),
    "vlm": TaskEntry(
        models=(
            hf.LlavaForConditionalGeneration,
            hf.LlavaNextForConditionalGeneration,
            hf.LlavaOnevisionForConditionalGeneration,
            hf.Qwen2VLForConditionalGeneration,
            hf.Qwen2_5_VLForConditionalGeneration,
            hf.Qwen3VLForConditionalGeneration,
            hf.InternVLForConditionalGeneration,
            hf.SmolVLMForConditionalGeneration,
            hf.Idefics3ForConditionalGeneration,
        ),
        make=lambda processor, images, data: VlmTask(processor),
        data={"mosaics": NamedData(lambda split, processor, size, limit: Mosaics(split, processor, limit=limit))},
        annotations=Conversations,
        one_processor=True,
    ),
}


class Loaded(NamedTuple):
    """train: what is trained on; calibration: single samples of it; test: what a model is judged on."""

    model: PreTrainedModel
    task: Task
    train: Dataset
    calibration: Dataset
    test: Dataset


class Judged(NamedTuple):
    """A model, dense or compressed, and what it is judged on."""

    model: PreTrainedModel
    task: Task
    data: Dataset


def load(
    name: str,
    model: Path,
    data: str,
    *,
    test: Path | None = None,
    images: Path | None = None,
    limit: int | None = None,
) -> Loaded:
    """The dense model of a task, from a Hugging Face folder with its tokenizer and image processor, and its data.

    Args:
        name: one of `TASKS`.
        data: a data set of the task by name, or the annotation file to train on.
        test, images: the annotation file to judge by, and the folder that image paths start from; with a file only.
        limit: only the first items of each split.

    Raises:
        DataError, ValueError: what is missing or wrong, in one line.
    """
    entry = _entry(name)
    named = _named(entry, data, test, images)
    if named is None and (test is None or images is None):
        raise ValueError(f"data must be {_choices(entry)} with test= and images=, got {data!r}")
    dense = load_model(model, entry.models, dense=True)
    tokenizer, processor = _processors(entry, model)
    if named is not None:
        size = _image_size(dense, processor)
        samples, judged = (named.read(split, tokenizer, size, limit) for split in ("train", "test"))
        train = named.train(samples)
    else:
        samples, judged = (_annotated(entry, model, file, images, tokenizer, processor, limit) for file in (data, test))
        train = samples
    return Loaded(dense, entry.make(tokenizer, processor, judged), train, samples, judged)


def load_judged(
    model: Path,
    name: str | None = None,
    data: str | None = None,
    *,
    test: Path | None = None,
    images: Path | None = None,
    limit: int | None = None,
) -> Judged:
    """A model, dense or compressed, from a folder, and the data that its task is judged on.

    Args:
        name: one of `TASKS`; None finds it by the class of the model.
        data: a data set of the task by name, or an annotation file; None takes the first by name.
        test, images, limit: as of `load`; `test` may be left out, `data` is then judged on.

    Raises:
        DataError, ModelError, ValueError: what is missing or wrong, in one line.
    """
    entry = _entry(name or _task_of(model))
    data = data or next(iter(entry.data), "")
    named = _named(entry, data, test, images)
    if named is None and images is None:
        raise ValueError(f"data must be {_choices(entry)} with images=, got {data!r}")
    loaded = load_model(model, entry.models)
    tokenizer, processor = _processors(entry, model)
    if named is not None:
        judged = named.read("test", tokenizer, _image_size(loaded, processor), limit)
    else:
        judged = _annotated(entry, model, test or data, images, tokenizer, processor, limit)
    return Judged(loaded, entry.make(tokenizer, processor, judged), judged)


def tasks_of(kind: str) -> list[str]:
    """The names of the tasks that are for a class of models."""
    return [name for name, entry in TASKS.items() if any(kind == model.__name__ for model in entry.models)]


def _task_of(directory: Path | str) -> str:
    """The one task that is for the class of a folder's model."""
    kind = architecture(directory)
    names = tasks_of(kind)
    if len(names) > 1:
        raise ValueError(f"task must be given for a {kind}, one of {', '.join(names)}")
    if not names:
        known = names_of([model for entry in TASKS.values() for model in entry.models])
        raise DataError(f"model directory {directory} must hold a model with a task ({known}), got {kind}")
    return names[0]


def _entry(name: str) -> TaskEntry:
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    return TASKS[name]


def _choices(entry: TaskEntry) -> str:
    return ", or ".join(filter(None, (" or ".join(entry.data), "an annotation file")))


def _named(entry: TaskEntry, data: str, test: Path | None, images: Path | None) -> NamedData | None:
    """The data set of that name, None for an annotation file."""
    named = entry.data.get(data)
    if named is not None and (test is not None or images is not None):
        raise ValueError(f"test and images must come with an annotation file, got them with {data!r}")
    return named


def _processors(entry: TaskEntry, model: Path) -> tuple[Any, Any]:
    """The tokenizer, None for models without text, and the image processor, None where there is none."""
    if entry.one_processor:
        processor = load_processor(model)
        return processor, getattr(processor, "image_processor", None)
    return load_tokenizer(model) if entry.reads_text else None, load_image_processor(model)


def _annotated(entry: TaskEntry, model, file, images, tokenizer, processor, limit: int | None) -> Annotations:
    if processor is None:
        raise no_image_processor(model)
    if entry.one_processor:
        length = load_context(model)
    else:
        length = MAX_LENGTH if tokenizer is None else min(MAX_LENGTH, tokenizer.model_max_length)
    return entry.annotations(file, images, tokenizer, processor, max_length=length, limit=limit)


def _image_size(model: PreTrainedModel, processor) -> int:
    """Pixels of a side: what the image processor makes, else what the configuration says.

    The two differ where a tower was trained on larger images than the model is used with.
    """
    for sizes in (getattr(processor, "crop_size", None), getattr(processor, "size", None)):
        side = (sizes or {}).get("height") or (sizes or {}).get("shortest_edge")
        if side:
            return side
    config: Any = model.config
    return getattr(config, "vision_config", config).image_size  # a vision tower alone is its own
