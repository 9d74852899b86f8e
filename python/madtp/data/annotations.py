# SPDX-License-Identifier: Apache-2.0
"""NLVR2, COCO, Flickr30k and VQAv2 in the annotation files of the BLIP project: JSON lists of records.

The items are those the tasks here take, with every text padded to `max_length`. Files and images are the user's.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from madtp.data.errors import DataError
from madtp.data.images import read_image
from madtp_kernels.bounded_file import one_line, read_json

MAX_LENGTH = 35  # tokens of a text, as BLIP has it
MAX_BYTES = 1 << 31  # of an annotation file


class Annotations(Dataset):
    """Records of a file, as items.

    Args:
        file: the JSON file.
        image_root: the folder that image paths start from.
        tokenizer, image_processor: of Hugging Face; a reader of records without text needs no tokenizer, and gets None.
        max_length: tokens of a text.
        limit: keep the first `limit` records.

    Raises:
        DataError: the file is missing or no list of records, a record lacks a field or has another kind of value in it,
            or, when an item is read, its image is missing or broken.
    """

    fields: dict[str, Callable[[Any], bool]]  # that every record must have -> whether a value fits

    def __init__(
        self, file: Path | str, image_root: Path | str, tokenizer, image_processor, max_length=MAX_LENGTH, limit=None
    ):
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        self.file, self.image_root = Path(file), Path(image_root)
        self.tokenizer, self.image_processor, self.max_length = tokenizer, image_processor, max_length
        self.records = self._read()[:limit]

    def __len__(self) -> int:
        return len(self.records)

    @property
    def mean(self) -> list[float]:
        """Of the pixels, per channel."""
        return self.image_processor.image_mean

    @property
    def std(self) -> list[float]:
        """Of the pixels, per channel."""
        return self.image_processor.image_std

    def _read(self) -> list[dict]:
        try:
            records = read_json(self.file, MAX_BYTES)
        except OSError as error:
            raise DataError(f"annotation file {self.file} cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise DataError(f"annotation file {self.file} must be JSON ({one_line(error)})") from error
        if not isinstance(records, list) or not records:
            raise DataError(f"annotation file {self.file} must hold a list of records, got {type(records).__name__}")
        for number, record in enumerate(records):
            for field, fits in self.fields.items():
                if not isinstance(record, dict) or field not in record:
                    raise DataError(f"{self.file}: record {number} lacks the field {field!r}")
                if not fits(record[field]):
                    raise DataError(
                        f"{self.file}: record {number} has {field!r} of another kind: {one_line(repr(record[field]))}"
                    )
        return records

    def _image(self, name: str) -> Tensor:
        """(3, H, W), as the image processor makes it."""
        picture = read_image(self.image_root / name, "; image_root is wrong?")
        return torch.as_tensor(self.image_processor(picture, return_tensors="pt")["pixel_values"][0])

    def _text(self, text: str, length: int | None = None) -> dict[str, Tensor]:
        """input_ids and attention_mask (L,), L = max_length unless given."""
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        tokens = self.tokenizer(text, max_length=length or self.max_length, **options)
        return {name: tokens[name][0] for name in ("input_ids", "attention_mask")}


def cleaned(text: str, gap: str = " ") -> str:
    """Lower case, `gap` for most punctuation: what BLIP makes of captions, and of questions with no gap."""
    return re.sub(r"\s+", " ", re.sub(r"[.!\"()*#:;~]", gap, text.lower())).strip()


def is_text(value) -> bool:
    return isinstance(value, str)


def _are_texts(value) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_text, value))


def _is_text_or_texts(value) -> bool:
    return is_text(value) or _are_texts(value)


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


class NlvrAnnotations(Annotations):
    """NLVR2 for `NlvrTask`: `images`, two paths, `sentence`, `label`, "True" or "False".

    An item: pixel_values (2, 3, H, W), input_ids and attention_mask (L,), labels (), 1 for true.
    """

    fields = {
        "images": lambda value: _are_texts(value) and len(value) == 2,
        "sentence": is_text,
        "label": lambda value: str(value) in ("True", "False"),
    }

    def __getitem__(self, index: int) -> dict:
        record = self.records[index]
        return self._text(cleaned(record["sentence"])) | {
            "pixel_values": torch.stack([self._image(name) for name in record["images"]]),
            "labels": torch.tensor(int(str(record["label"]) == "True")),
        }


class RetrievalAnnotations(Annotations):
    """COCO or Flickr30k for `RetrievalTask`: `image`, a path, `caption`, a text or several (Karpathy's splits).

    An item is a caption with its image: pixel_values (3, H, W), input_ids and attention_mask (L,), concept and image,
    both the number of the image. `limit` counts images in files with several captions to one.
    """

    fields = {"image": is_text, "caption": _is_text_or_texts}

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        numbers: dict[str, int] = {}
        self.pairs = [
            (record["image"], numbers.setdefault(record["image"], len(numbers)), caption)
            for record in self.records
            for caption in _listed(record["caption"])
        ]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict:
        image, number, caption = self.pairs[index]
        return self._text(cleaned(caption)) | {"pixel_values": self._image(image), "concept": number, "image": number}


class CaptionAnnotations(Annotations):
    """COCO captions for `CaptioningTask`: `image`, a path, `caption`, a text or several.

    An item: pixel_values (3, H, W), input_ids and attention_mask (L,) and labels (L,), -100 at padding, of the first
    caption, references, a tuple of all.
    """

    fields = {"image": is_text, "caption": _is_text_or_texts}

    def __getitem__(self, index: int) -> dict:
        record = self.records[index]
        captions = _listed(record["caption"])
        text = self._text(cleaned(captions[0]))
        return text | {
            "labels": text["input_ids"].masked_fill(text["attention_mask"] == 0, -100),
            "pixel_values": self._image(record["image"]),
            "references": tuple(captions),
        }


class VqaAnnotations(Annotations):
    """VQAv2 for `VqaTask`: `image`, a path, `question`, `answer`, a text or those of several people.

    An item: pixel_values (3, H, W), image, its number, input_ids and attention_mask (L,), labels (A,), the answer given
    most often, padded with the pad token, answers, a dict of answer -> the share of people who gave it, as BLIP weighs
    them.

    Args:
        answer_length: tokens of an answer, those around it included; the others are those of `Annotations`.
    """

    fields = {"image": is_text, "question": is_text, "answer": _is_text_or_texts}

    def __init__(self, *args, answer_length: int = 10, **options):
        super().__init__(*args, **options)
        self.answer_length = answer_length
        self.numbers = {name: i for i, name in enumerate(dict.fromkeys(record["image"] for record in self.records))}

    @property
    def answers(self) -> list[str]:
        """All that were given to any question, in alphabetical order."""
        return sorted({answer for record in self.records for answer in _listed(record["answer"])})

    def __getitem__(self, index: int) -> dict:
        record = self.records[index]
        given = _listed(record["answer"])
        counts = Counter(given)
        return self._text(cleaned(record["question"], gap="")) | {
            "labels": self._text(counts.most_common(1)[0][0], self.answer_length)["input_ids"],
            "pixel_values": self._image(record["image"]),
            "image": self.numbers[record["image"]],
            "answers": {answer: count / len(given) for answer, count in counts.items()},
        }
