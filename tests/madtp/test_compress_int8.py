# SPDX-License-Identifier: Apache-2.0
"""Runs that end in int8: one shot without training, smoothing, plans that say which Linears go there, refusals."""

import copy
import dataclasses

import pytest
import torch
from test_compression import BRIEF, CONFIG, Questions, Task, never
from test_latency import Machine, sensitivities
from tiny_models import tiny_batch, tiny_blip
from torch import nn

import madtp
from madtp import hwp
from madtp.budgets import latency
from madtp.budgets.allocate import MAX_ROUNDING_ERROR, choose
from madtp.budgets.plan import Plan
from madtp.budgets.prunable import prunable_linears
from madtp.budgets.sensitivity import Calibration, find_sensitivities
from madtp.budgets.smoothing import smooth_model
from madtp.cli.options import settings
from madtp.compression import pipeline, predict_targets
from madtp.hwp.packing import schemes_of
from madtp.profiling import timing
from madtp.profiling.inputs import input_statistics
from madtp.reporting import report
from madtp.tasks.batches import sample_batches
from madtp.training.trainer import MadtpTrainer

INT8 = dataclasses.replace(CONFIG, weight_dtype="int8", hwp_schedule="one_shot", macs_reduction=0.5)
JOINT = dataclasses.replace(INT8, hwp_score="second_order")
NONE = BRIEF | {"max_steps": 0}
FC1, FC2 = (f"vision_model.encoder.layers.0.mlp.fc{i}" for i in (1, 2))
NORM = "vision_model.encoder.layers.0.layer_norm2"


def with_outliers():
    """A model whose first MLP meets two large channels."""
    model = tiny_blip()
    with torch.no_grad():
        model.get_submodule(NORM).weight[:2] *= 100
    return model


def patched(model, config=JOINT):
    model = copy.deepcopy(model)
    madtp.patch(model, config)
    return model


def plan(**fields):
    given = {"macs_reduction": 0, "tokens": {"vision": 1, "text": 1}, "sparse_modules": (FC1,)}
    return Plan(**given | fields)


@pytest.fixture(scope="module")
def data():
    return Questions(24)


def test_without_training_one_shot_is_what_is_saved(tmp_path, data):
    some = plan(weight_dtypes={FC1: "int8", FC2: "int8"}, sparse_modules=(FC1, "vision_model.encoder.layers.1.mlp.fc1"))
    result = madtp.compress(tiny_blip(), Task(), data, None, JOINT, output_dir=tmp_path, plan=some, training=NONE)
    expected = patched(tiny_blip())
    names = [*some.sparse_modules, FC2]
    inputs = input_statistics(expected, names, sample_batches(Task(), data, 64), gram=True)
    hwp.prune_one_shot(expected, "2:4", [FC1], inputs, correct=True, weight_dtype="int8")
    hwp.prune_one_shot(expected, "2:4", [names[1]], inputs, correct=True)
    hwp.prune_one_shot(expected, None, [FC2], inputs, correct=True, weight_dtype="int8")
    assert schemes_of(result.model) == {FC1: "int8_24", FC2: "int8", names[1]: "sparse24"}
    for name in (FC1, FC2):
        layer, plain = result.model.get_submodule(name), expected.get_submodule(name)
        assert torch.equal(layer.weight_scale, plain.weight_scale)
        assert torch.equal(layer.quantized_weight.to_dense(), plain.weight)
    assert torch.equal(
        result.model.get_submodule(names[1]).sparse_weight.to_dense(), expected.get_submodule(names[1]).weight
    )
    assert result.report["training"] == [] and not (tmp_path / "checkpoints").exists()


def test_scales_of_one_shot_do_not_outlive_a_step(tmp_path, data, monkeypatch):
    seen, pack = [], pipeline.pack
    started = []

    def packed(model, names, **options):
        linears = [model.get_submodule(name) for name in names]
        seen.extend(hasattr(module, "weight_scale") for module in linears if isinstance(module, nn.Linear))
        return pack(model, names, **options)

    def prepared(trainer, *_):
        started.append(sum(hasattr(module, "weight_scale") for module in trainer.model.modules()))
        trainer.state.global_step = 1  # of one, in which nothing is rounded yet
        trainer.find_start()

    monkeypatch.setattr(pipeline, "pack", packed)
    monkeypatch.setattr(pipeline, "_train", prepared)
    training = BRIEF | {"max_steps": 1}
    madtp.compress(tiny_blip(), Task(), data, None, JOINT, output_dir=tmp_path, plan=plan(), training=training)
    assert started == [28] and seen == [False] * 28


