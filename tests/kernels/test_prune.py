# SPDX-License-Identifier: Apache-2.0
"""The prune step as one call: bit-equal to the ops it is made of, with their gradients, on every backend."""

import contextlib
import math
from unittest import mock

import pytest
import torch
from backend_cases import BACKENDS, ON_GPU, device_of
from ragged_cases import LENGTHS, SUMMARIES, cu_seqlens_of, scores
from torch.library import opcheck

import madtp_kernels as mk

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = [
    pytest.mark.sanitized,
    pytest.mark.filterwarnings(r"ignore:var\(\). degrees of freedom:UserWarning"),  # the reference on no rows
]


def batch(lengths, backend=None, channels=24, dtype=torch.float32, **options):
    """x, stats, mag_logits, cu_seqlens and (weight, bias, eps)."""
    device = device_of(backend)
    *stats, logits = (t.to(device) for t in scores(lengths, **options))
    generator = torch.Generator().manual_seed(1)
    x, affine = (torch.randn(n, channels, generator=generator).to(device, dtype) for n in (sum(lengths), 2))
    return x, mk.AttentionStats(*stats), logits, cu_seqlens_of(lengths).to(device), (*affine.unbind(), 1e-3)


def separately(x, stats, logits, cu, temperature, *, norm=None, summary_index=None, capacity="exact", backend=None):
    """What `prune_tokens` stands for."""
    options = {"summary_index": summary_index, "backend": backend}
    importance = mk.token_importance(stats, logits, cu, **options)
    selection = mk.select_tokens(importance, logits.detach(), cu, temperature, capacity=capacity, **options)
    if norm is None:
        return mk.Pruned(mk.gather_merge(x, selection, backend=backend), None, selection, importance)
    out, normed = mk.gather_merge_layernorm(x, selection, *norm, backend=backend)
    return mk.Pruned(out, normed, selection, importance)


@contextlib.contextmanager
def poisoned_outputs():
    """What is allocated without a value holds NaN or 127: what a backend does not write shows."""
    empty, empty_like = torch.empty, torch.empty_like

    with (
        mock.patch.object(torch, "empty", lambda *a, **k: _poison(empty(*a, **k))),
        mock.patch.object(torch, "empty_like", lambda *a, **k: _poison(empty_like(*a, **k))),
    ):
        yield


def _poison(tensor):
    if tensor.is_floating_point():
        return tensor.fill_(math.nan)
    tensor.view(torch.uint8).fill_(0x7F)
    return tensor


def flattened(pruned):
    tensors = [pruned.x, pruned.normed, *pruned.selection, pruned.importance]
    return [t for t in tensors if t is not None]


