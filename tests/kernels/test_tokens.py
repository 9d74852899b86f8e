# SPDX-License-Identifier: Apache-2.0
"""Token pruning ops: the reference against its equations, C++ against the reference, autograd, torch.compile."""

import math
import pickle

import pytest
import torch
from ragged_cases import LENGTHS, SUMMARIES, cu_seqlens_of, scores
from torch.library import opcheck

import madtp_kernels as mk
from madtp_kernels import dispatch
from madtp_kernels.selection import PADDING

pytestmark = pytest.mark.sanitized

BACKENDS = [
    "reference",
    pytest.param(
        "cpu", marks=pytest.mark.skipif(dispatch.extension_unsupported_reason() is not None, reason="no C++ extension")
    ),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def select(
    lengths, temperature=1.0, *, dtype=torch.float32, summary_index=None, capacity="exact", backend=None, seed=0
):
    *stats, logits = scores(lengths, dtype=dtype, seed=seed)
    stats, cu = mk.AttentionStats(*stats), cu_seqlens_of(lengths)
    importance = mk.token_importance(stats, logits, cu, summary_index=summary_index, backend=backend)
    selection = mk.select_tokens(
        importance, logits, cu, temperature, summary_index=summary_index, capacity=capacity, backend=backend
    )
    return importance, logits, selection


def test_importance_follows_its_equation():
    summary_attention, received_attention, logits = scores([4], dtype=torch.float64)
    stats = mk.AttentionStats(summary_attention, received_attention)
    importance = mk.token_importance(stats, logits, cu_seqlens_of([4]))
    guidance = logits[1:].max(1).values.clamp_min(0)
    share = received_attention[1:] / received_attention[1:].sum()
    expected = (summary_attention[1:] + share + guidance / guidance.sum()) / 3
    torch.testing.assert_close(importance, torch.cat([importance.new_zeros(1), expected]))


def test_selection_follows_its_equation():
    lengths, tau = [64, 9], 0.7
    importance, logits, selection = select(lengths, tau, dtype=torch.float64)
    out_row = 0
    for b, (begin, end) in enumerate([(0, 64), (64, 73)]):
        s, a = importance[begin + 1 : end], logits[begin + 1 : end]
        theta = ((a / tau).softmax(0) * s[:, None]).sum(0).min()
        kept = [begin, *(begin + 1 + (s > theta).nonzero().flatten()).tolist()]
        expected = [*kept, -(b + 1)]
        assert selection.source[out_row : out_row + len(expected)].tolist() == expected
        out_row += len(expected)
        assert selection.cu_seqlens_out[b + 1] == out_row
        pruned = s[s <= theta]
        torch.testing.assert_close(selection.merge_weight[begin + 1 : end][s <= theta], pruned / pruned.sum())
    assert selection.source.numel() == out_row < 73


@pytest.mark.parametrize("backend", BACKENDS)
def test_below_the_temperature_of_argmax_the_threshold_goes_to_the_least_importance(backend):
    cu = cu_seqlens_of([64])
    importance = torch.rand(64) + 1
    logits = 1000 * importance[:, None] * torch.ones(64, 3)  # all alignment tokens point at the most important one
    s = importance[1:]

    def kept(tau):
        return mk.select_tokens(importance, logits, cu, tau, backend=backend).keep[1:]

    assert kept(0.01).sum() <= 1  # at most the one they point at
    for tau in (0.009, 0.003, 0.0004):
        theta = s.min() + tau / 0.01 * (s.max() - s.min())
        assert torch.equal(kept(tau), s > theta) and (s > theta).any()
    assert kept(1e-9).all()  # one is not above the least importance, and one alone never goes
    assert kept(0).all()


def test_gather_merge_follows_its_equation():
    lengths = [40, 3, 33]
    _, _, selection = select(lengths, dtype=torch.float64)
    x = torch.randn(76, 5, dtype=torch.float64)
    out = mk.gather_merge(x, selection)
    for row, source in enumerate(selection.source.tolist()):
        if source >= 0:
            assert torch.equal(out[row], x[source])
        else:
            begin, end = selection.cu_seqlens_in[-source - 1], selection.cu_seqlens_in[-source]
            expected = selection.merge_weight[begin:end] @ x[begin:end]
            torch.testing.assert_close(out[row], expected)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("summary_token", SUMMARIES)
@pytest.mark.parametrize("temperature", [0.0, 1e-3, 1.0, 1e6])
def test_cpu_selects_like_the_float64_reference(lengths, summary_token, temperature):
    pytest.importorskip("madtp_kernels._C")
    index = SUMMARIES[summary_token](lengths)
    exact, logits64, expected = select(lengths, temperature, dtype=torch.float64, summary_index=index)
    got_importance, _, got = select(lengths, temperature, summary_index=index, backend="cpu")
    torch.testing.assert_close(got_importance.double(), exact, rtol=1e-6, atol=1e-7)
    assert torch.equal(got.keep, expected.keep)
    assert torch.equal(got.source, expected.source)
    assert torch.equal(got.cu_seqlens_out, expected.cu_seqlens_out)
    torch.testing.assert_close(got.merge_weight.double(), expected.merge_weight, rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit", [1e-44, 3e-42, 1e-40, 2.9e-39, 1e-37])
def test_subnormal_attention_prunes_as_any_other(backend, dtype, unit):
    received_attention = (torch.tensor([9.0, 8, 1, 1, 2, 7, 1]) * unit).float()
    logits = torch.tensor([3.0, 2, 0, 0, 0, 1, 0]).to(dtype)[:, None] * torch.ones(1, 5, dtype=dtype)
    stats, cu = mk.AttentionStats(torch.zeros(7), received_attention), cu_seqlens_of([7])
    none = torch.tensor([-1], dtype=torch.int32)

    def select(received_attention, backend):
        scored = mk.AttentionStats(stats.summary_attention, received_attention)
        importance = mk.token_importance(scored, logits, cu, summary_index=none, backend=backend)
        return importance, mk.select_tokens(importance, logits, cu, 1.0, summary_index=none, backend=backend)

    exact, selected = select((received_attention.double() * 1e37).float(), "reference")
    importance, selection = select(received_attention, backend)
    torch.testing.assert_close(importance, exact, rtol=1e-5, atol=1e-7)
    assert torch.equal(selection.keep, selected.keep) and not selection.keep.all()
    torch.testing.assert_close(selection.merge_weight, selected.merge_weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("gap", "kept"), [(20, 1), (84, 1), (90, 1), (100, 1), (106, 0), (300, 0)])
def test_softmax_weights_of_the_threshold_vanish_where_float32_does(backend, gap, kept):
    importance, logits = torch.tensor([0.9, 0.1, 0.2, 0.1]), torch.tensor([[float(gap)], [0], [0], [0]])
    none = torch.tensor([-1], dtype=torch.int32)
    selection = mk.select_tokens(importance, logits, cu_seqlens_of([4]), 1.0, summary_index=none, backend=backend)
    assert selection.keep.sum() == kept


@pytest.mark.parametrize("backend", BACKENDS)
def test_merge_weights_of_subnormal_importance_add_up_to_one(backend):
    importance, logits = torch.tensor([1.0, 1, 1e-40, 3e-40, 0]), torch.tensor([[9.0], [9], [0], [0], [0]])
    none = torch.tensor([-1], dtype=torch.int32)
    selection = mk.select_tokens(importance, logits, cu_seqlens_of([5]), 5.0, summary_index=none, backend=backend)
    torch.testing.assert_close(selection.merge_weight, torch.tensor([0, 0, 0.25, 0.75, 0]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.003, 1.0])
def test_importance_of_any_size_is_selected_alike(backend, temperature):
    importance, logits, cu = torch.rand(40), torch.randn(40, 3), cu_seqlens_of([40])
    expected = mk.select_tokens(importance, logits, cu, temperature, backend=backend)
    assert expected.source.numel() < 40
    for exponent in (-60, 63, 65, 100, 120):
        got = mk.select_tokens(importance * 2.0**exponent, logits, cu, temperature, backend=backend)
        assert torch.equal(got.keep, expected.keep)
        torch.testing.assert_close(got.merge_weight, expected.merge_weight)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 17, 64, 129])
