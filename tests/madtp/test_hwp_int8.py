# SPDX-License-Identifier: Apache-2.0
"""int8 weights in one shot: the joint sweep, the grid, what is written and what is refused."""

import copy

import pytest
import torch
from test_hwp_scores import correlated, make_model, output_error

from madtp.hwp import collect_inputs, is_pattern, prune_one_shot, reconstruct, reconstruct_rounded, round_weight
from madtp.hwp.rounding import SHRINKS, search_scale
from madtp.hwp.weight_grid import GridWeight, nearest, rounded, row_scale
from madtp_kernels import nm_mask, quantize


def weight_with_outliers(rows=32, columns=64):
    """An outlier in every row, which leaves few steps of the grid to the others."""
    torch.manual_seed(1)
    weight = torch.randn(rows, columns)
    weight[:, 5] *= 20
    return weight


@pytest.mark.parametrize("pattern", [None, "2:4", "1:4", "4:8"])
def test_one_sweep_keeps_the_outputs_better_than_rounding_after(pattern):
    x, weight = correlated(), weight_with_outliers()
    gram = x.T @ x
    alone = weight if pattern is None else reconstruct(weight, gram, *map(int, pattern.split(":")))
    joint = reconstruct_rounded(weight, gram, pattern)
    errors = [output_error(weight, found, x) for found in (rounded(alone), joint.to_dense(torch.float32))]
    assert errors[1] < (0.3 if pattern is None else 1) * errors[0]
    assert pattern is None or is_pattern(joint.values.float(), pattern)
    assert joint.values.dtype == torch.int8 and joint.values.min() >= -127


def test_rounding_in_the_sweep_against_the_naive_one():
    """Column by column, with the inverse of what is left computed anew each time."""
    torch.manual_seed(0)
    x, weight = torch.randn(300, 24, dtype=torch.float64), torch.randn(5, 24, dtype=torch.float64)
    x[:, 1::2] += x[:, ::2]
    found = reconstruct_rounded(weight, x.T @ x, damping=0.05)
    left, scale = weight.clone(), found.scale.double()[:, None]
    damped = x.T @ x + 0.05 * (x.T @ x).diagonal().mean() * torch.eye(24, dtype=torch.float64)
    for j in range(24):
        inverse = torch.linalg.inv(damped[j:, j:])
        error = left[:, j : j + 1] - nearest(left[:, j : j + 1], scale) * scale
        left[:, j:] -= error * inverse[0] / inverse[0, 0]
    same = (found.values == nearest(left, scale)).all(1)
    nearest_won = (found.values == nearest(weight, scale)).all(1)
    assert (same | nearest_won).all() and same.sum() >= 4


def test_a_row_shrinks_where_that_pays():
    """An outlier on an input that is never there may be cut."""
    weight = torch.randn(4, 16)
    weight[0, 3] = 40.0
    gram = torch.eye(16)
    gram[3, 3] = 0.0
    factor = search_scale(weight, gram) / row_scale(weight)
    assert factor[0] < 1 and (factor >= min(SHRINKS) - 1e-6).all()
    torch.testing.assert_close(search_scale(torch.ones(3, 16), torch.eye(16)), torch.full((3,), 1 / 127))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_nearest_integers_are_those_of_quantize(dtype):
    weight = torch.randn(9, 16).to(dtype)
    weight[3] = 0
    found, expected = round_weight(weight), quantize(weight, "int8")
    assert torch.equal(found.values, expected.values) and torch.equal(found.scale, expected.scale)
    assert torch.equal(rounded(weight), found.to_dense(dtype))
    again = quantize(found.to_dense(dtype), "int8", found.scale)
    assert torch.equal(again.values, found.values)
    score = torch.rand(9, 16)
    pruned = round_weight(weight, "2:4", score=score)
    expected = quantize(weight.masked_fill(~nm_mask(weight, 2, 4, score=score), 0), "int8")
    assert torch.equal(pruned.values, expected.values) and torch.equal(pruned.scale, expected.scale)


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_zeros(pattern):
    weight = torch.randn(8, 16)
    weight[2], weight[:, 4:8] = 0, 0
    for gram in (torch.eye(16), torch.zeros(16, 16)):
        found = reconstruct_rounded(weight, gram, pattern)
        assert (found.values[2] == 0).all() and found.scale[2] == 1
        assert (found.values[:, 4:8] == 0).all()  # what was pruned before stays so
        assert found.scale.isfinite().all() and (found.scale > 0).all()


