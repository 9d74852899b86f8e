# SPDX-License-Identifier: Apache-2.0
"""Times of layers, on a clock that only certain layers move."""

import pytest
import torch
from tiny_models import tiny_batch, tiny_blip
from transformers import ViTConfig, ViTModel

import madtp
from madtp import hwp
from madtp.handles import find_handle
from madtp.profiling import timing
from madtp.profiling.figures import dense_runs


class Clock:
    def __init__(self, monkeypatch):
        self.time = 0.0
        monkeypatch.setattr(timing, "now", lambda device: self.time)

    def taken_by(self, module, seconds):
        def advance(*_):
            self.time += seconds

        module.register_forward_hook(advance)


@pytest.mark.parametrize("packed", [False, True])
def test_every_layer_gets_its_own_time(monkeypatch, packed):
    clock, dense, patched = Clock(monkeypatch), tiny_blip(), tiny_blip()
    handle, batch = madtp.patch(patched), tiny_batch()
    handle.set_temperature(1.0)
    if packed:
        hwp.prune_one_shot(patched, "2:4", ["vision_model.encoder.layers.1.mlp.fc1"])
        assert hwp.pack(patched)
    for model, factor in ((dense, 2), (patched, 1)):
        for number in (0, 1):
            clock.taken_by(model.vision_model.encoder.layers[number].mlp.fc1, factor * (number + 1))
            clock.taken_by(model.text_encoder.encoder.layer[number].attention.self.query, factor * 10)
        clock.taken_by(model.text_decoder, 1000)
    before, after = timing.time_per_layer(dense, patched, batch, rounds=3)
    ms = 1e3 / len(batch["labels"])
    assert before == {"vision": pytest.approx([2 * ms, 4 * ms]), "text": pytest.approx([20 * ms, 20 * ms])}
    assert after == {"vision": pytest.approx([ms, 2 * ms]), "text": pytest.approx([10 * ms, 10 * ms])}
    for model in (dense, patched):
        block = model.vision_model.encoder.layers[0]
        assert not block._forward_hooks and not block._forward_pre_hooks, "what was hooked is as it was"
    with torch.no_grad():
        patched(**batch)


def test_samples_share_the_time_of_a_forward(monkeypatch):
    clock, model = Clock(monkeypatch), tiny_blip()
    clock.taken_by(model, 5.0)
    assert timing.time_per_sample({"a": model}, tiny_batch(), rounds=2) == {"a": pytest.approx(1000.0)}


def test_a_dense_model_runs_in_every_way_it_can():
    """With torch's fused attention too, where it has that and was loaded without."""
    assert list(dense_runs(tiny_blip())) == ["as loaded", "patched"], "Hugging Face's BLIP has no fused attention"
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    vit = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8, attn_implementation="eager")).eval()
    runs = dense_runs(vit)
    assert list(runs) == ["as loaded", "SDPA", "patched"] and runs["as loaded"] is vit
    assert vit.config._attn_implementation == "eager" and runs["SDPA"].config._attn_implementation == "sdpa"
    assert find_handle(vit) is None
    assert list(dense_runs(ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8)))) == ["as loaded", "patched"]
