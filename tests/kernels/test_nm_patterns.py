# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest
import torch

from madtp_kernels import Pattern, explain_pattern, nm_mask
from madtp_kernels.nm_patterns import COMMON, UNITS, is_pattern


def worst(n, m, size):
    """Brute force: the most non-zeros of an n:m weight that one aligned group of `size` can hold, over 12 columns."""
    columns = 12
    choices = [
        set(itertools.chain.from_iterable(itertools.combinations(range(s, s + m), k) for k in range(n + 1)))
        for s in range(0, columns, m)
    ]
    return max(
        sum(start <= c < start + size for group in rows for c in group)
        for start in range(0, columns, size)
        for rows in itertools.product(*choices)
    )


@pytest.mark.parametrize("m", [1, 2, 3, 4, 6])
def test_runs_as_against_brute_force(m):
    for n in range(1, min(m, 3) + 1):
        for other in (Pattern(1, 2), Pattern(2, 4)):
            assert Pattern(n, m).max_in(other.m) == worst(n, m, other.m)
            assert Pattern(n, m).runs_as(other) == (worst(n, m, other.m) <= other.n)


def test_sparse24_patterns():
    runs = {text for text in map(str, COMMON) if Pattern.parse(text).sparse24}
    assert runs == {"1:2", "1:4", "2:4", "1:8", "2:8", "2:16"}
    assert not any(Pattern.parse(text).sparse24 for text in ("4:8", "8:16", "4:16", "2:6", "3:4", "4:4", "2:3", "1:1"))
    assert Pattern.parse("1:3").sparse24 and Pattern.parse("2:32").sparse24


@pytest.mark.parametrize("pattern", COMMON, ids=str)
def test_the_rule_holds_for_masks(pattern):
    """Masks of random scores: never over the rule; and the densest columns of a rejected pattern break it."""
    torch.manual_seed(0)
    weight = torch.randn(16, 48 if pattern.m < 16 else 64)
    masked = weight * nm_mask(weight, *pattern)
    assert is_pattern(masked, pattern)
    first = weight * nm_mask(weight, *pattern, score=-torch.arange(weight.shape[1]).expand_as(weight) * 1.0)
    assert is_pattern(first, "2:4") == pattern.sparse24 and (not pattern.sparse24 or is_pattern(masked, "2:4"))


def test_explain_pattern():
    found = explain_pattern("2:8")
    assert found.runs == (UNITS[0], UNITS[2], UNITS[3]) and list(found.rejected) == [UNITS[1]]
    assert "2:8 runs as 2:4" in str(found)
    assert "4:8 runs dense, as it can put 4 non-zeros in an aligned group of 4" in str(explain_pattern("4:8"))
    assert not explain_pattern("4:8").runs and not explain_pattern(Pattern(1, 8)).rejected


@pytest.mark.parametrize("text", ["24", "5:4", "0:4", "2:4:8", "-1:4", "a:b", "", None])
def test_pattern_errors(text):
    with pytest.raises(ValueError, match='pattern must be "n:m" with 1 <= n <= m, got'):
        Pattern.parse(text)


def test_is_pattern():
    weight = torch.tensor([[1.0, -0.0, 0.0, 2.0, 0.0, 0.0, 3.0, 4.0]])
    assert is_pattern(weight, "2:4") and is_pattern(weight, "4:8")
    assert not is_pattern(weight, "1:4") and not is_pattern(weight, "2:8") and not is_pattern(weight, "2:3")
    assert str(Pattern.parse("2:4")) == "2:4" and Pattern.parse(Pattern(1, 8)) == (1, 8)