@pytest.mark.slow
def test_a_training_goes_on_from_one_shot(tmp_path, data):
    config = dataclasses.replace(JOINT, hwp_smoothing=0.5)
    result = madtp.compress(with_outliers(), Task(), data, data, config, output_dir=tmp_path, training=BRIEF)
    found = result.report["plan"]
    assert found["quantized_modules"] == dict.fromkeys(sorted(found["sparse_modules"]), "int8_24")
    assert found["smoothings"][NORM]["after"] < 0.3 * found["smoothings"][NORM]["before"]
    report.write(result.report, tmp_path, command="madtp compress")
    assert "int8 in 28 linears" in (tmp_path / "report.md").read_text()


def test_smoothing_leaves_what_a_model_computes():
    model, batch = patched(with_outliers()).eval(), tiny_batch()
    names = prunable_linears(model, JOINT).selected
    model.madtp_handle.set_temperature(1.0)
    with torch.no_grad():
        before = model(**batch).logits
        norm = model.get_submodule(NORM).weight.clone()
        found = smooth_model(model, names, [batch], 0.5)
        assert torch.equal(model(**batch).logits, before)
    assert found[NORM].divisor is not None and not torch.equal(model.get_submodule(NORM).weight, norm)
    assert found[NORM].outliers_after < 0.3 * found[NORM].outliers_before
    assert smooth_model(patched(with_outliers()), [FC2], [batch], 0.5) == {}, "nothing that goes int8 reads a norm"


def test_smoothing_is_a_part_of_a_run(tmp_path, data):
    config = dataclasses.replace(INT8, hwp_smoothing=0.5)
    some = plan(weight_dtypes={FC1: "int8"}, sparse_modules=())
    result = madtp.compress(with_outliers(), Task(), data, None, config, output_dir=tmp_path, plan=some, training=NONE)
    assert list(result.report["plan"]["smoothings"]) == [NORM]
    norm = result.model.get_submodule(NORM).weight
    assert (norm[:2] < with_outliers().get_submodule(NORM).weight[:2]).all()


def test_a_plan_names_the_linears_that_go_int8(tmp_path):
    errors = {"a": 0.01, "b": 2 * MAX_ROUNDING_ERROR, "c": None}
    measured = sensitivities()
    unit = measured.weights["fc"]
    weights = {name: dataclasses.replace(unit, rounding_error=error) for name, error in errors.items()}
    measured = dataclasses.replace(measured, weights=weights)
    config = dataclasses.replace(INT8, macs_reduction=0.2)
    chosen = choose(measured, config)
    assert chosen.weight_dtypes == {"a": "int8"} and chosen.rounding_errors == {"a": 0.01, "b": 2 * MAX_ROUNDING_ERROR}
    chosen.save(tmp_path / "plan.yaml")
    assert "weight_dtypes:\n  a: int8\n" in (tmp_path / "plan.yaml").read_text()
    assert Plan.load(tmp_path / "plan.yaml") == chosen
    without = choose(measured, dataclasses.replace(config, weight_dtype=None))
    assert without == dataclasses.replace(chosen, weight_dtypes=None, rounding_errors={})
    with pytest.raises(ValueError, match="sensitivities must hold rounding errors with a weight_dtype, got none"):
        choose(sensitivities(), config)


def test_what_int8_does_is_looked_at_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr("madtp.budgets.sensitivity._token_points", lambda *_: ())
    config = dataclasses.replace(INT8, sparse_include=(FC1,))
    calibration = Calibration(patched(tiny_blip(), config), Task(), [tiny_batch()], config)
    (unit,) = find_sensitivities(calibration).weights.values()
    assert 0 < unit.rounding_error < 0.05
    assert unit.rounding_error == hwp.rounding_sensitivity(calibration.model, calibration.inputs([FC1]))[FC1]


