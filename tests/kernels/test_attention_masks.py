# SPDX-License-Identifier: Apache-2.0
"""`varlen_attention` with grouped-query heads, unequal lengths, windows, soft caps and ALiBi: every pair by hand."""

import pytest
import torch
from ragged_cases import cu_seqlens_of

import madtp_kernels as mk
from madtp_kernels import dispatch

pytestmark = pytest.mark.sanitized
needs_extension = pytest.mark.skipif(dispatch.extension_unsupported_reason() is not None, reason="no C++ extension")

QUERIES, KEYS = [5, 1, 0, 9, 4], [5, 4, 3, 7, 1]  # fewer than keys, none, more than keys
HEADS, KEY_HEADS, DIM = 4, 2, 8
SLOPES = torch.tensor([0.5, 0.25, 1.0, 0.0])
MASKS = {
    "causal": {"causal": True},
    "window": {"window_size": (2, 1)},
    "left": {"window_size": (1, -1)},
    "right": {"window_size": (-1, 2)},
    "causal window": {"causal": True, "window_size": (3, 5)},
    "itself": {"window_size": (0, 0)},
}
BIASES = {
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi_slopes": SLOPES},
    "alibi by sequence": {"alibi_slopes": torch.stack([SLOPES * (b + 1) for b in range(5)])},
    "all": {"causal": True, "window_size": (3, -1), "softcap": 2.0, "alibi_slopes": SLOPES},
}
OPTIONS = {"plain": {}, **MASKS, **BIASES}


