# SPDX-License-Identifier: Apache-2.0
"""Width as an axis of budgets: beside tokens and weights, alone, before weights; and carried out by `compress`."""

import dataclasses
import shutil

import pytest
import torch
from test_compression import CONFIG, Questions, Task
from tiny_models import tiny_batch, tiny_blip

import madtp
from madtp import width
from madtp.budgets.allocate import choose, measured_distill_loss
from madtp.budgets.plan import Plan
from madtp.budgets.sensitivity import Calibration, find_sensitivities
from madtp.compression import predict_targets

WIDE = dataclasses.replace(CONFIG, width_reduction=0.5)
TRAINING = {"max_steps": 4, "per_device_train_batch_size": 8, "disable_tqdm": True, "save_strategy": "no"}


@pytest.fixture(scope="module")
def calibration():
    model = tiny_blip()
    madtp.patch(model, WIDE)
    return Calibration(model, Task(), [tiny_batch()], WIDE)


@pytest.fixture(scope="module")
def measured(calibration):
    before = {name: value.clone() for name, value in calibration.model.state_dict().items()}
    found = find_sensitivities(calibration)
    assert all(torch.equal(value, before[name]) for name, value in calibration.model.state_dict().items())
    return found


def with_targets(**targets):
    return dataclasses.replace(WIDE, **targets)


def real_macs(calibration, plan):
    """Of the model with the widths and Linears of a plan, all its tokens: what a profile counts."""
    with calibration.narrowed(plan.widths), calibration.masked(plan.sparse_modules):
        return madtp.profile(calibration.model, calibration.batches[0]).total.counted_macs


def test_every_part_has_its_sensitivity(calibration, measured):
    parts = {part.name: part for part in width.width_parts(calibration.model)}
    assert measured.widths.keys() == parts.keys() and len(parts) == 10
    assert {unit.branch for unit in measured.widths.values()} == {"vision", "text"}
    for name, unit in measured.widths.items():
        widths = [point.width for point in unit.points]
        assert widths == sorted(set(widths), reverse=True) and widths[-1] == parts[name].full / 2
        assert unit.points[0].distill_loss == 0 and all(point.distill_loss > 0 for point in unit.points[1:])
    fc2 = measured.widths["vision_model.encoder.layers.0.mlp.fc2"]
    assert fc2.macs == pytest.approx(17 * 32 * 2) and fc2.params == 65 and fc2.full == 64
    heads = measured.widths["vision_model.encoder.layers.0.self_attn.projection"]
    assert heads.macs == pytest.approx(17 * 32 * 8 * 4 + 2 * 17 * 17 * 8)


@pytest.mark.parametrize("allocation", ["joint", "uniform", "width", "width_weights"])
def test_a_plan_costs_what_it_says(calibration, measured, allocation):
    reduction = {"joint": 0.4, "uniform": 0.65, "width": 0.2, "width_weights": 0.45}[allocation]
    plan = choose(measured, with_targets(macs_reduction=reduction), allocation)
    assert plan.widths and bool(plan.sparse_modules) == (allocation != "width")
    full = measured.profile.total.dense_macs
    if allocation in ("width", "width_weights"):
        assert set(plan.tokens.values()) == {1.0}
        assert real_macs(calibration, plan) == pytest.approx((1 - plan.macs_reduction) * full, rel=1e-9)
        assert reduction <= plan.macs_reduction < reduction + 0.05
    else:
        assert plan.macs_reduction == pytest.approx(reduction, abs=1e-6)
    whole = dataclasses.replace(plan, tokens=dict.fromkeys(plan.tokens, 1.0))
    predicted = 1 - real_macs(calibration, whole) / full
    assert predicted <= plan.macs_reduction + 1e-9
    assert 0 < measured_distill_loss(calibration, measured, plan)
    assert calibration.distill_loss() == pytest.approx(0, abs=1e-6)


def test_three_axes_are_predicted_to_hurt_least(measured):
    losses = {
        name: choose(measured, with_targets(macs_reduction=0.2), name).predicted["distill_loss"]
        for name in madtp.budgets.allocate.ALLOCATIONS
    }
    assert losses["joint"] == min(losses.values())


def test_width_goes_before_weights(measured):
    plan = choose(measured, with_targets(macs_reduction=0.1), "width_weights")
    assert plan.widths and not plan.sparse_modules
    both = choose(measured, with_targets(macs_reduction=0.55), "width_weights")
    least = {name: unit.points[-1].width for name, unit in measured.widths.items()}
    assert both.widths == least and both.sparse_modules


def test_removed_parameters_count(measured):
    plan = choose(measured, with_targets(macs_reduction=0.2), "width")
    removed = sum(
        (unit.full - plan.widths.get(name, unit.full)) * unit.params for name, unit in measured.widths.items()
    )
    assert plan.predicted["params_reduction"] == pytest.approx(removed / measured.profile.total.params) != 0