@pytest.mark.parametrize(
    ("dtypes", "dtype", "quantized"),
    [(None, None, 0), (None, "int8", 28), ({}, "int8", 0), ({FC1: "int8"}, None, 1), ({FC1: "int8"}, "int8", 1)],
)
def test_a_plan_comes_before_the_config(data, dtypes, dtype, quantized):
    config = dataclasses.replace(INT8, weight_dtype=dtype)
    targets = predict_targets(tiny_blip(), Task(), data, config, plan=plan(weight_dtypes=dtypes))
    assert len(targets.quantized) == quantized and targets.chosen == [FC1]


def test_a_plan_of_int8_alone_is_carried_out(tmp_path, data):
    config = dataclasses.replace(INT8, weight_dtype=None)
    some = plan(sparse_modules=(), weight_dtypes={FC1: "int8"})
    result = madtp.compress(tiny_blip(), Task(), data, None, config, output_dir=tmp_path, plan=some, training=NONE)
    assert result.report["plan"]["quantized_modules"] == {FC1: "int8"}
    assert result.report["config"]["weight_dtype"] == "int8" and schemes_of(result.model) == {FC1: "int8"}


OLD = "version: 2\nmacs_reduction: 0.3\ntokens: {vision: 0.5}\nsparse_modules: [fc1]\n"


def test_a_plan_of_version_3_had_errors_of_int8(tmp_path):
    (tmp_path / "plan.yaml").write_text(OLD.replace("version: 2", "version: 3") + "int8_errors: {fc1: 0.01}\n")
    assert Plan.load(tmp_path / "plan.yaml").rounding_errors == {"fc1": 0.01}


def test_a_plan_of_version_2_leaves_dtypes_to_the_config(tmp_path):
    (tmp_path / "plan.yaml").write_text(OLD)
    assert Plan.load(tmp_path / "plan.yaml") == Plan(0.3, {"vision": 0.5}, ("fc1",))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("weight_dtypes: {fc1: int4}", "weight_dtypes of fc1 must be int8 or fp8, got 'int4'$"),
        ("weight_dtypes: {fc1: }", "weight_dtypes of fc1 must be int8 or fp8, got None$"),
        ("weight_dtypes: {fc1: [int8]}", r"weight_dtypes of fc1 must be int8 or fp8, got \['int8'\]$"),
        ("weight_dtypes: {fc1: int8, fc2: fp8}", "weight_dtypes must be of one dtype, got fp8, int8$"),
        ("weight_dtypes: [fc1]", r"weight_dtypes must map names of Linears to dtypes or be null, got \['fc1'\]$"),
    ],
)
def test_an_edited_plan_is_checked(tmp_path, line, message):
    (tmp_path / "plan.yaml").write_text(OLD.replace("version: 2", "version: 3") + line)
    with pytest.raises(ValueError, match=f"^plan .*plan.yaml: {message}"):
        Plan.load(tmp_path / "plan.yaml")


def test_a_linear_that_the_plan_does_not_know_is_named(data):
    some = plan(weight_dtypes={"nowhere": "int8"})
    with pytest.raises(ValueError, match="weight_dtypes of the plan must name Linears that may go N:M, got 'nowhere'$"):
        predict_targets(tiny_blip(), Task(), data, INT8, plan=some)


class Int8Machine(Machine):
    """In which a multiply-add of integers takes a quarter of a nanosecond."""

    extra = Machine.extra | {
        torch.ops.madtp.quantized_linear: lambda x, values, *_, **__: x.shape[0] * values.numel() // 2
    }


@pytest.fixture
def machine(monkeypatch):
    def seconds(run, device):
        macs = {(): 0}
        with Int8Machine(macs, []):
            run()
        return 1e-9 * macs[()]

    medians = timing.medians
    monkeypatch.setattr(timing, "seconds", seconds)
    for module in (timing, latency):
        monkeypatch.setattr(module, "medians", lambda runs, device, rounds=1: medians(runs, device, rounds=1))


def test_time_is_that_of_the_layers_that_will_run(machine):
    model, batch = patched(tiny_blip(), INT8), tiny_batch()
    names = prunable_linears(model, INT8).selected
    unit = sensitivities().weights["fc"]
    known = dataclasses.replace(sensitivities(), tokens={}, weights=dict.fromkeys(names, unit))
    plain = latency.time_parts(tiny_blip(), model, known, batch)
    rounded = latency.time_parts(tiny_blip(), model, known, batch, [FC1])
    assert not schemes_of(model), "the model stays as it is"
    assert plain.weights[FC1] > 0 and rounded.weights[FC1] == pytest.approx(plain.weights[FC1] / 4)
    assert {n: t for n, t in rounded.weights.items() if n != FC1} == {
        n: t for n, t in plain.weights.items() if n != FC1
    }
    # As 2:4 it saves half of what it takes, in int8 three quarters.
    assert rounded.patched == pytest.approx(plain.patched - 1.5 * plain.weights[FC1]) and rounded.dense == plain.dense


