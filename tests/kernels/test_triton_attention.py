# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of `varlen_attention` against the reference: in the interpreter without a GPU."""

import math

import pytest
import torch
from ragged_cases import cu_seqlens_of
from test_attention_masks import OPTIONS, SLOPES
from triton_cases import DEVICE, DTYPES, MARKS, largest, wild_integers, with_slow, within_twice

import madtp_kernels as mk
from madtp_kernels import dispatch

pytest.importorskip("triton")
from madtp_kernels.triton.attention import backward as attention_backward
from madtp_kernels.triton.attention.backward import varlen_attention_backward
from madtp_kernels.triton.attention.forward import varlen_attention

pytestmark = MARKS

LENGTHS = [35, 1, 0, 6, 2, 3]
INDEX = [34, 0, -1, 5, -1, 99]  # last, first, none, inside, none, past the end


class Case:
    """Inputs of one call, q, k and v side by side, and upstream gradients."""

    def __init__(self, lengths, heads=2, dim=16, dtype=torch.float32, index=None, causal=False, stats=True, seed=0):
        generator = torch.Generator().manual_seed(seed)
        rows = sum(lengths)

        def random(*shape):
            return torch.randn(*shape, generator=generator).to(DEVICE)

        self.qkv = random(rows, 3, heads, dim).to(dtype)  # rows are 3 * heads apart
        self.grads = [random(rows, heads, dim).to(dtype), random(rows), random(rows)]
        self.cu = cu_seqlens_of(lengths).to(DEVICE)
        self.longest = max(lengths, default=0)
        self.index = None if index is None else torch.tensor(index, dtype=torch.int32, device=DEVICE)
        self.scale, self.causal, self.stats = dim**-0.5, causal, stats

    def arguments(self):
        ragged = (self.cu, self.cu, self.longest, self.longest)
        return *ragged, self.scale, self.causal, -1, -1, 0.0, None, self.index, self.stats

    def run(self, qkv=None):
        """out, summary_attention, received_attention, lse, dq, dk, dv of the kernels."""
        q, k, v = self.qkv.unbind(1) if qkv is None else qkv
        out, summary_attention, received_attention, lse = varlen_attention(q, k, v, *self.arguments())
        grads = (self.grads[0], *(self.grads[1:] if self.stats else (summary_attention, received_attention)))
        return (
            out,
            summary_attention,
            received_attention,
            lse,
            *varlen_attention_backward(*grads, out, lse, q, k, v, *self.arguments()),
        )

    def reference(self, dtype):
        """The same in `dtype` by the reference, without lse."""
        inputs = [x.to(dtype).requires_grad_() for x in self.qkv.unbind(1)]
        in_range = self.index
        if in_range is not None:
            in_range = torch.where(self.index < self.cu.diff(), self.index, -1)
        result = mk.varlen_attention(
            *inputs, self.cu, max_seqlen_q=self.longest, softmax_scale=self.scale, causal=self.causal,
            summary_index=in_range, return_stats=self.stats, backend="reference",
        )  # fmt: skip
        outputs = (result[0], *result[1]) if self.stats else (result,)
        upstream = [g.to(o.dtype) for g, o in zip(self.grads, outputs, strict=False)]
        grads = torch.autograd.grad(outputs, inputs, upstream)
        return *(o.detach() for o in outputs), *grads

    def check(self):
        out, summary_attention, received_attention, _, *grads = self.run()
        assert summary_attention.numel() == received_attention.numel() == (out.shape[0] if self.stats else 0)
        got = (out, summary_attention, received_attention, *grads) if self.stats else (out, *grads)
        within_bound(got, self.reference(torch.float64), self.reference(self.qkv.dtype))


