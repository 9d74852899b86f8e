# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json

import pytest

from madtp.config import CompressionConfig
from madtp.dtp.selection_rules import SELECTIONS


def test_round_trip_through_json():
    config = CompressionConfig(macs_reduction=0.6, sparse_exclude=("text_decoder.*",), pattern="1:4", seed=3)
    assert CompressionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.sparse_exclude == ("text_decoder.*",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


@pytest.mark.parametrize(
    "field, value, rule",
    [
        ("macs_reduction", 1.0, r"a number in \[0, 1\), got 1.0"),
        ("latency_reduction", 1.0, r"a number in \[0, 1\), got 1.0"),
        ("macs_reduction", float("nan"), "a number in"),
        ("params_reduction", -0.1, "a number in"),
        ("alignment_tokens", 0, "an integer of at least 1, got 0"),
        ("alignment_dim", 1.5, "an integer of at least 1"),
        ("temperature", 0, "a positive number, got 0"),
        ("temperature", 5000.0, "from temperature_min 0.0001 to _max 1000.0, got 5000.0"),
        ("kd_temperature", "4", "a positive number, got '4'"),
        ("align_weight", -1, "a number of at least 0"),
        ("hwp_schedule", "sudden", '"gradual" or "one_shot", got \'sudden\''),
        ("guard_tolerance", 0, "a positive number or None, got 0"),
        ("hwp_ramp", 1.5, r"a number in \[0, 1\]"),
        ("selection", "all", f"one of {', '.join(SELECTIONS)}, or a function, got 'all'"),
        ("weight_dtype", "int4", "None or int8 or fp8, got 'int4'"),
        ("pattern", "4:2", '"n:m" with 1 <= n <= m'),
        ("sparse_exclude", "text_decoder", "a tuple of module name patterns, got 'text_decoder'"),
        ("controller_interval", True, "an integer of at least 1, got True"),
        ("seed", -1, "an integer of at least 0"),
    ],
)
def test_each_field_names_its_rule(field, value, rule):
    with pytest.raises(ValueError, match=f"{field} must be {rule}"):
        CompressionConfig(**{field: value})


def test_one_target():
    assert CompressionConfig().macs_reduction == 0.5 and CompressionConfig().latency_reduction is None
    timed = CompressionConfig(latency_reduction=0.4)
    assert timed.macs_reduction is None and CompressionConfig.from_dict(timed.to_dict()) == timed
    with pytest.raises(ValueError, match="latency_reduction must be None with a macs_reduction, which is 0.5, got 0.4"):
        CompressionConfig(macs_reduction=0.5, latency_reduction=0.4)


def test_unknown_field():
    with pytest.raises(ValueError, match=r"config must have known fields \(.*\), got flops"):
        CompressionConfig.from_dict({"flops": 0.5})
