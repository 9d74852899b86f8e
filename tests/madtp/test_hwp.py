# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from torch import nn

from madtp import hwp
from madtp.hwp import Pattern, WeightPruner, is_pattern, select_modules
from madtp_kernels import nm_mask


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 10), nn.Linear(10, 16), nn.Linear(16, 3))


def names_of(model, pattern="2:4", **options):
    return select_modules(model, pattern, **options).selected


def test_select_modules_reports_what_stays_dense():
    model = make_model()
    model.append(nn.Linear(16, 3))
    model[5].weight = model[4].weight
    selected, dense = select_modules(model, "2:4", exclude=("0",))
    assert selected == ["2"]
    assert dense == {
        "0": "excluded",
        "3": "in_features 10 is not a multiple of 4",
        "4": "weight is shared with 5",
        "5": "weight is shared with 4",
    }
    assert select_modules(nn.ModuleDict({"head": model}), "2:4", exclude=("he*",)).selected == []
    assert select_modules(nn.ModuleDict({"head": model}), "2:4", include=("head.0",)).selected == ["head.0"]


@pytest.mark.parametrize("pattern", ["2:4", "1:8"])
def test_one_shot_masks_and_straight_through_gradient(pattern):
    model, decay = make_model(), 0.1
    dense = copy.deepcopy(model)
    pruner = WeightPruner(model, pattern, names_of(model, pattern), schedule="one_shot", decay=decay)
    assert pruner.current == Pattern.parse(pattern)
    x = torch.randn(5, 16)
    masked = copy.deepcopy(dense)
    for name in ("0", "2", "4"):
        layer = masked.get_submodule(name)
        layer.weight.data *= nm_mask(layer.weight, *pruner.pattern)
        assert is_pattern(model.get_submodule(name).weight, pattern)
    assert torch.equal(model(x), masked(x))
    assert not torch.signbit(model[0].weight[model[0].weight == 0]).any()

    model(x).square().sum().backward()
    masked(x).square().sum().backward()
    original, reference = model[0].parametrizations.weight.original, masked[0].weight
    expected = reference.grad + decay * dense[0].weight * (reference == 0)
    torch.testing.assert_close(original.grad, expected.detach())


def test_masks_by_the_norms_of_inputs():
    model, dense = make_model(), make_model()
    norms = {"0": torch.rand(16), "2": torch.rand(24)}
    pruner = WeightPruner(model, "2:4", ["0", "2"], schedule="one_shot", norms=norms)
    pruner.finalize()
    for name in ("0", "2"):
        weight = dense.get_submodule(name).weight
        kept = nm_mask(weight, 2, 4, score=weight.abs() * norms[name])
        assert torch.equal(model.get_submodule(name).weight, weight.masked_fill(~kept, 0))
    for wrong in ({"0": norms["0"]}, norms | {"2": torch.rand(16)}, norms | {"2": torch.full((24,), torch.nan)}):
        with pytest.raises(ValueError, match=r"norms\['2'\] must be finite of shape \(24,\), got"):
            WeightPruner(dense, "2:4", ["0", "2"], schedule="one_shot", norms=wrong)
    assert not hasattr(dense[0], "parametrizations")


def test_gradual_schedule_and_refresh():
    model = make_model()
    pruner = WeightPruner(model, "2:4", ["0"], total_steps=20, refresh_interval=4)
    stages = []
    for step in range(20):
        pruner.step(step)
        stages.append(str(pruner.current))
        assert is_pattern(model[0].weight, pruner.current)
    assert stages == ["4:4"] * 5 + ["3:4"] * 5 + ["2:4"] * 10

    before = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].parametrizations.weight.original.copy_(torch.randn(24, 16))
    pruner.step(21)
    assert torch.equal(model[0].weight == 0, before == 0)  # not yet
    pruner.step(24)
    assert torch.equal(model[0].weight != 0, nm_mask(model[0].parametrizations.weight.original, 2, 4))