def within_bound(got, exact, same_dtype):
    """Twice the reference's error; in 16 bits and a rounding: P and dS enter their matrix products in that dtype."""
    eps = torch.finfo(got[0].dtype).eps if got[0].dtype != torch.float32 else 0.0
    within_twice(got[:-3], exact[:-3], same_dtype[:-3], floor=eps / 2)
    within_twice(got[-3:], exact[-3:], same_dtype[-3:], floor=eps)


def equal(got, expected):
    return all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", with_slow([72], [8, 16, 24, 32, 64, 80, 96, 128, 200, 256]))
def test_head_dims(dtype, dim):
    Case([33, 1, 0, 2], dim=dim, dtype=dtype, causal=dim % 64 == 0, index=[32, 0, -1, 1]).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", with_slow([True], [False]))
@pytest.mark.parametrize("index", with_slow([INDEX], [[-1] * len(INDEX)]), ids=["any", "none"])
def test_summary_tokens(dtype, causal, index):
    Case(LENGTHS, dtype=dtype, causal=causal, index=index).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", with_slow([True], [False]))
def test_without_statistics(dtype, causal):
    case = Case([37, 1, 0, 5], dtype=dtype, dim=32, causal=causal, stats=False)
    case.check()
    qkv, arguments = case.qkv.unbind(1), case.arguments()
    out, _, _, lse = varlen_attention(*qkv, *arguments)
    same, _, _, same_lse = varlen_attention(*qkv, *arguments[:-1], True)
    assert torch.equal(same, out) and torch.equal(same_lse, lse)


