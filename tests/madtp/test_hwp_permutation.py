# SPDX-License-Identifier: Apache-2.0
import copy
import itertools

import pytest
import torch
from tiny_models import tiny_batch, tiny_blip
from torch import nn

import madtp
from madtp.hwp import fold_permutation, mlp_pairs, permute_mlps, prune_one_shot, search_permutation
from madtp.hwp.permutation import _swap, _tournament
from madtp_kernels import nm_mask


def kept(score, n, m):
    return (score * nm_mask(score, n, m)).sum().item()


@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (2, 8), (4, 8), (1, 2), (3, 4), (1, 3)])
def test_the_search_keeps_more_and_counts_it_right(n, m):
    torch.manual_seed(0)
    weight = torch.randn(40, 48) * torch.randn(48).exp()
    found = search_permutation(weight, f"{n}:{m}")
    share = weight.abs().sum().item()
    assert sorted(found.order.tolist()) == list(range(48))
    assert found.before == pytest.approx(kept(weight.abs(), n, m) / share, rel=1e-5)
    assert found.after == pytest.approx(kept(weight[:, found.order].abs(), n, m) / share, rel=1e-5)
    assert found.after > found.before + 0.005
    assert torch.equal(search_permutation(weight, f"{n}:{m}").order, found.order)


@pytest.mark.parametrize("n, m", [(2, 4), (1, 3)])
def test_a_round_makes_the_best_swap(n, m):
    """Against every swap of two channels, counted by masks."""
    torch.manual_seed(1)
    score = torch.rand(6, 2 * m)

    def total(columns):
        return kept(score[:, columns], n, m)

    swaps = []
    for i, j in itertools.product(range(m), range(m, 2 * m)):
        columns = list(range(2 * m))
        columns[i], columns[j] = j, i
        swaps.append((total(columns), columns))
    groups, order = score.T.reshape(2, m, 6).contiguous(), torch.arange(2 * m).view(2, m)
    assert _swap(groups, order, torch.tensor([0]), torch.tensor([1]), n)
    assert order.flatten().tolist() == max(swaps)[1] and max(swaps)[0] > total(list(range(2 * m)))
    assert torch.equal(groups.reshape(2 * m, 6), score.T[order.flatten()])


@pytest.mark.parametrize("players", [1, 2, 7, 8])
def test_in_a_tournament_everyone_meets_everyone_once(players):
    rounds = players - 1 + players % 2
    met = [tuple(sorted(pair)) for pairs in _tournament(players, rounds, "cpu") for pair in pairs.T.tolist()]
    assert sorted(met) == list(itertools.combinations(range(players), 2))


def test_known_optimum_ties_and_nothing_to_gain():
    planted = torch.tensor([[9.0, 8.0, 7.0, 6.0, 0.0, 0.0, 0.0, 0.0]])  # all four fit once they are spread
    found = search_permutation(planted, "2:4")
    assert found.before == pytest.approx(17 / 30) and found.after == 1
    for weight, pattern in ((torch.ones(4, 16), "2:4"), (torch.randn(4, 16), "4:4"), (torch.zeros(4, 16), "2:4")):
        found = search_permutation(weight, pattern)
        assert found.order.tolist() == list(range(16)) and found.before == found.after
    assert search_permutation(torch.randn(4, 16), "2:4", rounds=0).order.tolist() == list(range(16))
    assert search_permutation(torch.empty(4, 0), "2:4").order.numel() == 0
    score = planted.expand(3, 8)
    assert search_permutation(torch.randn(3, 8), "2:4", score=score).after == 1
    with pytest.raises(ValueError, match="weight must be free of NaN"):
        search_permutation(torch.full((2, 8), torch.nan), "2:4")
    with pytest.raises(ValueError, match="weight must be a 2-dimensional tensor, got"):
        search_permutation(torch.ones(8), "2:4")
    with pytest.raises(ValueError, match="rounds must be an integer of at least 0, got int -1"):
        search_permutation(torch.ones(2, 8), "2:4", rounds=-1)


@torch.no_grad()
def test_the_model_computes_what_it_did():
    model = tiny_blip()
    madtp.patch(model)
    for layer in model.vision_model.encoder.layers:  # channels that differ, so that there is something to gain
        layer.mlp.fc2.weight.mul_(torch.randn(64).exp())
    before = model(**tiny_batch()).logits
    pairs = mlp_pairs(model)
    assert ("vision_model.encoder.layers.0.mlp.fc1", "vision_model.encoder.layers.0.mlp.fc2") in pairs
    assert ("text_encoder.encoder.layer.1.intermediate.dense", "text_encoder.encoder.layer.1.output.dense") in pairs
    assert len(pairs) == 6
    dense = copy.deepcopy(model)
    found = permute_mlps(model, "2:4")
    assert set(found) == {second for _, second in pairs}
    assert all(entry.after >= entry.before for entry in found.values())
    assert found["vision_model.encoder.layers.0.mlp.fc2"].after > found["vision_model.encoder.layers.0.mlp.fc2"].before
    torch.testing.assert_close(model(**tiny_batch()).logits, before, rtol=1e-4, atol=1e-4)
    seconds = list(found)
    permuted, plain = (prune_one_shot(m, "2:4", seconds).magnitude_kept for m in (model, dense))
    for name, entry in found.items():
        assert permuted[name] == pytest.approx(entry.after, rel=1e-5)
        assert plain[name] == pytest.approx(entry.before, rel=1e-5)


def test_folding_without_a_bias_and_refusals():
    torch.manual_seed(0)
    first, second = nn.Linear(5, 8, bias=False), nn.Linear(8, 3)
    x, order = torch.randn(4, 5), torch.randperm(8)
    expected = second(first(x).relu())
    fold_permutation(first, second, order)
    torch.testing.assert_close(second(first(x).relu()), expected)
    with pytest.raises(ValueError, match="order must be a permutation of 8 channels"):
        fold_permutation(first, second, torch.zeros(8, dtype=torch.long))
    with pytest.raises(ValueError, match="second must be of 8 in_features like first's outputs"):
        fold_permutation(first, nn.Linear(9, 3), order)
    tied = nn.Sequential(first, second, nn.Linear(8, 3))
    tied[2].weight = second.weight
    with pytest.raises(ValueError, match="got '1': weight is shared with 2"):
        permute_mlps(tied, "2:4", [("0", "1")])
