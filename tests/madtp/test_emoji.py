# SPDX-License-Identifier: Apache-2.0
"""Emoji as data: families stay on one side of the split, items are the same every time and say what is true."""

import itertools
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from madtp.data import emoji_icons
from madtp.data.downloads import Tarball
from madtp.data.emoji import (
    SHIFTED,
    STATEMENTS,
    VENDORS,
    Emoji,
    EmojiCaptions,
    EmojiPairs,
    EmojiRetrieval,
    build_tokenizer,
)
from madtp.data.emoji_icons import ICONS, SPLITS, TEXT, Concept
from madtp.data.emoji_kinds import BROAD, NOUNS
from madtp.data.errors import DataError
from madtp.data.scenes import COLORS, TEXTURES, Scene
from madtp.data.word_tokenizer import word_tokenizer

PACKAGE = Tarball("some data", "some-data@1.0.0", "some-data-1.0.0.tgz", "00")


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def published():
    pytest.importorskip("resvg_py")
    try:
        for package in (TEXT, *ICONS.values()):
            package.prepare(download=False)
        return Emoji()
    except DataError as error:
        pytest.skip(str(error))


def same(left: dict, right: dict) -> bool:
    assert left.keys() == right.keys()
    return all(
        torch.equal(value, right[name]) if torch.is_tensor(value) else value == right[name]
        for name, value in left.items()
    )


@pytest.mark.parametrize(
    "labels",
    [
        ("man mage", "woman mage", "mage"),
        ("person running", "woman running: facing right"),
        ("one o’clock", "eleven-thirty"),
        ("keycap: 1", "keycap: #"),
        ("red apple", "green apple"),
        ("merman", "mermaid", "merperson"),
        ("prince", "princess", "person with crown"),
        ("man", "woman: red hair", "boy", "old woman"),
        ("cat", "cat face"),
    ],
)
def test_near_duplicates_are_a_family(labels):
    assert len({Concept("0", label, (), None).base for label in labels}) == 1
    assert len({Concept("0", label, (), None).split for label in labels}) == 1


def test_different_things_are_not():
    labels = ("dog", "cat", "red apple", "tangerine", "grinning cat", "police officer", "police car", "clock tower")
    assert len({Concept("0", label, (), None).base for label in labels}) == len(labels)


def test_every_concept_is_in_one_split(few_emoji):
    splits = [few_emoji.of_split(name) for name in SPLITS]
    assert sorted(itertools.chain(*splits)) == list(range(120)) and all(splits)
    with pytest.raises(ValueError, match="split must be one of train, val, test, got 'dev'"):
        few_emoji.of_split("dev")


@pytest.mark.parametrize("make", [EmojiRetrieval, EmojiPairs, EmojiCaptions])
def test_items_are_the_same_every_time(few_emoji, tokenizer, make):
    whole, again, other, few = (
        make("train", tokenizer, 32, source=few_emoji, **options) for options in ({}, {}, {"seed": 1}, {"limit": 7})
    )
    assert len(few) == 7 < len(whole)
    for i in (0, 3, 6):
        assert same(whole[i], again[i]) and torch.equal(whole[i]["pixel_values"], few[i]["pixel_values"])
        assert not torch.equal(whole[i]["pixel_values"], other[i]["pixel_values"])


def truth(statement, left, right):
    return {
        "the left image shows {}": left,
        "the left image does not show {}": not left,
        "the right image shows {}": right,
        "the right image does not show {}": not right,
        "both images show {}": left and right,
        "at most one image shows {}": not (left and right),
        "at least one image shows {}": left or right,
        "neither image shows {}": not (left or right),
        "exactly one image shows {}": left != right,
        "both or neither of the images show {}": left == right,
    }[statement]


@pytest.mark.parametrize("about", ["kinds", "backgrounds"])
def test_pairs_are_true_when_they_say_so(few_emoji, tokenizer, about):
    data = EmojiPairs("test", tokenizer, 32, pairs=200, about=about, source=few_emoji)
    assert sum(int(data[i]["labels"]) for i in range(200)) == 100
    subjects = {noun: noun for noun in NOUNS} if about == "kinds" else {f"a {c} background": c for c in COLORS}
    seen = set()
    for i in range(200):
        shown = [few_emoji.concepts[concept] for concept, _, _ in data.pictures[i]]
        assert all(concept.split == "test" for concept in shown)
        statement, subject = next((s, n) for s in STATEMENTS for n in subjects if data.statements[i] == s.format(n))
        if about == "kinds":
            left, right = (subject in (concept.kind, BROAD[concept.kind]) for concept in shown)
        else:
            left, right = (scene.color == subjects[subject] for _, _, scene in data.pictures[i])
        assert int(data[i]["labels"]) == truth(statement, left, right)
        seen.add(statement)
    assert seen == set(STATEMENTS)


