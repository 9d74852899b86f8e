# SPDX-License-Identifier: Apache-2.0
"""The rules the method is compared with, each against its definition written out sequence by sequence."""

import pytest
import torch
from tiny_models import tiny_batch, tiny_blip

import madtp
from madtp.dtp.selection_rules import GUIDED, HALF, RULES
from madtp_kernels import AttentionStats, score_and_select

LENGTHS = (9, 1, 6, 0, 13, 2)
SUMMARY = torch.tensor([0, 0, 5, -1, 3, -1], dtype=torch.int32)
CU_SEQLENS = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)


@pytest.fixture
def stats():
    torch.manual_seed(0)
    tokens = sum(LENGTHS)
    return AttentionStats(torch.rand(tokens), torch.rand(tokens))


def sequences():
    """begin, end, and the prunable rows of each sequence."""
    bounds = CU_SEQLENS.tolist()
    for begin, end, summary in zip(bounds, bounds[1:], SUMMARY.tolist(), strict=False):
        yield begin, end, [row for row in range(begin, end) if summary < 0 or row != begin + summary]


@pytest.mark.parametrize("temperature", [0.01, 2.3, HALF, 300.0])
def test_static_keeps_the_share_the_summary_attends_to_most(stats, temperature):
    _, selection = RULES["static"](stats, None, CU_SEQLENS, temperature, SUMMARY)
    for begin, end, prunable in sequences():
        count = -int(-len(prunable) // (1 + temperature / HALF))
        best = sorted(prunable, key=lambda row: -stats.summary_attention[row])[:count]
        expected = set(range(begin, end)) - (set(prunable) - set(best) if len(prunable) - count >= 2 else set())
        assert {row for row in range(begin, end) if selection.keep[row]} == expected
    assert selection.cu_seqlens_out[-1] == selection.source.numel()


def test_random_keeps_the_same_share_of_others_each_time(stats):
    torch.manual_seed(1)
    drawn = [RULES["random"](stats, None, CU_SEQLENS, HALF, SUMMARY)[1] for _ in range(4)]
    assert all(torch.equal(selection.cu_seqlens_out, drawn[0].cu_seqlens_out) for selection in drawn)
    assert any(not torch.equal(selection.keep, drawn[0].keep) for selection in drawn)
    merged = drawn[0].merge_weight[(~drawn[0].keep).nonzero().flatten()]
    assert merged.numel() and len(merged.unique()) <= len(LENGTHS)  # averages


@pytest.mark.parametrize("temperature", [0.3, 3.0])
def test_batch_max_keeps_the_best_of_every_sequence(stats, temperature):
    logits = torch.randn(sum(LENGTHS), 4)
    importance, own = score_and_select(stats, logits, CU_SEQLENS, temperature, summary_index=SUMMARY)
    most = max(int(own.keep[prunable].sum()) for _, _, prunable in sequences())
    got, selection = RULES["batch_max"](stats, logits, CU_SEQLENS, temperature, SUMMARY)
    torch.testing.assert_close(got, importance)
    for begin, end, prunable in sequences():
        best = sorted(prunable, key=lambda row: -importance[row])[:most]
        expected = set(range(begin, end)) - (set(prunable) - set(best) if len(prunable) - most >= 2 else set())
        assert {row for row in range(begin, end) if selection.keep[row]} == expected


def test_unguided_falls_from_all_tokens_to_those_above_the_mean(stats):
    kept = []
    for temperature in (1e-3, 0.1, 1.0, 1e4):
        importance, selection = RULES["unguided"](stats, None, CU_SEQLENS, temperature, SUMMARY)
        kept.append(int(selection.keep.sum()))
    assert kept == sorted(kept, reverse=True) and kept[0] > kept[-1]
    for begin, end, prunable in sequences():
        above = {row for row in prunable if importance[row] > importance[prunable].mean()}
        left = {row for row in prunable if selection.keep[row]}
        assert left == (above if len(prunable) - len(above) >= 2 else set(prunable)), (begin, end)


@pytest.mark.parametrize("rule", RULES)
def test_a_model_trains_with_every_rule(rule):
    model, batch = tiny_blip(), tiny_batch()
    handle = madtp.patch(model, madtp.CompressionConfig(alignment_tokens=8, alignment_dim=24, selection=rule))
    handle.set_temperature(HALF)
    handle.collect_alignment(True)
    model(**batch).loss.backward()
    before, after = (
        handle.pruning["vision"].last.entered.count_rows(),
        handle.pruning["vision"].last.layers[0].count_rows(),
    )
    assert after < before
    guided = rule in GUIDED
    assert (handle.alignment_tokens.grad is not None) == guided
    assert (handle.aligned["vision"] is not None) == guided
    assert (madtp.profile(model, batch).modules["madtp_guide.logits.vision"].counted_macs > 0) == guided
