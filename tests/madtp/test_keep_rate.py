# SPDX-License-Identifier: Apache-2.0
"""`keep_rate`: temperatures found without training, by what calibration inputs keep."""

import copy

import pytest
import torch
from families import CASES, pixels, randomised

import madtp
from madtp.patching.keep_rate import TOLERANCE, kept_shares

CONFIG = madtp.CompressionConfig(alignment_tokens=100, alignment_dim=24)
FAMILIES = ["BlipForQuestionAnswering", "CLIPModel", "BertModel"]


def calibration(family):
    """Some hundred tokens: 12 batches that differ in their images and words."""
    generator, batches = torch.Generator().manual_seed(0), []
    for seed in range(12):
        inputs = CASES[family].inputs()
        if "pixel_values" in inputs:
            inputs["pixel_values"] = pixels(4, seed=seed)
        words = torch.randint(4, 37, inputs["input_ids"].shape, generator=generator)
        special = (inputs["attention_mask"] == 0) | (inputs["input_ids"] == 39)  # 39: CLIP's end of text
        batches.append(inputs | {"input_ids": torch.where(special, inputs["input_ids"], words)})
    return batches


def build(family):
    torch.manual_seed(0)
    return randomised(CASES[family].build())


def by_hand(handle, branch):
    """The share of a branch, from what the handle reports of the last forward: no summary token is ever pruned."""
    samples = len(handle.selections[branch][0])
    before = handle.pruning[branch].last.entered.count_rows() - samples
    return [(sum(map(len, layer)) - samples) / before for layer in handle.selections[branch]]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_branch_keeps_what_was_asked_for(family):
    batches = calibration(family)
    model = build(family).train()
    torch.manual_seed(0)
    handle = madtp.patch(model, CONFIG, keep_rate=0.7, calibration=iter(batches))
    assert model.training
    for share in kept_shares(handle, batches).values():
        assert share == pytest.approx(0.7, abs=2 * TOLERANCE)
    assert all(0 < tau < float("inf") for tau in handle.temperatures.values())
    before = handle.temperatures
    shares = handle.set_keep_rate(0.5, batches)
    assert shares == kept_shares(handle, batches)
    for name, share in shares.items():
        assert share == pytest.approx(0.5, abs=2 * TOLERANCE) and handle.temperatures[name] > before[name]


def test_the_share_is_that_of_the_tokens_left_after_a_block():
    model = build("CLIPModel")
    handle = madtp.patch(model, CONFIG)
    handle.set_temperature(2.0)
    batch = calibration("CLIPModel")[0]
    shares = kept_shares(handle, [batch])
    for branch in ("vision", "text"):
        by_layer = by_hand(handle, branch)
        assert len(by_layer) == 2 and 0 < by_layer[1] < by_layer[0] < 1
        assert shares[branch] == pytest.approx(sum(by_layer) / 2)


def test_rates_can_be_given_by_branch():
    batches = calibration("BlipForQuestionAnswering")
    torch.manual_seed(0)
    handle = madtp.patch(build("BlipForQuestionAnswering"), CONFIG, keep_rate={"vision": 0.6}, calibration=batches)
    assert handle.temperatures["vision"] > 0 and handle.temperatures["text"] == 0
    assert handle.set_keep_rate({"vision": 1, "text": 0.8}, batches)["vision"] == 1
    assert handle.temperatures["vision"] == 0 and handle.temperatures["text"] > 0


def test_what_cannot_be_is_refused_and_leaves_the_model_alone():
    model, batches = build("CLIPModel"), calibration("CLIPModel")[:2]
    kinds, state = [type(module) for module in model.modules()], copy.deepcopy(model.state_dict())
    few = madtp.CompressionConfig(alignment_tokens=100, alignment_dim=24, temperature_max=2.0)
    rule = r"calibration must be an iterable of dicts of model inputs, at least one, for keep_rate, got "
    for config, rate, given, message in (
        (CONFIG, 0.7, None, rule + "NoneType"),
        (CONFIG, 0.7, [], rule + "none"),
        (CONFIG, 0.7, batches[0], rule + "dict"),
        (CONFIG, 0.7, [batches[0], 3], rule + "one with a int"),
        (CONFIG, None, batches, "keep_rate must be given with calibration"),
        (CONFIG, 0, batches, r"keep_rate must be a number in \(0, 1\]"),
        (CONFIG, 1.5, batches, r"keep_rate must be a number in \(0, 1\]"),
        (CONFIG, True, batches, r"keep_rate must be a number in \(0, 1\]"),
        (CONFIG, {"vision": float("nan")}, batches, r"keep_rate must be a number in \(0, 1\]"),
        (CONFIG, {"audio": 0.5}, batches, "keep_rate must be for branches vision, text"),
        (CONFIG, {}, batches, "keep_rate must be for branches vision, text"),
        (few, 0.1, batches, r"keep_rate of vision must be 1 or from 0\.\d+ to \d\.\d+, .*, got 0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            madtp.patch(model, config, keep_rate=rate, calibration=given)
        assert [type(module) for module in model.modules()] == kinds and not hasattr(model, "madtp_handle")
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="pixel_values must be a tensor of shape"):  # from the model itself
        madtp.patch(model, CONFIG, keep_rate=0.7, calibration=[{"pictures": 1}])
    assert not hasattr(model, "madtp_handle")
    handle = madtp.patch(model, few)
    handle.set_temperature({"vision": 0.3, "text": 0.4})
    with pytest.raises(ValueError, match="keep_rate of text must be 1 or from"):
        handle.set_keep_rate({"vision": 0.8, "text": 0.1}, batches)
    assert handle.temperatures == {"vision": 0.3, "text": 0.4}