def test_pairs_can_keep_to_some_statements(few_emoji, tokenizer):
    first, second, *_ = STATEMENTS
    data = EmojiPairs("test", tokenizer, 32, pairs=40, statements=(first, second), source=few_emoji)
    assert all(said.startswith(("the left image shows", "the left image does not")) for said in data.statements)
    with pytest.raises(ValueError, match="statements must be some of STATEMENTS, got .'no'"):
        EmojiPairs("test", tokenizer, 32, statements=("no",), source=few_emoji)
    with pytest.raises(ValueError, match="about must be 'kinds' or 'backgrounds', got 'icons'"):
        EmojiPairs("test", tokenizer, 32, about="icons", source=few_emoji)


def test_every_statement_has_its_negation():
    """Then images alone tell nothing: what is true of a pair for one statement is false for another, as often."""
    every = frozenset(itertools.product((False, True), repeat=2))
    truths = {frozenset(true) for true in STATEMENTS.values()}
    assert {every - true for true in truths} == truths


def test_items_of_pairs_and_captions(few_emoji, tokenizer):
    pair = EmojiPairs("val", tokenizer, 32, pairs=4, source=few_emoji)[1]
    assert pair["pixel_values"].shape == (2, 3, 32, 32) and pair["labels"].shape == ()
    data = EmojiCaptions("val", tokenizer, 32, source=few_emoji)
    assert len(data) == len(VENDORS) * len(few_emoji.of_split("val"))
    for i in range(len(data)):
        item = data[i]
        (caption,) = item["references"]
        assert tokenizer.decode(item["input_ids"], skip_special_tokens=True) == caption
        assert torch.equal(item["labels"] == -100, item["attention_mask"] == 0)
        concept, _, scene = data.pictures[i]
        assert caption.startswith(few_emoji.concepts[concept].kind) and caption.endswith(scene.background)
        assert -1 <= item["pixel_values"].min() and item["pixel_values"].max() <= 1


def test_the_tokenizer_knows_all_that_is_said(tokenizer):
    texts = [statement.format(noun) for statement in STATEMENTS for noun in NOUNS]
    scenes = (Scene(0.5, x, y, c, t, 0) for x in (0, 0.5, 1) for y in (0, 0.5, 1) for c in COLORS for t in TEXTURES)
    texts += [f"{scene.place} {scene.background}" for scene in scenes]
    assert tokenizer.unk_token_id not in itertools.chain(*tokenizer(texts)["input_ids"])
    assert max(map(len, tokenizer(texts)["input_ids"])) < tokenizer.model_max_length


def test_retrieval_shows_every_concept_by_every_vendor(few_emoji, tokenizer):
    data = EmojiRetrieval("test", tokenizer, 32, renders=2, source=few_emoji)
    members = few_emoji.of_split("test")
    shown = [(data[i]["concept"], data.pictures[i][1]) for i in range(len(data))]
    assert sorted(shown) == sorted(2 * list(itertools.product(members, VENDORS)))
    shifted = EmojiRetrieval("test", tokenizer, 32, vendors=SHIFTED, source=few_emoji)
    assert {vendor for _, vendor, _ in shifted.pictures} == {"fluent"}
    label, *tags = data.captions[0].split(", ")
    assert label == few_emoji.concepts[shown[0][0]].label and set(tags) < {"small", "round", "odd"} and len(tags) == 2


def test_arguments_are_checked(few_emoji, tokenizer):
    for error, options in {
        "vendors must be some of noto, twemoji, fluent, got \\['apple'\\]": {"vendors": ["apple"]},
        "vendors must be some of": {"vendors": []},
        "size must be at least 16 pixels, got 8": {"size": 8},
        "limit must be at least 1, got 0": {"limit": 0},
        "must have at least 1 item": {"renders": 0},
    }.items():
        with pytest.raises(ValueError, match=error):
            EmojiRetrieval("test", tokenizer, source=few_emoji, **options)


@pytest.mark.parametrize("texture", TEXTURES)
def test_a_scene_is_where_and_on_what_it_says(texture):
    icon = np.full((20, 20, 4), 255, np.uint8)  # a white square
    for x, y, place in ((0.1, 0.1, "top left"), (0.9, 0.5, "right"), (0.5, 0.5, "middle"), (0.55, 0.95, "bottom")):
        for color in COLORS:
            scene = Scene(0.4, x, y, color, texture, seed=5)
            picture = scene.draw(icon, 48)
            assert picture.shape == (3, 48, 48) and picture.dtype == np.uint8
            assert scene.place == place and scene.background == f"a {texture} {color} background"
            assert (picture == scene.draw(icon, 48)).all()
            white = (picture == 255).all(axis=0)
            rows, columns = np.nonzero(white)
            side = round(0.4 * 48)
            assert abs(rows.mean() - (y * (48 - side) + side / 2)) < 1.5
            assert abs(columns.mean() - (x * (48 - side) + side / 2)) < 1.5
            behind = picture[:, ~white].mean(axis=1)
            nearest = min(COLORS, key=lambda name: np.abs(behind - COLORS[name]).sum())
            assert nearest == color


