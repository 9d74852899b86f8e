# SPDX-License-Identifier: Apache-2.0
"""The token ops on a GPU: both GPU backends against the reference, without host reads, and in one CUDA graph."""

import pytest
import torch
from ragged_cases import LENGTHS, SUMMARIES, cu_seqlens_of, scores

import madtp_kernels as mk

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def on_gpu(lengths, channels=65, dtype=torch.float32):
    *stats, logits = (t.cuda() for t in scores(lengths))
    x = torch.randn(sum(lengths), channels, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    return mk.AttentionStats(*stats), logits, cu_seqlens_of(lengths).cuda(), x


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("summary", SUMMARIES)
def test_triton_selects_like_the_reference(lengths, summary):
    index = SUMMARIES[summary](lengths)
    index = None if index is None else index.cuda()
    stats, logits, cu, _ = on_gpu(lengths)
    exact = mk.AttentionStats(*(t.double() for t in stats))
    expected = mk.token_importance(exact, logits.double(), cu, summary_index=index)
    importance = mk.token_importance(stats, logits, cu, summary_index=index, backend="triton")
    torch.testing.assert_close(importance.double(), expected, rtol=1e-5, atol=1e-7)
    wanted = mk.select_tokens(expected, logits.double(), cu, 1.0, summary_index=index)
    got = mk.select_tokens(importance, logits, cu, 1.0, summary_index=index, backend="triton")
    for name in ("keep", "source", "cu_seqlens"):
        assert torch.equal(getattr(got, name), getattr(wanted, name)), name
    torch.testing.assert_close(got.merge_weight.double(), wanted.merge_weight, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 33, 768, 1030])
def test_gathers_and_their_gradients_within_twice_the_reference_error(backend, dtype, channels):
    stats, logits, cu, x = on_gpu([63, 1, 0, 111, 5], channels, dtype)
    importance = mk.token_importance(stats, logits, cu)
    selection = mk.select_tokens(importance, logits, cu, 1.0, capacity="upper_bound")
    weight, bias, grad = (torch.randn(n, device="cuda").to(dtype) for n in (channels, channels, x.numel()))
    grad = grad.view_as(x)

    def results(name, convert=lambda t: t):
        inputs = [convert(t).detach().requires_grad_() for t in (x, selection.merge_weight, weight, bias)]
        chosen = selection._replace(merge_weight=inputs[1])
        out, normed = mk.gather_merge_layernorm(inputs[0], chosen, *inputs[2:], backend=name)
        assert torch.equal(out, mk.gather_merge(inputs[0], chosen, backend=name))
        ((out + normed) * convert(grad)).sum().backward()
        return [t.double() for t in (out, normed, *(i.grad for i in inputs))]

    exact, bound = results("reference", lambda t: t.double()), results("reference")
    for got, want, limit in zip(results(backend), exact, bound, strict=True):
        assert (got - want).abs().max() <= 2 * (limit - want).abs().max() + 1e-5


def test_upper_bound_reads_nothing_on_the_host_and_fits_one_graph():
    stats, logits, cu, x = on_gpu([577, 64, 130], 768, torch.bfloat16)
    weight, bias = torch.randn(2, 768, device="cuda").bfloat16()

    def prune():
        return mk.prune_tokens(x, stats, logits, cu, 1.0, norm=(weight, bias, 1e-5), capacity="upper_bound")[:2]

    expected = prune()  # also compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = prune()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = prune()
    for tensor in captured:
        tensor.fill_(float("nan"))
    graph.replay()
    for results in (again, captured):
        assert all(torch.equal(got, want) for got, want in zip(results, expected, strict=True))
