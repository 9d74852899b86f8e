# SPDX-License-Identifier: Apache-2.0
"""`varlen_attention`: the reference against dense equations, its gradients in float64, fake and bad input."""

import pytest
import torch
from ragged_cases import cu_seqlens_of
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import madtp_kernels as mk
from madtp_kernels import dispatch

pytestmark = pytest.mark.sanitized

LENGTHS = [5, 1, 0, 9]
# Every size is one of these in the vectors of some instruction set: whole panels, half of one, half a vector.
USUAL_HEAD_DIMS = (8, 16, 64, 72, 128, 256)
HEAD_DIMS = [pytest.param(dim, marks=() if dim in USUAL_HEAD_DIMS else pytest.mark.slow) for dim in range(8, 257, 8)]
needs_extension = pytest.mark.skipif(dispatch.extension_unsupported_reason() is not None, reason="no C++ extension")


def qkv(rows, heads=3, dim=4, dtype=torch.float64):
    return (torch.randn(rows, heads, dim, dtype=dtype).requires_grad_() for _ in range(3))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("index", [None, [4, 0, -1, 2], [-1, -1, -1, -1]])
def test_follows_the_equations(causal, index):
    q, k, v = qkv(sum(LENGTHS))
    cu = cu_seqlens_of(LENGTHS)
    summary_index = None if index is None else torch.tensor(index, dtype=torch.int32)
    out, stats = mk.varlen_attention(
        q, k, v, cu, max_seqlen_q=9, causal=causal, summary_index=summary_index, return_stats=True
    )
    for b, (begin, end) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)):
        n, s = end - begin, 0 if index is None else index[b]
        scores = torch.einsum("ihd,jhd->hij", q[begin:end], k[begin:end]) / 2
        seen = torch.ones(n, n, dtype=torch.bool).tril() if causal else torch.ones(n, n, dtype=torch.bool)
        p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        expected = torch.einsum("hij,jhd->ihd", p, v[begin:end])
        torch.testing.assert_close(out[begin:end], expected)
        others = [i for i in range(n) if i != s]
        received = p.max(0).values[others].sum(0)
        if causal:
            received = received / seen[others].sum(0).clamp_min(1)
        torch.testing.assert_close(stats.received_attention[begin:end], received)
        norms = expected.norm(dim=-1)
        weight = norms / norms.sum(-1, keepdim=True)
        summary = (p[:, s] * weight.T).sum(0) if s >= 0 and n else torch.zeros(n, dtype=torch.float64)
        torch.testing.assert_close(stats.summary_attention[begin:end], summary)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_in_float64(causal):
    cu, index = cu_seqlens_of(LENGTHS), torch.tensor([1, 0, -1, -1], dtype=torch.int32)

    def attend(q, k, v):
        out, stats = mk.varlen_attention(
            q, k, v, cu, max_seqlen_q=9, causal=causal, summary_index=index, return_stats=True
        )
        return out, *stats

    assert torch.autograd.gradcheck(attend, tuple(qkv(sum(LENGTHS))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_round_the_reference(dtype):
    def attended():
        torch.manual_seed(0)
        q, k, v = qkv(sum(LENGTHS), dtype=dtype)
        out, stats = mk.varlen_attention(
            q, k, v, cu_seqlens_of(LENGTHS), max_seqlen_q=9, return_stats=True, backend="reference"
        )
        grads = torch.autograd.grad(
            out.float().sum() + stats.received_attention.sum() + stats.summary_attention.sum(), (q, k, v)
        )
        return out, *stats, *grads

    expected = attended()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attended()
    assert expected[1].dtype == torch.float32
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_cross_attention_in_float64():
    cu_q, cu_k = cu_seqlens_of([3, 0, 2]), cu_seqlens_of([4, 2, 7])
    q, *_ = qkv(5)
    _, k, v = qkv(13)

    def attend(q, k, v):
        return mk.varlen_attention(q, k, v, cu_q, cu_k, max_seqlen_q=3, max_seqlen_k=7)

    expected = torch.nn.functional.scaled_dot_product_attention(
        q[None, 3:].transpose(1, 2), k[None, 6:].transpose(1, 2), v[None, 6:].transpose(1, 2)
    )
    torch.testing.assert_close(attend(q, k, v)[3:], expected.transpose(1, 2)[0])
    assert torch.autograd.gradcheck(attend, (q, k, v))


@pytest.mark.parametrize("dim", [4, 16])  # the reference, and the CPU kernel where it is built
def test_opcheck(dim):
    q, k, v = qkv(sum(LENGTHS), dim=dim, dtype=torch.float32)
    cu = cu_seqlens_of(LENGTHS)
    opcheck(
        torch.ops.madtp.varlen_attention, (q, k, v, cu, cu, 9, 9, 0.5, False, -1, -1, 0.0, None, None, True, "auto")
    )


@pytest.mark.parametrize("dim", [4, 16])
def test_compiles_in_one_graph(dim):
    cu = cu_seqlens_of(LENGTHS)

    def attend(q, k, v):
        out, stats = mk.varlen_attention(q, k, v, cu, max_seqlen_q=9, causal=True, return_stats=True)
        return (out**2).sum() + (stats.summary_attention * stats.received_attention).sum()

    inputs = list(qkv(sum(LENGTHS), dim=dim, dtype=torch.float32))
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), attend(*inputs))
    for got, want in zip(
        torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(attend(*inputs), inputs), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dim", [4, 16])
def test_nan_stays_in_its_sequence_and_large_scores_do_not_overflow(dim):
    cu = cu_seqlens_of([7, 5, 1])
    q, k, v = (x.detach() for x in qkv(13, dim=dim, dtype=torch.float32))

    def attend(q):
        out, stats = mk.varlen_attention(q, k, v, cu, max_seqlen_q=7, return_stats=True)
        return torch.cat([out.flatten(1), stats.summary_attention[:, None], stats.received_attention[:, None]], dim=1)

    large = attend(q * 1e4)
    assert large.isfinite().all()
    assert attend(q.index_fill(0, torch.tensor(9), torch.inf))[7:12].isnan().any()
    broken = attend((q * 1e4).index_fill(0, torch.tensor(9), torch.nan))
    assert broken[7:12].isnan().any()
    assert torch.equal(broken[:7], large[:7]) and torch.equal(broken[12:], large[12:])


def test_flops():
    q, k, v = qkv(sum(LENGTHS), dtype=torch.float32)
    cu = cu_seqlens_of(LENGTHS)
    with FlopCounterMode(display=False) as counter:
        mk.varlen_attention(q, k, v, cu, max_seqlen_q=9)
    assert counter.get_total_flops() == 4 * (25 + 1 + 81) * 12


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_cpu_within_twice_the_reference_error(dtype, causal, dim):
    lengths = [63, 1, 0, 111, 2, 17]
    cu, index = cu_seqlens_of(lengths), torch.tensor([62, 0, -1, 5, -1, 0], dtype=torch.int32)
    qkv = torch.randn(sum(lengths), 3, 3, dim).to(dtype)  # fused: rows are 9 heads apart

    def attend(qkv, backend, return_stats=True):
        ragged = {"cu_seqlens_q": cu, "max_seqlen_q": 111, "causal": causal, "summary_index": index}
        result = mk.varlen_attention(*qkv.unbind(1), **ragged, return_stats=return_stats, backend=backend)
        return (result[0], *result[1]) if return_stats else result

    exact = attend(qkv.double(), "reference")
    # With dot products of bfloat16, P enters the second product in that dtype: a rounding is allowed beside the rule.
    native = pytest.importorskip("madtp_kernels._C")
    floor = torch.finfo(dtype).eps / 2 if dtype is torch.bfloat16 and native.cpu.isa() == "avx512_bf16" else 0
    for got, want, limit in zip(attend(qkv, "cpu"), exact, attend(qkv, "reference"), strict=True):
        assert got.dtype == limit.dtype
        allowed = 2 * (limit.double() - want).abs().max() + 1e-6 + floor * want.abs().max()
        assert (got.double() - want).abs().max() <= allowed
    assert torch.equal(attend(qkv, "cpu", return_stats=False), attend(qkv, "cpu")[0])


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [17, 18, 33, 34, 50, 65, 82, 577])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_equal_tokens_have_equal_statistics(dtype, length, softcap):
    q, k, v = torch.randn(3, length, 3, 24).to(dtype)
    twins = [1, 7, length - 3, length - 2, length - 1]  # in every part of a panel, and in the last keys of it
    for x in (q, k, v):
        x[twins] = x[5].clone()
    out, stats = mk.varlen_attention(
        *(q, k, v, cu_seqlens_of([length])),
        **{"max_seqlen_q": length, "softcap": softcap, "return_stats": True, "backend": "cpu"},
    )
    for result in (out, *stats):
        assert all(torch.equal(result[twin], result[5]) for twin in twins)


