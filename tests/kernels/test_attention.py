"""`varlen_attention`: the reference against dense equations, its gradients in float64, fake and bad input."""

import pytest
import torch
from ragged_cases import cu_seqlens_of
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import madtp_kernels as mk

LENGTHS = [5, 1, 0, 9]


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
        torch.testing.assert_close(stats.received[begin:end], received)
        norms = expected.norm(dim=-1)
        weight = norms / norms.sum(-1, keepdim=True)
        summary = (p[:, s] * weight.T).sum(0) if s >= 0 and n else torch.zeros(n, dtype=torch.float64)
        torch.testing.assert_close(stats.summary[begin:end], summary)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_in_float64(causal):
    cu, index = cu_seqlens_of(LENGTHS), torch.tensor([1, 0, -1, -1], dtype=torch.int32)

    def attend(q, k, v):
        out, stats = mk.varlen_attention(
            q, k, v, cu, max_seqlen_q=9, causal=causal, summary_index=index, return_stats=True
        )
        return out, *stats

    assert torch.autograd.gradcheck(attend, tuple(qkv(sum(LENGTHS))))


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


def test_opcheck_and_flops():
    q, k, v = qkv(sum(LENGTHS), dtype=torch.float32)
    cu = cu_seqlens_of(LENGTHS)
    opcheck(torch.ops.madtp.varlen_attention, (q, k, v, cu, cu, 9, 9, 0.5, False, None, True, "auto"))
    with FlopCounterMode(display=False) as counter:
        mk.varlen_attention(q, k, v, cu, max_seqlen_q=9)
    assert counter.get_total_flops() == 4 * (25 + 1 + 81) * 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(8, 2, 5)}, r"k must be of 2 heads of 4 like q, got float32 \(8, 2, 5\)"),
        ({"v": torch.zeros(8, 2, 4).half()}, "v must be a 3-dimensional tensor of float32, got float16"),
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
