# SPDX-License-Identifier: Apache-2.0
"""Rules of `Keep`, against what their equations say on few tokens."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

import madtp
from madtp.dtp import keep_rules
from madtp.dtp.keep_rules import RULES, Candidates, Kept, fewest_with_mass

LENGTHS = (9, 1, 0, 6)
COUNTS = [4, 1, 0, 5]
WITHOUT_ATTENTION = [name for name, entry in RULES.items() if not entry.needs_importance]


def candidates(lengths=LENGTHS, dtype=torch.float64):
    total = sum(lengths)
    rows = torch.randn(total, 5, dtype=dtype)
    texts = torch.randn(7, 5, dtype=dtype)
    return Candidates(rows, lengths, torch.rand(total), texts, (3, 4), [i % 2 for i in range(len(lengths))])


def chosen(rule, given, counts=COUNTS):
    """The places kept, of each image."""
    kept = RULES[rule].choose(given, counts)
    keep = kept.keep if isinstance(kept, Kept) else kept
    return [part.nonzero().flatten().tolist() for part in keep.split(list(given.lengths))]


def units(given, image):
    return F.normalize(given.features.split(list(given.lengths))[image], dim=1)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_each_image_keeps_its_count(rule, dtype):
    given = candidates(dtype=dtype)
    assert [len(places) for places in chosen(rule, given)] == COUNTS
    assert len(madtp.Keep(3, rule=rule).choose(candidates(())).keep) == 0


@pytest.mark.parametrize("rule", RULES)
def test_an_image_by_itself_keeps_the_same(rule):
    given = candidates()
    together, begin = chosen(rule, given), 0
    for image, length in enumerate(LENGTHS):
        if not length:
            continue
        rows = slice(begin, begin + length)
        alone = given._replace(
            features=given.features[rows],
            lengths=(length,),
            importance=given.importance[rows],
            text_of=given.text_of[image : image + 1],
        )
        assert chosen(rule, alone, COUNTS[image : image + 1]) == [together[image]]
        begin += length


@pytest.mark.parametrize("rule", ["received", "cls"])
def test_the_most_important_stay(rule):
    given = candidates((4, 3))._replace(importance=torch.tensor([1.0, 3.0, 3.0, 2.0, 5.0, 5.0, 5.0]))
    assert chosen(rule, given, [2, 2]) == [[1, 2], [0, 1]], "of equal ones the first"


def test_random_is_reproducible_and_has_other_seeds():
    given = candidates((64,))
    first = RULES["random"].choose(given, [20])
    assert first.equal(RULES["random"].choose(given, [20]))
    assert not first.equal(partial(keep_rules.random, seed=1)(given, [20]))


def test_uniform_is_in_the_middle_of_equal_parts():
    given = candidates((10, 7))
    assert chosen("uniform", given, [5, 3]) == [[1, 3, 5, 7, 9], [1, 3, 5]]


def test_text_takes_the_largest_mean_cosine():
    given = candidates()
    text = F.normalize(given.text.split([3, 4])[1], dim=1)
    cosine = (units(given, 3) @ text.T).mean(1)
    assert chosen("text", given, [9, 1, 0, 2])[3] == sorted(cosine.topk(2).indices.tolist())


def test_divprune_takes_the_farthest_at_every_step():
    given = candidates()
    y = units(given, 0)
    distance = 1 - y @ y.T
    nearest = distance.clone().fill_diagonal_(torch.inf).amin(1)
    taken = [int(nearest.argmax())]
    for count in range(1, 9):
        assert chosen("divprune", given, [count, 1, 0, 1])[0] == sorted(taken)
        taken.append(max(set(range(9)) - set(taken), key=lambda j: float(distance[taken, j].min())))


@pytest.mark.parametrize(("rule", "sign"), [("cdpruner", 1), ("cdpruner_negative", -1)])
def test_cdpruner_takes_the_largest_determinant_at_every_step(rule, sign):
    given = candidates()
    y = units(given, 0)
    r = sign * (y @ F.normalize(given.text[:3], dim=1).T).mean(1)
    r = (r - r.min() + keep_rules.EPSILON) / (r.max() - r.min() + keep_rules.EPSILON)
    kernel = r[:, None] * (y @ y.T) * r
    taken: list[int] = []
    for count in range(1, 5):  # of 5 dimensions
        rest = set(range(9)) - set(taken)
        taken.append(max(rest, key=lambda j: float(torch.linalg.det(kernel[taken + [j]][:, taken + [j]]))))
        assert chosen(rule, given, [count, 1, 0, 1])[0] == sorted(taken)


def test_cdpruner_with_more_tokens_than_dimensions_keeps_its_count():
    given = candidates((40,))
    assert len(chosen("cdpruner", given, [30])[0]) == 30
    flat = Candidates(torch.randn(400, 3), [400], None, torch.randn(3, 3), [3], [0])
    for rule in ("cdpruner", "cdpruner_negative"):
        assert len(chosen(rule, flat, [399])[0]) == 399, "all but three gain nothing"


def test_tome_keeps_the_sum():
    given = candidates((9,))
    keep, rows = RULES["tome"].choose(given, [6])
    y = units(given, 0)
    cosine = (y[0::2] @ y[1::2].T).amax(1)
    gone = [2 * i for i in cosine.topk(3).indices.tolist()]
    assert (~keep).nonzero().flatten().tolist() == sorted(gone)
    untouched = [i for i, j in enumerate(keep.nonzero().flatten().tolist()) if j % 2 == 0]
    assert torch.equal(rows[untouched], given.features[keep][untouched])
    targets = {g: 2 * int((y[g] @ y[1::2].T).argmax()) + 1 for g in gone}
    for place, row in zip(keep.nonzero().flatten().tolist(), rows, strict=True):
        members = [place] + [g for g, to in targets.items() if to == place]
        torch.testing.assert_close(row, given.features[members].mean(0))
    torch.testing.assert_close(RULES["tome"].choose(given, [1])[1][0], given.features.mean(0))


def test_visionzip_adds_the_mean_of_the_rest():
    given = candidates((9,))._replace(importance=torch.tensor([0.0, 9, 0, 0, 8, 0, 0, 7, 0]))
    keep, rows = keep_rules.visionzip(given, [5], context=0.4)
    assert keep.nonzero().flatten().tolist() == [1, 2, 4, 6, 7], "three dominant ones, and two of 0, 2, 3, 5, 6, 8"
    assert torch.equal(rows[[0, 2, 4]], given.features[[1, 4, 7]])
    y = units(given, 0)
    for row, target, other in ((rows[1], 2, 6), (rows[3], 6, 2)):
        members = [j for j in (0, 3, 5, 8) if y[j] @ y[target] > y[j] @ y[other]]
        mean = given.features[members].mean(0) if members else 0
        torch.testing.assert_close(row, given.features[target] + mean)


def test_tome_has_gradients():
    given = candidates((9,))
    rows = given.features.requires_grad_()
    RULES["tome"].choose(given, [3]).features.sum().backward()
    assert (rows.grad != 0).all()


@pytest.mark.parametrize(("mass", "expected"), [(0.5, 1), (0.51, 2), (0.8, 2), (1.0, 3)])
def test_the_fewest_tokens_with_a_mass(mass, expected):
    given = candidates((4, 2))._replace(importance=torch.tensor([3.0, 5.0, 0.0, 2.0, 0.0, 0.0]))
    assert fewest_with_mass(given, mass) == [expected, 2], "all, where there is no importance at all"
    keep = madtp.Keep(mass=mass).choose(given).keep
    assert keep.sum() == expected + 2


@pytest.mark.parametrize(
    ("value", "lengths", "expected"),
    [
        (0.5, [4, 5, 1], [2, 3, 1]),
        (0.1, [30, 4], [3, 1]),
        (1.0, [7], [7]),
        (1, [7, 0], [1, 0]),
        (64, [100, 9], [64, 9]),
        (1e-12, [16, 0], [1, 0]),
    ],
)
def test_counts_of_shares_and_numbers(value, lengths, expected):
    assert madtp.Keep(value, rule="random").counts(lengths) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"amount": 0}, "amount must be a share, a float in (0, 1], or a count, an int >= 1, got 0"),
        ({"amount": 1.5}, "amount must be a share, a float in (0, 1], or a count, an int >= 1, got 1.5"),
        ({"amount": True}, "got True"),
        ({"mass": 0.0}, "mass must be in (0, 1], got 0.0"),
        ({"amount": 3, "mass": 0.5}, "mass must be None with amount 3, got 0.5"),
        ({}, "amount, mass or temperature must be given with rule 'received', got none of them"),
        ({"amount": 3, "rule": "best"}, "rule must be one of received, cls, fastv, random, uniform, text, "),
        ({"amount": 3, "rule": ["divprune"]}, "or a function, got ['divprune']"),
    ],
)
def test_what_cannot_be_is_one_line(arguments, message):
    with pytest.raises(ValueError) as error:
        madtp.Keep(**arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (torch.ones(16), "must return a bool tensor, or a Kept, got torch.float32"),
        (torch.ones(3, dtype=torch.bool), r"must return one bool a token, (16,), got (3,)"),
        (torch.ones(16, dtype=torch.bool), "must keep 3 tokens of image 0, got 9"),
    ],
)
def test_a_rule_of_the_user_is_checked(keep, message):
    with pytest.raises(ValueError, match="rule ") as error:
        madtp.Keep(3, rule=lambda given, counts: keep).choose(candidates())
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.ones(3, 5), "must return features (3, 6), got (3, 5)"),
        (torch.ones(2, 6), "must return features (3, 6), got (2, 6)"),
        ([[1.0] * 6] * 3, "must return features (3, 6), got list"),
        (torch.ones(3, 6).half(), "must return features of torch.float32, got torch.float16"),
    ],
)
def test_features_of_a_rule_of_the_user_are_checked(features, message):
    given = Candidates(torch.randn(8, 6), [8])
    with pytest.raises(ValueError, match="rule ") as error:
        madtp.Keep(3, rule=lambda given, counts: Kept(torch.arange(8) < 3, features)).choose(given)
    assert message in str(error.value)


def test_means_of_many_16_bit_tokens():
    given = Candidates(torch.ones(600, 4, dtype=torch.bfloat16), [600], torch.arange(600.0))
    merged = keep_rules.tome(given, [1]).features
    assert merged.dtype == torch.bfloat16 and (merged == 1).all()
    (context,) = keep_rules.visionzip(given, [1], context=1.0).features
    assert (context == 2).all(), "itself, and the mean of the rest"


def test_a_rule_of_the_user_may_decide_how_many():
    given = candidates()
    keep = madtp.Keep(rule=lambda given, counts: given.importance > -1).choose(given).keep
    assert keep.all()
    with pytest.raises(ValueError, match="must keep at least 1 token of image 0, got 0"):
        madtp.Keep(rule=lambda given, counts: given.importance < -1).choose(given)
    with pytest.raises(ValueError, match="counts must be of a share or a count, got rule <lambda>"):
        madtp.Keep(rule=lambda given, counts: given.importance > -1).counts([3])


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_documented(rule):
    from pathlib import Path

    text = (Path(__file__).parents[2] / "docs" / "method.md").read_text()
    assert f"`{rule}`" in text
