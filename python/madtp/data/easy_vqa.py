# SPDX-License-Identifier: Apache-2.0
"""easy-vqa 1.0: 5,000 images of one coloured shape, 48,248 questions about them, 13 answers (PyPI, MIT licence)."""

from __future__ import annotations

import io
import itertools
import json
import zipfile
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset

from madtp.data.downloads import Wheel
from madtp.data.word_tokenizer import word_tokenizer

PACKAGE = Wheel(
    "easy-vqa data",
    "easy-vqa==1.0",
    "easy_vqa-1.0-py3-none-any.whl",
    "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
)
IMAGE_SIZE = 64
IMAGE_MEAN = IMAGE_STD = 0.5
ANSWERS = tuple("circle green red gray yes teal black rectangle yellow triangle brown blue no".split())
QUESTIONS = 4  # of an image in a training batch; they share its encoding


def _read(split: str, limit: int | None, cache: Path | None) -> tuple[torch.Tensor, list[tuple[str, str, int]]]:
    with zipfile.ZipFile(PACKAGE.prepare(cache)) as wheel:
        root = f"easy_vqa/data/{split}"
        questions = [tuple(record) for record in json.loads(wheel.read(f"{root}/questions.json"))][:limit]
        count = 1 + max((image for _, _, image in questions), default=-1)
        images = torch.empty(count, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
        for i in range(count):
            with Image.open(io.BytesIO(wheel.read(f"{root}/images/{i}.png"))) as picture:
                pixels = bytearray(picture.convert("RGB").tobytes())
            images[i] = torch.frombuffer(pixels, dtype=torch.uint8).view(IMAGE_SIZE, IMAGE_SIZE, 3).permute(2, 0, 1)
    return images, questions


def normalise(images: torch.Tensor) -> torch.Tensor:
    """uint8 (..., 3, H, W) -> float32 in [-1, 1], as BlipImageProcessor does with mean = std = 0.5."""
    return (images.float() / 255 - IMAGE_MEAN) / IMAGE_STD


class EasyVqa(Dataset):
    """All (image, question, answer) triples of one split.

    split: "train" (4,000 images, 38,575 questions) or "test" (1,000 and 9,673).
    tokenizer: a Hugging Face tokenizer in which every answer is one token.
    limit: keep only the first `limit` questions.

    An item is a dict: pixel_values (3, 64, 64) float32, image (the image's number), input_ids and attention_mask (L,)
    int64 padded to the longest question of the split, labels (3,) = [bos, answer, eos]. Batch items with `collate`.
    """

    answers = ANSWERS
    mean, std = IMAGE_MEAN, IMAGE_STD  # of the pixels

    def __init__(self, split: str, tokenizer, cache: Path | None = None, limit: int | None = None):
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', got {split!r}")
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        self.images, self.questions = _read(split, limit, cache)  # (I, 3, 64, 64) uint8, (question, answer, image)
        text = tokenizer([question for question, _, _ in self.questions], padding=True, return_tensors="pt")
        self.input_ids, self.attention_mask = text["input_ids"], text["attention_mask"]  # (Q, L)
        tokens = {answer: answer_token(tokenizer, answer) for answer in {answer for _, answer, _ in self.questions}}
        answers = torch.tensor([tokens[answer] for _, answer, _ in self.questions])  # (Q,)
        start, end = (torch.full_like(answers, t) for t in (tokenizer.cls_token_id, tokenizer.sep_token_id))
        self.labels = torch.stack([start, answers, end], dim=1)  # (Q, 3)
        self.image_of = [image for _, _, image in self.questions]

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> dict:
        image = self.image_of[index]
        return {
            "input_ids": self.input_ids[index],
            "attention_mask": self.attention_mask[index],
            "labels": self.labels[index],
            "pixel_values": normalise(self.images[image]),
            "image": image,
        }

    def examples(self, images: int) -> list[int]:
        """The numbers of questions about as many images, spread over the data: open questions and yes-or-no ones in
        turn where there are both.

        Raises:
            ValueError: there are fewer images.
        """
        by_image: dict[int, list[int]] = {}
        for index, image in enumerate(self.image_of):
            by_image.setdefault(image, []).append(index)
        if not 1 <= images <= len(by_image):
            raise ValueError(f"rows must be from 1 to the {len(by_image)} images in the data, got {images}")
        chosen = []
        for row in range(images):
            questions = list(by_image.values())[row * len(by_image) // images]
            wanted = [i for i in questions if (self.questions[i][1] in ("yes", "no")) == bool(row % 2)]
            chosen.append((wanted or questions)[row % len(wanted or questions)])
        return chosen


class ImagesWithQuestions(Dataset):
    """The same data for training: an item is one image as a list of `questions` random triples of an `EasyVqa`.

    Several questions share one pass of the vision encoder, which is most of a step's cost. Yes-or-no questions and
    open ones ("what ...") alternate in the draw: drawn evenly, the 74 % of yes and no would drown the harder rest.
    The image is moved by up to `shift` pixels and mirrored at random: no question is about where or which way round.
    """

    def __init__(self, data: EasyVqa, questions: int = QUESTIONS, shift: int = 4):
        self.data, self.questions, self.shift = data, questions, shift
        self.of_image: dict[int, tuple[list[int], list[int]]] = {}  # image -> (open, yes-or-no) question numbers
        for index, (_, answer, image) in enumerate(data.questions):
            self.of_image.setdefault(image, ([], []))[answer in ("yes", "no")].append(index)
        self.images = sorted(self.of_image)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[dict]:
        open_ended, closed = (
            [kind[i] for i in torch.randperm(len(kind)).tolist()] for kind in self.of_image[self.images[index]]
        )
        paired = [question for pair in zip(open_ended, closed, strict=False) for question in pair]
        rest = open_ended[len(paired) // 2 :] + closed[len(paired) // 2 :]
        drawn = itertools.islice(itertools.cycle(paired + rest), self.questions)
        pixels = self._augment(normalise(self.data.images[self.images[index]]))
        return [self.data[question] | {"pixel_values": pixels} for question in drawn]

    def _augment(self, image: torch.Tensor) -> torch.Tensor:
        """Shift (the border is repeated) and mirror one image (3, H, W)."""
        height, width = image.shape[-2:]
        down, right = torch.randint(2 * self.shift + 1, (2,)).tolist()
        padded = torch.nn.functional.pad(image, [self.shift] * 4, mode="replicate")
        image = padded[:, down : down + height, right : right + width]
        return image.flip(-1) if torch.rand(()) < 0.5 else image


def collate(items: list) -> dict[str, torch.Tensor]:
    """Batch of `EasyVqa` or `ImagesWithQuestions` items in which every image appears once.

    Returns input_ids, attention_mask (Q, L), labels (Q, 3), image_index (Q,) int64: the row of pixel_values each
    question asks about, pixel_values (I, 3, 64, 64) float32.
    """
    triples = [triple for item in items for triple in (item if isinstance(item, list) else [item])]
    rows: dict[int, int] = {}
    pixels: list[torch.Tensor] = []
    for triple in triples:
        if rows.setdefault(triple["image"], len(rows)) == len(pixels):
            pixels.append(triple["pixel_values"])
    batch = {name: torch.stack([t[name] for t in triples]) for name in ("input_ids", "attention_mask", "labels")}
    batch["image_index"] = torch.tensor([rows[triple["image"]] for triple in triples])
    batch["pixel_values"] = torch.stack(pixels)
    return batch


def answer_token(tokenizer, answer: str) -> int:
    """Token id of an answer. Raises ValueError when the tokenizer splits it or does not know it."""
    tokens = tokenizer.encode(answer, add_special_tokens=False)
    if len(tokens) != 1 or tokens[0] == tokenizer.unk_token_id:
        raise ValueError(f"answer must be one known token, got {answer!r} -> {tokens}")
    return tokens[0]


def build_tokenizer(cache: Path | None = None):
    """A word-level tokenizer of the training questions and the answers: 32 tokens, lower case, [CLS] text [SEP]."""
    with zipfile.ZipFile(PACKAGE.prepare(cache)) as wheel:
        questions = [question for question, _, _ in json.loads(wheel.read("easy_vqa/data/train/questions.json"))]
    return word_tokenizer([*questions, *ANSWERS], max_length=32)
