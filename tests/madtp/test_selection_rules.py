# SPDX-License-Identifier: Apache-2.0
"""The rules the method is compared with, each against its definition written out sequence by sequence."""

import json

import pytest
import torch
from tiny_models import tiny_batch, tiny_blip

import madtp
from madtp.dtp import keep_rules
from madtp.dtp.keep_rules import Candidates, Kept
from madtp.dtp.selection_rules import ELSEWHERE, GUIDED, HALF, RULES, SELECTIONS, Tokens, choose
from madtp_kernels import AttentionStats, score_and_select

LENGTHS = (9, 1, 6, 0, 13, 2)
SUMMARY = torch.tensor([0, 0, 5, -1, 3, -1], dtype=torch.int32)
CU_SEQLENS = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)


@pytest.fixture
def stats():
    torch.manual_seed(0)
    tokens = sum(LENGTHS)
    return AttentionStats(torch.rand(tokens), torch.rand(tokens))


def tokens(stats, logits=None):
    return Tokens(torch.randn(sum(LENGTHS), 6), stats, logits, CU_SEQLENS, SUMMARY)


def sequences():
    """begin, end, and the prunable rows of each sequence."""
    bounds = CU_SEQLENS.tolist()
    for begin, end, summary in zip(bounds, bounds[1:], SUMMARY.tolist(), strict=False):
        yield begin, end, [row for row in range(begin, end) if summary < 0 or row != begin + summary]