def test_log_sum_exp_is_natural():
    case = Case([40, 3], heads=3, causal=True)
    q, k, _ = case.qkv.double().unbind(1)
    scores = torch.einsum("ihd,jhd->hij", q, k) * case.scale
    position = torch.arange(43, device=DEVICE)
    start = torch.where(position < 40, 0, 40)
    visible = (position >= start[:, None]) & (position <= position[:, None])
    expected = scores.masked_fill(~visible, -math.inf).logsumexp(-1)
    torch.testing.assert_close(case.run()[3].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("length", with_slow([65], [577]))
def test_image_length(length):
    """In the interpreter; test_triton_attention_gpu.py has more of them, and longer ones."""
    Case([length], heads=2, dim=64, dtype=torch.float16).check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_attention(dtype):
    queries, keys = [34, 1, 0, 3, 2], [17, 5, 4, 66, 1]
    cu_q, cu_k = cu_seqlens_of(queries).to(DEVICE), cu_seqlens_of(keys).to(DEVICE)
    q = torch.randn(sum(queries), 2, 32, device=DEVICE).to(dtype)
    k, v = torch.randn(2, sum(keys), 2, 32, device=DEVICE).to(dtype).unbind()
    grad = torch.randn_like(q)

    def reference(dtype):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = mk.varlen_attention(*inputs, cu_q, cu_k, max_seqlen_q=34, max_seqlen_k=66, backend="reference")
        return out.detach(), *torch.autograd.grad(out, inputs, grad.to(dtype))

    arguments = (q, k, v, cu_q, cu_k, 34, 66, 32**-0.5, False, -1, -1, 0.0, None, None, False)
    out, summary_attention, received_attention, lse = varlen_attention(*arguments)
    grads = varlen_attention_backward(grad, summary_attention, received_attention, out, lse, *arguments)
    within_bound((out, *grads), reference(torch.float64), reference(dtype))


def test_queries_without_keys_give_zeros():
    cu_q, cu_k = cu_seqlens_of([3, 2]).to(DEVICE), cu_seqlens_of([0, 4]).to(DEVICE)
    q, k = torch.randn(5, 2, 16, device=DEVICE), torch.randn(4, 2, 16, device=DEVICE)
    arguments = (q, k, k, cu_q, cu_k, 3, 4, 0.25, False, -1, -1, 0.0, None, None, False)
    out, *empty, lse = varlen_attention(*arguments)
    dq, *_ = varlen_attention_backward(torch.ones_like(q), *empty, out, lse, *arguments)
    assert not out[:3].any() and not dq[:3].any() and out[3:].all()


@pytest.mark.parametrize("causal", with_slow([True], [False]))
def test_slabs_of_queries(causal, monkeypatch):
    """Longer sequences than a slab: dk and dv add up in float32; sequences of one slab are as they were."""
    case = Case([140, 20], dtype=torch.float16, causal=causal, index=[139, 3])
    whole = case.run()
    monkeypatch.setattr(attention_backward, "SLAB", 128)
    case.check()
    cut = case.run()
    assert equal(cut[:5], whole[:5])  # to dq
    assert all(torch.equal(c[140:], w[140:]) for c, w in zip(cut[5:], whole[5:], strict=True))
    assert all(grad.dtype == torch.float16 for grad in cut[4:])


@pytest.mark.parametrize("dtype_and_length", with_slow([(torch.float32, 18)], [(torch.float16, 130)]))
@pytest.mark.parametrize("causal", with_slow([True], [False]))
def test_a_sequence_does_not_depend_on_the_batch(dtype_and_length, causal, monkeypatch):
    dtype, length = dtype_and_length
    monkeypatch.setattr(attention_backward, "SLAB", 128)
    lengths, index = [length, 17, 1], [length - 1, 4, -1]
    case = Case(lengths, dtype=dtype, causal=causal, index=index)
    together = case.run()
    assert equal(case.run(), together)
    begin = 0
    for length, row in zip(lengths, index, strict=True):
        rows = slice(begin, begin + length)
        alone = Case([length], dtype=dtype, causal=causal, index=[row])
        alone.qkv, alone.grads = case.qkv[rows], [g[rows] for g in case.grads]
        alone.longest += 3
        for position, (got, expected) in enumerate(zip(alone.run(), together, strict=True)):
            assert torch.equal(got, expected[:, rows] if position == 3 else expected[rows])
        begin += length


def test_any_layout_is_read():
    case = Case([33, 4], dtype=torch.float16)
    expected = case.run([x.contiguous() for x in case.qkv.unbind(1)])
    head_major = case.qkv.permute(1, 2, 0, 3).contiguous().transpose(1, 2)
    channels_apart = torch.stack([case.qkv, case.qkv], -1)[..., 0].unbind(1)
    for views in (case.qkv.unbind(1), head_major.unbind(0), channels_apart):
        assert not views[0].is_contiguous()
        assert equal(case.run(views), expected)
    case.grads = [torch.ones((), device=DEVICE).expand_as(g) for g in case.grads]  # the gradients of sums
    expanded = case.run()
    case.grads = [g.contiguous() for g in case.grads]
    assert equal(case.run(), expanded)


def test_rows_past_the_last_sequence_are_zero():
    case = Case([20, 30], dtype=torch.float16, index=[3, 4])
    expected = case.run()
    padded = Case([20, 30, 25], dtype=torch.float16, index=[3, 4])
    padded.cu, padded.longest = case.cu, 30
    padded.qkv[:50], padded.qkv[50:] = case.qkv, math.nan
    padded.grads = [torch.cat([g, g.new_full((25, *g.shape[1:]), math.nan)]) for g in case.grads]
    for position, (got, want) in enumerate(zip(padded.run(), expected, strict=True)):
        if position == 3:
            assert torch.equal(got[:, :50], want)
        else:
            assert torch.equal(got[:50], want) and not got[50:].any()


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [1]], ids=str)
def test_corner_batches(lengths):
    case = Case(lengths)
    out, summary_attention, received_attention, lse, *grads = case.run()
    rows = sum(lengths)
    assert (
        out.shape == (rows, 2, 16)
        and summary_attention.shape == received_attention.shape == (rows,)
        and lse.shape == (2, rows)
    )
    assert all(grad.shape == out.shape for grad in grads)
    if rows:
        assert torch.equal(out, case.qkv[:, 2]) and summary_attention.item() == 1 and received_attention.item() == 0
    case.stats = False
    assert case.run()[1].numel() == 0


