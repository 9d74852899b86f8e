# SPDX-License-Identifier: Apache-2.0
"""Maskings in training beside SR-STE: soft ones, and a penalty before the mask."""

import copy

import pytest
import torch
from torch import nn

from madtp.hwp import Pattern, WeightPruner, is_pattern
from madtp.hwp.masking import soft_threshold
from madtp_kernels import nm_mask


def make_layer():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24))


def soft_by_hand(weight, n, m):
    """Group by group: sign(w) max(|w| - t, 0), t the (m - n)-th smallest magnitude."""
    rows = []
    for group in weight.double().reshape(-1, m):
        threshold = group.abs().sort().values[m - n - 1]
        rows.append(torch.stack([value.sign() * max(abs(value) - threshold, 0) for value in group]))
    return torch.stack(rows).view(weight.shape)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_soft_values_scale_and_gradient(pattern):
    model = make_layer()
    dense, (n, m) = model[0].weight.detach().clone(), Pattern.parse(pattern)
    pruner = WeightPruner(model, pattern, ["0"], schedule="one_shot", masking="s_ste", decay=0.1)
    shrunk = soft_by_hand(dense, n, m)
    scale = (dense.double() * shrunk).sum() / shrunk.square().sum()
    torch.testing.assert_close(model[0].weight.detach(), (scale * shrunk).float())
    around = [(dense - c * shrunk).square().sum() for c in (0.999 * scale, scale, 1.001 * scale)]
    assert min(around) == around[1] and scale > 1  # the least squares, and no bias towards 0

    seen = torch.randn(24, 16)
    (model[0].weight * seen).sum().backward()
    assert torch.equal(model[0].parametrizations.weight.original.grad, seen)
    original = model[0].parametrizations.weight.original
    with torch.no_grad():
        original.mul_(-0.5).add_(torch.randn(24, 16))
    pruner.step(1)
    torch.testing.assert_close(model[0].weight.detach(), (scale * soft_by_hand(original.detach(), n, m)).float())
    pruner.finalize()
    assert is_pattern(model[0].weight, pattern) and not model[0].weight[model[0].weight == 0].signbit().any()


def test_soft_weights_do_not_jump_where_two_change_places():
    first, second = torch.tensor([[3.0, 1.0, 2.0, 2.0 - 1e-6]]), torch.tensor([[3.0, 1.0, 2.0, 2.0 + 1e-6]])
    masks = [nm_mask(weight, 2, 4) for weight in (first, second)]
    assert not torch.equal(*masks)
    soft = [soft_threshold(weight, mask, 4) for weight, mask in zip((first, second), masks, strict=True)]
    assert (soft[0] - soft[1]).abs().max() < 3e-6
    assert torch.allclose(soft[0], torch.tensor([[1.0, 0.0, 0.0, 0.0]]), atol=3e-6)


def test_a_soft_scale_is_of_the_pattern_that_is_there():
    model = make_layer()
    dense = model[0].weight.detach().clone()
    pruner = WeightPruner(model, "2:4", ["0"], total_steps=4, masking="s_ste")
    assert torch.equal(model[0].weight, dense)
    scales = []
    for step in range(4):
        pruner.step(step)
        scales.append(model[0].parametrizations.weight[0].scale.item())
    assert scales[0] == 1 < scales[1] < scales[2] == scales[3]
    state, twin = model.state_dict(), make_layer()
    resumed = WeightPruner(twin, "2:4", ["0"], total_steps=4, masking="s_ste")
    with torch.no_grad():
        model[0].parametrizations.weight.original.normal_()
    twin.load_state_dict(model.state_dict())
    resumed.kept |= pruner.kept
    for one in (pruner, resumed):
        one.step(3)
    assert torch.equal(twin[0].weight, model[0].weight) and set(twin.state_dict()) == set(state)


def test_after_one_shot_a_soft_mask_changes_nothing():
    model = make_layer()
    with torch.no_grad():
        model[0].weight.mul_(nm_mask(model[0].weight, 2, 4))
    before = model[0].weight.detach().clone()
    WeightPruner(model, "2:4", ["0"], schedule="one_shot", masking="s_ste")
    assert torch.equal(model[0].weight, before)
    for value in (0.0, 1.0):  # a group of equal weights has nothing above its threshold
        model = make_layer()
        nn.init.constant_(model[0].weight, value)
        WeightPruner(model, "2:4", ["0"], schedule="one_shot", masking="s_ste")
        assert not model[0].weight.any()


def test_a_reweighted_penalty_pulls_the_dense_weight_and_then_masks_it():
    model, decay = make_layer(), 0.1
    dense = model[0].weight.detach().clone()
    pruner = WeightPruner(model, "2:4", ["0"], total_steps=10, refresh_interval=3, masking="reweighted", decay=decay)
    original = model[0].parametrizations.weight.original
    assert torch.equal(model[0].weight, dense) and str(pruner.current) == "4:4"
    model[0].weight.sum().backward()
    mean = dense.square().mean()
    pull = decay * mean / (dense.square() + 0.01 * mean) * ~nm_mask(dense, 2, 4)
    torch.testing.assert_close(original.grad, 1 + pull * dense)

    with torch.no_grad():
        original.copy_(torch.randn(24, 16))
    for step, is_old in ((1, True), (2, True), (3, False)):
        pruner.step(step)
        assert torch.equal(model[0].parametrizations.weight[0].penalty, pull) == is_old
        assert torch.equal(model[0].weight, original)
    pruner.step(4)
    assert str(pruner.current) == "4:4"
    pruner.step(5)
    assert torch.equal(model[0].weight, original * nm_mask(original, 2, 4)) and str(pruner.current) == "2:4"


def test_a_reweighted_penalty_leaves_less_for_the_mask_to_take():
    kept = []
    for masking in (None, "reweighted"):
        torch.manual_seed(0)
        model, x = make_layer(), torch.randn(64, 16)
        target = copy.deepcopy(model)(x).detach()
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        pruner = WeightPruner(model, "2:4", ["0"], total_steps=101, ramp=1.0, masking=masking, decay=0.1)
        for step in range(100):
            if masking is not None:
                pruner.step(step)
            optimizer.zero_grad()
            (model(x) - target).square().mean().backward()
            optimizer.step()
        kept.append(pruner.finalize())
    assert kept[1] > kept[0] + 0.1


def test_refuses():
    for options, message in (
        ({"masking": "soft"}, "masking must be None, reweighted or s_ste, got 'soft'"),
        ({"masking": "reweighted"}, 'schedule must be "gradual" with masking "reweighted", got \'one_shot\''),
        ({"masking": "s_ste", "norms": {}}, 'norms must be None with masking "s_ste", which goes by'),
    ):
        model = make_layer()
        with pytest.raises(ValueError, match=message):
            WeightPruner(model, "2:4", ["0"], **{"schedule": "one_shot"} | options)
        assert not hasattr(model[0], "parametrizations")
