# SPDX-License-Identifier: Apache-2.0
"""A latency target, on a machine whose time is the multiply-adds that run: what is planned and calibrated on."""

import dataclasses

import pytest
import torch
from test_compression import CONFIG, Questions, Task
from tiny_models import tiny_blip

import madtp
from madtp import compression
from madtp.budgets import latency
from madtp.budgets.allocate import choose
from madtp.budgets.plan import Plan
from madtp.budgets.records import Sensitivities, Times, TokenPoint, WeightUnit
from madtp.profiling import macs as accounting
from madtp.profiling import timing

LATENCY = dataclasses.replace(CONFIG, macs_reduction=None, latency_reduction=0.35)
TRAINING = {"max_steps": 12, "per_device_train_batch_size": 16, "disable_tqdm": True}


class Machine(accounting._MacCounter):
    """Takes a nanosecond for a multiply-add, and none for those a 2:4 weight leaves out."""

    extra = accounting._MacCounter.extra | {
        torch.ops.madtp.sparse24_linear: lambda x, values, *_, **__: 2 * x.shape[0] * values.numel()
    }


@pytest.fixture
def machine(monkeypatch):
    def seconds(run, device):
        macs = {}
        macs[()] = 0
        with Machine(macs, []):
            run()
        return 1e-9 * macs[()]

    medians = timing.medians

    def of_one_round(runs, device, rounds=1):  # this clock says the same in every round
        return medians(runs, device, rounds=1)

    monkeypatch.setattr(timing, "seconds", seconds)
    for module in (timing, latency):
        monkeypatch.setattr(module, "medians", of_one_round)


@pytest.fixture(scope="module")
def data():
    return Questions(48)


@pytest.mark.slow
def test_a_plan_for_time_predicts_it_and_says_so(machine, data, tmp_path):
    plan = madtp.allocate(tiny_blip(), Task(), data, LATENCY)
    assert plan.latency_reduction == 0.35 and 0 < plan.predicted["ms"] < plan.predicted["dense_ms"]
    assert plan.predicted["ms"] == pytest.approx(0.65 * plan.predicted["dense_ms"], rel=1e-3)
    macs = madtp.allocate(tiny_blip(), Task(), data, dataclasses.replace(CONFIG, macs_reduction=plan.macs_reduction))
    assert plan.macs_reduction == pytest.approx(0.35, abs=0.08), "time is multiply-adds here"
    assert macs.latency_reduction is None and "ms" not in macs.predicted
    plan.save(tmp_path / "plan.yaml")
    assert Plan.load(tmp_path / "plan.yaml") == plan
    (tmp_path / "plan.yaml").write_text("macs_reduction: 0.5\ntokens: {}\nsparse_modules: []\nlatency_reduction: 2")
    with pytest.raises(ValueError, match=r"latency_reduction must be a number in \[0, 1\) or null, got 2"):
        Plan.load(tmp_path / "plan.yaml")
    with pytest.raises(ValueError, match="latency_reduction must be at most about 0.*on this device, got 0.95"):
        madtp.allocate(tiny_blip(), Task(), data, dataclasses.replace(LATENCY, latency_reduction=0.95))


@pytest.mark.slow
def test_the_front_is_of_times_where_the_config_asks_for_time(machine, data):
    plans = madtp.pareto(tiny_blip(), Task(), data, LATENCY, reductions=(0.2, 0.3, 0.999))
    assert [plan.latency_reduction for plan in plans] == [0.2, 0.3]
    assert plans[0].predicted["ms"] > plans[1].predicted["ms"]


def sensitivities(times=None):
    """Of two branches, one of them with a Linear; every part saves as many MACs, at as much harm per MAC."""
    account = accounting.Account(0, 0, 100.0, 100.0, 100.0, 0.0, 0)
    profile = accounting.Profile(
        accounting.Account(1000, 1000, 200.0, 200.0, 200.0, 0.0, 0), {"vision": account, "text": account}, {}
    )
    points = (TokenPoint(1.0, 0.0, 0.0), TokenPoint(0.9, 1.0, 0.1), TokenPoint(0.5, 10.0, 0.5))
    weights = {"fc": WeightUnit("text", 100, 40.0, 0.4)}
    return Sensitivities(profile, {"vision": points, "text": points}, weights, times)


