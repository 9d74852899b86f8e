# SPDX-License-Identifier: Apache-2.0
"""Captions: what is generated is what is scored, by plain and patched models alike."""

import sys

import pytest
import torch

import madtp
from madtp.data.emoji import EmojiCaptions, build_tokenizer
from madtp.data.errors import DataError
from madtp.tasks.captioning import CaptioningTask, caption_scores
from madtp.tasks.small_models import captioning_model


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def task(tokenizer):
    return CaptioningTask(tokenizer, max_new_tokens=16)


@pytest.fixture
def data(few_emoji, tokenizer):
    return EmojiCaptions("train", tokenizer, 32, limit=24, source=few_emoji)


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    return captioning_model(tokenizer, 32)


def fit(model, task, data, steps):
    batch = task.collate([data[i] for i in range(len(data))])
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        task.loss(model(**batch), batch).backward()
        optimiser.step()
    return model.eval()


def test_loss_is_of_the_positions_that_count(task, data, model):
    batch = task.collate([data[i] for i in range(24)])
    assert set(batch) == {"input_ids", "attention_mask", "labels", "pixel_values"}
    output = model(**batch)
    logits, mask = task.logits(output, batch)
    following = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    assert torch.equal(mask, following >= 0) and 0 < mask.sum() < mask.numel()
    expected = torch.nn.functional.cross_entropy(logits[mask], following[mask])
    torch.testing.assert_close(task.loss(output, batch), expected)


@pytest.mark.slow
def test_it_learns_to_say_what_it_is_shown(task, data, model):
    pytest.importorskip("pycocoevalcap")
    before = task.evaluate(model, data, batch_size=7)
    fit(model, task, data, 100)
    figures = task.evaluate(model, data, batch_size=7)
    assert figures[task.metric] > 0.9 > before[task.metric] and figures["caption_accuracy"] > 0.7
    assert 0 <= figures["bleu4"] <= 1 and 0 <= figures["cider"] <= 10
    beams = CaptioningTask(task.tokenizer, beams=3, max_new_tokens=16)
    assert beams.evaluate(model, data)["bleu4"] > 0.9
    handle = madtp.patch(model)
    assert task.evaluate(model, data, batch_size=7) == pytest.approx(figures)
    handle.set_temperature(50.0)
    task.evaluate(model, data)
    assert handle.tokens_per_layer["vision"][-1] < 17


def test_scores_of_known_captions():
    pytest.importorskip("pycocoevalcap")
    references = [["a red bird, on the left"], ["A FRUIT at the top.", "fruit"]]
    perfect = caption_scores(["a red bird on the left", "a fruit at the top"], references)
    assert perfect == {"bleu4": pytest.approx(1.0), "cider": pytest.approx(10.0), "caption_accuracy": 1.0} or (
        perfect["bleu4"] == pytest.approx(1.0) and perfect["caption_accuracy"] == 1.0
    )
    half = caption_scores(["a red bird on the left", ""], references)
    assert half["caption_accuracy"] == 0.5 and half["bleu4"] < perfect["bleu4"] and half["cider"] < perfect["cider"]


def test_a_missing_scorer_is_named_before_the_work(task, data, model, monkeypatch):
    for name in ("pycocoevalcap", "pycocoevalcap.bleu", "pycocoevalcap.bleu.bleu"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match="run `python -m pip install pycocoevalcap`"):
        task.evaluate(model, [], batch_size=7)


@pytest.mark.slow
def test_compress(task, data, model, tmp_path):
    pytest.importorskip("pycocoevalcap")
    config = madtp.CompressionConfig(macs_reduction=0.4, alignment_tokens=8, alignment_dim=32, controller_interval=2)
    training = {"max_steps": 6, "per_device_train_batch_size": 8, "disable_tqdm": True, "save_strategy": "no"}
    fit(model, task, data, 20)
    result = madtp.compress(model, task, data, data, config, output_dir=tmp_path, training=training)
    report = result.report
    assert report["metric"] == "bleu4" and 0 <= report["compressed"]["metrics"]["bleu4"] <= 1
    assert report["compressed"]["counted_gmacs"] < 0.7 * report["dense"]["counted_gmacs"]
    assert (result.path / "tokenizer.json").exists()
