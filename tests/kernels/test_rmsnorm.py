# SPDX-License-Identifier: Apache-2.0
"""`gather_merge_rmsnorm`: the RMSNorm of transformers behind the gather, on every backend."""

import pytest
import torch
from backend_cases import BACKENDS, ON_GPU, REFERENCE_AND_CPU, device_of
from ragged_cases import cu_seqlens_of, scores
from torch import nn
from torch.library import opcheck

import madtp_kernels as mk
from madtp_kernels.selection import PADDING

pytestmark = pytest.mark.sanitized

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [63, 1, 0, 51, 5]


def selection_of(lengths=LENGTHS, device="cpu", **options):
    *stats, logits = (t.to(device) for t in scores(lengths))
    return mk.score_and_select(mk.AttentionStats(*stats), logits, cu_seqlens_of(lengths).to(device), 1.0, **options)[1]


class RMSNorm(nn.Module):
    """As transformers has it in models of Qwen2 and Llama."""

    def __init__(self, weight, eps):
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.eps)
        return self.weight * hidden_states.to(input_dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 17, 64, 129])
def test_within_twice_the_reference_error(backend, dtype, channels):
    if backend == "triton" and dtype == torch.bfloat16 and not ON_GPU:
        pytest.skip("the interpreter does bfloat16 arithmetic on the bits of its storage")
    device = device_of(backend)
    selection = selection_of(device=device, capacity="upper_bound" if channels == 17 else "exact")
    wide = selection._replace(merge_weight=selection.merge_weight.double())
    x = torch.randn(sum(LENGTHS), channels, dtype=torch.float64).to(device, dtype)
    for affine in {dtype, torch.float32}:
        weight = torch.randn(channels).to(device, affine)
        exact = mk.gather_merge_rmsnorm(x.double(), wide, weight.double(), 1e-6, backend="reference")
        bound = mk.gather_merge_rmsnorm(x, selection, weight, 1e-6, backend="reference")
        got = mk.gather_merge_rmsnorm(x, selection, weight, 1e-6, backend=backend)
        assert torch.equal(got[0], mk.gather_merge(x, selection, backend=backend))
        for g, e, b in zip(got, exact, bound, strict=True):
            assert g.dtype == dtype and (g.double() - e).abs().max() <= 2 * (b.double() - e).abs().max() + 1e-6
        assert not got[1][selection.source == PADDING].any()


