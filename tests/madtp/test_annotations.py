# SPDX-License-Identifier: Apache-2.0
"""Annotation files of the BLIP project: what their records become, and what is said of broken ones."""

import json

import pytest
import torch
from families import CASES
from PIL import Image
from tiny_models import tiny_blip
from transformers import BlipImageProcessor

from madtp.data.annotations import CaptionAnnotations, NlvrAnnotations, RetrievalAnnotations, VqaAnnotations, cleaned
from madtp.data.errors import DataError
from madtp.data.word_tokenizer import word_tokenizer
from madtp.tasks.captioning import CaptioningTask
from madtp.tasks.nlvr import NlvrTask
from madtp.tasks.retrieval import RetrievalTask
from madtp.tasks.vqa import VqaTask

SENTENCE = "A red cat and two dogs!"
NLVR = {"images": ["a/0.png", "1.png"], "sentence": SENTENCE, "label": "True", "dataset": "nlvr2"}
KARPATHY = {"image": "1.png", "caption": ["A cat.", "Two dogs!", "red"]}
CAPTION = {"image": "a/0.png", "caption": "Two (red) dogs.", "image_id": "coco_1"}
VQA = {"image": "1.png", "question": "Which cat?", "answer": ["red", "two", "red", "red"], "question_id": 7}
KINDS = [
    (NlvrAnnotations, NLVR),
    (RetrievalAnnotations, KARPATHY),
    (CaptionAnnotations, CAPTION),
    (VqaAnnotations, VQA),
]


@pytest.fixture
def read(tmp_path):
    """Writes records beside two images and reads them back as a data set."""
    (tmp_path / "a").mkdir()
    Image.new("RGB", (20, 12), (255, 0, 0)).save(tmp_path / "a" / "0.png")
    Image.new("L", (8, 30), 0).save(tmp_path / "1.png")
    tokenizer = word_tokenizer([SENTENCE, "which ?"], max_length=16)
    processor = BlipImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.5] * 3, image_std=[0.5] * 3)

    def make(kind, records, **options):
        file = tmp_path / "records.json"
        file.write_text(records if isinstance(records, str) else json.dumps(records))
        return kind(file, tmp_path, tokenizer, processor, max_length=9, **options)

    make.tokenizer, make.root = tokenizer, tmp_path
    return make


def said(read, item, name="input_ids"):
    return read.tokenizer.decode(item[name][item[name] >= 0], skip_special_tokens=True)


def test_nlvr(read):
    data = read(NlvrAnnotations, [NLVR, NLVR | {"label": "False"}, NLVR | {"label": True}])
    item = data[0]
    assert item["pixel_values"].shape == (2, 3, 16, 16) and item["input_ids"].shape == (9,)
    red, black = item["pixel_values"]
    assert (red[0] == 1).all() and (red[1:] == -1).all() and (black == -1).all()
    assert [int(item["labels"]) for item in data] == [1, 0, 1]
    assert said(read, item) == "a red cat and two dogs"
    accuracy = NlvrTask(read.tokenizer).evaluate(CASES["BlipForNLVR"].build(), data)["accuracy"]
    assert accuracy in (pytest.approx(1 / 3), pytest.approx(2 / 3)), "the same inputs get the same answer"


def test_retrieval(read):
    data = read(RetrievalAnnotations, [KARPATHY, CAPTION, CAPTION | {"caption": "red"}])
    assert len(data) == 5 and [item["concept"] for item in data] == [0, 0, 0, 1, 1]
    assert [said(read, item) for item in data] == ["a cat", "two dogs", "red", "two red dogs", "red"]
    figures = RetrievalTask(read.tokenizer).evaluate(CASES["SiglipModel"].build(), data)
    assert figures["text_to_image_recall@5"] == 1.0
    assert len(read(RetrievalAnnotations, [KARPATHY, CAPTION], limit=1)) == 3


def test_captions(read):
    data = read(CaptionAnnotations, [KARPATHY, CAPTION])
    assert data[0]["references"] == tuple(KARPATHY["caption"]) and data[1]["references"] == (CAPTION["caption"],)
    assert said(read, data[0], "labels") == "a cat"
    assert torch.equal(data[0]["labels"] == -100, data[0]["attention_mask"] == 0)
    task = CaptioningTask(read.tokenizer, max_new_tokens=4)
    model = CASES["BlipForConditionalGeneration"].build()
    batch = task.collate([data[0], data[1]])
    assert task.loss(model(**batch), batch).isfinite()


def test_vqa(read):
    data = read(VqaAnnotations, [VQA, VQA | {"answer": "two"}], answer_length=3)
    item = data[0]
    assert item["answers"] == {"red": 0.75, "two": 0.25} and data[1]["answers"] == {"two": 1.0}
    assert said(read, item).replace(" ?", "?") == "which cat?" and said(read, item, "labels") == "red"
    task = VqaTask(read.tokenizer, ["red", "two"])
    batch = task.collate([data[0], data[1]])
    assert batch["pixel_values"].shape == (1, 3, 16, 16) and batch["image_index"].tolist() == [0, 0]
    assert task.evaluate(tiny_blip(), data)["accuracy"] == 0.5


def test_blip_cleans_texts_so():
    assert cleaned('  A "Cat" (red):  is it,   two~dogs?!') == "a cat red is it, two dogs?"
    assert cleaned("The U.S. cat?", gap="") == "the us cat?"


@pytest.mark.parametrize("kind, record", KINDS)
def test_a_record_that_lacks_a_field(read, kind, record):
    for field in kind.fields:
        without = {name: value for name, value in record.items() if name != field}
        with pytest.raises(DataError, match=f"records.json: record 1 lacks the field '{field}'"):
            read(kind, [record, without])
        with pytest.raises(DataError, match=f"records.json: record 0 has '{field}' of another kind: 7"):
            read(kind, [record | {field: 7}])
    with pytest.raises(DataError, match="record 0 lacks the field"):
        read(kind, ["text"])


@pytest.mark.parametrize("kind, record", KINDS)
def test_an_image_that_is_missing_or_broken(read, kind, record):
    for path in (read.root / "a" / "0.png", read.root / "1.png"):
        path.unlink()
    with pytest.raises(DataError, match=r"image .*png cannot be read \(No such file or directory\); image_root is"):
        read(kind, [record])[0]
    for path in (read.root / "a" / "0.png", read.root / "1.png"):
        path.write_text("no picture")
    with pytest.raises(DataError, match="png cannot be read .*cannot identify image file"):
        read(kind, [record])[0]


def test_a_file_that_is_missing_or_something_else(read, tmp_path):
    with pytest.raises(DataError, match=r"none.json cannot be read \(No such file or directory\)"):
        NlvrAnnotations(tmp_path / "none.json", tmp_path, read.tokenizer, None)
    with pytest.raises(DataError, match="records.json must be JSON"):
        read(NlvrAnnotations, "[{")
    for content in ({}, []):
        with pytest.raises(DataError, match="records.json must hold a list of records"):
            read(NlvrAnnotations, content)
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        read(NlvrAnnotations, [NLVR], limit=0)