@pytest.mark.slow
def test_a_latency_plan_of_int8_layers_is_carried_out(machine, tmp_path, data):
    config = dataclasses.replace(JOINT, macs_reduction=None, latency_reduction=0.5)
    result = madtp.compress(tiny_blip(), Task(), data, data, config, output_dir=tmp_path, training=BRIEF)
    chosen = Plan.load(tmp_path / "plan.yaml")
    assert len(chosen.weight_dtypes) == 28 and chosen.predicted["ms"] <= 0.501 * chosen.predicted["dense_ms"]
    times = [result.report["compressed"]["ms_per_sample"], result.report["dense"]["ms_by_run"]["as loaded"]]
    assert times[0] < 0.55 * times[1] and schemes_of(result.model).keys() == chosen.weight_dtypes.keys()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hwp_smoothing": 1.5}, r"hwp_smoothing must be a number in \[0, 1\] or None, got 1.5"),
        ({"hwp_smoothing": True}, r"hwp_smoothing must be a number in \[0, 1\] or None, got True"),
        ({"hwp_smoothing": 0.5, "weight_dtype": None}, "hwp_smoothing must be None without a weight_dtype, got 0.5"),
        (
            {"pattern": "4:8"},
            "pattern must be 2:4 or within it, or dense as \"4:4\", with weight_dtype 'int8', got '4:8'",
        ),
    ],
)
def test_configs_that_contradict_themselves(fields, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        dataclasses.replace(INT8, **fields)


def test_patterns_that_int8_layers_run():
    for pattern in ("1:4", "2:8", "4:4"):
        assert dataclasses.replace(INT8, pattern=pattern).pattern == pattern


def test_int8_weights_are_not_trained(tmp_path, data, monkeypatch):
    monkeypatch.setattr(MadtpTrainer, "train", never)
    model = tiny_blip()
    hwp.pack(model, [FC1], dtype="int8")
    with pytest.raises(
        ValueError, match=f"^model must have no int8 weights, which do not train, got '{FC1}': .*unpack"
    ):
        madtp.compress(model, Task(), data, None, CONFIG, output_dir=tmp_path / "out", training=BRIEF)
    assert not (tmp_path / "out").exists()


def test_masks_that_grow_need_steps(tmp_path, data):
    config = dataclasses.replace(INT8, hwp_schedule="gradual")
    with pytest.raises(ValueError, match='^max_steps must be at least 1 with hwp_schedule "gradual", got 0$'):
        madtp.compress(tiny_blip(), Task(), data, None, config, output_dir=tmp_path, training=NONE)


@pytest.mark.parametrize("fields", [{"hwp_score": "second_order"}, {"hwp_smoothing": 0.5}])
def test_linears_that_calibration_data_do_not_reach(tmp_path, data, monkeypatch, fields):
    monkeypatch.setattr(MadtpTrainer, "train", never)
    model, spare = tiny_blip(), "vision_model.encoder.layers.0.mlp.spare"
    model.get_submodule(spare.rpartition(".")[0]).add_module("spare", nn.Linear(32, 32))
    monkeypatch.setattr("madtp.budgets.smoothing.norm_readers", lambda model: [hwp.NormReaders(NORM, (spare,))])
    config = dataclasses.replace(INT8, **fields)
    with pytest.raises(
        ValueError, match=f"^calibration_data must reach all Linears .* '{spare}': sparse_exclude leaves"
    ):
        madtp.compress(model, Task(), data, None, config, output_dir=tmp_path, training=BRIEF)


def test_the_command_line_smooths():
    config, _ = settings(None, weights="int8", smoothing=0.5)
    assert config.hwp_smoothing == 0.5
    with pytest.raises(ValueError, match="hwp_smoothing must be None without a weight_dtype, got 0.5"):
        settings(None, smoothing=0.5)