def test_what_cannot_be(measured):
    without = dataclasses.replace(measured, widths={})
    with pytest.raises(ValueError, match="width_reduction must be above 0, .* for allocation 'width', got None"):
        choose(without, dataclasses.replace(CONFIG, macs_reduction=0.2), "width")
    with pytest.raises(ValueError, match="macs_reduction must be at most about 0.404, which allocation 'width'"):
        choose(measured, with_targets(macs_reduction=0.6), "width")
    with pytest.raises(ValueError, match="width_reduction must be None with a latency_reduction, got 0.5"):
        with_targets(macs_reduction=None, latency_reduction=0.3)
    with pytest.raises(ValueError, match=r"width_reduction must be a number in \[0, 1\), got 1"):
        with_targets(width_reduction=1)


def test_a_plan_is_a_file(tmp_path, measured):
    plan = choose(measured, with_targets(macs_reduction=0.2), "width")
    plan.save(tmp_path / "plan.yaml")
    assert Plan.load(tmp_path / "plan.yaml") == plan
    for widths in ("{a: 0}", "[a]", "{a: 1.5}", "{a: true}"):
        (tmp_path / "bad.yaml").write_text(
            f"version: 5\nmacs_reduction: 0.1\ntokens: {{}}\nsparse_modules: []\nwidths: {widths}"
        )
        with pytest.raises(ValueError, match="widths must map names of Linears to numbers of at least 1"):
            Plan.load(tmp_path / "bad.yaml")


FC2 = "vision_model.encoder.layers.0.mlp.fc2"


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({FC2: 40}, "must leave shapes that kernels run"),
        ({FC2: 80}, "from 1 to its 64 channels"),
        ({"nowhere": 16}, "widths must be of Linears that read heads or hidden channels, .* got 'nowhere'"),
    ],
)
def test_a_plan_that_no_kernel_runs(widths, message, tmp_path):
    plan = Plan(0.1, {"vision": 1.0, "text": 1.0}, (), "width", widths=widths)
    with pytest.raises(ValueError, match=message):
        madtp.compress(tiny_blip(), Task(), Questions(16), None, CONFIG, output_dir=tmp_path, plan=plan)
    assert not (tmp_path / "model").exists()


def test_compress_carries_out_width_and_weights(tmp_path, measured):
    """By a plan of all axes: what is saved is narrow, 2:4, costs the target, and is trained."""
    plan = choose(measured, with_targets(macs_reduction=0.5))
    data = Questions(24)
    config = with_targets(macs_reduction=0.5, hwp_score="second_order", hwp_schedule="one_shot")
    result = madtp.compress(tiny_blip(), Task(), data, data, config, output_dir=tmp_path, plan=plan, training=TRAINING)
    report = result.report["plan"]
    assert {name: entry["after"] for name, entry in report["widths"].items()} == plan.widths
    assert width.widths_of(result.model) == plan.widths != {}
    assert report["packed_modules"] == sorted(plan.sparse_modules) != []
    dense, compressed = (result.report[which] for which in ("dense", "compressed"))
    assert compressed["dense_gmacs"] < dense["dense_gmacs"]
    assert compressed["counted_gmacs"] == pytest.approx(0.5 * dense["dense_gmacs"], rel=0.05)
    assert compressed["params"] < dense["params"]


def test_compress_without_a_plan_takes_a_share_of_each(tmp_path):
    config = with_targets(macs_reduction=0.45, width_reduction=0.25, hwp_schedule="one_shot")
    data = Questions(16)
    targets = predict_targets(tiny_blip(), Task(), data, config)
    assert {entry.after / entry.before for entry in targets.widths.values()} == {0.75}
    dense = madtp.profile(tiny_blip(), targets.probe[0]).total.dense_macs
    assert targets.before.total.dense_macs == pytest.approx(dense, rel=0.02)
    assert sum(targets.counted_macs.values()) == pytest.approx(0.55 * targets.before.total.dense_macs, rel=1e-6)
    result = madtp.compress(tiny_blip(), Task(), data, None, config, output_dir=tmp_path, training={"max_steps": 0})
    assert set(width.widths_of(result.model)) == set(targets.widths)


@pytest.mark.slow
def test_a_training_goes_on(tmp_path):
    """The widths are removed again, and the weights are those of the checkpoint: the bits of a run that was not cut."""
    config = with_targets(macs_reduction=0.45, width_reduction=0.25, hwp_schedule="one_shot")
    training = TRAINING | {"save_strategy": "steps", "save_steps": 2}
    arguments = (tiny_blip(), Task(), Questions(16), None, config)
    whole = madtp.compress(*arguments, output_dir=tmp_path / "whole", training=training)
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "checkpoint-2", tmp_path / "cut/checkpoints/checkpoint-2")
    resumed = madtp.compress(*arguments, output_dir=tmp_path / "cut", training=training, resume=True)
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())
