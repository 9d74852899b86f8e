# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest
import torch

from madtp_kernels.nm_masks import nm_mask, transposable_mask


def naive(score, n, m):
    """Row by row: sort by (score, lowest index)."""
    keep = torch.zeros(score.shape, dtype=torch.bool)
    for row, values in enumerate(score.tolist()):
        for start in range(0, len(values), m):
            group = range(start, start + m)
            for column in sorted(group, key=lambda c: (-values[c], c))[:n]:
                keep[row, column] = True
    return keep


@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (3, 4), (4, 4), (4, 8), (2, 16), (1, 3), (1, 1), (5, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_matches_naive_with_ties(n, m, dtype):
    torch.manual_seed(0)
    weight = torch.randint(-3, 4, (5, 48)).to(dtype)  # few values: most groups hold ties
    assert torch.equal(nm_mask(weight, n, m), naive(weight.abs(), n, m))


def test_score_and_dim():
    torch.manual_seed(0)
    weight, score = torch.randn(8, 3, 5), torch.randn(8, 3, 5)
    mask = nm_mask(weight, 2, 4, score=score, dim=0)
    expected = naive(score.permute(1, 2, 0).reshape(15, 8), 2, 4).reshape(3, 5, 8).permute(2, 0, 1)
    assert torch.equal(mask, expected) and mask.is_contiguous()


def test_ties_and_negative_zero_keep_the_lowest_index():
    assert nm_mask(torch.ones(2, 4), 2, 4).tolist() == [[True, True, False, False]] * 2
    zeros = torch.tensor([[-0.0, 0.0, -0.0, 0.0]])
    assert nm_mask(zeros, 2, 4).tolist() == [[True, True, False, False]]
    assert nm_mask(torch.ones(1, 4), 2, 4, score=zeros).tolist() == [[True, True, False, False]]


def test_negative_zero_in_groups_that_are_sorted():
    score = torch.zeros(1, 64)
    score[0, ::2] = -0.0
    assert nm_mask(torch.ones(1, 64), 5, 64, score=score).nonzero()[:, 1].tolist() == [0, 1, 2, 3, 4]


def test_large_groups_infinities_and_non_contiguous_weights():
    torch.manual_seed(0)
    weight = torch.randn(64, 33).T  # (33, 64), strided
    assert torch.equal(nm_mask(weight, 8, 32), nm_mask(weight.contiguous(), 8, 32))
    assert nm_mask(torch.tensor([[1.0, -torch.inf, 2.0, torch.inf]]), 2, 4).tolist() == [[False, True, False, True]]
    assert nm_mask(torch.empty(0, 8), 2, 4).shape == (0, 8)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((torch.ones(2, 6), 2, 4), {}, "weight must be of a size along dim -1 that is a multiple of m = 4, got f"),
        ((torch.tensor([[1.0, torch.nan, 0, 0]]), 2, 4), {}, "weight must be free of NaN"),
        ((torch.ones(1, 4), 2, 4), {"score": torch.full((1, 4), torch.nan)}, "score must be free of NaN"),
        ((torch.ones(1, 4), 2, 4), {"score": torch.ones(1, 8)}, r"score must be of shape \(1, 4\)"),
        ((torch.ones(1, 4), 5, 4), {}, "n must be an integer from 1 to m = 4, got int 5"),
        ((torch.ones(1, 4), 0, 4), {}, "n must be"),
        ((torch.ones(1, 4), 2, 0), {}, "m must be"),
        ((torch.ones(1, 4), 2, 4), {"dim": 2}, "dim must be a dimension of 2"),
        ((torch.ones(1, 4).int(), 2, 4), {}, "weight must be a floating-point tensor"),
    ],
)
def test_bad_input(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        nm_mask(*arguments, **options)


def exhaustive(block):
    """The most magnitude a 4x4 mask with exactly 2 in each row and column keeps, by trying every choice of rows."""
    pairs = list(itertools.combinations(range(4), 2))
    best = -1.0
    for rows in itertools.product(pairs, repeat=4):
        if all(sum(column in pair for pair in rows) == 2 for column in range(4)):
            best = max(best, sum(block[r][c] for r, pair in enumerate(rows) for c in pair))
    return best


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_transposable_mask_keeps_the_most(dtype):
    torch.manual_seed(0)
    weight = torch.randn(12, 8, dtype=dtype)
    mask = transposable_mask(weight)
    kept = (weight.abs().double() * mask).unflatten(0, (3, 4)).unflatten(2, (2, 4)).sum((1, 3))
    for row in range(3):
        for column in range(2):
            block = weight.abs().double()[4 * row : 4 * row + 4, 4 * column : 4 * column + 4].tolist()
            assert kept[row, column].item() == pytest.approx(exhaustive(block), rel=1e-12)
    assert torch.equal(mask.unflatten(1, (-1, 4)).sum(-1), torch.full((12, 2), 2))
    assert torch.equal(mask.unflatten(0, (-1, 4)).sum(1), torch.full((3, 8), 2))
    assert torch.equal(transposable_mask(weight.T.contiguous().T), mask)


def test_transposable_mask_ties_scores_infinities_and_empty():
    first = [[True, True, False, False]] * 2 + [[False, False, True, True]] * 2
    assert transposable_mask(torch.ones(4, 4)).tolist() == first
    assert transposable_mask(torch.tensor([0.0, -0.0, 0.0, -0.0]).repeat(4, 1)).tolist() == first
    score = torch.rand(4, 4)
    assert torch.equal(transposable_mask(torch.ones(4, 4), score=score), transposable_mask(score))
    weight = torch.ones(4, 4)
    weight[0, 3], weight[1, 3] = torch.inf, -torch.inf
    mask = transposable_mask(weight)
    assert mask[0, 3] and mask[1, 3] and mask.sum() == 8
    assert transposable_mask(torch.empty(0, 8)).shape == (0, 8)


@pytest.mark.parametrize(
    "weight, options, message",
    [
        (torch.ones(4, 6), {}, "weight must be of sizes that are multiples of 4, got f"),
        (torch.ones(4), {}, "weight must be a 2-dimensional floating-point tensor"),
        (torch.ones(4, 4).int(), {}, "weight must be a 2-dimensional floating-point tensor"),
        (torch.full((4, 4), torch.nan), {}, "weight must be free of NaN"),
        (torch.ones(4, 4), {"score": torch.ones(4, 8)}, r"score must be of shape \(4, 4\)"),
    ],
)
def test_transposable_mask_refuses(weight, options, message):
    with pytest.raises(ValueError, match=message):
        transposable_mask(weight, **options)
