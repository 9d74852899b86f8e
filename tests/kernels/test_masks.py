import pytest
import torch

from madtp_kernels.ops.masks import nm_mask


def naive(score, n, m):
    """Row by row: sort by (score, lowest index)."""
    keep = torch.zeros(score.shape, dtype=torch.bool)
    for row, values in enumerate(score.tolist()):
        for start in range(0, len(values), m):
            group = range(start, start + m)
            for column in sorted(group, key=lambda c: (-values[c], c))[:n]:
                keep[row, column] = True
    return keep


@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (3, 4), (4, 4), (4, 8), (2, 16), (1, 3), (1, 1)])
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