def test_random_scenes_cover_the_nine_places():
    generator = np.random.default_rng(0)
    scenes = [Scene.random(generator) for _ in range(300)]
    assert len({scene.place for scene in scenes}) == 9
    assert all(0 <= scene.x <= 1 and 0 <= scene.y <= 1 for scene in scenes)


def test_icons_are_rendered_once(few_emoji, monkeypatch):
    icons = few_emoji.icons(16)
    assert icons.shape == (120, 3, 16, 16, 4) and icons.dtype == np.uint8
    (file,) = few_emoji.cache.glob("*.npy")
    calls = []
    render = emoji_icons.render
    monkeypatch.setattr(emoji_icons, "render", lambda *args: calls.append(args) or render(*args))
    assert (few_emoji.icons(16) == icons).all() and not calls
    file.write_bytes(file.read_bytes()[:1000])
    assert few_emoji.icons(16).shape == icons.shape and len(calls) == 360
    few_emoji.drawings["noto"][few_emoji.concepts[0].code] = "0 0"
    few_emoji.icons(16)
    assert len(list(few_emoji.cache.glob("*.npy"))) == 2, "another drawing is another file"


def test_a_cache_that_cannot_be_written(few_emoji, tmp_path):
    (tmp_path / "file").write_text("")
    few_emoji.cache = tmp_path / "file"
    with pytest.raises(DataError, match="data cache must be a writable directory.*set MADTP_CACHE"):
        few_emoji.icons(16)


def test_svg_is_rendered():
    pytest.importorskip("resvg_py")
    wide = emoji_icons._svg({"body": '<rect width="40" height="20" fill="#f00"/>', "width": 40, "height": 20}, {})
    icon = emoji_icons.render(wide, 16)
    assert icon.shape == (16, 16, 4)
    assert (icon[5:11] == [255, 0, 0, 255]).all() and (icon[:3, :, 3] == 0).all() and (icon[-3:, :, 3] == 0).all()


def test_a_missing_renderer_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(DataError, match="run `python -m pip install resvg-py`"):
        emoji_icons.render("<svg/>", 16)


def test_a_package_that_cannot_be_fetched(tmp_path, monkeypatch):
    how = f"run `npm pack --pack-destination {tmp_path} some-data@1.0.0`"
    with pytest.raises(DataError, match="some data not found") as error:
        PACKAGE.prepare(tmp_path, download=False)
    assert how in str(error.value) and "\n" not in str(error.value)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(DataError, match="there is no npm to fetch it") as error:
        PACKAGE.prepare(tmp_path)
    assert how in str(error.value)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1, "", "npm error\nE404"))
    with pytest.raises(DataError, match=r"npm could not fetch it \(E404\)") as error:
        PACKAGE.prepare(tmp_path)
    assert how in str(error.value)
    (tmp_path / PACKAGE.file).write_bytes(b"\x1f\x8b cut short")
    with pytest.raises(DataError, match="must have sha256 00, got"):
        PACKAGE.json("package.json", tmp_path)


def test_word_tokenizer():
    words = word_tokenizer(["A cat, a dog"], max_length=8)
    assert words.convert_ids_to_tokens(words("a Dog cow")["input_ids"]) == ["[CLS]", "a", "dog", "[UNK]", "[SEP]"]
    assert len(words) == 4 + len({"a", "cat", ",", "dog"})


def test_published_emoji(published, tokenizer):
    assert len(published.concepts) == 1594
    counts = {name: len(published.of_split(name)) for name in SPLITS}
    assert counts == {"train": 1221, "val": 168, "test": 205}
    split_of = {}
    for concept in published.concepts:
        assert split_of.setdefault(concept.base, concept.split) == concept.split
    icons = published.icons(24)
    assert (icons[..., 3].reshape(1594, 3, -1).max(axis=-1) > 0).all(), "nothing is blank"
    flat = icons.reshape(1594 * 3, -1)
    assert len(np.unique(flat, axis=0)) > 0.99 * len(flat)
    for make in (EmojiPairs, EmojiCaptions):
        data = make("test", tokenizer, 32, limit=50, source=published)
        assert not (data.input_ids == tokenizer.unk_token_id).any()
        assert data[3]["pixel_values"].std() > 0
