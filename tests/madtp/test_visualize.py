"""The picture of the tokens kept."""

import copy

import pytest
import torch
from PIL import Image

import madtp
from madtp.tasks.easy_vqa import EasyVqa
from madtp.tasks.vqa import VqaTask, load_dense
from madtp.visualize import _dimmed, _spread, _words, picture


@pytest.fixture
def scene(drawn):
    dense, tokenizer = load_dense()
    model = copy.deepcopy(dense)
    madtp.patch(model, madtp.CompressionConfig(alignment_tokens=8, alignment_dim=128)).set_temperature(1.0)
    return model, VqaTask(tokenizer), EasyVqa("test", tokenizer), dense


def test_picture(scene, tmp_path):
    model, task, data, dense = scene
    model.train()
    path = picture(model, task, data, tmp_path / "tokens.png", images=3)
    assert model.training
    with Image.open(path) as image:
        assert image.format == "PNG" and image.width > 1000
        assert len(image.convert("RGB").getcolors(1 << 20)) > 100  # drawn, not blank
    with pytest.raises(TypeError, match="model must be a compressed one, got a plain BlipForQuestionAnswering"):
        picture(dense, task, data, tmp_path / "dense.png")
    for images in (0, 25):
        with pytest.raises(ValueError, match=f"images must be from 1 to the 24 in the data, got {images}"):
            picture(model, task, data, tmp_path / "none.png", images=images)


def test_questions_of_both_kinds_about_different_images(scene):
    data = scene[2]
    chosen = [data.questions[i] for i in _spread(data, 8)]
    assert [answer in ("yes", "no") for _, answer, _ in chosen] == [False, True] * 4
    assert len({image for _, _, image in chosen}) == 8


def test_pruned_patches_are_dimmed_and_kept_ones_are_not():
    image = torch.full((3, 8, 8), 200, dtype=torch.uint8)
    shown = _dimmed(image, torch.tensor([1, 2, -1]), 4)  # of 2 x 2 patches; -1 is the summary token
    assert shown.shape == (8, 8, 3)
    assert (shown[:4, 4:] == 200).all() and (shown[4:, :4] == 200).all()
    assert (shown[:4, :4] < 90).all() and (shown[4:, 4:] < 90).all()


def test_words_say_whether_they_are_kept(scene):
    _, task, data, _ = scene
    batch = task.collate([data[0]])
    words = _words(task, batch, torch.tensor([0, 2, 4]), 0)
    assert [word for word, _ in words] == "what is the color of the shape ?".split()
    assert [kept for _, kept in words] == [False, True, False, True] + [False] * 4