def test_gathers_within_twice_the_reference_error(backend, dtype, channels):
    lengths = [63, 1, 0, 111, 5]
    _, _, selection = select(lengths)
    x = torch.randn(sum(lengths), channels, dtype=torch.float64).to(dtype)
    weight, bias = torch.randn(channels).to(dtype), torch.randn(channels).to(dtype)
    wide = selection._replace(merge_weight=selection.merge_weight.double())
    exact, exact_normed = mk.gather_merge_layernorm(x.double(), wide, weight.double(), bias.double(), 1e-5)

    def errors(name):
        out, normed = mk.gather_merge_layernorm(x, selection, weight, bias, 1e-5, backend=name)
        assert torch.equal(out, mk.gather_merge(x, selection, backend=name))
        assert out.dtype == normed.dtype == dtype
        return (out.double() - exact).abs().max(), (normed.double() - exact_normed).abs().max()

    for error, bound in zip(errors(backend), errors("reference"), strict=True):
        assert error <= 2 * bound + 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_upper_bound_pads_with_zero_rows(backend):
    lengths = [50, 20]
    _, _, exact = select(lengths, backend=backend)
    _, _, bound = select(lengths, capacity="upper_bound", backend=backend)
    num_rows = int(bound.cu_seqlens_out[-1])
    x, weight, bias = torch.randn(70, 24), torch.randn(24), torch.ones(24)
    assert bound.source.numel() == 70 and (bound.source[num_rows:] == PADDING).all()
    out, normed = mk.gather_merge_layernorm(x, bound, weight, bias, backend=backend)
    assert torch.equal(out[:num_rows], mk.gather_merge(x, exact, backend=backend))
    assert not out[num_rows:].any() and not normed[num_rows:].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_sample_does_not_depend_on_its_batch(backend, threads):
    lengths, before = [37, 101, 64, 5], torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        summary_attention, received_attention, logits = scores(lengths)
        x, weight, bias = torch.randn(sum(lengths), 40), torch.randn(40), torch.randn(40)

        def prune(rows, cu):
            stats = mk.AttentionStats(summary_attention[rows], received_attention[rows])
            importance = mk.token_importance(stats, logits[rows], cu, backend=backend)
            selection = mk.select_tokens(importance, logits[rows], cu, 0.8, backend=backend)
            pruned = mk.gather_merge_layernorm(x[rows], selection, weight, bias, backend=backend)
            return importance, *pruned, selection

        importance, out, normed, selection = prune(slice(None), cu_seqlens_of(lengths))
        begin = 0
        for b, length in enumerate(lengths):
            rows, alone = slice(begin, begin + length), cu_seqlens_of([length])
            span = slice(*selection.cu_seqlens_out[b : b + 2].tolist())
            single = prune(rows, alone)
            assert torch.equal(importance[rows], single[0])
            assert torch.equal(out[span], single[1]) and torch.equal(normed[span], single[2])
            begin += length
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_corner_sequences(backend):
    cu = cu_seqlens_of([6, 5, 4])
    importance = torch.full((15,), 0.25)
    logits = torch.randn(15, 3)
    everything_equal = mk.select_tokens(importance, logits, cu, 1.0, backend=backend)
    assert everything_equal.source.tolist() == [0, -1, 6, -2, 11, -3]  # the summary token and one merged token
    assert everything_equal.merge_weight[1:6].tolist() == pytest.approx([0.2] * 5)

    zero = mk.select_tokens(torch.zeros(15), logits, cu, 1.0, backend=backend)
    assert zero.merge_weight[1:6].tolist() == pytest.approx([0.2] * 5)  # nothing to weigh by: a plain mean

    for broken in (math.nan, math.inf, -math.inf):
        poisoned = torch.rand(15)
        poisoned[8] = broken
        selection = mk.select_tokens(poisoned, logits, cu, 1.0, backend=backend)
        clean = mk.select_tokens(torch.where(poisoned.isfinite(), poisoned, 0.5), logits, cu, 1.0, backend=backend)
        assert selection.keep[6:11].all()  # the broken sequence keeps everything
        assert torch.equal(selection.keep[:6], clean.keep[:6]) and torch.equal(selection.keep[11:], clean.keep[11:])

    logits[12, 1] = math.nan
    assert mk.select_tokens(torch.rand(15), logits, cu, 1.0, backend=backend).keep[11:].all()

    large = mk.select_tokens(torch.rand(15), torch.randn(15, 3) * 1e4, cu, 1e-3, backend=backend)
    assert large.merge_weight.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_takes_no_part_cannot_spoil_the_rest(backend):
    cu = cu_seqlens_of([12])
    *stats, logits = scores([12])
    stats = mk.AttentionStats(*stats)
    clean = mk.token_importance(stats, logits, cu, backend=backend)
    for tensor in (*stats, logits):
        tensor[0] = math.nan  # the summary token
    importance = mk.token_importance(stats, logits, cu, backend=backend)
    assert torch.equal(importance, clean)
    selection = mk.select_tokens(importance, logits, cu, 1.0, backend=backend)
    x = torch.randn(12, 4)
    merged = mk.gather_merge(x, selection, backend=backend)[-1]
    x[selection.keep] = math.inf
    assert torch.equal(mk.gather_merge(x, selection, backend=backend)[-1], merged)

    if backend == "cpu":
        logits[5] = -math.inf  # weight 0, at any temperature
        assert mk.select_tokens(importance, logits, cu, 1e300, backend="cpu").source.numel() < 12


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    cu = torch.zeros(1, dtype=torch.int32)
    stats = mk.AttentionStats(torch.empty(0), torch.empty(0))
    importance = mk.token_importance(stats, torch.empty(0, 3), cu, backend=backend)
    selection = mk.select_tokens(importance, torch.empty(0, 3), cu, 1.0, backend=backend)
    out = mk.gather_merge(torch.empty(0, 8), selection, backend=backend)
    assert out.shape == (0, 8) and selection.cu_seqlens_out.tolist() == [0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_inputs_give_the_same_result(backend):
    lengths = [30, 12]
    *stats, logits = scores(lengths)
    cu = cu_seqlens_of(lengths)
    expected = mk.token_importance(mk.AttentionStats(*stats), logits, cu, backend=backend)
    strided = mk.AttentionStats(*torch.stack(stats, 1).unbind(1))
    assert torch.equal(mk.token_importance(strided, logits.T.contiguous().T, cu, backend=backend), expected)
    selection = mk.select_tokens(expected, logits, cu, 1.0, backend=backend)
    x = torch.randn(42, 10)
    for view in (torch.cat([x, x], 1)[:, :10], x.T.contiguous().T, x.repeat_interleave(2, 0)[::2]):
        assert not view.is_contiguous()
        torch.testing.assert_close(mk.gather_merge(view, selection, backend=backend), mk.gather_merge(x, selection))


# --- autograd


def test_gradients_in_float64():
    lengths = [7, 1, 0, 5]
    cu = cu_seqlens_of(lengths)
    inputs = [t.requires_grad_() for t in scores(lengths, 4, dtype=torch.float64)]
    logits = inputs[2]
    index = torch.tensor([2, 0, -1, -1], dtype=torch.int32)

    def importance_of(summary_attention, received_attention, logits):
        stats = mk.AttentionStats(summary_attention, received_attention)
        return mk.token_importance(stats, logits, cu, summary_index=index)

    assert torch.autograd.gradcheck(importance_of, inputs)

    importance = importance_of(*inputs).detach().requires_grad_()
    selection = mk.select_tokens(importance.detach(), logits.detach(), cu, 0.5, summary_index=index)
    assert (~selection.keep).sum() >= 2
    weights = lambda s: mk.select_tokens(s, logits.detach(), cu, 0.5, summary_index=index).merge_weight  # noqa: E731
    assert torch.autograd.gradcheck(weights, (importance,))

    x = torch.randn(13, 6, dtype=torch.float64, requires_grad=True)
    merge_weight = selection.merge_weight.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, w: mk.gather_merge(x, selection._replace(merge_weight=w)), (x, merge_weight)
    )
    weight, bias = torch.randn(2, 6, dtype=torch.float64).unbind()
    affine = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    for capacity in ("exact", "upper_bound"):
        chosen = mk.select_tokens(importance.detach(), logits.detach(), cu, 0.5, summary_index=index, capacity=capacity)
        assert torch.autograd.gradcheck(
            lambda x, w, a, b, s=chosen: mk.gather_merge_layernorm(x, s._replace(merge_weight=w), a, b),
            (x, merge_weight, *affine),
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_backward_matches_the_reference(dtype):
    pytest.importorskip("madtp_kernels._C")
    lengths = [63, 1, 0, 40]
    _, _, selection = select(lengths)
    x = torch.randn(104, 33).to(dtype)
    grad = torch.randn(selection.source.numel(), 33).to(dtype)
    got = torch.ops.madtp.gather_merge_backward(grad, x, *selection, "cpu")
    wide = selection._replace(merge_weight=selection.merge_weight.double())
    exact = torch.ops.madtp.gather_merge_backward(grad.double(), x.double(), *wide, "reference")
    bound = torch.ops.madtp.gather_merge_backward(grad, x, *selection, "reference")
    for g, e, r in zip(got, exact, bound, strict=True):
        assert (g.double() - e).abs().max() <= 2 * (r.double() - e).abs().max() + 1e-5


def test_opcheck():
    lengths = [9, 0, 1, 12]
    cu = cu_seqlens_of(lengths)
    summary_attention, received_attention, logits = (t.requires_grad_() for t in scores(lengths))
    index = torch.tensor([0, -1, 0, 3], dtype=torch.int32)
    opcheck(torch.ops.madtp.token_importance, (summary_attention, received_attention, logits, cu, index, "auto"))
    importance = torch.rand(22, requires_grad=True)
    opcheck(torch.ops.madtp.select_tokens, (importance, logits.detach(), cu, 1.0, index, "auto"))
    s = mk.select_tokens(importance.detach(), logits.detach(), cu, 1.0, summary_index=index, capacity="upper_bound")
    selection = s._replace(merge_weight=s.merge_weight.clone().requires_grad_())
    x = torch.randn(22, 6, requires_grad=True)
    opcheck(torch.ops.madtp.gather_merge, (x, *selection, "auto"))
    opcheck(torch.ops.madtp.gather_merge_backward, (torch.randn(22, 6), x.detach(), *s, "auto"))
    affine = torch.randn(6, requires_grad=True), torch.randn(6, requires_grad=True)
    opcheck(torch.ops.madtp.gather_merge_layernorm, (x, *selection, *affine, 1e-5, "auto"))


@pytest.mark.parametrize("capacity", ["exact", "upper_bound"])
def test_compiles_without_graph_breaks(capacity):
    lengths = [30, 5, 12]
    cu = cu_seqlens_of(lengths)
    summary_attention, received_attention, logits = scores(lengths)
    weight, bias = torch.ones(16), torch.zeros(16)

    def prune(x, summary_attention, received_attention, logits):
        importance = mk.token_importance(mk.AttentionStats(summary_attention, received_attention), logits, cu)
        selection = mk.select_tokens(importance, logits, cu, 1.0, capacity=capacity)
        out, normed = mk.gather_merge_layernorm(x, selection, weight, bias)
        return out.sum() + (normed**2).sum(), mk.gather_merge(x, selection)

    def run(function):
        x = torch.linspace(-1, 1, 47 * 16).reshape(47, 16).requires_grad_()
        loss, out = function(x, summary_attention, received_attention, logits)
        loss.backward()
        return loss.detach(), out.detach(), x.grad

    # Only "exact" reads a value on the host; "upper_bound" must trace without permission to.
    with torch._dynamo.config.patch(capture_scalar_outputs=capacity == "exact"):
        compiled = torch.compile(prune, fullgraph=True, backend="aot_eager")
        for got, expected in zip(run(compiled), run(prune), strict=True):
            torch.testing.assert_close(got, expected)


# --- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 4, 8])}, r"cu_seqlens must be int32 of shape \(B\+1,\), got int64 \(3,\)"),
        ({"cu_seqlens": torch.tensor([1, 4, 8], dtype=torch.int32)}, "cu_seqlens must be 0 at its first entry, got 1"),
        ({"cu_seqlens": torch.tensor([0, 6, 4, 8], dtype=torch.int32)}, "non-decreasing, got 6 then 4 at entry 2"),
        ({"cu_seqlens": torch.tensor([0, 4, 9], dtype=torch.int32)}, "the row count 8 at its last entry, got 9"),
        ({"temperature": -1.0}, "temperature must be a finite number >= 0, got float -1.0"),
        ({"temperature": math.nan}, "temperature must be a finite number >= 0, got float nan"),
        ({"capacity": "half"}, 'capacity must be "exact" or "upper_bound"'),
        ({"mag_logits": torch.zeros(7, 3)}, "mag_logits must be of 8 rows like importance, got float32 \\(7, 3\\)"),
        ({"mag_logits": torch.zeros(8, 0)}, "at least one alignment token"),
        ({"mag_logits": torch.zeros(8, 3, device="meta")}, "mag_logits must be on cpu, got .* on meta"),
        ({"importance": torch.zeros(8, dtype=torch.float16)}, "importance must be a 1-dimensional tensor of float32"),
        ({"summary_index": torch.tensor([0, 4], dtype=torch.int32)}, r"sequence 1 has 4 rows\), got 4"),
        ({"summary_index": torch.tensor([0, -2], dtype=torch.int32)}, "summary_index must be -1 or a row"),
        ({"summary_index": torch.tensor([0], dtype=torch.int32)}, "summary_index must be of 2 rows"),
        (
            {"backend": "tpu"},
            "backend= must be one of auto, reference, dense, onednn, cpu, triton, cuda, cusparselt, got 'tpu'",
        ),
    ],
)
def test_select_tokens_refuses(change, message):
    arguments = {
        "importance": torch.rand(8),
        "mag_logits": torch.randn(8, 3),
        "cu_seqlens": torch.tensor([0, 4, 8], dtype=torch.int32),
        "temperature": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        mk.select_tokens(**(arguments | change))


def test_gather_merge_refuses():
    _, _, selection = select([4, 4])
    with pytest.raises(ValueError, match="x must be a 2-dimensional tensor of .*, got int64"):
        mk.gather_merge(torch.zeros(8, 2, dtype=torch.int64), selection)
    with pytest.raises(ValueError, match="selection.keep must be of 9 rows like x"):
        mk.gather_merge(torch.zeros(9, 2), selection)
    with pytest.raises(ValueError, match="selection must be a Selection from select_tokens, got tuple"):
        mk.gather_merge(torch.zeros(8, 2), tuple(selection))
    with pytest.raises(ValueError, match="weight must be of shape"):
        mk.gather_merge_layernorm(torch.zeros(8, 2), selection, torch.ones(3), torch.ones(3))
    with pytest.raises(ValueError, match="weight must be a 1-dimensional tensor of float32, got float16"):
        mk.gather_merge_layernorm(torch.zeros(8, 2), selection, torch.ones(2).half(), torch.ones(2).half())
    with pytest.raises(ValueError, match="x must be at most 2147483647 rows"):
        mk.gather_merge(torch.zeros(1, 1).expand(2**31, 1), selection)


@pytest.mark.slow
def test_more_elements_than_int32_counts():
    rows, channels = 33_000, 65_536  # 2.16e9 elements; pages that are only read cost no memory
    x = torch.zeros(rows, channels, dtype=torch.bfloat16)
    x[-2:] = torch.tensor([[1.0], [3.0]])
    importance = torch.zeros(rows)
    importance[-2] = 1.0
    selection = mk.select_tokens(importance, torch.zeros(rows, 1), cu_seqlens_of([rows]), 1.0)
    assert selection.source.tolist() == [0, rows - 2, -1]
    merge_weight = selection.merge_weight.clone()
    merge_weight[-1] = 0.5
    out = mk.gather_merge(x, selection._replace(merge_weight=merge_weight))
    assert (out[1] == 1).all() and (out[2] == 1.5).all()


def test_the_ops_themselves_check_what_kernels_trust():
    _, _, s = select([4, 4])
    x, ones = torch.zeros(8, 2), torch.ones(2)
    with pytest.raises(ValueError, match="selection.keep must be of 8 rows like x"):
        torch.ops.madtp.gather_merge(x, torch.ones(9, dtype=torch.bool), *s[1:], "auto")
    with pytest.raises(ValueError, match="bias must be a 1-dimensional tensor of float32, got float16"):
        torch.ops.madtp.gather_merge_layernorm(x, *s, ones, ones.half(), 1e-5, "auto")
    with pytest.raises(ValueError, match="grad must be a 2-dimensional tensor of float32, got float16"):
        torch.ops.madtp.gather_merge_backward(x[: s.source.numel()].half(), x, *s, "auto")


def test_dispatch(monkeypatch):
    x, selection = torch.zeros(8, 2), select([4, 4])[2]
    choice = mk.explain("gather_merge", x, selection)
    assert choice.backend in ("cpu", "reference") and "cuda" in choice.rejected
    assert "the tensors are on cpu" in str(choice)
    assert mk.explain("gather_merge", x.double(), selection).backend == "reference"
    with pytest.raises(RuntimeError, match="cannot run on backend 'cuda'.*the tensors are on cpu; auto would run"):
        mk.gather_merge(x, selection, backend="cuda")
    monkeypatch.setenv("MADTP_BACKEND", "reference")
    assert mk.explain("gather_merge", x, selection).backend == "reference"
    monkeypatch.setenv("MADTP_BACKEND", "abacus")
    with pytest.raises(ValueError, match="MADTP_BACKEND must be one of"):
        mk.gather_merge(x, selection)
    with pytest.raises(ValueError, match="op must be one of"):
        mk.explain("softmax", x)


@pytest.mark.parametrize(("old", "new"), [("cu_seqlens", "cu_seqlens_out"), ("input_cu_seqlens", "cu_seqlens_in")])
def test_old_names_of_the_fields_are_refused_by_their_new_ones(old, new):
    _, _, selection = select([4, 4])
    fields = selection._asdict()
    fields[old] = fields.pop(new)
    with pytest.raises(TypeError, match=f"^Selection: {old} is now called {new}$"):
        mk.Selection(**fields)
    assert pickle.loads(pickle.dumps(selection)).keep.equal(selection.keep)
    assert mk.Selection(**selection._asdict()) == selection
