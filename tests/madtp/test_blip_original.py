# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the BLIP project, written here in its layout from tiny models, come back as they were."""

import pytest
import torch
import transformers as hf
from families import blip_config, randomised
from torch.nn import functional as F

from madtp.models import BlipForNLVR, from_original

KINDS = {
    "vqa": hf.BlipForQuestionAnswering,
    "nlvr": BlipForNLVR,
    "caption": hf.BlipForConditionalGeneration,
    "retrieval": hf.BlipForImageTextRetrieval,
}


def original(model):
    """The state dict of a model under the names that the BLIP project gives its parameters."""
    vision = {
        "embeddings.class_embedding": "cls_token",
        "embeddings.position_embedding": "pos_embed",
        "embeddings.patch_embedding": "patch_embed.proj",
        "post_layernorm": "norm",
        "encoder.layers": "blocks",
        "layer_norm1": "norm1",
        "layer_norm2": "norm2",
        "self_attn.projection": "attn.proj",
        "self_attn.qkv": "attn.qkv",
    }
    state = {}
    for name, value in model.state_dict().items():
        if name.startswith("vision_model."):
            name = "visual_encoder." + name.removeprefix("vision_model.")
            for ours, theirs in vision.items():
                name = name.replace(ours, theirs)
        state[name.replace("classifier.", "cls_head.")] = value
    return state


def saved(tmp_path, state):
    torch.save({"model": state, "epoch": 4}, tmp_path / "model.pth")
    return tmp_path / "model.pth"


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_finds_its_place(kind, tmp_path):
    model = randomised(KINDS[kind](blip_config()))
    state = original(model)
    assert not any(name.startswith("vision_model") for name in state)
    state["text_encoder.embeddings.position_ids"] = torch.arange(16)[None]
    if kind == "retrieval":
        state |= {"temp": torch.tensor(0.07), "image_queue": torch.zeros(4, 4), "text_encoder_m.x": torch.zeros(1)}
    loaded = from_original(saved(tmp_path, state), kind=kind, config=model.config)
    assert type(loaded) is KINDS[kind] and not loaded.training
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_sizes_are_read_off_the_weights(tmp_path):
    model = randomised(BlipForNLVR(blip_config()))
    config = from_original(saved(tmp_path, original(model)), kind="nlvr").config
    for part in ("vision_config", "text_config"):
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers"):
            assert getattr(getattr(config, part), name) == getattr(getattr(model.config, part), name)
    assert (config.vision_config.image_size, config.vision_config.patch_size) == (16, 4)
    assert config.text_config.vocab_size == model.config.text_config.vocab_size


def test_nlvr_starts_from_one_cross_attention(tmp_path):
    model = randomised(hf.BlipForImageTextRetrieval(blip_config()))
    loaded = from_original(saved(tmp_path, original(model)), kind="nlvr", config=model.config)
    for ours, theirs in zip(loaded.text_encoder.encoder.layer, model.text_encoder.encoder.layer, strict=True):
        for twin in (ours.crossattention.self0, ours.crossattention.self1):
            assert torch.equal(twin.key.weight, theirs.crossattention.self.key.weight)
        for twin in (ours.crossattention.output.dense0, ours.crossattention.output.dense1):
            assert torch.equal(twin.weight, theirs.crossattention.output.dense.weight)
        assert torch.equal(ours.crossattention.output.LayerNorm.weight, theirs.crossattention.output.LayerNorm.weight)
    assert loaded.text_encoder.encoder.layer[1].crossattention.output.merge_layer is not None


def test_positions_follow_the_image_size(tmp_path):
    model = randomised(hf.BlipForConditionalGeneration(blip_config()))
    loaded = from_original(saved(tmp_path, original(model)), kind="caption", image_size=24)
    before = model.vision_model.embeddings.position_embedding
    after = loaded.vision_model.embeddings.position_embedding
    assert after.shape == (1, 37, 32) and torch.equal(after[:, 0], before[:, 0])
    grid = before[0, 1:].T.reshape(1, 32, 4, 4)
    expected = F.interpolate(grid, (6, 6), mode="bicubic", align_corners=False).reshape(32, 36).T
    torch.testing.assert_close(after[0, 1:], expected)
    assert loaded(torch.randn(2, 3, 24, 24), torch.ones(2, 3, dtype=torch.long)).logits.shape[:2] == (2, 3)


def test_refuses_what_is_no_such_checkpoint(tmp_path):
    model = randomised(hf.BlipForQuestionAnswering(blip_config()))
    state = original(model)
    with pytest.raises(ValueError, match="kind must be one of vqa, nlvr, caption, retrieval, got 'vcr'"):
        from_original(tmp_path / "x.pth", kind="vcr")
    with pytest.raises(FileNotFoundError, match="path must be a .pth file"):
        from_original(tmp_path / "x.pth", kind="vqa")
    with pytest.raises(ValueError, match=r"weights of a BlipForConditionalGeneration, it has text_encoder"):
        from_original(saved(tmp_path, state), kind="caption", config=model.config)
    with pytest.raises(ValueError, match="it has something.else too"):
        from_original(saved(tmp_path, state | {"something.else": torch.zeros(1)}), kind="vqa", config=model.config)
    missing = {name: value for name, value in state.items() if "blocks.1.mlp.fc2.bias" not in name}
    with pytest.raises(ValueError, match=r"it lacks vision_model.encoder.layers.1.mlp.fc2.bias"):
        from_original(saved(tmp_path, missing), kind="vqa", config=model.config)
    wrong = state | {"visual_encoder.norm.weight": torch.zeros(7)}
    with pytest.raises(ValueError, match=r"vision_model.post_layernorm.weight of shape \(32,\), got \(7,\)"):
        from_original(saved(tmp_path, wrong), kind="vqa", config=model.config)
    with pytest.raises(ValueError, match="must hold the weights of a BLIP model"):
        from_original(saved(tmp_path, {"fc.weight": torch.zeros(1)}), kind="vqa")
    whole = saved(tmp_path, state).read_bytes()
    (tmp_path / "model.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="path must be a .pth file of the BLIP project"):
        from_original(tmp_path / "model.pth", kind="vqa")
    torch.save({"model": model}, tmp_path / "model.pth")  # would run code
    with pytest.raises(ValueError, match="path must be a .pth file of the BLIP project"):
        from_original(tmp_path / "model.pth", kind="vqa")