@pytest.mark.parametrize("part", with_slow([1, 2], [0]))
def test_nan_stays_in_its_sequence(part):
    case = Case([40, 30, 50], dtype=torch.float16, index=[0, 29, -1])
    clean = case.run()
    case.qkv[41, part, 0, 3] = math.nan
    broken = case.run()
    for position, (got, want) in enumerate(zip(broken, clean, strict=True)):
        got, want = (x.T if position == 3 else x for x in (got, want))
        assert torch.equal(got[:40], want[:40]) and torch.equal(got[70:], want[70:])
        assert position in (1, 2, 3) or got[40:70].isnan().any()
    assert broken[2][40:70].isnan().any() == (part < 2)


def test_large_scores():
    case = Case([37, 2], dtype=torch.float16)
    case.qkv[:, :2] *= 200  # scores of 1e4: a rounding of the log-sum-exp is 1e-3 of P
    got, exact = case.run(), case.reference(torch.float64)
    assert all(x.isfinite().all() for x in got)
    assert all(largest(g - e) <= 1e-2 for g, e in zip(got[:3], exact[:3], strict=True))


def test_negative_scale():
    case = Case([20, 3])
    case.scale *= -1
    case.check()


def test_equal_heads_send_the_gradient_to_the_first():
    case = Case([20, 3], heads=3)
    case.qkv[:, :2, 1:] = case.qkv[:, :2, :1]
    case.check()


@pytest.mark.parametrize("causal", with_slow([True], [False]))
@pytest.mark.parametrize("seed", with_slow([0], [1]))
def test_no_value_makes_a_kernel_write_out_of_bounds(causal, seed, monkeypatch):
    """On a GPU values are not checked: the guards of the outputs see a write past the end, the process a wild read."""
    monkeypatch.setattr(attention_backward, "SLAB", 128)
    generator = torch.Generator().manual_seed(seed)
    case = Case([40], dtype=torch.float16, causal=causal)
    case.cu, case.index = wild_integers(7, generator), wild_integers(6, generator)
    for case.longest in (25, 130):
        case.run()
    q, k, v = case.qkv.unbind(1)
    cu_k = wild_integers(7, generator)
    arguments = (q, k[:30], v[:30], case.cu, cu_k, 40, 30, 1.0, causal, 3 if causal else -1, -1, 0.0, None, None, False)
    out, *empty, lse = varlen_attention(*arguments)
    varlen_attention_backward(out, *empty, out, lse, *arguments)


# --- grouped-query heads, unequal lengths, masks and biases: options by the names of the public function


