# SPDX-License-Identifier: Apache-2.0
"""Conversations about images, in the JSON files of LLaVA: what decoders that read images are trained on.

A record is {"image": a path, or a list of them, "conversations": [{"from": "human", "value": "<image>\\nWhat ...?"},
{"from": "gpt", "value": "..."}, ...]}. Files and images are the user's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from madtp.data.annotations import Annotations, is_text
from madtp.data.errors import DataError
from madtp.data.images import read_image
from madtp_kernels.bounded_file import one_line

IMAGE = "<image>"  # where a text has an image, whatever the placeholder of a tokenizer is
SPEAKERS = ("human", "gpt")  # in turns
IGNORED = -100  # a label that does not count
REMEDY = (
    "run `hf download liuhaotian/LLaVA-Instruct-150K llava_instruct_150k.json --repo-type dataset --local-dir .` for "
    "LLaVA's, whose images are train2017 of COCO (images.cocodataset.org/zips/train2017.zip), or write one as "
    "examples/compress_vlm.py does"
)


class Piece(NamedTuple):
    """A part of a conversation as it is read: all up to an answer, or an answer."""

    text: str
    images: int
    is_answer: bool


class Conversations(Annotations):
    """Conversations for `VlmTask`.

    An item: input_ids, attention_mask and labels (L,), the last -100 outside of the answers, what else the processor
    makes for the tokens (L,) and the images, question and answer, the last texts of the two, and answer_begin, where
    the tokens of that answer begin.

    Args:
        file: the JSON file.
        image_root: the folder that image paths start from.
        processor: of Hugging Face, with a tokenizer, an image processor and perhaps a chat template. Without one
            prompts are those of LLaVA-1.5, "USER: <image>\\nWhat ...? ASSISTANT: ...".
        image_processor: that of the processor; it is not looked at.
        max_length: tokens of the model's context, image tokens among them; None: what the tokenizer says.
        limit: keep the first `limit` records.

    Raises:
        DataError: the file is missing or no list of conversations; a record has no image or no question, or other
            speakers than human and gpt in turns; an answer is longer than the context; the tokenizer has no token for
            images. When an item is read: its image is missing or broken, or the conversation is longer than the
            context.
    """

    fields = {
        "image": lambda value: is_text(value) or (isinstance(value, list) and bool(value) and all(map(is_text, value))),
        "conversations": lambda value: isinstance(value, list) and bool(value) and all(map(_is_turn, value)),
    }

    def __init__(
        self,
        file: Path | str,
        image_root: Path | str,
        processor,
        image_processor=None,
        max_length: int | None = None,
        limit: int | None = None,
    ):
        self.image_token = _image_token(processor)
        self.image_id = processor.tokenizer.convert_tokens_to_ids(self.image_token)
        longest = processor.tokenizer.model_max_length  # a number without meaning, but large, where nobody knows
        max_length = longest if max_length is None else min(max_length, longest)
        super().__init__(file, image_root, processor, image_processor, max_length, limit)
        for number, record in enumerate(self.records):
            self._check(number, record)

    @property
    def processor(self) -> Any:
        """Makes the inputs."""
        return self.tokenizer

    @property
    def mean(self) -> list[float]:
        return self.processor.image_processor.image_mean

    @property
    def std(self) -> list[float]:
        return self.processor.image_processor.image_std

    def __getitem__(self, index: int) -> dict:
        record = self.records[index]
        images = [self._picture(name) for name in _listed(record["image"])]
        item: dict[str, Any] = {}
        begin = 0
        for piece in self._pieces(index, record["conversations"]):
            taken, images = images[: piece.images], images[piece.images :]
            begin = len(item["input_ids"]) if piece.is_answer else begin
            item = _joined(item, self._encoded(piece, taken, first=not item), piece.is_answer)
            if piece.is_answer and item["input_ids"][begin - 1] == self.image_id:
                raise DataError(
                    f"{self.file}: record {index} must have text between an image and the answer, which the chat "
                    "template of the processor leaves out"
                )
        length = len(item["input_ids"])
        if length > self.max_length:
            raise DataError(
                f"{self.file}: record {index} must fit the context of {self.max_length} tokens, image tokens among "
                f"them, got {length}"
            )
        question, answer = (turn["value"] for turn in record["conversations"][-2:])
        asked = question.replace(IMAGE, "").strip()
        return item | {"question": asked, "answer": answer, "answer_begin": begin}

    def _read(self) -> list[dict]:
        if not self.file.exists():
            raise DataError(f"conversations not found at {self.file}: {REMEDY}")
        return super()._read()

    def _picture(self, name: str) -> Image.Image:
        return read_image(self.image_root / name, "; image_root is wrong?")

    def _check(self, number: int, record: dict) -> None:
        turns, images = record["conversations"], len(_listed(record["image"]))
        where = f"{self.file}: record {number}"
        said = tuple(turn["from"] for turn in turns)
        if len(turns) % 2 or said != SPEAKERS * (len(turns) // 2):
            raise DataError(f"{where} must have turns of human and gpt, one after the other, got {', '.join(said)}")
        questions, answers = turns[::2], turns[1::2]
        marks = sum(turn["value"].count(IMAGE) for turn in questions)
        if marks != images:
            raise DataError(
                f"{where} must have one {IMAGE} in its questions for each of its {images} images, got {marks}"
            )
        if self.image_token != IMAGE and any(self.image_token in turn["value"] for turn in turns):
            raise DataError(
                f"{where} must have {IMAGE} for an image, got {self.image_token}, the token of the tokenizer"
            )
        if any(not turn["value"].replace(IMAGE, "").strip() for turn in questions):
            raise DataError(f"{where} must have a question beside {IMAGE} in each turn of human, got none")
        for turn in answers:
            if not turn["value"].strip() or IMAGE in turn["value"]:
                raise DataError(f"{where} must have answers of text, got {turn['value']!r}")
            if len(turn["value"].encode()) > self.max_length:  # no fewer bytes than tokens
                length = len(self._tokens(turn["value"]))
                if length >= self.max_length:
                    raise DataError(f"{where} must have answers within {self.max_length} tokens, got one of {length}")

    def _tokens(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _pieces(self, number: int, turns: Sequence[dict]) -> list[Piece]:
        """The text that the processor's chat template makes of the turns, cut before and behind every answer."""
        messages = [_message(turn) for turn in turns]
        pieces, whole = [], ""
        for end in range(1, len(turns) + 1):
            is_answer = turns[end - 1]["from"] == "gpt"
            try:
                text = self._templated(messages[:end], prompts=not is_answer)
            except Exception as error:  # whatever a template does
                raise DataError(
                    f"{self.file}: record {number} cannot be said by the chat template of the processor "
                    f"({one_line(error)})"
                ) from error
            if not text.startswith(whole):
                raise DataError(
                    f"{self.file}: record {number} must be said turn by turn, and the chat template of the processor "
                    f"changes what it said before turn {end}"
                )
            images = 0 if is_answer else turns[end - 1]["value"].count(IMAGE)
            pieces.append(Piece(text[len(whole) :], images, is_answer))
            whole = text
        return pieces

    def _templated(self, messages: list[dict], *, prompts: bool) -> str:
        if getattr(self.processor, "chat_template", None) is not None:
            return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompts)
        end = self.processor.tokenizer.eos_token or ""
        said = ""
        for message in messages:
            parts = (self.image_token if part["type"] == "image" else part["text"] for part in message["content"])
            text = "\n".join(parts)
            said += f"USER: {text} ASSISTANT:" if message["role"] == "user" else f" {text}{end}"
        return said

    def _encoded(self, piece: Piece, images: list, *, first: bool) -> dict[str, Tensor]:
        """What the processor makes of a piece: per token (L,), of images as it comes."""
        begin = self.processor.tokenizer.bos_token
        marks = first and not (begin and piece.text.startswith(begin))  # which a template may have written
        if not images:
            tokens = self.processor.tokenizer(piece.text, add_special_tokens=marks)["input_ids"]
            return {"input_ids": torch.tensor(tokens).long(), "attention_mask": torch.ones(len(tokens)).long()}
        made = self.processor(images=images, text=[piece.text], add_special_tokens=marks, return_tensors="pt")
        shape = made["input_ids"].shape
        return {name: value[0] if value.shape == shape else value for name, value in made.items()}


