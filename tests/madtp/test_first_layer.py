# SPDX-License-Identifier: Apache-2.0
"""Towers that prune from a layer on: those before it keep all tokens, and run as they do without pruning."""

import dataclasses

import pytest
import torch
from test_compression import Questions, Task
from tiny_models import tiny_batch, tiny_blip

import madtp
from madtp.budgets.plan import Plan
from madtp.budgets.sensitivity import Calibration, find_first_layers
from madtp.profiling.macs import counted_macs

CONFIG = madtp.CompressionConfig(alignment_tokens=8, alignment_dim=32)


def run(first_layer=0, temperature=1.0):
    model = tiny_blip().eval()
    torch.manual_seed(0)
    handle = madtp.patch(model, CONFIG)
    handle.set_first_layer(first_layer)
    handle.set_temperature(temperature)
    with torch.no_grad():
        logits = model(**tiny_batch()).logits
    return handle, logits


def test_layers_before_it_keep_all_tokens():
    (whole, _), (late, logits), (dense, plain) = run(), run({"vision": 1}), run(temperature=0)
    assert whole.tokens_per_layer["vision"][0] < dense.tokens_per_layer["vision"][0]
    assert late.tokens_per_layer["vision"][0] == dense.tokens_per_layer["vision"][0]
    assert late.tokens_per_layer["vision"][1] < dense.tokens_per_layer["vision"][1]
    kept = late.selections["vision"]
    assert any(len(left) < len(entered) for left, entered in zip(kept[1], kept[0], strict=True))
    assert late.tokens_per_layer["text"] == whole.tokens_per_layer["text"]
    assert late.first_layers == {"vision": 1, "text": 0} and not torch.equal(logits, plain)
    for before, after in zip(dense.summary_features["vision"][:1], late.summary_features["vision"][:1], strict=True):
        assert torch.equal(before, after), "the first layer computes what the dense one does"


@pytest.mark.parametrize("capacity", ["exact", "upper_bound"])
def test_fewer_rows_are_left_in_either_capacity(capacity):
    model = tiny_blip().eval()
    torch.manual_seed(0)
    handle = madtp.patch(model, dataclasses.replace(CONFIG, first_layer={"vision": 1}), capacity=capacity)
    handle.set_temperature(1.0)
    with torch.no_grad():
        logits = model(**tiny_batch()).logits
    torch.testing.assert_close(logits, run({"vision": 1})[1], rtol=1e-4, atol=1e-5)


def test_a_gradient_passes_and_a_file_keeps_it(tmp_path):
    handle, logits = run({"vision": 1, "text": 1})
    model = handle.model
    model(**tiny_batch()).loss.backward()
    assert model.vision_model.encoder.layers[0].mlp.fc1.weight.grad.abs().sum() > 0
    model.save_pretrained(tmp_path)
    again = madtp.from_pretrained(tmp_path)
    assert again.madtp_handle.first_layers == {"vision": 1, "text": 1}
    with torch.no_grad():
        assert torch.equal(again(**tiny_batch()).logits, logits)
    assert "from layer 1 on" in again.madtp_handle.explain()


@pytest.mark.parametrize(
    ("first_layer", "message"),
    [
        (2, "first_layer of vision must be an integer from 0 to 1, got 2"),
        (-1, "first_layer of vision must be an integer from 0 to 1, got -1"),
        (True, "first_layer of vision must be an integer from 0 to 1, got True"),
        ({"audio": 0}, "first_layer must be for branches vision, text, got 'audio'"),
        ({"vision": 1, "text": 0.5}, "first_layer of text must be an integer from 0 to 1, got 0.5"),
    ],
)
def test_what_is_no_layer_is_refused(first_layer, message):
    handle, _ = run()
    with pytest.raises(ValueError, match=message):
        handle.set_first_layer(first_layer)
    assert handle.first_layers == {"vision": 0, "text": 0}, "nothing is changed"