def by_hand(q, k, v, causal=False, window_size=(-1, -1), softcap=0.0, slopes=None):
    """Attention of one sequence, and its probabilities (H, Nq, Nk): pair by pair, as it is defined."""
    queries, keys, group = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    out, p = torch.zeros_like(q), q.new_zeros(q.shape[1], queries, keys)
    for h in range(q.shape[1]):
        for i in range(queries):
            position = i + keys - queries
            left, right = window_size
            right = 0 if causal else right
            scores = {}
            for j in range(keys):
                if (right >= 0 and j > position + right) or (left >= 0 and j < position - left):
                    continue
                score = q[i, h] @ k[j, h // group] * q.shape[2] ** -0.5
                if softcap:
                    score = softcap * torch.tanh(score / softcap)
                scores[j] = score - (0 if slopes is None else slopes[h].double() * abs(position - j))
            if scores:
                p[h, i, list(scores)] = torch.stack(list(scores.values())).softmax(0)
                out[i, h] = p[h, i] @ v[:, h // group]
    return out, p


def inputs(queries=QUERIES, keys=KEYS, dtype=torch.float64, dim=DIM):
    torch.manual_seed(0)
    shapes = (sum(queries), HEADS, dim), *[(sum(keys), KEY_HEADS, dim)] * 2
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def ragged(queries=QUERIES, keys=KEYS):
    lengths = {"cu_seqlens_q": cu_seqlens_of(queries), "max_seqlen_q": max(queries)}
    return lengths if keys is queries else lengths | {"cu_seqlens_k": cu_seqlens_of(keys), "max_seqlen_k": max(keys)}


def one_by_one(q, k, v, queries, keys, options):
    """`by_hand` of each sequence."""
    options = dict(options)
    slopes = options.pop("alibi_slopes", None)
    parts = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
    for b, part in enumerate(parts):
        yield by_hand(*part, slopes=slopes if slopes is None or slopes.ndim == 1 else slopes[b], **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_pair(options):
    q, k, v = (x.detach() for x in inputs())
    got = mk.varlen_attention(q, k, v, **ragged(), **options)
    torch.testing.assert_close(got, torch.cat([out for out, _ in one_by_one(q, k, v, QUERIES, KEYS, options)]))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_statistics(options):
    lengths, index = QUERIES, [4, 0, 0, -1, 2]
    q, k, v = (x.detach() for x in inputs(lengths, lengths))
    summary_index = torch.tensor(index, dtype=torch.int32)
    arguments = ragged(lengths, lengths) | options | {"summary_index": summary_index}
    got, stats = mk.varlen_attention(q, k, v, **arguments, return_stats=True)
    masked = "causal" in options or "window_size" in options
    summary, received = [], []
    outs = list(one_by_one(q, k, v, lengths, lengths, options))
    for (out, p), s in zip(outs, index, strict=True):
        norms = out.norm(dim=-1)  # (N, H)
        share = norms / norms.sum(1, keepdim=True)
        summary.append((p[:, s] * share.T).sum(0) if s >= 0 and len(out) else out.new_zeros(len(out)))
        counted = p.amax(0) * (torch.arange(len(out)) != s)[:, None]
        seen = ((p.amax(0) > 0) & (torch.arange(len(out)) != s)[:, None]).sum(0).clamp(min=1)
        received.append(counted.sum(0) / seen if masked else counted.sum(0))
    torch.testing.assert_close(got, torch.cat([out for out, _ in outs]))
    torch.testing.assert_close(stats.summary_attention, torch.cat(summary))
    torch.testing.assert_close(stats.received_attention, torch.cat(received))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_log_sum_exp(options):
    """-inf where nothing is seen; elsewhere what normalises the scores."""
    q, k, v = (x.detach() for x in inputs())
    cu_q, cu_k = cu_seqlens_of(QUERIES), cu_seqlens_of(KEYS)
    window = options.get("window_size", (-1, -1))
    rest = options.get("softcap", 0.0), options.get("alibi_slopes")
    arguments = (cu_q, cu_k, 9, 7, DIM**-0.5, options.get("causal", False), *window, *rest, None, False, "reference")
    *_, lse = torch.ops.madtp.varlen_attention(q, k, v, *arguments)
    blind = lse.T.isneginf()  # (Tq, H)
    assert blind.any() == ("causal" in options or window[1] >= 0) and not blind.all()
    out = mk.varlen_attention(q, k, torch.ones_like(v), **ragged(), **options)
    torch.testing.assert_close(out, torch.where(blind, 0.0, 1.0).double()[..., None].expand_as(out))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("return_stats", [False, True])
def test_gradients_in_float64(options, return_stats):
    keys = QUERIES if return_stats else KEYS

    def attend(q, k, v):
        result = mk.varlen_attention(q, k, v, **ragged(QUERIES, keys), **options, return_stats=return_stats)
        return (result[0], *result[1]) if return_stats else result

    assert torch.autograd.gradcheck(attend, tuple(inputs(QUERIES, keys, dim=2)), fast_mode=True)


def test_a_window_as_wide_as_the_sequence_and_right_0_is_a_causal_mask():
    q, k, v = (x.detach() for x in inputs())
    causal = mk.varlen_attention(q, k, v, **ragged(), causal=True)
    assert torch.equal(causal, mk.varlen_attention(q, k, v, **ragged(), window_size=(100, 0)))
    plain = mk.varlen_attention(q, k, v, **ragged())
    assert torch.equal(plain, mk.varlen_attention(q, k, v, **ragged(), window_size=(100, 100)))


LONG_QUERIES, LONG_KEYS = [63, 1, 0, 121, 17, 40], [130, 4, 3, 70, 17, 45]
# All options in float32 with groups of two; the other types and groups with all options at once.
CASES = [
    pytest.param(options, key_heads, dtype, id=f"{name}-{key_heads}-{dtype}".replace("torch.", ""), marks=marks)
    for name, options in OPTIONS.items()
    for key_heads in (1, 2, 4)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for usual in [(key_heads == 2 and dtype == torch.float32) or (name == "all" and key_heads == 1)]
    for marks in [() if usual else pytest.mark.slow]
]


def long_inputs(keys, key_heads, dtype, dim=24):
    torch.manual_seed(0)
    shapes = (sum(LONG_QUERIES), HEADS, dim), *[(sum(keys), key_heads, dim)] * 2
    return [torch.randn(shape).to(dtype) for shape in shapes]


def long_options(options):
    """Those of the short sequences, for a sequence more."""
    slopes = options.get("alibi_slopes")
    if slopes is None or slopes.ndim == 1:
        return options
    return options | {"alibi_slopes": torch.cat([slopes, slopes[:1]])}


def allowed(want, limit, dtype):
    """Twice the error of the same-dtype reference.

    With dot products of bfloat16, P enters the second product in that dtype: a rounding beside the rule.
    """
    native = pytest.importorskip("madtp_kernels._C")
    rounds = dtype is torch.bfloat16 and native.cpu.isa() == "avx512_bf16"
    floor = torch.finfo(dtype).eps / 2 if rounds else 0
    return 2 * (limit.double() - want).abs().max() + 2e-6 + floor * want.abs().max()


@needs_extension
@pytest.mark.parametrize(("options", "key_heads", "dtype"), CASES)
@pytest.mark.parametrize("return_stats", [False, True])
def test_cpu_within_twice_the_reference_error(options, key_heads, dtype, return_stats):
    keys = LONG_QUERIES if return_stats else LONG_KEYS
    q, k, v = long_inputs(keys, key_heads, dtype)
    index = torch.tensor([62, 0, 0, 5, -1, 0], dtype=torch.int32) if return_stats else None
    arguments = ragged(LONG_QUERIES, keys) | long_options(options) | {"summary_index": index}

    def run(backend, dtype):
        x = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        result = mk.varlen_attention(*x, **arguments, return_stats=return_stats, backend=backend)
        results = (result[0], *result[1]) if return_stats else (result,)
        torch.manual_seed(1)
        # Random weights for each statistic, and rounded ones for the output.
        loss = sum((y * torch.randn(y.shape).bfloat16().to(y.dtype)).sum() for y in results)
        return *results, *torch.autograd.grad(loss, x)

    for got, want, limit in zip(
        run("cpu", dtype), run("reference", torch.float64), run("reference", dtype), strict=True
    ):
        assert got.dtype == limit.dtype and got.shape == limit.shape
        assert (got.double() - want).abs().max() <= allowed(want, limit, dtype)


@needs_extension
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_cpu_sees_what_the_reference_sees(options):
    """Where nothing is seen, zeros, a log-sum-exp of -inf and no gradient; elsewhere the same log-sum-exp."""
    q, k, v = long_inputs(LONG_KEYS, KEY_HEADS, torch.float32)
    options = long_options(options)
    rest = options.get("softcap", 0.0), options.get("alibi_slopes"), None, False
    arguments = (
        *(cu_seqlens_of(LONG_QUERIES), cu_seqlens_of(LONG_KEYS), 121, 130, 0.3, options.get("causal", False)),
        *(*options.get("window_size", (-1, -1)), *rest),
    )
    out, _, _, lse = torch.ops.madtp.varlen_attention(q, k, v, *arguments, "cpu")
    *_, want = torch.ops.madtp.varlen_attention(q, k, v, *arguments, "reference")
    torch.testing.assert_close(lse, want)
    empty = q.new_empty(0)
    grads = torch.ops.madtp.varlen_attention_backward(out, empty, empty, out, lse, q, k, v, *arguments, "cpu")
    blind = lse.T.isneginf()
    assert blind.any() == (want.isneginf().any())
    assert out[blind].eq(0).all() and grads[0][blind].eq(0).all()
    assert all(grad.isfinite().all() for grad in grads)


@needs_extension
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_cpu_results_do_not_depend_on_batch_or_threads(options):
    q, k, v = long_inputs(LONG_KEYS, KEY_HEADS, torch.float32)
    options, before, results = long_options(options), torch.get_num_threads(), []
    slopes = options.get("alibi_slopes")

    def run(x, **arguments):
        x = [t.clone().requires_grad_() for t in x]
        out = mk.varlen_attention(*x, **arguments, backend="cpu")
        return out, *torch.autograd.grad(out.square().sum(), x)

    try:
        for threads in (1, 5):
            torch.set_num_threads(threads)
            results.append(run((q, k, v), **ragged(LONG_QUERIES, LONG_KEYS), **options))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    rows, columns = LONG_QUERIES, LONG_KEYS
    parts = [x.split(lengths) for x, lengths in zip(results[0], (rows, rows, columns, columns), strict=True)]
    for b, x in enumerate(zip(q.split(rows), k.split(columns), v.split(columns), strict=True)):
        own = options if slopes is None or slopes.ndim == 1 else options | {"alibi_slopes": slopes[b : b + 1]}
        alone = run(x, **ragged([rows[b]], [columns[b]]), **own)
        assert all(torch.equal(part[b], got) for part, got in zip(parts, alone, strict=True))


def test_flops_are_of_the_pairs_that_are_seen():
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v = (x.detach() for x in inputs())
    for options in (*MASKS.values(), {"window_size": (2**63 - 1, 2**63 - 1)}):
        with FlopCounterMode(display=False) as counter:
            mk.varlen_attention(q, k, v, **ragged(), **options)
        pairs = sum(int((p[0] > 0).sum()) for _, p in one_by_one(q, k, v, QUERIES, KEYS, options))
        assert counter.get_total_flops() == 4 * pairs * HEADS * DIM


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window_size": 3}, r"window_size must be two integers, \(left, right\), got int 3"),
        ({"window_size": (1.5, 0)}, "window_size must be an integer, got float 1.5"),
        ({"window_size": (-2, 0)}, r"window_size must be -1 or at least 0 on either side, got tuple \(-2, 0\)"),
        ({"softcap": -1.0}, "softcap must be a finite number >= 0, got float -1.0"),
        ({"softcap": float("nan")}, "softcap must be a finite number >= 0, got float nan"),
        ({"softcap": "1"}, "softcap must be a number"),
        ({"alibi_slopes": torch.ones(3)}, r"alibi_slopes must be of shape \(H,\) or \(B, H\), got float32 \(3,\)"),
        ({"alibi_slopes": torch.ones(4).double()}, "alibi_slopes must be a 1-dimensional tensor of float32"),
        ({"alibi_slopes": [1.0] * 4}, "alibi_slopes must be a tensor or None, got list"),
        ({"k": torch.zeros(20, 3, DIM).double()}, "k must be of heads of 8, and of 4 of them or a"),
        ({"v": torch.zeros(20, 1, DIM).double()}, "v must be of as many heads as k"),
        ({"return_stats": True}, "return_stats must be False in cross-attention"),
    ],
)
def test_refuses(change, message):
    q, k, v = (x.detach() for x in inputs())
    with pytest.raises(ValueError, match=message):
        mk.varlen_attention(**({"q": q, "k": k, "v": v} | ragged() | change))