def test_optimizer_trains_the_dense_weight_and_finalize_bakes_it():
    model = make_model()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    pruner = WeightPruner(model, "2:4", names_of(model), total_steps=10)
    assert {id(p) for p in model.parameters()} == {id(p) for p in parameters}
    x = torch.randn(8, 16)
    for step in range(3):  # ends before the schedule does
        pruner.step(step)
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    dense = [model.get_submodule(name).parametrizations.weight.original.detach().clone() for name in ("0", "2", "4")]
    kept = pruner.finalize()
    baked = [model.get_submodule(name).weight for name in ("0", "2", "4")]
    assert all(is_pattern(weight, "2:4") for weight in baked) and not hasattr(model[0], "parametrizations")
    expected = sum(w.abs().sum() for w in baked) / sum(w.abs().sum() for w in dense)
    assert kept == pytest.approx(expected.item(), rel=1e-5) and 0.5 < kept < 1
    report = hwp.sparsity(model)
    assert report["0"] == (16 * 24, 16 * 12, True) and report["3"].nonzero == 160
    assert set(model.state_dict()) == set(make_model().state_dict())
    pruner.step(4)  # nothing left to do


def test_remove_restores_the_dense_weight():
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    pruner = WeightPruner(model, "2:4", names_of(model), schedule="one_shot")
    pruner.remove()
    after = model.state_dict()
    assert set(after) == set(before) and all(torch.equal(after[key], before[key]) for key in before)
    pruner.remove()


def test_deepcopy_and_state_dict_round_trip():
    model = make_model()
    pruner = WeightPruner(model, "2:4", names_of(model), schedule="one_shot")
    x = torch.randn(4, 16)
    expected = model(x)
    clone = copy.deepcopy(model)
    assert torch.equal(clone(x), expected)
    assert 0 < hwp.bake(clone) < 1 and torch.equal(clone(x), expected)
    assert hwp.bake(clone) == 1.0 and not is_pattern(model[0].parametrizations.weight.original, "2:4")

    other = make_model()
    with torch.no_grad():
        [parameter.zero_() for parameter in other.parameters()]
    WeightPruner(other, "2:4", names_of(other), schedule="one_shot")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), expected)

    twin, twin_pruner = copy.deepcopy((model, pruner))
    twin_pruner.finalize()
    assert torch.equal(twin(x), expected) and not hasattr(twin[0], "parametrizations")
    assert torch.equal(model(x), expected) and is_pattern(model[0].weight, "2:4")  # the copies took nothing with them


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (("2:4", ["9"]), {}, "modules must name Linear modules, got '9', which is no module"),
        (("2:4", ["1"]), {}, "modules must name Linear modules, got '1', which is a ReLU"),
        (("2:4", ["0", "3"]), {}, "modules must fit pattern 2:4, got '3': in_features 10 is not a multiple of 4"),
        (("2:4", ["4"]), {}, "'4': weight is shared with tied"),
        (("2:4", ["0"]), {"schedule": "sudden"}, "schedule must be"),
        (("2:4", ["0"]), {"schedule": "gradual", "total_steps": 0}, "total_steps must be at least 1"),
        (("2:4", ["0"]), {"refresh_interval": 0}, "refresh_interval must be at least 1"),
    ],
)
def test_bad_input_leaves_the_model_alone(arguments, options, message):
    model = make_model()
    model.add_module("tied", nn.Linear(16, 3))
    model.tied.weight = model[4].weight
    with pytest.raises(ValueError, match=message):
        WeightPruner(model, *arguments, **({"schedule": "one_shot"} | options))
    assert not any(hasattr(module, "parametrizations") for module in model.modules())


def test_twice_on_one_module_and_nan():
    model = make_model()
    pruner = WeightPruner(model, "2:4", ["0"], schedule="one_shot")
    with pytest.raises(ValueError, match="weight is parametrized already"):
        WeightPruner(model, "2:4", ["0"], schedule="one_shot")
    with torch.no_grad():
        model[0].parametrizations.weight.original[0, 0] = torch.nan
    with pytest.raises(ValueError, match="weight must be free of NaN"):
        pruner.step(1)
