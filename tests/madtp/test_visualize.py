# SPDX-License-Identifier: Apache-2.0
"""The picture of the tokens kept."""

import copy

import numpy as np
import pytest
import torch
from families import CASES, CONFIG, randomised
from PIL import Image
from transformers import BlipImageProcessor

import madtp
from madtp.data.easy_vqa import EasyVqa
from madtp.data.mosaics import Mosaics
from madtp.reporting import seam_pictures
from madtp.reporting.drawing import dimmed
from madtp.reporting.visualize import _words, depths, picture
from madtp.tasks.small_vlms import SMALL_VLMS
from madtp.tasks.vlm import VlmTask
from madtp.tasks.vqa import VqaTask, load_dense


@pytest.fixture
def scene(drawn):
    dense, tokenizer = load_dense()
    model = copy.deepcopy(dense)
    madtp.patch(model, madtp.CompressionConfig(alignment_tokens=8, alignment_dim=128)).set_temperature(1.0)
    return model, VqaTask(tokenizer), EasyVqa("test", tokenizer), dense


def test_picture(scene, tmp_path):
    model, task, data, dense = scene
    model.train()
    path = picture(model, task, data, tmp_path / "tokens.png", rows=3)
    assert model.training
    with Image.open(path) as image:
        assert image.format == "PNG" and image.width > 1000
        assert len(image.convert("RGB").getcolors(1 << 20)) > 100  # drawn, not blank
    with pytest.raises(TypeError, match="model must be a compressed one, got a plain BlipForQuestionAnswering"):
        picture(dense, task, data, tmp_path / "dense.png")
    for rows in (0, 25):
        with pytest.raises(ValueError, match=f"rows must be from 1 to the 24 images in the data, got {rows}"):
            picture(model, task, data, tmp_path / "none.png", rows=rows)
    with pytest.raises(ValueError, match="data must have the mean of their pixels to be drawn, list has none"):
        picture(model, task, [data[0]], tmp_path / "none.png", rows=1)


def test_questions_of_both_kinds_about_different_images(scene):
    data = scene[2]
    chosen = [data.questions[i] for i in data.examples(8)]
    assert [answer in ("yes", "no") for _, answer, _ in chosen] == [False, True] * 4
    assert len({image for _, _, image in chosen}) == 8


def test_pruned_patches_are_dimmed_and_kept_ones_are_not():
    image = torch.full((3, 8, 8), 200, dtype=torch.uint8)
    shown = dimmed(image, torch.tensor([1, 2, -1]), 4)  # of 2 x 2 patches; -1 is the summary token
    assert shown.shape == (8, 8, 3)
    assert (shown[:4, 4:] == 200).all() and (shown[4:, :4] == 200).all()
    assert (shown[:4, :4] < 90).all() and (shown[4:, 4:] < 90).all()


def test_words_say_whether_they_are_kept(scene):
    _, task, data, _ = scene
    words = _words(task.tokenizer, data[0]["input_ids"], torch.tensor([0, 2, 4]))
    assert [word for word, _ in words] == "what is the color of the shape ?".split()
    assert [kept for _, kept in words] == [False, True, False, True] + [False] * 4


class Letters:
    """A tokenizer of as many ids as a text has words; the last one ends it."""

    all_special_ids = ()

    def __init__(self, end):
        self.end = end

    def __call__(self, text, return_tensors):
        ids = torch.tensor([[*range(4, 4 + len(text.split())), self.end]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def convert_ids_to_tokens(self, ids):
        return [f"w{i}" for i in ids]


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("CLIPVisionModel", None),
        ("SiglipVisionModel", None),
        ("CLIPModel", "a cat on a mat"),
        ("BlipForQuestionAnswering", "what is it"),
        ("BlipForNLVR", "two cats on mats"),
        ("BlipForConditionalGeneration", "a cat"),
        ("Blip2ForConditionalGeneration", "a cat"),
        ("Blip2ForImageTextRetrieval", "a cat"),
        ("Dinov2Model", None),
        ("ViTForImageClassification", None),
    ],
)
def test_an_image_of_ones_own(family, text, tmp_path):
    torch.manual_seed(0)
    model = randomised(CASES[family].build())
    size = CASES[family].inputs()["pixel_values"].shape[-1]
    processor = BlipImageProcessor(size={"height": size, "width": size})
    end = 3 if "Blip" in family else 39  # which is where CLIP pools, and the image token of BLIP-2
    photo = Image.effect_noise((50, 40), 60).convert("RGB")
    options = {"image_processor": processor, "tokenizer": Letters(end), "text": text}
    with pytest.raises(TypeError, match="model must be a compressed one with a vision tower"):
        depths(model, photo, tmp_path / "none.png", **options)
    madtp.patch(model, CONFIG).set_temperature(2.0)
    with Image.open(depths(model, photo, tmp_path / "depths.png", **options)) as drawn:
        assert drawn.format == "PNG" and len(drawn.convert("RGB").getcolors(1 << 20)) > 100
    assert not any(module._forward_hooks for module in model.modules())
    if text is not None:
        with pytest.raises(ValueError, match=f"text must be given for a {type(model).__name__}, got none"):
            depths(model, photo, tmp_path / "none.png", **options | {"text": None})
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize("name", SMALL_VLMS)
def test_what_a_decoder_keeps_for_a_question(name, tmp_path):
    torch.manual_seed(0)
    model, processor = SMALL_VLMS[name].make().eval(), SMALL_VLMS[name].processor()
    data, task = Mosaics("test", processor, limit=8), VlmTask(processor)
    handle = madtp.patch(model, keep={"vision": 0.5, "projector": 0.5, "prefill": {2: 4}})
    titles, (view,) = seam_pictures.look(model, task.prompt(data[0]), data.mean, data.std)
    layers = handle.seams["vision"].layers
    assert titles == ["input", *(f"tower, {n + 1}" for n in range(layers)), "projector", "decoder, 2"]
    assert [len(kept) for kept in view.kept][-3:] == [32, 16, 4] and len(view.kept[0]) == 64
    assert set(view.kept[-1].tolist()) <= set(view.kept[-2].tolist()) <= set(view.kept[-3].tolist())
    drawn = torch.from_numpy(np.array(data.mosaic(0).draw())).permute(2, 0, 1)
    assert (view.pixels.int() - drawn.int()).abs().max() <= 1 and view.side == 12  # as the tower was given it
    path = picture(model, task, data, tmp_path / "seams.png", rows=2)
    with Image.open(path) as image:
        assert image.width > 1000 and len(image.convert("RGB").getcolors(1 << 20)) > 100


def test_tokens_that_are_no_grid_are_not_drawn(llava):
    model, batch = llava
    madtp.patch(model, keep={"projector": 0.5})
    wide = batch["pixel_values"].new_zeros(3, 3, 16, 8)
    with pytest.raises(ValueError, match="model must have a square of tokens for each of the 3 pictures of a prompt"):
        seam_pictures._pictures({"pixel_values": wide}, 0.5, 0.5, model.config, [16, 16, 16])
