# SPDX-License-Identifier: Apache-2.0
"""The pretrained towers load and mean what they should. They are read where they are cached, and else not fetched."""

import pytest
import torch

import madtp
from madtp.data import pretrained
from madtp.data.errors import DataError


@pytest.fixture(scope="module")
def dual():
    try:
        for package in (pretrained.VISION, pretrained.TEXT):
            package.prepare(download=False)
        return pretrained.dual_encoder()
    except DataError as error:
        pytest.skip(str(error))


def test_text_means_something(dual):
    model, tokenizer = dual
    texts = ["a photo of a cat", "a picture of a kitten", "the stock market fell today"]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    hidden = model.text_model(**inputs).last_hidden_state * inputs["attention_mask"][..., None]
    features = torch.nn.functional.normalize(hidden.sum(dim=1), dim=-1)
    similar = features @ features.T
    assert similar[0, 1] > 0.7 and similar[0, 2] < 0.2


def test_it_patches(dual):
    model, tokenizer = dual
    inputs = dict(tokenizer(["a cat", "two dogs on a sofa"], padding=True, return_tensors="pt"))
    inputs["pixel_values"] = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(**inputs).logits_per_image
        handle = madtp.patch(model)
        torch.testing.assert_close(model(**inputs).logits_per_image, expected, rtol=1e-4, atol=1e-4)
        handle.set_temperature({"vision": 2.0})
        model(**inputs)
    assert handle.tokens_per_layer["vision"][-1] < 257
    handle.remove()