def statistics_of(model, x):
    with torch.no_grad(), collect_inputs(model, ["0", "2"], gram=True) as statistics:
        model(x)
    return statistics


@pytest.mark.parametrize("correct", [False, True])
@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_shot_leaves_the_grid(pattern, correct, dtype):
    model = make_model()
    statistics = statistics_of(model, correlated())
    model, dense = model.to(dtype), copy.deepcopy(model).to(dtype)
    keys = list(model.state_dict())
    report = prune_one_shot(model, pattern, ["0", "2"], statistics, correct=correct, weight_dtype="int8")
    assert list(model.state_dict()) == keys and torch.equal(model[0].bias, dense[0].bias)
    assert set(report.magnitude_kept) == {"0", "2"}
    for layer in (model[0], model[2]):
        scale = layer.weight_scale
        assert scale.dtype == torch.float32 and scale.shape == (layer.out_features,) and not scale.requires_grad
        integers = nearest(layer.weight, scale[:, None])
        assert torch.equal((integers * scale[:, None]).to(dtype), layer.weight)
        assert torch.equal(quantize(layer.weight, "int8", scale).values.float(), integers)
        assert pattern is None or is_pattern(layer.weight, pattern)
        assert not layer.weight[layer.weight == 0].signbit().any()
    prune_one_shot(model, "1:4", ["0"])  # the scale was of another weight
    assert not hasattr(model[0], "weight_scale") and hasattr(model[2], "weight_scale")


def test_one_shot_refuses_before_it_writes():
    model = make_model()
    good = statistics_of(model, correlated())
    with collect_inputs(model, ["0", "2"], gram=True) as unreached:
        model[0](correlated())
    broken = statistics_of(model, torch.full((1, 64), torch.inf))
    before = copy.deepcopy(model.state_dict())
    for arguments, options, message in (
        (
            (None, ["0", "2"]),
            {"weight_dtype": None},
            "pattern must be n:m where weights keep their dtype, got NoneType",
        ),
        (("2:4", ["0"]), {"weight_dtype": "int4"}, "weight_dtype must be None or int8 or fp8, got 'int4'"),
        ((None, ["0", "2"], unreached), {"correct": True}, "must hold inputs of every module, got none of '2'"),
        ((None, ["0", "2"], broken), {"correct": True}, "gram must be finite, got a NaN or an infinity for '0'"),
        (("2:4", ["0", "2"]), {"correct": True}, "statistics must be given to correct weights"),
        (("3:7", ["0", "2"], good), {}, "modules must fit pattern 3:7, got '0': in_features 64 is not a multiple of 7"),
    ):
        with pytest.raises(ValueError, match=message):
            prune_one_shot(model, *arguments, **{"weight_dtype": "int8"} | options)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert not hasattr(model[0], "weight_scale")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda layer: layer.weight.data.fill_(torch.nan), "got '2': weight has a NaN or an infinity"),
        (lambda layer: setattr(layer, "weight_scale", 3), "got '2': weight_scale is an attribute of it already"),
        (
            lambda layer: layer.half().weight.data.mul_(1e-5),
            "must hold int8 weights in their dtype, got '2': dtype must be one that holds values",
        ),
    ],
)
def test_weights_that_cannot_be_rounded(spoil, message):
    model = make_model()
    statistics = statistics_of(model, correlated())
    spoil(model[2])
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match=message):
        prune_one_shot(model, None, ["0", "2"], statistics, correct=True, weight_dtype="int8")
    assert torch.equal(model[0].weight, before) and not hasattr(model[0], "weight_scale")


@pytest.mark.parametrize(
    ("weight", "gram", "message"),
    [
        (torch.ones(4, 8), torch.eye(4), r"gram must be finite of shape \(8, 8\)"),
        (torch.full((4, 8), torch.inf), torch.eye(8), "weight must be finite floating point"),
        (torch.ones(4, 8, dtype=torch.int8), torch.eye(8), "weight must be finite floating point"),
        (torch.ones(4, 6), torch.eye(6), "multiple of m = 4"),
    ],
)
def test_reconstruct_int8_refuses(weight, gram, message):
    with pytest.raises(ValueError, match=message):
        reconstruct_rounded(weight, gram, "2:4")


def test_a_dtype_that_cannot_hold_the_grid():
    with pytest.raises(ValueError, match="dtype must be one that holds values \\* scale, got float16"):
        GridWeight(torch.tensor([[127, 1]], dtype=torch.int8), torch.tensor([1e-8])).to_dense(torch.float16)
