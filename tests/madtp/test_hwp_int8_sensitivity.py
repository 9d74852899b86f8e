# SPDX-License-Identifier: Apache-2.0
"""What int8 is said to do to a Linear, beside what it does; and which Linears then stay in floating point."""

import pytest
import torch
from test_hwp_scores import correlated, make_model
from torch import nn

from madtp.hwp import InputStatistics, collect_inputs, prune_one_shot, rounding_sensitivity, select_rounded
from madtp_kernels import quantize, quantized_linear


def collected(model, x, **options):
    with torch.no_grad(), collect_inputs(model, ["0", "2"], **{"gram": True} | options) as statistics:
        model(x)
    return statistics


def measured(layer, x):
    weight = quantize(layer.weight, "int8", getattr(layer, "weight_scale", None))
    y = x @ layer.weight.T
    return ((quantized_linear(x, weight) - y).norm() / y.norm()).item()


# An outlier that is always the largest of its row is rounded without an error, which the estimate does not know.
@pytest.mark.parametrize(("outlier", "tolerance"), [(1, 0.1), (100, 0.25)])
def test_it_is_about_what_is_measured(outlier, tolerance):
    model, x = make_model(), torch.randn(500, 64)
    x[:, 7] *= outlier
    found = rounding_sensitivity(model, collected(model, x))
    assert list(found) == ["0", "2"]
    with torch.no_grad():
        inputs = {"0": x, "2": model[:2](x)}
        for name, layer in (("0", model[0]), ("2", model[2])):
            assert found[name] == pytest.approx(measured(layer, inputs[name]), rel=tolerance)
    assert found["0"] < 0.05


def test_an_outlier_of_the_inputs_makes_a_layer_sensitive():
    model, x = make_model(), torch.randn(200, 64)
    model[0].weight.data[:, 7] = 0  # so that the outlier counts for the scales of the rows alone
    before = rounding_sensitivity(model, collected(model, x))["0"]
    x[:, 7] *= 100
    assert rounding_sensitivity(model, collected(model, x))["0"] > 5 * before


def test_the_scale_of_the_module_counts():
    model, x = make_model(), correlated()
    statistics = collected(model, x)
    prune_one_shot(model, None, ["0"], statistics, correct=True, weight_dtype="int8")
    with_scale = rounding_sensitivity(model, statistics)["0"]
    assert with_scale == pytest.approx(measured(model[0], x), rel=0.1)
    model[0].weight_scale.mul_(8)
    assert rounding_sensitivity(model, statistics)["0"] > 2 * with_scale


def test_statistics_of_magnitudes():
    x, weight = torch.randn(3, 5, 8), torch.rand(15)
    found = InputStatistics(torch.zeros(8, dtype=torch.float64), torch.zeros(8, 8, dtype=torch.float64))
    found.add(x[:1], weight[:5])
    found.add(x[:0])
    found.add(x[1:], weight[5:])
    rows = x.flatten(0, 1)
    assert torch.equal(found.amax, rows.abs().amax(0))
    expected = (rows.double().abs().amax(1).square() * weight).sum()
    torch.testing.assert_close(found.row_amax_squares, expected)
    divisor = torch.rand(8) + 0.5
    found.divide_channels(divisor)
    divided = InputStatistics(torch.zeros(8, dtype=torch.float64), torch.zeros(8, 8, dtype=torch.float64))
    divided.add(rows / divisor, weight)
    for name in ("squares", "gram", "amax"):
        torch.testing.assert_close(getattr(found, name), getattr(divided, name), rtol=1e-5, atol=1e-6)
    assert found.row_amax_squares is None


def test_zero_outputs_have_no_error():
    model = make_model()
    nn.init.zeros_(model[0].weight)
    assert rounding_sensitivity(model, collected(model, correlated()))["0"] == 0


def test_select_int8():
    errors = {"a": 0.1, "b": 0.3, "c": 0.0, "d": 0.2}
    assert select_rounded(errors) == ["a", "b", "c", "d"]
    assert select_rounded(errors, keep_float=0.25) == ["a", "c", "d"]
    assert select_rounded(errors, keep_float=0.3, max_error=0.15) == ["a", "c"]
    assert select_rounded(errors, keep_float=1) == [] and select_rounded({}, keep_float=0.5) == []
    for wrong in ({"keep_float": 1.5}, {"keep_float": "b"}, {"max_error": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be a number"):
            select_rounded(errors, **wrong)
    with pytest.raises(ValueError, match="errors must be numbers, got NaN for 'a'"):
        select_rounded({"a": float("nan")})


def test_bad_statistics():
    model = make_model()
    smoothed, broken = collected(model, correlated()), collected(model, torch.full((1, 64), torch.inf))
    smoothed["0"].divide_channels(torch.ones(64))
    with collect_inputs(model, ["0"], gram=True) as nothing:
        pass
    wrong = collected(model, correlated())
    for statistics, message in (
        ({"0": wrong["2"]}, r"gram of '0' must be of shape \(64, 64\), got float64 \(32, 32\)"),
        ({"1": wrong["2"]}, "statistics must name Linear modules, got '1', which is a GELU"),
        (collected(model, correlated(), gram=False), "gram must be finite, got None for '0': collect inputs with gram"),
        (nothing, "statistics must hold inputs of every module, got none of '0'"),
        (broken, "gram and weight must be finite, got a NaN or an infinity for '0'"),
        (smoothed, "statistics must be of the inputs as they are, got those before smoothing for '0'"),
    ):
        with pytest.raises(ValueError, match=message):
            rounding_sensitivity(model, statistics)