@needs_extension
def test_cpu_results_do_not_depend_on_batch_or_threads():
    lengths, before = [200, 37, 1, 90], torch.get_num_threads()
    q, k, v = torch.randn(3, sum(lengths), 2, 32).unbind()
    results = {}
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out, stats = mk.varlen_attention(
                q, k, v, cu_seqlens_of(lengths), max_seqlen_q=200, return_stats=True, backend="cpu"
            )
            results[threads] = (out, *stats)
    finally:
        torch.set_num_threads(before)
    begin = 0
    for length in lengths:
        rows = slice(begin, begin + length)
        out, stats = mk.varlen_attention(
            q[rows], k[rows], v[rows], cu_seqlens_of([length]), max_seqlen_q=length, return_stats=True, backend="cpu"
        )
        for result in results.values():
            assert all(torch.equal(a[rows], b) for a, b in zip(result, (out, *stats), strict=True))
        begin += length


def gradients(qkv, cu, weights, backend, dtype=None, return_stats=True, **options):
    """Gradients to fused qkv (T, 3, H, D) of a weighted sum of all results."""
    qkv = qkv.detach().to(dtype or qkv.dtype).requires_grad_()
    result = mk.varlen_attention(
        *qkv.unbind(1), cu, max_seqlen_q=int(cu.diff().max()), return_stats=return_stats, backend=backend, **options
    )
    results = (result[0], *result[1]) if return_stats else (result,)
    loss = sum((x * w.to(x.dtype)).sum() for x, w in zip(results, weights, strict=False))
    return torch.autograd.grad(loss, qkv)[0]


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("return_stats", [False, True])
def test_cpu_gradients_within_twice_the_reference_error(dtype, causal, dim, return_stats):
    lengths = [63, 1, 0, 111, 2, 17]
    cu, index = cu_seqlens_of(lengths), torch.tensor([62, 0, -1, 5, -1, 0], dtype=torch.int32)
    qkv = torch.randn(sum(lengths), 3, 3, dim).to(dtype)
    weights = [torch.randn(sum(lengths), 3, dim).to(dtype), torch.randn(sum(lengths)), torch.randn(sum(lengths))]
    options = {"return_stats": return_stats, "causal": causal, "summary_index": index}
    want = gradients(qkv, cu, weights, "reference", torch.float64, **options)
    limit = gradients(qkv, cu, weights, "reference", **options)
    got = gradients(qkv, cu, weights, "cpu", **options)
    assert got.dtype == dtype
    assert (got.double() - want).abs().max() <= 2 * (limit.double() - want).abs().max() + 2e-6


