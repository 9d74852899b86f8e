# SPDX-License-Identifier: Apache-2.0
"""Protected rows: always kept, no candidates, and what they hold reaches nothing."""

import math

import pytest
import torch
from backend_cases import BACKENDS, device_of
from ragged_cases import LENGTHS, SUMMARIES, cu_seqlens_of, scores
from torch.library import opcheck

import madtp_kernels as mk

pytestmark = pytest.mark.sanitized


def batch(lengths, backend=None, share=0.3, dtype=torch.float32):
    """stats, mag_logits, cu_seqlens and protected rows."""
    device = device_of(backend)
    *stats, logits = (t.to(device) for t in scores(lengths, dtype=dtype))
    protected = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(2)) < share
    return mk.AttentionStats(*stats), logits, cu_seqlens_of(lengths).to(device), protected.to(device)


def on(device, index):
    return None if index is None else index.to(device)


def same(got, expected):
    return all(torch.equal(g.nan_to_num(7), e.nan_to_num(7)) for g, e in zip(got, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("summary_token", SUMMARIES)
@pytest.mark.parametrize("lengths", [*LENGTHS[:3], [33, 1, 0, 41, 5]], ids=str)
def test_the_others_are_chosen_as_if_protected_rows_were_not_there(backend, summary_token, lengths):
    stats, logits, cu, protected = batch(lengths, backend)
    index = on(cu.device, SUMMARIES[summary_token](lengths))
    options = {"summary_index": index, "backend": backend}
    for temperature in (0.0, 1.0):
        importance, got = mk.score_and_select(stats, logits, cu, temperature, protected=protected, **options)
        assert got.keep[protected].all() and not importance[protected].any()
        assert not got.merge_weight[got.keep].any()

        # The batch without those rows. A summary token among them is gone there.
        rows = (~protected).nonzero().flatten()
        before = torch.cat([rows.new_zeros(1), (~protected).cumsum(0)])
        own = torch.zeros_like(cu[:-1]) if index is None else index
        at = (cu[:-1] + own).clamp(max=max(sum(lengths) - 1, 0)).long()
        exists = (own >= 0) & (cu.diff() > 0)
        exists = exists & ~protected[at] if sum(lengths) else exists
        place = torch.where(exists, before[at] - before[cu[:-1].long()], -1).int()
        alone, expected = mk.score_and_select(
            mk.AttentionStats(*(t[rows] for t in stats)), logits[rows], before[cu.long()].int(), temperature,
            summary_index=place, backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(importance[rows], alone, rtol=1e-5, atol=1e-8)
        assert torch.equal(got.keep[rows], expected.keep)
        torch.testing.assert_close(got.merge_weight[rows], expected.merge_weight, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_none_and_nothing_protected_have_the_same_bits(backend):
    stats, logits, cu, protected = batch([63, 1, 0, 111, 5], backend)
    plain = mk.score_and_select(stats, logits, cu, 0.7, backend=backend)
    nothing = mk.score_and_select(stats, logits, cu, 0.7, protected=torch.zeros_like(protected), backend=backend)
    assert same((plain[0], *plain[1]), (nothing[0], *nothing[1]))
    first = torch.zeros_like(protected)
    first[cu[:-1].long()[cu.diff() > 0]] = True  # the summary tokens, which are protected anyway
    again = mk.score_and_select(stats, logits, cu, 0.7, protected=first, backend=backend)
    assert same((plain[0], *plain[1]), (again[0], *again[1]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_separate_ops_and_the_whole_step_agree_bit_for_bit(backend):
    stats, logits, cu, protected = batch([63, 1, 0, 40, 5], backend)
    options = {"protected": protected, "backend": backend}
    importance, selection = mk.score_and_select(stats, logits, cu, 0.7, **options)
    assert torch.equal(mk.token_importance(stats, logits, cu, **options), importance)
    assert same(mk.select_tokens(importance, logits, cu, 0.7, **options), selection)
    assert not selection.keep.all()
    x = torch.randn(109, 12, device=cu.device)
    pruned = mk.prune_tokens(x, stats, logits, cu, 0.7, **options)
    assert same(pruned.selection, selection)
    assert torch.equal(pruned.x, mk.gather_merge(x, selection, backend=backend))
    every_second = torch.stack([protected, protected], 1)[:, 0]
    assert same(mk.select_tokens(importance, logits, cu, 0.7, protected=every_second, backend=backend), selection)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_or_all_but_one_protected_keep_everything(backend):
    stats, logits, cu, protected = batch([9, 0, 12], backend)
    everything = torch.ones_like(protected)
    for left in (0, 1):  # one candidate alone never goes
        everything[20 - left : 20] = False
        importance, selection = mk.score_and_select(stats, logits, cu, 1e6, protected=everything, backend=backend)
        assert selection.keep.all() and selection.cu_seqlens_out.equal(cu)
        assert not selection.merge_weight.any() and not importance[everything].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_candidates_go_together(backend):
    cu = cu_seqlens_of([6, 5]).to(device_of(backend))
    importance, logits = torch.full((11,), 0.25, device=cu.device), torch.randn(11, 3, device=cu.device)
    protected = torch.zeros(11, dtype=torch.bool, device=cu.device)
    protected[[2, 3, 8]] = True
    selection = mk.select_tokens(importance, logits, cu, 1.0, protected=protected, backend=backend)
    assert selection.source.tolist() == [0, 2, 3, -1, 6, 8, -2]
    assert selection.merge_weight[1:6].tolist() == pytest.approx([1 / 3, 0, 0, 1 / 3, 1 / 3])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_protected_rows_hold_reaches_nothing(backend, poison):
    stats, logits, cu, protected = batch([30, 12], backend)
    clean = mk.score_and_select(stats, logits, cu, 0.7, protected=protected, backend=backend)
    own = mk.AttentionStats(*(t.masked_fill(protected, poison) for t in stats))
    wrong = logits.masked_fill(protected[:, None], poison)
    got = mk.score_and_select(own, wrong, cu, 0.7, protected=protected, backend=backend)
    assert same((got[0], *got[1]), (clean[0], *clean[1])) and not clean[1].keep.all()
    importance = clean[0].masked_fill(protected, poison)
    assert same(mk.select_tokens(importance, wrong, cu, 0.7, protected=protected, backend=backend), clean[1])

    inputs = [t.clone().requires_grad_() for t in (*own, wrong)]
    given = mk.AttentionStats(*inputs[:2])
    importance, selection = mk.score_and_select(given, inputs[2], cu, 0.7, protected=protected, backend=backend)
    grads = torch.autograd.grad(importance.square().sum() + selection.merge_weight.square().sum(), inputs)
    for grad in grads:
        assert grad.isfinite().all() and not grad[protected].any() and grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_broken_candidate_keeps_its_sequence(backend):
    stats, logits, cu, protected = batch([30, 12], backend)
    importance = mk.token_importance(stats, logits, cu, protected=protected, backend=backend)
    importance[int((~protected).nonzero()[3])] = math.nan
    selection = mk.select_tokens(importance, logits, cu, 1.0, protected=protected, backend=backend)
    assert selection.keep[:30].all() and not selection.keep[30:].all()


def test_gradients_in_float64():
    stats, logits, cu, protected = batch([9, 1, 0, 7], dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (*stats, logits)]
    assert protected.any()

    def importance_and_weight(summary_attention, received_attention, logits):
        stats = mk.AttentionStats(summary_attention, received_attention)
        importance, selection = mk.score_and_select(stats, logits, cu, 0.5, protected=protected)
        return importance, selection.merge_weight, mk.token_importance(stats, logits, cu, protected=protected)

    assert (importance_and_weight(*inputs)[1] > 0).sum() >= 2
    assert torch.autograd.gradcheck(importance_and_weight, inputs)


def test_opcheck_and_compile():
    stats, logits, cu, protected = batch([9, 0, 1, 12])
    inputs = [t.requires_grad_() for t in (*stats, logits)]
    opcheck(torch.ops.madtp.token_importance, (*inputs, cu, None, "auto", protected))
    opcheck(torch.ops.madtp.score_and_select, (*inputs, cu, 1.0, None, "auto", protected))
    importance = torch.rand(22, requires_grad=True)
    opcheck(torch.ops.madtp.select_tokens, (importance, logits.detach(), cu, 1.0, None, "auto", protected))

    def prune(x, protected):
        stats = mk.AttentionStats(*inputs[:2])
        return mk.prune_tokens(x, stats, inputs[2], cu, 1.0, protected=protected, capacity="upper_bound").x

    compiled = torch.compile(prune, fullgraph=True, backend="aot_eager")
    x = torch.randn(22, 4)
    assert torch.equal(compiled(x, protected), prune(x, protected))