class Question(Conversations):
    """One picture with one question, as `Conversations`; there is no answer to judge by, and one word stands for it.

    Args:
        picture: RGB. text: the question. processor, max_length: as of `Conversations`.

    Raises:
        DataError: the text is empty or longer than the context, or the processor makes no prompts with images.
    """

    def __init__(self, picture: Image.Image, text: str, processor, max_length: int | None = None):
        self.picture, self.text = picture, text
        super().__init__("text", ".", processor, max_length=max_length)

    def _read(self) -> list[dict]:
        turns = [{"from": "human", "value": f"{IMAGE}\n{self.text}"}, {"from": "gpt", "value": "?"}]
        return [{"image": "", "conversations": turns}]

    def _picture(self, name: str) -> Image.Image:
        return self.picture


def _joined(item: dict[str, Any], piece: dict[str, Tensor], is_answer: bool) -> dict[str, Any]:
    """A conversation and what follows; what one of them has for its tokens, and the other not, is 0 there."""
    ids = piece["input_ids"]
    piece = piece | {"labels": ids if is_answer else torch.full_like(ids, IGNORED)}
    if not item:
        return piece
    joined = {}
    before, behind = len(item["input_ids"]), len(ids)
    for name in {**item, **piece}:
        per_token = any(name in part and part[name].shape == (n,) for part, n in ((item, before), (piece, behind)))
        first, then = item.get(name), piece.get(name)
        if per_token:
            first = ids.new_zeros(before) if first is None else first
            then = ids.new_zeros(behind) if then is None else then
        parts = [part for part in (first, then) if part is not None]
        joined[name] = torch.cat(parts)
    return joined


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and is_text(value.get("from")) and is_text(value.get("value"))


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _message(turn: dict) -> dict[str, Any]:
    """As chat templates read it; images come before or behind the text that is beside them, as in the file."""
    content: list[dict[str, str]] = []
    for i, text in enumerate(turn["value"].split(IMAGE)):
        content += [{"type": "image"}] if i else []
        content += [{"type": "text", "text": text.strip()}] if text.strip() else []
    return {"role": "user" if turn["from"] == "human" else "assistant", "content": content}


def _image_token(processor: Any) -> str:
    """Raises DataError for what cannot make prompts with images."""
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or getattr(processor, "image_processor", None) is None:
        raise DataError(
            f"processor must have a tokenizer and an image processor (AutoProcessor), got a {type(processor).__name__}"
        )
    token = getattr(processor, "image_token", None)
    known = is_text(token) and tokenizer.convert_tokens_to_ids(token) not in (None, tokenizer.unk_token_id)
    if not known:
        raise DataError(f"tokenizer must have the image token of its processor, got none for {token!r}")
    return str(token)
