# SPDX-License-Identifier: Apache-2.0
"""NLVR: accuracy of plain and patched models, and that a small one learns what a statement is about."""

import pytest
import torch

import madtp
from madtp.data.emoji import EmojiPairs, build_tokenizer
from madtp.tasks.nlvr import NlvrTask
from madtp.tasks.small_models import captioning_model, nlvr_model


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def data(few_emoji, tokenizer):
    return EmojiPairs("train", tokenizer, 32, pairs=48, source=few_emoji)


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    return nlvr_model(tokenizer, 32)


def test_accuracy_is_counted(data, tokenizer, model):
    task = NlvrTask(tokenizer)
    batch = task.collate([data[i] for i in range(48)])
    assert batch["pixel_values"].shape == (48, 2, 3, 32, 32) and batch["labels"].shape == (48,)
    with torch.no_grad():
        output = model.eval()(**batch)
    expected = {"accuracy": (output.logits.argmax(-1) == batch["labels"]).double().mean().item()}
    assert task.loss(output, batch) == torch.nn.functional.cross_entropy(output.logits, batch["labels"])
    assert task.logits(output, batch)[0].shape == (48, 2) and task.logits(output, batch)[1] is None
    assert task.evaluate(model.train(), data, batch_size=10) == pytest.approx(expected) and model.training
    handle = madtp.patch(model)
    assert task.evaluate(model, data, batch_size=10) == pytest.approx(expected)
    handle.set_temperature({"vision": 50.0})
    assert 0 <= task.evaluate(model, data)["accuracy"] <= 1
    assert handle.tokens_per_layer["vision"][-1] < 17


@pytest.mark.slow
def test_it_can_be_learned(few_emoji, tokenizer, model):
    data = EmojiPairs("train", tokenizer, 32, pairs=48, source=few_emoji)
    task = NlvrTask(tokenizer)
    batch = task.collate([data[i] for i in range(48)])
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(30):
        optimiser.zero_grad()
        task.loss(model(**batch), batch).backward()
        optimiser.step()
    assert task.evaluate(model, data)["accuracy"] > 0.9


def test_a_captioning_model_lends_its_vision_encoder(tokenizer):
    captioner = captioning_model(tokenizer, 32)
    model = nlvr_model(tokenizer, 32, vision=captioner)
    for left, right in zip(model.vision_model.parameters(), captioner.vision_model.parameters(), strict=True):
        assert torch.equal(left, right)
    assert 0.9e6 < sum(p.numel() for p in model.parameters()) < 2.5e6


@pytest.mark.slow
def test_compress(few_emoji, tokenizer, tmp_path):
    data = EmojiPairs("train", tokenizer, 32, pairs=48, source=few_emoji)
    config = madtp.CompressionConfig(macs_reduction=0.3, alignment_tokens=8, alignment_dim=32, controller_interval=2)
    training = {"max_steps": 6, "per_device_train_batch_size": 8, "disable_tqdm": True, "save_strategy": "no"}
    model = nlvr_model(tokenizer, 32)
    result = madtp.compress(model, NlvrTask(tokenizer), data, data, config, output_dir=tmp_path, training=training)
    report = result.report
    assert report["metric"] == "accuracy" and 0 <= report["compressed"]["metrics"]["accuracy"] <= 1
    assert report["compressed"]["counted_gmacs"] < 0.8 * report["dense"]["counted_gmacs"]