def test_what_saves_no_time_is_left_alone():
    config = dataclasses.replace(LATENCY, latency_reduction=0.2)
    # Few tokens gone cost more than they save, many save; the text saves nothing, nor does its Linear.
    times = Times(10.0, 10.0, {"vision": (10.0, 10.5, 7.0), "text": (10.0, 10.0, 10.0)}, {"fc": 0.0})
    plan = choose(sensitivities(times), config)
    assert plan.tokens["text"] == 1 and plan.sparse_modules == ()
    assert plan.tokens["vision"] == pytest.approx(1 - 0.5 * 2 / 3) and plan.predicted["ms"] == pytest.approx(8.0)
    assert plan.macs_reduction == pytest.approx(0.5 * (1 - plan.tokens["vision"]))
    faster = dataclasses.replace(times, weights={"fc": 2.0})  # 0.4 for 2 ms, where tokens give 3 ms for 0.5
    assert choose(sensitivities(faster), config).sparse_modules == ()
    faster = dataclasses.replace(times, weights={"fc": 2.5})
    assert choose(sensitivities(faster), config).sparse_modules == ()  # 0.4 for the 2 ms asked for, tokens 0.33
    config = dataclasses.replace(config, latency_reduction=0.25)
    assert choose(sensitivities(faster), config).sparse_modules == ("fc",)  # 0.4 for 2.5 ms, tokens 0.42
    with pytest.raises(ValueError, match="sensitivities must hold times"):
        choose(sensitivities(), config)
    slower = dataclasses.replace(times, dense=6.5)
    with pytest.raises(
        ValueError, match=r"latency_reduction must be None: no plan .* \(7 and 6.5 ms a sample\), got 0.2"
    ):
        choose(sensitivities(slower), config)
    with pytest.raises(ValueError, match="latency_reduction must be at most about 0.300"):
        choose(sensitivities(times), dataclasses.replace(config, latency_reduction=0.4))


@pytest.mark.slow
def test_compress_calibrates_on_the_time_it_measures(machine, data, tmp_path):
    result = madtp.compress(tiny_blip(), Task(), data, data, LATENCY, output_dir=tmp_path, training=TRAINING)
    figures, plan = result.report, result.report["plan"]
    assert plan["latency_reduction"] == 0.35 and abs(plan["calibration_miss"]) <= 0.03
    times = [figures["compressed"]["ms_per_sample"], figures["dense"]["ms_by_run"]["as loaded"]]
    assert times[0] == pytest.approx(0.65 * times[1], rel=0.05)
    chosen = Plan.load(tmp_path / "plan.yaml")
    assert plan["allocation"] == chosen.to_dict() and plan["packed_modules"] == sorted(chosen.sparse_modules)


@pytest.mark.slow
def test_a_plan_for_time_may_take_width(machine, data, tmp_path):
    config = dataclasses.replace(LATENCY, width_reduction=0.5)
    plan = madtp.allocate(tiny_blip(), Task(), data, config)
    assert plan.widths and plan.predicted["ms"] == pytest.approx(0.65 * plan.predicted["dense_ms"], rel=1e-3)
    training = TRAINING | {"max_steps": 4}
    result = madtp.compress(tiny_blip(), Task(), data, data, config, output_dir=tmp_path, plan=plan, training=training)
    times = [result.report[name]["ms_per_sample"] for name in ("compressed", "dense")]
    assert times[0] == pytest.approx(0.65 * times[1], rel=0.05)


@pytest.mark.slow
def test_a_resumed_run_keeps_its_plan(machine, data, tmp_path, monkeypatch):
    training = TRAINING | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    run = lambda **options: madtp.compress(  # noqa: E731
        tiny_blip(), Task(), data, None, LATENCY, output_dir=tmp_path, training=training, **options
    )
    first = run().report["plan"]["allocation"]
    monkeypatch.setattr("madtp.compression.targets.allocate", None)  # a second measurement would be another
    assert run(resume=True).report["plan"]["allocation"] == first


def test_medians_take_turns_and_do_not_count_the_first_round(monkeypatch):
    calls, clock = [], iter([9, 9, 1, 10, 3, 30, 2, 20])
    monkeypatch.setattr(timing, "seconds", lambda run, device: (run(), next(clock))[1])
    found = timing.medians({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, None, rounds=3)
    assert found == {"a": 2, "b": 20} and calls == list("abababab")


def test_a_dry_run_plans_for_time(machine):
    targets = compression.predict_targets(tiny_blip(), Task(), Questions(8), LATENCY)
    assert targets.latency_reduction == 0.35 and 0 < targets.macs_reduction < 1
