# SPDX-License-Identifier: Apache-2.0
"""Patched BLIP: dense at temperature 0, ragged and batch-invariant above it, saved and loaded whole."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BlipForQuestionAnswering

import madtp
from madtp.handles import find_handle, handle_of
from madtp.hwp.packing import epilogues_of

CONFIG = madtp.CompressionConfig(alignment_tokens=8, alignment_dim=24)
FIXTURES = Path(__file__).parents[1] / "fixtures" / "v0.1"


def reference(model, batch):
    """Logits of the Hugging Face model, each question on its own: there the decoder attends to padding."""
    rows = []
    for i in range(len(batch["labels"])):
        images = model.vision_model(batch["pixel_values"][i : i + 1]).last_hidden_state
        tokens = batch["input_ids"][i : i + 1, : int(batch["attention_mask"][i].sum())]
        question = model.text_encoder(tokens, encoder_hidden_states=images).last_hidden_state
        rows.append(model.text_decoder(batch["labels"][i : i + 1], encoder_hidden_states=question).logits)
    return torch.cat(rows)


def test_temperature_zero_is_the_dense_model(blip, batch):
    logits = reference(blip, batch)
    unpadded = {name: value[[0, 3, 4]] for name, value in batch.items()}
    loss = blip(**unpadded).loss
    handle = madtp.patch(blip, CONFIG)
    torch.testing.assert_close(blip(**batch).logits, logits)
    torch.testing.assert_close(blip(**unpadded).loss, loss)
    tokens = blip.generate(batch["input_ids"], batch["pixel_values"], batch["attention_mask"], max_new_tokens=2)
    assert tokens.shape[0] == 5
    handle.remove()
    assert type(blip) is BlipForQuestionAnswering and not hasattr(blip, "madtp_guide")
    torch.testing.assert_close(blip(**unpadded).loss, loss)


def test_pruning_is_per_sample_and_does_not_depend_on_the_batch(blip, batch):
    handle = madtp.patch(blip, CONFIG)
    handle.set_temperature({"vision": 2.0, "text": 1.0})
    together = blip(**batch).logits
    selections = handle.selections
    assert [len(layer) for layer in selections["vision"]] == [5, 5]
    counts = [len(kept) for kept in selections["vision"][-1]]
    assert max(counts) < 17 and len(set(counts)) > 1
    for first, second in zip(*selections["vision"], strict=True):
        assert first[0] == 0 and set(second.tolist()) <= set(first.tolist())
        assert first.tolist() == sorted(first.tolist())
    for sample in range(5):
        alone = {name: value[sample : sample + 1] for name, value in batch.items()}
        torch.testing.assert_close(blip(**alone).logits[0], together[sample], rtol=1e-5, atol=1e-5)
        assert torch.equal(handle.selections["text"][-1][0], selections["text"][-1][sample])


def test_questions_can_share_images(blip, batch):
    handle = madtp.patch(blip, CONFIG)
    handle.set_temperature(2.0)
    index = torch.tensor([1, 0, 1, 1, 0])
    shared = blip(**{**batch, "pixel_values": batch["pixel_values"][:2]}, image_index=index)
    repeated = blip(**{**batch, "pixel_values": batch["pixel_values"][index]})
    torch.testing.assert_close(shared.logits, repeated.logits)
    with pytest.raises(ValueError, match="image_index must say which of 2 images each of 5 questions"):
        blip(**{**batch, "pixel_values": batch["pixel_values"][:2]})


def test_batch_max_keeps_the_published_number(blip, batch):
    handle = madtp.patch(blip, madtp.CompressionConfig(alignment_tokens=8, alignment_dim=24, selection="batch_max"))
    handle.set_temperature({"vision": 2.0})
    blip(**batch)
    counts = {len(kept) for kept in handle.selections["vision"][0]}
    assert len(counts) == 1
    handle.pruning["vision"].selection = "instance"
    blip(**batch)
    assert max(len(kept) for kept in handle.selections["vision"][0]) == counts.pop()


def test_gradients_reach_alignment_tokens_and_both_branches(blip, batch):
    handle = madtp.patch(blip, CONFIG)
    handle.set_temperature(2.0)
    handle.collect_alignment(True)
    blip(**batch).loss.backward()  # through the merge weights alone
    assert handle.alignment_tokens.grad.abs().sum() > 0
    blip.zero_grad()
    blip(**batch)
    aligned = handle.aligned
    assert aligned["vision"].shape == aligned["text"].shape == (5, 8, 24)
    (aligned["vision"] * aligned["text"]).sum().backward()
    assert blip.vision_model.embeddings.patch_embedding.weight.grad.abs().sum() > 0
    assert blip.madtp_guide.maps["text"].weight.grad.abs().sum() > 0
    assert [s.shape for s in handle.summary_features["text"]] == [(5, 32), (5, 32)]


def test_aligned_feature_follows_its_equation(blip, batch):
    from madtp.mag import aligned_feature

    q, logits = torch.randn(7, 6), torch.randn(7, 3)
    feature = aligned_feature(q, logits, torch.tensor([0, 4, 5, 7], dtype=torch.int32), 4)
    expected = (logits[1:4].T / 6**0.5).softmax(-1) @ q[1:4]
    torch.testing.assert_close(feature[0], expected)
    assert not feature[1].any()  # nothing but the summary token


def test_saved_model_comes_back(blip, batch, tmp_path):
    handle = madtp.patch(blip, CONFIG)
    handle.set_temperature({"vision": 2.0, "text": 0.5})
    expected = blip(**batch).logits
    blip.save_pretrained(tmp_path)
    loaded = madtp.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**batch).logits, expected, rtol=0, atol=0)
    assert loaded.madtp_handle.temperatures == {"vision": 2.0, "text": 0.5}
    again = BlipForQuestionAnswering.from_pretrained(tmp_path)  # Hugging Face does it too
    torch.testing.assert_close(again(**batch).logits, expected, rtol=0, atol=0)


def test_a_model_saved_by_version_0_1_comes_back(batch, tmp_path):
    """And is saved as this version does it, for which its configuration has the names of today."""
    expected = load_file(FIXTURES / "model_logits.safetensors")["logits"]
    for directory in (FIXTURES / "model", tmp_path):
        loaded = madtp.from_pretrained(directory)
        handle = handle_of(loaded)
        assert handle.temperatures == {"vision": 6.5, "text": 3.0}
        config = handle.config.to_dict()
        assert [value for name, value in config.items() if name.endswith("_reduction")] == [0.4, None, None, None]
        assert len(epilogues_of(loaded)) == 4
        with torch.no_grad():
            torch.testing.assert_close(loaded(**batch).logits, expected, rtol=0, atol=1e-5)
        loaded.save_pretrained(tmp_path)
        state, saved = (json.loads((tmp_path / name).read_text()) for name in ("madtp.json", "config.json"))
        assert state["version"] == 6 and saved["quantization_config"]["config"] == config


def test_a_handle_is_found_from_any_layer(blip):
    assert find_handle(blip) is None
    with pytest.raises(
        ValueError, match=r"model must be patched \(madtp.patch\), got a plain BlipForQuestionAnswering"
    ):
        handle_of(blip)
    handle = madtp.patch(blip, CONFIG)
    assert find_handle(blip) is handle_of(blip) is handle


def test_macs_belong_to_the_branch_they_do(blip, batch):
    unpadded = {name: value[[0, 3, 4]] for name, value in batch.items()}
    plain = madtp.profile(blip, unpadded).branches
    madtp.patch(blip, CONFIG).set_temperature(2.0)
    pruned = madtp.profile(blip, unpadded).branches
    assert {b: account.dense_macs for b, account in pruned.items()} == {b: a.dense_macs for b, a in plain.items()}
    assert pruned["other"].counted_macs == 0
    assert all(pruned[branch].counted_macs < pruned[branch].dense_macs for branch in ("vision", "text"))


def test_deepcopy_is_independent(blip, batch):
    handle = madtp.patch(blip, CONFIG)
    twin = copy.deepcopy(blip)
    twin.madtp_handle.set_temperature(3.0)
    assert handle.temperatures == {"vision": 0.0, "text": 0.0}
    with torch.no_grad():
        twin.madtp_handle.alignment_tokens.zero_()
    assert handle.alignment_tokens.any()
    assert twin.madtp_handle.model is twin and twin.madtp_guide is twin.madtp_handle.pruning["text"].guide
    twin(**batch)
    assert handle.selections == {"vision": [], "text": []}


def test_refuses(blip, tmp_path):
    handle = madtp.patch(blip, CONFIG)
    with pytest.raises(ValueError, match="model must not be patched already"):
        madtp.patch(blip)
    with pytest.raises(TypeError, match="model must be one of BlipForQuestionAnswering, .*, got Linear"):
        madtp.patch(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="branches vision, text, got 'audio'"):
        handle.set_temperature({"audio": 1.0})
    for bad in (-1.0, float("nan"), "hot"):
        with pytest.raises(ValueError, match="temperature must be a finite number >= 0"):
            handle.set_temperature(bad)
    with pytest.raises(madtp.ModelError, match="is not a compressed model"):
        madtp.from_pretrained(tmp_path / "nowhere")
    blip.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(madtp.ModelError, match="cannot be read"):
        madtp.from_pretrained(tmp_path)
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(madtp.ModelError, match="its checksum does not match madtp.json"):
        madtp.from_pretrained(tmp_path)
    weights.write_bytes(whole)
    state = json.loads((tmp_path / "madtp.json").read_text())
    (tmp_path / "madtp.json").write_text(json.dumps(state | {"version": 99}))
    with pytest.raises(madtp.ModelError, match="madtp.json must be of version 6, got 99: install a newer madtp"):
        madtp.from_pretrained(tmp_path)
    (tmp_path / "madtp.json").write_text(json.dumps(state | {"version": 2}))
    with pytest.raises(madtp.ModelError, match="madtp.json must be of version 6, got 2: save the model again"):
        madtp.from_pretrained(tmp_path)
    (tmp_path / "madtp.json").write_text("[]")
    with pytest.raises(madtp.ModelError, match="madtp.json must be of version 6, got None"):
        madtp.from_pretrained(tmp_path)
    (tmp_path / "madtp.json").write_text(json.dumps(state | {"sha256": None}))
    with pytest.raises(madtp.ModelError, match="cannot be read"):
        madtp.from_pretrained(tmp_path)
