# SPDX-License-Identifier: Apache-2.0
"""Mosaics: the same on every machine, asked about what is there, in LLaVA's form."""

import hashlib
from collections import Counter

import numpy as np
import pytest
import torch
from vlm_conversations import example

from madtp.data.conversations import Conversations, Question
from madtp.data.errors import DataError
from madtp.data.mosaics import CHARACTERS, PLACES, SIDE, VOCABULARY, Mosaic, Mosaics, kind_of, write_mosaics
from madtp.tasks.small_vlms import SMALL_VLMS

DIGESTS = ["c882f8ec6196", "d9efd3c5ef4a", "116d36afa6ab"]  # of the first three pictures


@pytest.fixture(scope="module")
def processor():
    return SMALL_VLMS["llava"].processor()


def test_pictures_are_a_function_of_the_seed(processor):
    data, again, other = (Mosaics("test", processor, limit=12, seed=seed) for seed in (0, 0, 1))
    digests = [hashlib.sha256(np.asarray(data.mosaic(i).draw()).tobytes()).hexdigest()[:12] for i in range(3)]
    assert digests == DIGESTS  # on every machine
    assert data.records == again.records and data.records != other.records
    assert torch.equal(data[5]["pixel_values"], again[5]["pixel_values"])


def test_the_test_set_asks_every_kind_of_question(processor):
    data = Mosaics("test", processor)
    assert len(data) >= 4000 and len({record["id"] for record in data.records}) == len(data)
    kinds = Counter(kind_of(record["conversations"][0]["value"]) for record in data.records)
    assert set(kinds) == {"color", "what", "where", "read", "character"} and min(kinds.values()) > 400
    words = {word for record in data.records for turn in record["conversations"] for word in turn["value"].split()}
    assert words - {"<image>"} <= set(VOCABULARY)
    assert len({data.records[i]["image"] for i in data.examples(9)}) == 9


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_answers_are_what_is_drawn(kind):
    mosaic = Mosaic.random(np.random.default_rng(kind), kind)
    asked, boxes = dict(mosaic.questions()), mosaic.boxes()
    if kind == 2:
        assert [asked[f"read the {row} row"].replace(" ", "") for row in ("top", "middle", "bottom")] == [
            "".join(box.name for box in boxes[start : start + 4]) for start in (0, 4, 8)
        ]
        assert asked["what is the second character in the top row ?"] == boxes[1].name in CHARACTERS
        return
    places, cell = PLACES[mosaic.grid], SIDE // mosaic.grid
    pixels = np.asarray(mosaic.draw()).astype(int)
    for number, place in enumerate(places):
        row, column = divmod(number, mosaic.grid)
        inside = [box for box in boxes if (box.top + box.height // 2) // cell == row and box.left // cell == column]
        assert asked[f"what is {place} ?"] == (inside[0].name if inside else "nothing")
        patch = pixels[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
        assert (patch == mosaic.background).all() != bool(inside)
        if inside and inside[0].color:
            assert asked[f"what color is the {inside[0].name} {place} ?"] == inside[0].color


def test_files_of_them_are_read_as_conversations(processor, tmp_path):
    data = Mosaics("train", processor, turns=3, limit=4)
    read = Conversations(write_mosaics(data, tmp_path), tmp_path / "images", processor)
    for i in range(4):
        assert {"question", "answer", "pixel_values"} <= set(data[i])
        for name, value in data[i].items():
            same = torch.equal(value, read[i][name]) if isinstance(value, torch.Tensor) else value == read[i][name]
            assert same, name
        assert (data[i]["labels"] != -100).sum() > 3
    assert [turn["from"] for turn in data.records[0]["conversations"]] == ["human", "gpt"] * 3


def test_what_is_wrong_is_said(processor):
    with pytest.raises(ValueError, match="split must be one of train, test, got 'val'"):
        Mosaics("val", processor)
    with pytest.raises(ValueError, match="turns must be at least 1, got 0"):
        Mosaics("train", processor, turns=0)
    with pytest.raises(ValueError, match="rows must be from 1 to the 2 images in the data, got 3"):
        Mosaics("test", processor, limit=8).examples(3)
    with pytest.raises(DataError, match="tokenizer must know the words of mosaics, got none for "):
        Mosaics("test", example.make_processor(), limit=4)
    picture = Mosaics("test", processor, limit=4).mosaic(0).draw()
    with pytest.raises(DataError, match="must have a question beside <image>"):
        Question(picture, " ", processor)
    asked = Question(picture, "what is top ?", processor)[0]
    assert asked["question"] == "what is top ?" and asked["pixel_values"].shape == (1, 3, SIDE, SIDE)
