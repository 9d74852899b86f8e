# SPDX-License-Identifier: Apache-2.0
import json
import math
import random

import pytest

from madtp.profiling.macs import Account, Profile
from madtp.search import find_root
from madtp.training.controller import TemperatureController, branch_targets


class Plant:
    """MACs against tau, with noise: all tokens as tau goes to 0, a floor as it goes to infinity, a slope between."""

    def __init__(self, *, full, floor, knee, slope, noise=0.02, seed=0):
        self.full, self.floor, self.knee, self.slope, self.noise = full, floor, knee, slope, noise
        self.random = random.Random(seed)

    def mean(self, tau):
        keep = 1 / (1 + (tau / self.knee) ** self.slope)
        return self.full * (self.floor + (1 - self.floor) * keep)

    def __call__(self, tau):
        return self.mean(tau) * math.exp(self.random.gauss(0, self.noise))


def run(controller, plants, updates):
    temperatures = controller.temperatures
    for _ in range(updates):
        temperatures = controller.update({branch: plant(temperatures[branch]) for branch, plant in plants.items()})
    return temperatures


def total(plants, temperatures):
    return sum(plant.mean(temperatures[branch]) for branch, plant in plants.items())


@pytest.mark.parametrize("slope", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("knee", [0.3, 5.0, 60.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_converges_within_one_percent(slope, knee, seed):
    plants = {
        "vision": Plant(full=30e9, floor=0.2, knee=knee, slope=slope, seed=seed),
        "text": Plant(full=5e9, floor=0.3, knee=3.0, slope=1.5, seed=seed + 10),
    }
    controller = TemperatureController({"vision": 16e9, "text": 3e9})
    assert total(plants, run(controller, plants, 60)) == pytest.approx(19e9, rel=0.01)


def test_follows_a_plant_that_drifts():
    plant = Plant(full=10.0, floor=0.1, knee=2.0, slope=1.0, noise=0.01)
    controller = TemperatureController({"vision": 5.0})
    for _ in range(200):
        plant.knee *= 1.02  # 50 times harder to prune at the end
        run(controller, {"vision": plant}, 1)
    assert plant.mean(controller.temperatures["vision"]) == pytest.approx(5.0, rel=0.05)
    assert total({"vision": plant}, run(controller, {"vision": plant}, 40)) == pytest.approx(5.0, rel=0.01)


@pytest.mark.parametrize("floor, text_target", [(0.7, 2.0), (0.1, 6.0)])
def test_others_take_over_what_a_saturated_branch_cannot_do(floor, text_target):
    """Text cannot go below 3.5 of its 5, or cannot reach 6 however little it prunes: vision makes up for it."""
    plants = {
        "vision": Plant(full=30.0, floor=0.1, knee=5.0, slope=1.0, noise=0.005),
        "text": Plant(full=5.0, floor=floor, knee=5.0, slope=2.0, noise=0.005),
    }
    controller = TemperatureController({"vision": 15.0, "text": text_target})
    temperatures = run(controller, plants, 150)
    assert temperatures["text"] == pytest.approx(1000.0 if text_target < 5 else 1e-4)
    assert total(plants, temperatures) == pytest.approx(15.0 + text_target, rel=0.01)


def test_with_no_branch_to_prune_nothing_moves():
    controller = TemperatureController({})
    assert controller.update({}) == controller.halve_step() == controller.shifted(1.0) == {}
    assert controller.shifts == (0, 0)


def test_out_of_reach_goes_to_the_bounds_and_steps_are_limited():
    plants = {branch: Plant(full=10.0, floor=0.9, knee=1.0, slope=1.0) for branch in ("vision", "text")}
    controller = TemperatureController({"vision": 1.0, "text": 1.0}, bounds=(0.1, 50.0), max_step=0.25)
    first = controller.update({"vision": 10.0, "text": 10.0})
    assert first == pytest.approx({"vision": math.exp(0.25), "text": math.exp(0.25)})
    assert run(controller, plants, 60) == pytest.approx({"vision": 50.0, "text": 50.0})


def test_state_survives_json():
    plants = {"vision": Plant(full=30.0, floor=0.2, knee=5.0, slope=1.0)}
    controller = TemperatureController({"vision": 15.0}, temperature={"vision": 2.0})
    run(controller, plants, 7)
    other = TemperatureController({"vision": 1.0})
    other.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    assert other.update({"vision": 20.0}) == controller.update({"vision": 20.0})
    with pytest.raises(ValueError, match="state must hold"):
        TemperatureController({"text": 1.0}).load_state_dict(controller.state_dict())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"targets": {"vision": 0.0}}, "targets must be positive"),
        ({"targets": {"vision": 1.0}, "bounds": (0.0, 1.0)}, "bounds must be"),
        ({"targets": {"vision": 1.0}, "temperature": {"text": 1.0}}, "temperature must be positive for each of"),
        ({"targets": {"vision": 1.0}, "temperature": 0.0}, "temperature must be positive"),
        ({"targets": {"vision": 1.0}, "gain": 0.0}, "gain and max_step must be positive"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TemperatureController(**arguments)


@pytest.mark.parametrize("observed", [{}, {"vision": math.nan}, {"vision": 0.0}, {"vision": 1.0, "text": 1.0}])
def test_bad_observation_changes_nothing(observed):
    controller = TemperatureController({"vision": 1.0})
    with pytest.raises(ValueError, match="observed must be positive MACs for each of"):
        controller.update(observed)
    assert controller.temperatures == {"vision": 1.0}


def make_profile(**macs):
    """Branches as name=(dense, counted)."""
    branches = {name: Account(0, 0, dense, counted, dense, 0, 0) for name, (dense, counted) in macs.items()}
    sums = [sum(column) for column in zip(*macs.values(), strict=True)]
    return Profile(Account(0, 0, sums[0], sums[1], sums[0], 0, 0), branches, {})


def test_branch_targets_meet_the_budget_by_one_factor():
    profile = make_profile(vision=(80.0, 44.0), text=(10.0, 6.0), decoder=(10.0, 10.0), other=(0.0, 0.0))
    targets = branch_targets(profile, 0.6, ["vision", "text"])
    assert targets == pytest.approx({"vision": 44 * 0.6, "text": 6 * 0.6})
    assert sum(targets.values()) + 10 == pytest.approx(0.4 * 100)
    assert branch_targets(profile, 0.3, ["vision", "text"]) == {"vision": 44.0, "text": 6.0}  # 2:4 alone is enough


def test_branch_targets_errors():
    profile = make_profile(vision=(80.0, 44.0), decoder=(20.0, 20.0))
    with pytest.raises(ValueError, match="macs_reduction must be below 0.800, the share the fixed parts leave"):
        branch_targets(profile, 0.8, ["vision"])
    with pytest.raises(ValueError, match=r"prunable must name branches of \['vision', 'decoder'\], got \['text'\]"):
        branch_targets(profile, 0.5, ["text"])
    with pytest.raises(ValueError, match="macs_reduction must be a number"):
        branch_targets(profile, 1.0, ["vision"])


@pytest.mark.parametrize(
    "function, root",
    [
        (lambda x: 0.3 - 0.2 * x, 1.5),
        (lambda x: -0.3 - 0.16 * x, -1.875),
        (lambda x: math.exp(-x) - 0.5, math.log(2)),
        (lambda x: math.tanh(3 - 5 * x), 0.6),
        (lambda x: 0.5 - x**3, 0.5 ** (1 / 3)),
    ],
)
def test_a_root_is_found_in_few_rounds(function, root):
    seen = []
    x, value = find_root(lambda x: seen.append(x) or function(x), -4, 7, tolerance=0.002)
    assert value == function(x) and abs(value) <= 0.002 and len(seen) <= 10
    assert x == pytest.approx(root, abs=0.02)
    assert all(-4 <= x <= 7 for x in seen)


def test_without_a_root_the_best_is_taken():
    seen = []
    assert find_root(lambda x: seen.append(x) or 0.2 - x / 1000, -4, 7, tolerance=0.002) == (7, 0.193)
    assert len(seen) <= 5
    assert find_root(lambda x: 0.3 if x < 1 else -0.1, -4, 7, tolerance=0.002)[1] == -0.1


def test_all_temperatures_shift_by_one_factor():
    controller = TemperatureController({"vision": 1.0, "text": 1.0}, temperature={"vision": 2.0, "text": 2e-4})
    shifted = controller.shifted(math.log(0.1))
    assert shifted == pytest.approx({"vision": 0.2, "text": 1e-4})  # which is the lowest
    assert controller.temperatures == pytest.approx({"vision": 2.0, "text": 2e-4})
    low, high = controller.shifts
    assert controller.shifted(low) == pytest.approx({"vision": 1e-4, "text": 1e-4})
    assert controller.shifted(high) == pytest.approx({"vision": 1000.0, "text": 1000.0})