def share(prunable, temperature):
    """How many of these a rule of counts keeps."""
    count = -int(-len(prunable) // (1 + temperature / HALF))
    return count if len(prunable) - count >= 2 else len(prunable)


@pytest.mark.parametrize("temperature", [0.01, 2.3, HALF, 300.0])
@pytest.mark.parametrize("rule", ["static", "cls"])
def test_static_keeps_the_share_the_summary_attends_to_most(stats, temperature, rule):
    _, selection, *_ = choose(rule, tokens(stats), temperature)
    for begin, end, prunable in sequences():
        count = -int(-len(prunable) // (1 + temperature / HALF))
        best = sorted(prunable, key=lambda row: -stats.summary_attention[row])[:count]
        expected = set(range(begin, end)) - (set(prunable) - set(best) if len(prunable) - count >= 2 else set())
        assert {row for row in range(begin, end) if selection.keep[row]} == expected
    assert selection.cu_seqlens_out[-1] == selection.source.numel()


def test_random_keeps_the_same_share_of_others_each_time(stats):
    torch.manual_seed(1)
    drawn = [choose("random", tokens(stats), HALF).selection for _ in range(4)]
    assert all(torch.equal(selection.cu_seqlens_out, drawn[0].cu_seqlens_out) for selection in drawn)
    assert any(not torch.equal(selection.keep, drawn[0].keep) for selection in drawn)
    merged = drawn[0].merge_weight[(~drawn[0].keep).nonzero().flatten()]
    assert merged.numel() and len(merged.unique()) <= len(LENGTHS)  # averages


@pytest.mark.parametrize("temperature", [0.3, 3.0])
def test_batch_max_keeps_the_best_of_every_sequence(stats, temperature):
    logits = torch.randn(sum(LENGTHS), 4)
    importance, own = score_and_select(stats, logits, CU_SEQLENS, temperature, summary_index=SUMMARY)
    most = max(int(own.keep[prunable].sum()) for _, _, prunable in sequences())
    got, selection, *_ = choose("batch_max", tokens(stats, logits), temperature)
    torch.testing.assert_close(got, importance)
    for begin, end, prunable in sequences():
        best = sorted(prunable, key=lambda row: -importance[row])[:most]
        expected = set(range(begin, end)) - (set(prunable) - set(best) if len(prunable) - most >= 2 else set())
        assert {row for row in range(begin, end) if selection.keep[row]} == expected


def test_unguided_falls_from_all_tokens_to_those_above_the_mean(stats):
    kept = []
    for temperature in (1e-3, 0.1, 1.0, 1e4):
        importance, selection, *_ = choose("unguided", tokens(stats), temperature)
        kept.append(int(selection.keep.sum()))
    assert kept == sorted(kept, reverse=True) and kept[0] > kept[-1]
    for begin, end, prunable in sequences():
        above = {row for row in prunable if importance[row] > importance[prunable].mean()}
        left = {row for row in prunable if selection.keep[row]}
        assert left == (above if len(prunable) - len(above) >= 2 else set(prunable)), (begin, end)


@pytest.mark.parametrize("rule", sorted(set(keep_rules.RULES) - set(ELSEWHERE) - {"random"}))
def test_the_rules_of_keep_choose_in_a_tower_as_they_do_elsewhere(stats, rule):
    given = tokens(stats)
    attention = stats.received_attention if rule == "received" else stats.summary_attention
    importance, selection, changed, _ = choose(rule, given, HALF)
    rows = given.x if changed is None else changed
    for begin, end, prunable in sequences():
        if not prunable:
            assert selection.keep[begin:end].all()
            continue
        alone = Candidates(given.x[prunable], [len(prunable)], attention[prunable])
        count = share(prunable, HALF)
        expected = keep_rules.RULES[rule].choose(alone, [count])
        expected = expected if isinstance(expected, Kept) else Kept(expected, None)
        assert selection.keep[prunable].equal(expected.keep) or count == len(prunable)
        if expected.features is not None and count < len(prunable):
            torch.testing.assert_close(rows[prunable][expected.keep], expected.features)
    summary = [begin + row for begin, row in zip(CU_SEQLENS.tolist(), SUMMARY.tolist(), strict=False) if row >= 0]
    assert selection.keep[[row for row in summary if row < sum(LENGTHS)]].all()
    merged = int((selection.source < 0).sum())
    assert merged == (0 if keep_rules.RULES[rule].merges else sum(share(p, HALF) < len(p) for _, _, p in sequences()))


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


def odd(candidates, counts):
    """Keeps the tokens at odd places: a user's function, for both uses."""
    return torch.cat([torch.arange(length) % 2 == 1 for length in candidates.lengths]) | _first(candidates)


def _first(candidates):
    first = torch.zeros(len(candidates.features), dtype=torch.bool)
    first[candidates.cu_seqlens[:-1][candidates.cu_seqlens.diff() > 0].long()] = True
    return first


def test_a_users_function_works_in_a_tower_and_in_keep():
    model, batch = tiny_blip(), tiny_batch()
    config = madtp.CompressionConfig(alignment_tokens=8, alignment_dim=24, selection=odd)
    handle = madtp.patch(model, config)
    handle.set_temperature(HALF)
    model(**batch).loss.backward()
    entered, left = handle.pruning["vision"].last.entered, handle.pruning["vision"].last.layers[0]
    places = entered.cu_seqlens.diff()[0] - 1  # of one image, beside the summary token
    assert left.kept_positions()[0].tolist() == [0, 1, *range(2, int(places) + 1, 2)]
    kept = madtp.Keep(rule=odd).choose(Candidates(torch.randn(5, 2), [5]))
    assert kept.keep.nonzero().flatten().tolist() == [0, 1, 3]


def test_a_function_is_in_no_file(tmp_path):
    model = tiny_blip()
    config = madtp.CompressionConfig(alignment_tokens=8, alignment_dim=24, selection=odd)
    with pytest.raises(ValueError, match="selection must be one of instance.* to be saved, got the function odd"):
        config.to_dict()
    with pytest.raises(ValueError, match="to be saved, got the function odd"):
        madtp.compress(model, None, [None], None, config, output_dir=tmp_path)
    handle = madtp.patch(model, config)
    with pytest.raises(ValueError, match="to be saved, got the function odd"):
        model.save_pretrained(tmp_path / "model")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    state = model.state_dict()
    text = bytes(state["madtp_settings._extra_state"].tolist())
    assert "selection" not in json.loads(text)["branches"]["vision"]
    model.load_state_dict(state)
    assert handle.pruning["vision"].selection is odd


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (
            lambda c: torch.zeros(len(c.features), dtype=torch.bool),
            "rule wrong must keep at least 1 token of image 0, got",
        ),
        (lambda c: torch.ones(3, dtype=torch.bool), r"rule wrong must return one bool a token, \(\d+,\), got \(3,\)"),
        (lambda c: None, "rule wrong must return a bool tensor, or a Kept, got NoneType"),
    ],
)
def test_a_function_that_returns_something_else_is_named(stats, result, message):
    def wrong(candidates, counts):
        return result(candidates)

    with pytest.raises(ValueError, match=message):
        choose(wrong, tokens(stats), HALF)


@pytest.mark.parametrize("rule", ELSEWHERE)
def test_rules_of_a_prompt_are_none_of_a_tower(rule):
    with pytest.raises(ValueError, match="selection must be one of .*, or a function, got"):
        madtp.CompressionConfig(selection=rule)
    assert rule not in SELECTIONS