class OptionsCase:
    """Inputs of one call; `keys` None is self-attention with statistics."""

    def __init__(self, options, queries, keys=None, heads=4, key_heads=2, dim=8, dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)
        self.stats, keys = keys is None, keys or queries

        def random(*shape):
            return torch.randn(*shape, generator=generator).to(DEVICE)

        self.inputs = [random(sum(queries), heads, dim).to(dtype)]
        self.inputs += [random(sum(keys), key_heads, dim).to(dtype) for _ in range(2)]
        self.grads = [random(sum(queries), heads, dim).to(dtype)]
        self.grads += [random(sum(queries) if self.stats else 0) for _ in range(2)]
        self.cu = [cu_seqlens_of(lengths).to(DEVICE) for lengths in (queries, keys)]
        index = [n - 1 if b % 2 else 0 for b, n in enumerate(queries)]
        index = torch.tensor(index, dtype=torch.int32, device=DEVICE) if self.stats else None
        slopes = options.get("alibi_slopes")
        if slopes is not None:
            slopes = (slopes[: len(queries), :heads] if slopes.ndim == 2 else slopes[:heads]).to(DEVICE)
        mask = options.get("causal", False), *options.get("window_size", (-1, -1))
        options = dim**-0.5, *mask, options.get("softcap", 0.0), slopes, index, self.stats
        self.arguments = *self.cu, max(queries), max(keys), *options

    def run(self):
        """Outputs, lse, dq, dk and dv of the kernels."""
        out, *stats, lse = varlen_attention(*self.inputs, *self.arguments)
        grads = varlen_attention_backward(*self.grads, out, lse, *self.inputs, *self.arguments)
        return *([out, *stats] if self.stats else [out]), lse, *grads

    def reference(self, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in self.inputs]
        *outputs, lse = torch.ops.madtp.varlen_attention(*inputs, *self.arguments, "reference")
        outputs = outputs if self.stats else outputs[:1]
        upstream = [g.to(o.dtype) for g, o in zip(self.grads, outputs, strict=False)]
        grads = torch.autograd.grad(outputs, inputs, upstream)
        return *(o.detach() for o in outputs), lse, *grads

    def check(self):
        got, exact, same_dtype = self.run(), self.reference(torch.float64), self.reference(self.inputs[0].dtype)
        lse = got[-4]
        blind = lse.isneginf()  # (H, Tq)
        assert torch.equal(blind, exact[-4].isneginf())
        torch.testing.assert_close(lse.double(), exact[-4], rtol=1e-6, atol=2e-6)
        for x in (got[0], got[-3]):  # out and dq
            assert not x.transpose(0, 1)[blind].any()
        without_lse = [(*results[:-4], *results[-3:]) for results in (got, exact, same_dtype)]
        within_bound(*without_lse)


QUERIES, KEYS = [4, 9], [5, 7]  # fewer and more than keys
QUICK = ["causal window", "all"]
SLOW = [name for name in OPTIONS if name not in QUICK]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", with_slow(QUICK, SLOW))
def test_options(dtype, name):
    OptionsCase(OPTIONS[name], QUERIES, KEYS, dtype=dtype).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", with_slow(["all"], [name for name in OPTIONS if name != "all"]))
def test_options_with_statistics(dtype, name):
    OptionsCase(OPTIONS[name], [9, 4], heads=3, key_heads=1, dtype=dtype).check()


@pytest.mark.parametrize("dim", with_slow([72], [256]))
@pytest.mark.parametrize("scale", with_slow([0.0], [0.3]))
def test_causal_with_unequal_lengths_down_to_none(dim, scale):
    """No queries, one query and key, and more of one than of the other."""
    case = OptionsCase({"causal": True}, [0, 1, 3, 1], [2, 1, 2, 4], heads=1, key_heads=1, dim=dim)
    case.arguments = *case.arguments[:4], scale, *case.arguments[5:]
    case.check()


@pytest.mark.parametrize("dim", with_slow([72], [256]))
def test_statistics_of_one_token_without_a_scale(dim):
    case = Case([1, 0, 3], heads=2, dim=dim, index=[0, -1, 1])
    case.scale = 0.0
    case.check()


WIDE = {
    "window": {"window_size": (20, 9)},
    "left": {"window_size": (20, -1), "softcap": 50.0},
    "right": {"window_size": (-1, 20), "alibi_slopes": SLOPES},
    "causal window": {"causal": True, "window_size": (40, -1)},
    "all": {"causal": True, "window_size": (40, -1), "softcap": 5.0, "alibi_slopes": SLOPES},
}


@pytest.mark.parametrize("lengths", with_slow([([37], [53])], [([53], [37]), ([90, 37], None)]), ids=str)
@pytest.mark.parametrize("name", with_slow(["window"], [name for name in WIDE if name != "window"]))
def test_windows_over_several_blocks(lengths, name):
    OptionsCase(WIDE[name], *lengths, heads=2, key_heads=1, dim=16).check()


@pytest.mark.slow
def test_options_over_slabs_of_queries(monkeypatch):
    monkeypatch.setattr(attention_backward, "SLAB", 128)
    OptionsCase(WIDE["all"], [140], heads=2, key_heads=1, dim=16).check()


