# SPDX-License-Identifier: Apache-2.0
"""ADMM onto N:M and onto a grid, beside the sweep from left to right and beside brute force."""

import itertools

import pytest
import torch
from test_hwp_scores import correlated, make_model, output_error
from torch import nn

from madtp.hwp import (
    collect_inputs,
    is_pattern,
    prune_one_shot,
    reconstruct,
    reconstruct_admm,
    reconstruct_admm_rounded,
    reconstruct_rounded,
)
from madtp.hwp.admm import solve_masked
from madtp_kernels import nm_mask

DAMPING = 0.01


def damped(gram):
    return gram.double() + DAMPING * gram.double().diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def errors(weight, pruned, gram):
    lost = weight.double() - pruned.double()
    return ((lost @ damped(gram)) * lost).sum(1)


def least_squares(weight, x, mask):
    """Row by row, of the data itself and rows that stand for the damping."""
    gram = x.double().T @ x.double()
    level = (DAMPING * gram.diagonal().mean()).sqrt()
    inputs = torch.cat([x.double(), level * torch.eye(x.shape[1], dtype=torch.float64)])
    solved = torch.zeros_like(weight, dtype=torch.float64)
    for i, row in enumerate(mask):
        wanted = inputs @ weight[i].double()
        solved[i, row] = torch.linalg.lstsq(inputs[:, row], wanted).solution
    return solved


def test_values_on_a_mask_are_the_least_squares():
    x, weight = correlated(), torch.randn(8, 64)
    mask = nm_mask(weight, 2, 4)
    found = solve_masked(weight.double(), damped(x.double().T @ x.double()), mask)
    torch.testing.assert_close(found, least_squares(weight, x, mask), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (4, 8)])
def test_no_row_is_worse_than_the_sweep_and_magnitude_is_beaten(n, m):
    x, weight = correlated(), torch.randn(32, 64)
    gram = x.T @ x
    found = reconstruct_admm(weight, gram, n, m)
    assert is_pattern(found, f"{n}:{m}") and found.dtype == weight.dtype and not found[found == 0].signbit().any()
    ours, swept = errors(weight, found, gram), errors(weight, reconstruct(weight, gram, n, m), gram)
    assert (ours <= swept * (1 + 1e-5)).all()
    solved = least_squares(weight, x, nm_mask(weight, n, m))
    assert ours.sum() < 0.9 * errors(weight, solved, gram).sum() and ours.sum() < 0.8 * swept.sum()


def test_the_best_of_all_masks_is_found_or_nearly():
    torch.manual_seed(0)
    x = torch.randn(60, 6) @ torch.randn(6, 12) + 0.3 * torch.randn(60, 12)
    weight, gram = torch.randn(6, 12), x.T @ x
    groups = [torch.tensor(kept) for kept in itertools.combinations(range(4), 2)]
    best = torch.full((6,), torch.inf, dtype=torch.float64)
    for choice in itertools.product(groups, repeat=3):
        mask = torch.zeros(6, 12, dtype=torch.bool)
        for start, kept in zip((0, 4, 8), choice, strict=True):
            mask[:, start + kept] = True
        best = torch.minimum(best, errors(weight, least_squares(weight, x, mask), gram))
    found = errors(weight, reconstruct_admm(weight, gram, 2, 4), gram)
    swept = errors(weight, reconstruct(weight, gram, 2, 4), gram)
    assert (found >= best * (1 - 1e-4)).all()
    assert found.sum() < 1.2 * best.sum() < swept.sum()


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize("pattern", ["2:4", None])
def test_no_row_on_the_grid_is_worse_than_the_sweep(dtype, pattern):
    x, weight = correlated(), torch.randn(32, 64)
    weight[:, 5] = 0
    gram = x.T @ x
    found = reconstruct_admm_rounded(weight, gram, pattern, dtype=dtype)
    swept = reconstruct_rounded(weight, gram, pattern, dtype=dtype)
    ours, theirs = (errors(weight, grid.to_dense(torch.float64), gram) for grid in (found, swept))
    assert (ours <= theirs * (1 + 1e-9)).all() and ours.sum() < 0.95 * theirs.sum()
    assert found.values.dtype == swept.values.dtype
    dense = found.to_dense(torch.float64)
    assert is_pattern(dense, pattern) if pattern else not dense[:, 5].any()  # a zero stays one where all stay


def test_inputs_that_are_independent_or_missing_keep_the_largest():
    weight = torch.randn(8, 16)
    expected = weight * nm_mask(weight, 2, 4)
    torch.testing.assert_close(reconstruct_admm(weight, torch.eye(16), 2, 4), expected)
    torch.testing.assert_close(reconstruct_admm(weight, torch.zeros(16, 16), 2, 4), expected)


def test_pruning_in_one_shot_by_admm():
    x, losses = correlated(), []
    for correct in ("second_order", "admm"):
        model, dense = make_model(), make_model()
        with torch.no_grad(), collect_inputs(model, ["0", "2"], gram=True) as statistics:
            model(x)
        prune_one_shot(model, "2:4", ["0", "2"], statistics, correct=correct)
        assert is_pattern(model[0].weight, "2:4") and is_pattern(model[2].weight, "2:4")
        losses.append(output_error(dense[0].weight, model[0].weight, x))
    assert losses[1] < 0.8 * losses[0]
    prune_one_shot(model, None, ["0", "2"], statistics, correct="admm", weight_dtype="int8")
    assert is_pattern(model[0].weight, "2:4") and model[0].weight_scale.shape == (32,)


@pytest.mark.parametrize(
    "solve", [lambda w, h: reconstruct_admm(w, h, 2, 4), lambda w, h: reconstruct_admm_rounded(w, h, "2:4")]
)
def test_refuses_what_the_sweep_refuses(solve):
    with pytest.raises(ValueError, match=r"gram must be finite of shape \(16, 16\), got float32 \(8, 8\)"):
        solve(torch.ones(8, 16), torch.eye(8))


def test_refuses_another_correction():
    with pytest.raises(ValueError, match="correct must be a bool or second_order or admm, got 'obs'"):
        prune_one_shot(nn.Sequential(nn.Linear(8, 8)), "2:4", ["0"], {}, correct="obs")