@needs_extension
@pytest.mark.parametrize("causal", [False, True])
def test_cpu_gradients_of_long_sequences(causal):
    """More query rows than the backward looks at together, twice over."""
    lengths = [1200, 5]
    qkv, cu = torch.randn(1205, 3, 2, 16), cu_seqlens_of(lengths)
    weights = [torch.randn(1205, 2, 16), torch.randn(1205), torch.randn(1205)]

    want = gradients(qkv, cu, weights, "reference", torch.float64, causal=causal)
    limit, got = (gradients(qkv, cu, weights, backend, causal=causal) for backend in ("reference", "cpu"))
    errors, bounds = ((x.double() - want).abs().flatten() for x in (got, limit))
    # Among a million pairs, a few have two heads that tie to rounding: the gradient may take either.
    assert errors.quantile(0.999) <= 2 * bounds.max() + 2e-6


@needs_extension
def test_cpu_gradients_of_cross_attention():
    cu_q, cu_k = cu_seqlens_of([20, 0, 3, 0]), cu_seqlens_of([77, 5, 130, 0])
    q, k, v, weight = torch.randn(23, 2, 32), torch.randn(212, 2, 32), torch.randn(212, 2, 32), torch.randn(23, 2, 32)

    def run(backend, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = mk.varlen_attention(*inputs, cu_q, cu_k, max_seqlen_q=20, max_seqlen_k=130, backend=backend)
        return torch.autograd.grad((out * weight).sum(), inputs)

    for got, want in zip(run("cpu", torch.float32), run("reference", torch.float64), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    assert run("cpu", torch.float32)[1][20 + 57 : 82].eq(0).all(), "keys without queries have a zero gradient"


@needs_extension
def test_cpu_gradients_do_not_depend_on_batch_or_threads():
    lengths, before = [200, 37, 1, 0, 90, 610], torch.get_num_threads()
    rows = sum(lengths)
    qkv, weights = torch.randn(rows, 3, 2, 32), [torch.randn(rows, 2, 32), torch.randn(rows), torch.randn(rows)]
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(gradients(qkv, cu_seqlens_of(lengths), weights, "cpu"))
    finally:
        torch.set_num_threads(before)
    begin = 0
    for length in lengths:
        part = slice(begin, begin + length)
        alone = gradients(qkv[part], cu_seqlens_of([length]), [w[part] for w in weights], "cpu")
        assert all(torch.equal(result[part], alone) for result in results)
        begin += length


@needs_extension
def test_the_gradient_of_a_maximum_goes_to_the_first_head_that_reaches_it():
    x = torch.randn(9, 3, 1, 16).expand(-1, -1, 3, -1)  # three equal heads
    weights = [torch.zeros(9, 3, 16), torch.zeros(9), torch.randn(9)]
    got = gradients(x, cu_seqlens_of([9]), weights, "cpu")
    torch.testing.assert_close(got, gradients(x, cu_seqlens_of([9]), weights, "reference"), rtol=1e-4, atol=1e-6)
    assert got[:, :2, 0].abs().max() > 0 and got[:, :, 1:].eq(0).all()


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_extension)])
@pytest.mark.parametrize("zeros", ["first token", "one head", "all"])
def test_outputs_of_zeros_have_no_gradient_through_their_norm(backend, zeros):
    cu = cu_seqlens_of([6])
    q, k, v = (x.detach() for x in qkv(6, dim=8, dtype=torch.float32))
    at = {"first token": (slice(1),), "one head": (slice(None), 1), "all": (slice(None),)}[zeros]
    v[at] = 0

    def summaries(dtype, backend, order=1):
        x = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        result = mk.varlen_attention(*x, cu, max_seqlen_q=6, causal=True, return_stats=True, backend=backend)
        loss = (result[1].summary_attention * torch.arange(1.0, 7.0)).sum() + result[0].cos().sum()
        grads = torch.autograd.grad(100 * loss, x, create_graph=order > 1)
        return grads if order == 1 else torch.autograd.grad(sum(grad.square().sum() for grad in grads), x)

    for got, expected in zip(summaries(torch.float32, backend), summaries(torch.float64, "reference"), strict=True):
        assert expected.isfinite().all()
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
    assert all(grad.isfinite().all() for grad in summaries(torch.float64, backend="reference", order=2))