def assert_equal(got, expected):
    for g, e in zip(flattened(got), flattened(expected), strict=True):
        assert g.dtype == e.dtype and torch.equal(g.nan_to_num(7), e.nan_to_num(7))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("summary_token", SUMMARIES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_equals_the_separate_ops_bit_for_bit(backend, summary_token, lengths):
    index = SUMMARIES[summary_token](lengths)
    options = {"summary_index": None if index is None else index.to(device_of(backend)), "backend": backend}
    *inputs, norm = batch(lengths, backend)
    for temperature, extra in ((0.0, {"norm": norm}), (0.5, {"capacity": "upper_bound"}), (1e6, {"norm": norm})):
        with poisoned_outputs():
            got = mk.prune_tokens(*inputs, temperature, **extra, **options)
        assert_equal(got, separately(*inputs, temperature, **extra, **options))
        if temperature == 0:
            assert got.selection.keep.all() and torch.equal(got.x, inputs[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alignment_tokens", [1, 100, 131])
def test_equals_the_separate_ops_in_every_dtype(backend, dtype, alignment_tokens):
    if backend == "triton" and dtype == torch.bfloat16 and not ON_GPU:
        pytest.skip("the interpreter does bfloat16 arithmetic on the bits of its storage")
    options = {"alignment_tokens": alignment_tokens, "logits_dtype": dtype}
    *inputs, norm = batch([101, 0, 1, 40, 2], backend, 17, dtype, **options)
    got = mk.prune_tokens(*inputs, 0.5, norm=norm, backend=backend)
    assert got.x.dtype == got.normed.dtype == dtype and not got.selection.keep.all()
    assert_equal(got, separately(*inputs, 0.5, norm=norm, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_broken_values_stay_in_their_sequence(backend):
    x, stats, logits, cu, norm = batch([6, 30, 4], backend)
    clean = mk.prune_tokens(x, stats, logits, cu, 1.0, norm=norm, backend=backend)
    stats.received_attention[8], logits[20, 3] = math.inf, math.nan
    got = mk.prune_tokens(x, stats, logits, cu, 1.0, norm=norm, backend=backend)
    assert_equal(got, separately(x, stats, logits, cu, 1.0, norm=norm, backend=backend))
    assert got.selection.keep[6:36].all() and not clean.selection.keep[6:36].all()
    for rows in (slice(0, 6), slice(36, 40)):
        assert torch.equal(got.selection.keep[rows], clean.selection.keep[rows])
        assert torch.equal(got.importance[rows], clean.importance[rows])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_sample_does_not_depend_on_its_batch(backend, threads):
    lengths, before = [37, 101, 64, 5], torch.get_num_threads()
    x, stats, logits, _, norm = batch(lengths, backend)
    torch.set_num_threads(threads)
    try:
        together = mk.prune_tokens(
            x, stats, logits, cu_seqlens_of(lengths).to(x.device), 0.8, norm=norm, backend=backend
        )
        begin = 0
        for b, length in enumerate(lengths):
            rows, cu = slice(begin, begin + length), cu_seqlens_of([length]).to(x.device)
            own = mk.AttentionStats(*(t[rows] for t in stats))
            alone = mk.prune_tokens(x[rows], own, logits[rows], cu, 0.8, norm=norm, backend=backend)
            span = slice(*together.selection.cu_seqlens_out[b : b + 2].tolist())
            assert torch.equal(together.importance[rows], alone.importance)
            assert torch.equal(together.x[span], alone.x) and torch.equal(together.normed[span], alone.normed)
            begin += length
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_upper_bound_pads_with_zero_rows(backend):
    *inputs, norm = batch([50, 20], backend)
    exact = mk.prune_tokens(*inputs, 1.0, norm=norm, backend=backend)
    bound = mk.prune_tokens(*inputs, 1.0, norm=norm, capacity="upper_bound", backend=backend)
    num_rows = exact.x.shape[0]
    assert num_rows == bound.selection.cu_seqlens_out[-1] < 70 == bound.x.shape[0]
    for got, expected in ((bound.x, exact.x), (bound.normed, exact.normed)):
        assert torch.equal(got[:num_rows], expected) and not got[num_rows:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    *inputs, norm = batch([], backend)
    got = mk.prune_tokens(*inputs, 1.0, norm=norm, backend=backend)
    assert got.x.shape == got.normed.shape == (0, 24) and got.selection.cu_seqlens_out.tolist() == [0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_inputs_give_the_same_result(backend):
    x, stats, logits, cu, norm = batch([30, 12], backend)
    expected = mk.prune_tokens(x, stats, logits, cu, 1.0, norm=norm, backend=backend)
    strided = mk.AttentionStats(*torch.stack(stats, 1).unbind(1))
    affine = (*torch.stack(norm[:2], 1).unbind(1), norm[2])
    for view in (lambda t: t.T.contiguous().T, lambda t: torch.cat([t, t], 1)[:, : t.shape[1]]):
        every_second = torch.stack([cu, cu], 1)[:, 0]
        got = mk.prune_tokens(view(x), strided, view(logits), every_second, 1.0, norm=affine, backend=backend)
        if backend == "reference":  # torch sums strided rows in another order
            torch.testing.assert_close(flattened(got), flattened(expected))
        else:
            assert_equal(got, expected)


# --- autograd and tracing


def test_gradients_in_float64():
    x, stats, logits, cu, norm = batch([7, 1, 0, 5], channels=6, dtype=torch.float64, alignment_tokens=4)
    stats = [t.double() for t in stats]
    index = torch.tensor([2, 0, -1, -1], dtype=torch.int32)

    def importance_and_weight(summary_attention, received_attention, logits):
        stats = mk.AttentionStats(summary_attention, received_attention)
        importance, selection = mk.score_and_select(stats, logits, cu, 0.5, summary_index=index)
        return importance, selection.merge_weight

    inputs = [t.requires_grad_() for t in (*stats, logits.double())]
    assert (importance_and_weight(*inputs)[1] > 0).sum() >= 2
    assert torch.autograd.gradcheck(importance_and_weight, inputs)

    def step(x, summary_attention, received_attention, logits, weight, bias):
        pruned = mk.prune_tokens(
            x,
            mk.AttentionStats(summary_attention, received_attention),
            logits,
            cu,
            0.5,
            norm=(weight, bias, norm[2]),
            summary_index=index,
            capacity="upper_bound",
        )
        return pruned.x, pruned.normed

    assert torch.autograd.gradcheck(step, (x.requires_grad_(), *inputs, *(t.requires_grad_() for t in norm[:2])))


@pytest.mark.parametrize("backend", BACKENDS)
def test_differentiates_like_the_separate_ops(backend):
    gradients = []
    for step in (mk.prune_tokens, separately):
        x, stats, logits, cu, norm = batch([40, 0, 1, 23], backend)
        inputs = [t.requires_grad_() for t in (x, *stats, logits, *norm[:2])]
        pruned = step(x, stats, logits, cu, 0.7, norm=norm, backend=backend)
        loss = pruned.x.square().sum() + pruned.normed.sin().sum() + pruned.importance.square().sum()
        gradients.append(torch.autograd.grad(loss, inputs))
    assert all(g.any() for g in gradients[0])
    assert all(torch.equal(got, expected) for got, expected in zip(*gradients, strict=True))


def test_opcheck():
    _, stats, logits, cu, _ = batch([9, 0, 1, 12])
    index = torch.tensor([0, -1, 0, 3], dtype=torch.int32)
    inputs = [t.requires_grad_() for t in (*stats, logits)]
    opcheck(torch.ops.madtp.score_and_select, (*inputs, cu, 1.0, index, "auto"))
    opcheck(torch.ops.madtp.score_and_select, (*(t.detach() for t in inputs), cu, 0.0, None, "reference"))


@pytest.mark.parametrize("capacity", ["exact", "upper_bound"])
def test_compiles_without_graph_breaks(capacity):
    x, stats, logits, cu, norm = batch([30, 5, 12])

    def prune(x, summary_attention, received_attention, logits):
        stats = mk.AttentionStats(summary_attention, received_attention)
        pruned = mk.prune_tokens(x, stats, logits, cu, 1.0, norm=norm, capacity=capacity)
        return pruned.x, pruned.normed

    def run(function):
        inputs = [t.detach().clone().requires_grad_() for t in (x, *stats, logits)]
        out, normed = function(*inputs)
        (out.sum() + normed.square().sum()).backward()
        return [out, normed, *(t.grad for t in inputs)]

    # Only "exact" reads a value on the host; "upper_bound" must trace without permission to.
    with torch._dynamo.config.patch(capture_scalar_outputs=capacity == "exact"):
        compiled = torch.compile(prune, fullgraph=True, backend="aot_eager")
        for got, expected in zip(run(compiled), run(prune), strict=True):
            torch.testing.assert_close(got, expected)


# --- bad input

ROWS = torch.zeros(8)
NORM = (torch.ones(2), torch.ones(2), 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(8, 2, dtype=torch.int64)}, "x must be a 2-dimensional tensor of .*, got int64"),
        ({"x": torch.zeros(9, 2)}, r"x must be of 8 rows like stats.summary_attention, got float32 \(9, 2\)"),
        ({"x": torch.zeros(8, 2, device="meta")}, "x must be on cpu, got .* on meta"),
        ({"x": torch.zeros(8, 2).double()}, "stats.summary_attention must be torch.float64 for x of torch.float64"),
        (
            {"stats": (ROWS.half(), ROWS)},
            "stats.summary_attention must be a 1-dimensional tensor of float32 or",
        ),
        ({"stats": (ROWS, ROWS[:7])}, "stats.received_attention must be of 8 rows like stats.summary_attention"),
        ({"stats": (ROWS, ROWS.to("meta"))}, "stats.received_attention must be on cpu, got .* on meta"),
        ({"mag_logits": torch.zeros(8, 0)}, "mag_logits must be of at least one alignment token"),
        ({"mag_logits": torch.zeros(7, 3)}, "mag_logits must be of 8 rows like stats.summary_attention"),
        ({"cu_seqlens": torch.tensor([0, 4, 8])}, r"cu_seqlens must be int32 of shape \(B\+1,\), got int64 \(3,\)"),
        ({"cu_seqlens": torch.tensor([0, 4, 9], dtype=torch.int32)}, "the row count 8 at its last entry, got 9"),
        ({"temperature": -1.0}, "temperature must be a finite number >= 0, got float -1.0"),
        ({"temperature": math.inf}, "temperature must be a finite number >= 0, got float inf"),
        ({"capacity": "half"}, 'capacity must be "exact" or "upper_bound"'),
        ({"summary_index": torch.tensor([0, 4], dtype=torch.int32)}, r"sequence 1 has 4 rows\), got 4"),
        ({"norm": NORM[:1]}, r"norm must be \(weight, bias, eps\), \(weight, eps\) or None, got tuple"),
        ({"norm": NORM[:2]}, "norm.eps must be a number, got float32"),
        ({"norm": (1.0, 1e-5)}, "norm.weight must be a tensor, got float 1.0"),
        ({"norm": (torch.ones(3), 1e-5)}, r"norm.weight must be of shape \(2,\) like the channels of x"),
        ({"norm": (NORM[0], 0.0)}, "norm.eps must be a finite number > 0, got float 0.0"),
        ({"protected": torch.zeros(8)}, "protected must be a 1-dimensional tensor of bool, got float32"),
        ({"protected": torch.zeros(7, dtype=torch.bool)}, "protected must be of 8 rows like stats.summary_attention"),
        ({"protected": [True] * 8}, "protected must be a tensor or None, got list"),
        ({"protected": torch.zeros(8, dtype=torch.bool, device="meta")}, "protected must be on cpu, got .* on meta"),
        ({"norm": (torch.ones(3), *NORM[1:])}, r"norm.weight must be of shape \(2,\) like the channels of x"),
        ({"norm": (NORM[0], torch.ones(2).half(), 1e-5)}, "norm.bias must be a 1-dimensional tensor of float32"),
        ({"norm": (*NORM[:2], 0)}, "norm.eps must be a finite number > 0, got int 0"),
        (
            {"backend": "tpu"},
            "backend= must be one of auto, reference, dense, onednn, cpu, triton, cuda, cusparselt, got 'tpu'",
        ),
    ],
)
def test_refuses(change, message):
    arguments = {
        "x": torch.zeros(8, 2),
        "stats": mk.AttentionStats(ROWS, ROWS),
        "mag_logits": torch.randn(8, 3),
        "cu_seqlens": torch.tensor([0, 4, 8], dtype=torch.int32),
        "temperature": 1.0,
    } | change
    with pytest.raises(ValueError, match=message):
        mk.prune_tokens(**arguments)
    if not {"x", "norm"} & set(change):
        del arguments["x"]
        with pytest.raises(ValueError, match=message):
            mk.score_and_select(**arguments)


def test_the_op_itself_checks_what_kernels_trust():
    """torch.ops can be called without the public function."""
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    with pytest.raises(ValueError, match="the row count 8 at its last entry, got 9"):
        torch.ops.madtp.score_and_select(ROWS, ROWS, torch.zeros(8, 3), cu, 1.0, None, "auto")
    for received_attention, logits, name in (
        (ROWS[:7], torch.zeros(8, 3), "stats.received_attention"),
        (ROWS, torch.zeros(7, 3), "mag_logits"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be of 8 rows like stats.summary_attention"):
            torch.ops.madtp.score_and_select(ROWS, received_attention, logits, cu[:2] * 2, 1.0, None, "auto")


def test_dispatch():
    _, stats, logits, cu, _ = batch([4, 4])
    assert mk.explain("score_and_select", stats, logits, cu, 1.0).backend in ("cpu", "reference")
    with pytest.raises(RuntimeError, match="score_and_select has no cuda implementation; auto would run"):
        mk.score_and_select(stats, logits, cu, 1.0, backend="cuda")