@pytest.mark.parametrize("dim", with_slow([24], [8, 72, 200, 256]))
def test_options_at_head_dims(dim):
    OptionsCase(OPTIONS["all"], [5], [7], heads=2, key_heads=1, dim=dim, dtype=torch.float16).check()


def test_options_do_not_depend_on_the_batch():
    case = OptionsCase(OPTIONS["all"], [3, 5], [4, 2], heads=2, key_heads=1)
    alone = OptionsCase(OPTIONS["all"], [5], [2], heads=2, key_heads=1)
    begins = 3, 4, 4  # of the second sequence in q, k and v
    alone.inputs = [x[begin:] for x, begin in zip(case.inputs, begins, strict=True)]
    alone.grads[0] = case.grads[0][3:]
    out, lse, *grads = case.run()
    grads = [grad[begin:] for grad, begin in zip(grads, begins, strict=True)]
    assert equal(alone.run(), [out[3:], lse[:, 3:], *grads])


def test_a_window_of_any_size_is_taken():
    causal = OptionsCase({"causal": True}, [5], [7], heads=2, key_heads=1).run()
    assert equal(OptionsCase({"window_size": (2**40, 0)}, [5], [7], heads=2, key_heads=1).run(), causal)
    plain = OptionsCase({}, [5], [7], heads=2, key_heads=1).run()
    assert equal(OptionsCase({"window_size": (2**40, 2**40)}, [5], [7], heads=2, key_heads=1).run(), plain)


def test_refuses_more_heads_than_a_byte_holds():
    case = Case([1], heads=256)
    q, k, v = case.qkv.unbind(1)
    with pytest.raises(ValueError, match="q must have at most 255 heads when return_stats is True, got 256"):
        varlen_attention_backward(*case.grads, q, q[..., 0].T, q, k, v, *case.arguments())


def test_the_public_op_runs_forward_and_backward():
    q, k, v = (torch.randn(12, 2, 16).requires_grad_() for _ in range(3))
    ragged = {"cu_seqlens_q": torch.tensor([0, 9, 12], dtype=torch.int32), "max_seqlen_q": 9, "return_stats": True}
    results = {}
    for backend in ("triton", "reference"):
        out, stats = mk.varlen_attention(q, k, v, **ragged, backend=backend)
        results[backend] = (
            out,
            *stats,
            *torch.autograd.grad(out.sum() + (stats.summary_attention * stats.received_attention).sum(), q),
        )
    for got, want in zip(results["triton"], results["reference"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [0.0, 1e-45, -1e-30, -0.3])
def test_every_backend_takes_any_finite_scale(scale, causal):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 7, 1, 16)
    cu = cu_seqlens_of([2, 0, 5])
    arguments = (cu, cu, 5, 5, scale, causal, -1, -1, 0.0, None, None, True)

    def run(backend, dtype=torch.float32):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out, *stats, _ = torch.ops.madtp.varlen_attention(*inputs, *arguments, backend)
        loss = out.square().sum() + sum(statistic.square().sum() for statistic in stats)
        return out, *stats, *torch.autograd.grad(loss, inputs)

    expected = run("reference", torch.float64)
    for backend in ("reference", "triton", *(["cpu"] if dispatch.extension_unsupported_reason() is None else [])):
        for got, want in zip(run(backend), expected, strict=True):
            torch.testing.assert_close(got, want.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, 1e39])
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_other_scales_are_refused(scale, backend):
    q = torch.zeros(8, 2, 16)
    with pytest.raises(ValueError, match="^softmax_scale must be a finite number of float32, got float"):
        ragged = {"cu_seqlens_q": cu_seqlens_of([8]), "max_seqlen_q": 8}
        mk.varlen_attention(q, q, q, **ragged, softmax_scale=scale, backend=backend)