@needs_extension
def test_head_dims_the_cpu_kernel_lacks_run_on_the_reference():
    q, k, v = (x.float().detach() for x in qkv(15, dim=20))
    ragged = {"cu_seqlens_q": cu_seqlens_of(LENGTHS), "max_seqlen_q": 9}
    choice = mk.explain("varlen_attention", q, k, v, **ragged)
    assert choice.backend == "reference" and "head_dim must be a multiple of 8 from 8 to 256" in choice.rejected["cpu"]
    with pytest.raises(RuntimeError, match="cannot run on backend 'cpu' .*head_dim must be a multiple of 8"):
        mk.varlen_attention(q, k, v, **ragged, backend="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(8, 2, 5)}, r"k must be of heads of 4, .*, got float32 \(8, 2, 5\)"),
        ({"v": torch.zeros(8, 2, 4).half()}, "v must be a 3-dimensional tensor of float32, got float16"),
        ({"k": torch.zeros(8, 2, 4, device="meta")}, r"k must be on cpu, got float32 \(8, 2, 4\) on meta"),
        ({"k": torch.zeros(7, 2, 4), "v": torch.zeros(7, 2, 4)}, r"k must be of 8 rows like q \(self-attention\)"),
        ({"cu_seqlens_q": cu_seqlens_of([5, 4])}, "cu_seqlens_q must be the row count 8 at its last entry, got 9"),
        ({"max_seqlen_q": 4}, r"max_seqlen_q must be at least the longest sequence \(5\), got int 4"),
        ({"summary_index": torch.tensor([0, 3], dtype=torch.int32)}, r"sequence 1 has 3 rows\), got 3"),
        ({"cu_seqlens_k": torch.tensor([0, 8, 8], dtype=torch.int32), "max_seqlen_k": 8}, "at least one key where"),
        ({"cu_seqlens_k": torch.tensor([0, 5, 8], dtype=torch.int32)}, "max_seqlen_k must be given with cu_seqlens_k"),
    ],
)
def test_refuses(change, message):
    x = torch.zeros(8, 2, 4)
    arguments = {"q": x, "k": x, "v": x, "cu_seqlens_q": cu_seqlens_of([5, 3]), "max_seqlen_q": 5}
    with pytest.raises(ValueError, match=message):
        mk.varlen_attention(**(arguments | change))


@pytest.mark.parametrize("old", ["summary", "received"])
def test_old_names_of_the_statistics_are_refused_by_their_new_ones(old):
    fields = {"summary_attention": torch.ones(2), "received_attention": torch.ones(2)}
    fields[old] = fields.pop(f"{old}_attention")
    with pytest.raises(TypeError, match=f"^AttentionStats: {old} is now called {old}_attention$"):
        mk.AttentionStats(**fields)
