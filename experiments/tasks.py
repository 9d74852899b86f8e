# SPDX-License-Identifier: Apache-2.0
"""The four tasks: a dense model, its data, and how it is compressed, in two sizes.

Preset "cpu" is for two cores and some tens of minutes a task, "gpu" for one GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import nn
from torch.utils.data import Dataset, Subset
from transformers import BlipForConditionalGeneration, VisionTextDualEncoderModel, set_seed

from madtp import CompressionConfig
from madtp.data import pretrained
from madtp.data.easy_vqa import EasyVqa, ImagesWithQuestions
from madtp.data.emoji import SHIFTED, EmojiCaptions, EmojiPairs, EmojiRetrieval, build_tokenizer
from madtp.files import atomic_directory
from madtp.models import BlipForNLVR
from madtp.tasks import small_models as dense
from madtp.tasks.captioning import CaptioningTask
from madtp.tasks.nlvr import NlvrTask
from madtp.tasks.retrieval import RetrievalTask
from madtp.tasks.task import Task
from madtp.tasks.vqa import VqaTask, load_dense


@dataclass(frozen=True)
class Preset:
    """Sizes of one task."""

    steps: int  # of a compression
    batch_size: int
    learning_rate: float
    dense_steps: int = 0  # of the dense model's own training, where none is shipped
    dense_batch_size: int = 64
    dense_rate: float = 1e-3
    image_size: int = 64
    alignment_tokens: int = 32
    calibration: int = 1024  # samples on which the temperatures are calibrated
    allocation_samples: int = 64  # of these, on which budgets are chosen
    test: int | None = None  # the first samples of the test set; None: all
    pairs: int = 0  # NLVR: training pairs
    about: str = "kinds"  # NLVR: of `EmojiPairs`


@dataclass(frozen=True)
class Prepared:
    """A dense model with all a compression of it takes. `others`: test sets beside `test`, by name.

    `calibration` holds no sample of the test; where concepts are split, none of its concepts are in training either.
    """

    model: nn.Module
    task: Task
    train: Dataset
    calibration: Dataset
    test: Dataset
    others: dict[str, Dataset] = field(default_factory=dict)


@dataclass
class Experiment:
    title: str
    prepare: Callable[[Preset, Path], Prepared]
    presets: dict[str, Preset]

    def config(self, preset: Preset, model: nn.Module, **changes) -> CompressionConfig:
        return CompressionConfig(
            alignment_tokens=preset.alignment_tokens,
            alignment_dim=getattr(model.config, "vision_config", model.config).hidden_size,
            hwp_score="second_order",  # masks that grow in training need more of it than there is here
            hwp_schedule="one_shot",
            **changes,
        )


def _vqa(preset: Preset, folder: Path) -> Prepared:
    model, tokenizer = load_dense()
    train, test = EasyVqa("train", tokenizer), EasyVqa("test", tokenizer, limit=preset.test)
    return Prepared(model, VqaTask(tokenizer), ImagesWithQuestions(train), _first(train, preset), test)


def _retrieval(preset: Preset, folder: Path) -> Prepared:
    tokenizer = pretrained.tokenizer()
    task, size = RetrievalTask(tokenizer), preset.image_size
    train = EmojiRetrieval("train", tokenizer, size)

    def make() -> nn.Module:
        model = dense.retrieval_model(train)
        _train(model, task, train, preset, folder)
        return model

    model = _kept(folder, VisionTextDualEncoderModel, make)
    return Prepared(model, task, train, *_held_out(EmojiRetrieval, tokenizer, preset))


def _nlvr(preset: Preset, folder: Path) -> Prepared:
    tokenizer, size = build_tokenizer(), preset.image_size
    task, about = NlvrTask(tokenizer), preset.about
    train = EmojiPairs("train", tokenizer, size, pairs=preset.pairs, about=about)

    def make() -> nn.Module:
        seen = EXPERIMENTS["captioning"]  # its vision encoder has seen what the statements are about
        captions = seen.prepare(seen.presets[folder.parent.name], folder.with_name("captioning")).model
        model = dense.nlvr_model(tokenizer, size, vision=captions)
        _train(model, task, train, preset, folder, by=dense.train_after_vision)
        return model

    model = _kept(folder, BlipForNLVR, make)
    return Prepared(model, task, train, *_held_out(partial(EmojiPairs, about=about), tokenizer, preset))


def _captioning(preset: Preset, folder: Path) -> Prepared:
    tokenizer, size = build_tokenizer(), preset.image_size
    task, train = CaptioningTask(tokenizer), EmojiCaptions("train", tokenizer, size, renders=8)

    def make() -> nn.Module:
        model = dense.captioning_model(tokenizer, size)
        _train(model, task, train, preset, folder)
        return model

    model = _kept(folder, BlipForConditionalGeneration, make)
    return Prepared(model, task, train, *_held_out(partial(EmojiCaptions, renders=3), tokenizer, preset))


EXPERIMENTS = {
    "vqa": Experiment(
        "VQA, easy-vqa (BLIP)",
        _vqa,
        {
            "cpu": Preset(120, 16, 1e-3, calibration=2048),
            "gpu": Preset(2000, 64, 5e-4, alignment_tokens=100, calibration=2048),
        },
    ),
    "retrieval": Experiment(
        "Retrieval, emoji (ViT-S/14 + MiniLM)",
        _retrieval,
        {
            "cpu": Preset(80, 16, 1e-5, 100, 32, 5e-5, image_size=112, calibration=336, allocation_samples=16),
            "gpu": Preset(2000, 128, 3e-5, 2000, 128, 3e-5, image_size=224, alignment_tokens=100),
        },
    ),
    "nlvr": Experiment(
        "NLVR, emoji pairs (BlipForNLVR)",
        _nlvr,
        {
            "cpu": Preset(160, 16, 5e-4, 1500, 128, test=1000, pairs=6000, about="backgrounds"),
            "gpu": Preset(3000, 128, 3e-4, 12000, 128, 5e-4, pairs=20000),
        },
    ),
    "captioning": Experiment(
        "Captioning, emoji (BLIP)",
        _captioning,
        {"cpu": Preset(400, 16, 5e-4, 800), "gpu": Preset(3000, 128, 3e-4, 8000, 128)},
    ),
}


def _kept(folder: Path, kind: type[nn.Module], make: Callable[[], nn.Module]) -> nn.Module:
    """The dense model of a folder, made there first if it is not there."""
    if not folder.is_dir():
        set_seed(0)
        model = make()
        with atomic_directory(folder) as directory:
            model.save_pretrained(directory)
    return kind.from_pretrained(folder).eval()


def _train(model: nn.Module, task: Task, data: Dataset, preset: Preset, folder: Path, by=dense.train) -> None:
    if preset.dense_steps:
        by(
            model,
            task,
            data,
            steps=preset.dense_steps,
            batch_size=preset.dense_batch_size,
            learning_rate=preset.dense_rate,
            output_dir=folder.with_name(f"{folder.name}-training"),
        )


def _held_out(kind: Callable[..., Dataset], tokenizer, preset: Preset) -> tuple[Dataset, Dataset, dict[str, Dataset]]:
    """What calibration, test and other tests of a `Prepared` are: all of concepts not seen in training, calibration and
    test of different ones, both by vendors that were seen; the other test is by one that was not."""
    test = kind("test", tokenizer, preset.image_size, limit=preset.test)
    others = {"unseen vendor": kind("test", tokenizer, preset.image_size, vendors=SHIFTED, limit=preset.test)}
    return _first(kind("val", tokenizer, preset.image_size), preset), test, others


def _first(data: Dataset, preset: Preset) -> Dataset:
    stride = max(1, len(data) // preset.calibration)
    return Subset(data, range(0, len(data), stride)[: preset.calibration])
