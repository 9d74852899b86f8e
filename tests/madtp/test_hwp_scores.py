# SPDX-License-Identifier: Apache-2.0
"""One-shot masks: scores, second-order reconstruction, what is written and what is refused."""

import copy
import math

import pytest
import torch
from torch import nn

from madtp.hwp import activation_score, collect_inputs, is_pattern, prune_one_shot, reconstruct
from madtp_kernels import nm_mask


def correlated(rows=400, channels=64):
    """Inputs whose channels resemble each other and differ in size."""
    torch.manual_seed(0)
    return torch.randn(rows, channels // 4) @ torch.randn(channels // 4, channels) * torch.rand(channels).exp()


def output_error(weight, pruned, x):
    return ((x @ (weight - pruned).T).square().sum() / (x @ weight.T).square().sum()).item()


@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (2, 8), (4, 8)])
def test_each_score_keeps_the_outputs_better(n, m):
    x = correlated()
    weight = torch.randn(32, 64)
    norms = x.square().mean(0).sqrt()
    by_magnitude = weight * nm_mask(weight, n, m)
    by_activation = weight * nm_mask(weight, n, m, score=activation_score(weight, norms))
    corrected = reconstruct(weight, x.T @ x, n, m)
    errors = [output_error(weight, pruned, x) for pruned in (by_magnitude, by_activation, corrected)]
    assert errors[1] < errors[0] and errors[2] < 0.7 * errors[1]
    assert is_pattern(corrected, f"{n}:{m}") and corrected.dtype == weight.dtype
    assert not corrected[corrected == 0].signbit().any()


def test_activation_score_is_the_product():
    weight, norms = torch.randn(3, 8, dtype=torch.float64), torch.rand(8)
    torch.testing.assert_close(activation_score(weight, norms), weight.abs() * norms.double()[None])


def naive_reconstruction(weight, gram, n, m, damping):
    """Column by column, with the inverse of what is left computed anew each time (OBS)."""
    weight, columns = weight.double().clone(), weight.shape[1]
    damped = gram.double() + damping * gram.double().diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    pivots = torch.stack([torch.linalg.inv(damped[j:, j:])[0, 0] for j in range(columns)])
    for j in range(columns):
        if j % m == 0:
            score = weight[:, j : j + m].square() / pivots[j : j + m]
            mask[:, j : j + m] = nm_mask(weight[:, j : j + m], n, m, score=score)
        inverse = torch.linalg.inv(damped[j:, j:])
        gone = weight[:, j] * ~mask[:, j]
        weight[:, j:] -= gone[:, None] * inverse[0] / inverse[0, 0]
    return weight * mask


@pytest.mark.parametrize("columns", [24, 160])  # inside one block of columns, and over two
def test_reconstruction_against_the_naive_one(columns):
    torch.manual_seed(0)
    x, weight = torch.randn(300, columns, dtype=torch.float64), torch.randn(5, columns, dtype=torch.float64)
    x[:, 1::2] += x[:, ::2]
    expected = naive_reconstruction(weight, x.T @ x, 2, 4, 0.05)
    before = weight.clone()
    torch.testing.assert_close(reconstruct(weight, x.T @ x, 2, 4, damping=0.05), expected, rtol=1e-8, atol=1e-10)
    assert torch.equal(weight, before)  # float64 already, which is no copy of it


def test_independent_inputs_need_no_correction():
    weight = torch.randn(8, 16)
    expected = weight * nm_mask(weight, 2, 4)
    torch.testing.assert_close(reconstruct(weight, torch.eye(16), 2, 4), expected)
    torch.testing.assert_close(reconstruct(weight, torch.zeros(16, 16), 2, 4), expected)


@pytest.mark.parametrize(
    "gram, options, message",
    [
        (torch.eye(8), {}, r"gram must be finite of shape \(16, 16\), got float32 \(8, 8\)"),
        (None, {}, "gram must be finite"),
        (torch.full((16, 16), torch.inf), {}, "gram must be finite"),
        (torch.eye(16), {"damping": 0}, "damping must be a finite number above 0, got int 0"),
        (torch.eye(16), {"damping": math.inf}, "damping must be a finite number above 0, got float inf"),
    ],
)
def test_reconstruct_refuses(gram, options, message):
    with pytest.raises(ValueError, match=message):
        reconstruct(torch.ones(8, 16), gram, 2, 4, **options)


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 6))


def test_prune_one_shot():
    x, errors = correlated(), []
    for options in ({}, {"statistics": True}, {"statistics": True, "correct": True}):
        model, dense = make_model(), make_model()
        if "statistics" in options:
            with torch.no_grad(), collect_inputs(model, ["0", "2"], gram=True) as statistics:
                model(x)
            options["statistics"] = statistics
        report = prune_one_shot(model, "2:4", ["0", "2"], **options)
        assert is_pattern(model[0].weight, "2:4") and is_pattern(model[2].weight, "2:4")
        assert torch.equal(model[0].bias, dense[0].bias) and "2:4 runs as 2:4" in str(report.hardware)
        kept = (dense[0].weight.abs() * (model[0].weight != 0)).sum() / dense[0].weight.abs().sum()
        assert report.magnitude_kept["0"] == pytest.approx(kept.item(), rel=1e-5)
        errors.append((model(x) - dense(x)).square().mean().item())
    assert errors[2] < errors[1] < errors[0]


def test_prune_one_shot_refuses_before_it_writes():
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    with collect_inputs(model, ["0", "2"]) as statistics:
        model[0](correlated())
    for options, message in (
        ({"modules": ["1"]}, "modules must name Linear modules, got '1', which is a GELU"),
        ({"statistics": statistics}, "statistics must hold inputs of every module, got none of '2'"),
        ({"statistics": {}}, "statistics must hold inputs of every module, got none of '0'"),
        ({"correct": True}, "statistics must be given to correct weights"),
        ({"statistics": statistics, "correct": True}, "gram must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            prune_one_shot(model, "2:4", **{"modules": ["0", "2"]} | options)
    with collect_inputs(model, ["0"]) as statistics:
        model(torch.full((1, 64), torch.nan))
    with pytest.raises(ValueError, match=r"norms\['0'\] must be finite"):
        prune_one_shot(model, "2:4", ["0"], statistics)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