def test_a_config_says_it_or_is_refused():
    for wrong in (1, {"vision": -1}, {"vision": True}, {1: 1}):
        with pytest.raises(ValueError, match="first_layer must be integers of at least 0 by branch, or None, got "):
            madtp.CompressionConfig(first_layer=wrong)
    config = madtp.CompressionConfig.from_dict(dataclasses.replace(CONFIG, first_layer={"vision": 1}).to_dict())
    assert madtp.patch(tiny_blip(), config).first_layers == {"vision": 1, "text": 0}
    model = tiny_blip()
    with pytest.raises(ValueError, match="first_layer of vision must be an integer from 0 to 1, got 7"):
        madtp.patch(model, dataclasses.replace(config, first_layer={"vision": 7}))
    assert not hasattr(model, "madtp_handle") and madtp.patch(model, CONFIG)


@pytest.fixture(scope="module")
def calibration():
    model = tiny_blip()
    madtp.patch(model, CONFIG)
    return Calibration(model, Task(), [tiny_batch(40)], CONFIG)


def test_a_temperature_is_found_for_each_first_layer(calibration):
    whole = counted_macs(calibration.model, calibration.batches)["vision"]
    found = [calibration.temperature_for("vision", 0.92, layer) for layer in (0, 1)]
    assert found[0] < found[1], "fewer layers have to prune more"
    for layer, temperature in enumerate(found):
        with calibration.at({"vision": temperature}, {"vision": layer}):
            share = counted_macs(calibration.model, calibration.batches)["vision"] / whole
        assert share == pytest.approx(0.92, abs=0.02)
    assert calibration.temperature_for("vision", 0.2, 1) is None, "the first layer alone costs more"
    assert calibration.handle.first_layers == {"vision": 0, "text": 0}


@pytest.mark.parametrize(("second", "expected"), [(0.9, {"vision": 1}), (0.97, {}), (1.1, {})])
def test_a_later_layer_is_taken_where_it_costs_clearly_less(calibration, monkeypatch, second, expected):
    by_layer = [1.0, second]
    monkeypatch.setattr(calibration, "distill_loss", lambda: by_layer[calibration.handle.first_layers["vision"]])
    assert find_first_layers(calibration, {"vision": 0.92, "text": 1.0}) == expected


def test_a_plan_says_it(tmp_path):
    data, share = Questions(16), {"vision": 0.8, "text": 1.0}
    plan = Plan(0.2, share, (), "tokens", first_layers={"vision": 1})
    plan.save(tmp_path / "plan.yaml")
    assert Plan.load(tmp_path / "plan.yaml") == plan
    run = {"output_dir": tmp_path / "out", "training": {"max_steps": 0}}
    config = dataclasses.replace(CONFIG, macs_reduction=0.2, hwp_schedule="one_shot")
    result = madtp.compress(tiny_blip(), Task(), data, data, config, plan=plan, **run)
    assert result.model.madtp_handle.first_layers == {"vision": 1, "text": 0}
    left = result.report["compressed"]["tokens_per_layer"]["vision"]
    assert left[0] == 17 > left[1]
    with pytest.raises(ValueError, match="first_layer of vision must be an integer from 0 to 1, got 5"):
        madtp.compress(
            tiny_blip(), Task(), data, None, config, plan=dataclasses.replace(plan, first_layers={"vision": 5}), **run
        )
    for wrong in ({"audio": 1}, {"vision": -1}, {"vision": 1.0}, [1]):
        with pytest.raises(ValueError, match="first_layers must map branches of tokens to numbers of at least 0, got"):
            dataclasses.replace(plan, first_layers=wrong)


def test_a_decoder_has_none(llava):
    config = dataclasses.replace(CONFIG, first_layer={"vision": 1})
    with pytest.raises(ValueError, match="first_layer must be None for a Llava.*, whose keep says where, got"):
        madtp.patch(llava[0], config)
    assert not hasattr(llava[0], "madtp_handle")