@pytest.mark.parametrize("backend", REFERENCE_AND_CPU)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounds_as_the_models_of_transformers_do(backend, dtype):
    selection = selection_of()
    x, weight = torch.randn(sum(LENGTHS), 64).to(dtype), torch.randn(64).to(dtype)
    out, normed = mk.gather_merge_rmsnorm(x, selection, weight, 1e-6, backend=backend)
    expected = RMSNorm(weight, 1e-6)(out)
    # In the last bit before the weight they may differ, by the order of a sum.
    assert (normed != expected).float().mean() < (0.5 if dtype == torch.float32 else 0.01)
    torch.testing.assert_close(normed, expected, rtol=torch.finfo(dtype).eps * 2, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_whole_step_takes_the_norm_by_its_parameters(backend):
    device = device_of(backend)
    *stats, logits = (t.to(device) for t in scores([20, 9]))
    x, weight, cu = torch.randn(29, 12).to(device), torch.randn(12).to(device), cu_seqlens_of([20, 9]).to(device)
    step = mk.AttentionStats(*stats), logits, cu, 1.0
    pruned = mk.prune_tokens(x, *step, norm=(weight, 1e-6), backend=backend)
    expected = mk.gather_merge_rmsnorm(x, pruned.selection, weight, 1e-6, backend=backend)
    assert torch.equal(pruned.x, expected[0]) and torch.equal(pruned.normed, expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_does_not_depend_on_its_batch(backend):
    device = device_of(backend)
    selection, x, weight = selection_of(device=device), torch.randn(120, 40).to(device), torch.randn(40).to(device)
    together = mk.gather_merge_rmsnorm(x, selection, weight, backend=backend)[1]
    first, rows = LENGTHS[0], int(selection.cu_seqlens_out[1])
    ends = (selection.cu_seqlens_in[:2], selection.cu_seqlens_out[:2])
    own = mk.Selection(selection.keep[:first], *ends, selection.source[:rows], selection.merge_weight[:first])
    alone = mk.gather_merge_rmsnorm(x[:first], own, weight, backend=backend)[1]
    assert torch.equal(together[:rows], alone)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_rows_no_rows_and_rows_of_zeros(backend):
    device = device_of(backend)
    selection, x, weight = selection_of(device=device), torch.randn(120, 10).to(device), torch.randn(10).to(device)
    expected = mk.gather_merge_rmsnorm(x, selection, weight, backend=backend)
    for view in (torch.cat([x, x], 1)[:, :10], x.T.contiguous().T):
        got = mk.gather_merge_rmsnorm(view, selection, torch.stack([weight, weight], 1)[:, 0], backend=backend)
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g, e)
    zeros = mk.gather_merge_rmsnorm(torch.zeros_like(x), selection, weight, backend=backend)
    assert not zeros[0].any() and not zeros[1].any()
    nothing = mk.gather_merge_rmsnorm(x[:0], selection_of([], device), weight, backend=backend)
    assert nothing[0].shape == nothing[1].shape == (0, 10)


@pytest.mark.parametrize("capacity", ["exact", "upper_bound"])
def test_gradients_in_float64(capacity):
    selection = selection_of([9, 1, 0, 7], capacity=capacity)
    inputs = torch.randn(17, 6).double(), selection.merge_weight.double(), torch.randn(6).double()

    def gather(x, merge_weight, weight):
        return mk.gather_merge_rmsnorm(x, selection._replace(merge_weight=merge_weight), weight, 1e-3)

    assert (~selection.keep).any()
    inputs = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(gather, inputs)
    assert torch.autograd.gradgradcheck(gather, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_differentiates_like_the_norm_behind_the_gather(backend):
    device = device_of(backend)
    selection, gradients = selection_of(device=device), []
    for fused in (True, False):
        x, weight = (torch.linspace(-2, 3, n, device=device) for n in (120 * 16, 16))
        x, weight = x.sin().view(120, 16).requires_grad_(), weight.requires_grad_()
        chosen = selection._replace(merge_weight=selection.merge_weight.clone().requires_grad_())
        if fused:
            out, normed = mk.gather_merge_rmsnorm(x, chosen, weight, 1e-6, backend=backend)
        else:
            out = mk.gather_merge(x, chosen, backend=backend)
            normed = RMSNorm(weight, 1e-6)(out)
        loss = out.square().sum() + normed.sin().sum()
        gradients.append(torch.autograd.grad(loss, (x, chosen.merge_weight, weight)))
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_opcheck_and_compile():
    selection = selection_of([9, 0, 1, 12], capacity="upper_bound")
    x, weight = torch.randn(22, 6, requires_grad=True), torch.randn(6, requires_grad=True)
    opcheck(torch.ops.madtp.gather_merge_rmsnorm, (x, *selection, weight, 1e-6, "auto"))

    def gather(x, weight):
        return mk.gather_merge_rmsnorm(x, selection, weight)[1]

    compiled = torch.compile(gather, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight), gather(x, weight))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(3)}, r"weight must be of shape \(2,\) like the channels of x, got float32 \(3,\)"),
        ({"weight": torch.ones(2).half()}, "weight must be a 1-dimensional tensor of float32, got float16"),
        ({"weight": None}, "weight must be a tensor, got NoneType None"),
        ({"weight": torch.ones(2, device="meta")}, "weight must be on cpu, got float32 .* on meta"),
        ({"eps": 0.0}, "eps must be a finite number > 0, got float 0.0"),
        ({"eps": "small"}, "eps must be a number, got small"),
        ({"x": torch.zeros(9, 2)}, "selection.keep must be of 9 rows like x"),
        ({"selection": None}, "selection must be a Selection from select_tokens, got NoneType"),
    ],
)
def test_refuses(change, message):
    good = {"x": torch.zeros(8, 2), "selection": selection_of([8]), "weight": torch.ones(2)}
    with pytest.raises(ValueError, match=message):
        mk.gather_merge_rmsnorm(**(good | change))
