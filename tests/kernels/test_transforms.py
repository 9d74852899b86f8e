# SPDX-License-Identifier: Apache-2.0
"""Every way in which torch differentiates or transforms a call: right, or one clear error, and no silent zeros."""

import functools

import pytest
import torch
from op_examples import (
    differentiable_calls,
    gather_merge,
    gather_merge_layernorm,
    rounded_calls,
    score_and_select,
    sparse24_linear,
)
from op_examples import varlen_attention as attention
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from madtp_kernels import dispatch

pytestmark = [
    pytest.mark.sanitized,
    pytest.mark.skipif(dispatch.extension_unsupported_reason() is not None, reason="no C++ extension"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]

CALLS = differentiable_calls()
THIRD_ORDER = [attention.attention, gather_merge_layernorm.gather_layernorm, sparse24_linear.linear]


@pytest.fixture(params=CALLS, ids=lambda function: function.__name__)
def call(request):
    """(a function of tensors and a backend, its inputs in float64)."""
    return request.param, CALLS[request.param]()


def loss_of(function, backend):
    return lambda *inputs: function(*inputs, backend=backend).square().mean()


def gradients(loss, inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(loss(*inputs), inputs)


def gradable(inputs):
    return tuple(x.clone().requires_grad_() for x in inputs)


def second_order(loss, inputs, order=2):
    """The gradient of a weighted sum of the gradient, and so on."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    grads = torch.autograd.grad(loss(*inputs), inputs, create_graph=True)
    for left in reversed(range(order - 1)):
        total = sum(grad.cos().sum() for grad in grads)
        grads = torch.autograd.grad(total, inputs, create_graph=left > 0, materialize_grads=True)
    return grads


def assert_close(got, expected, tolerance=1e-7):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert (a.double() - b.double()).abs().max() <= tolerance * (1 + b.abs().max())


def test_second_order(call):
    function, inputs = call
    if function not in rounded_calls():
        assert torch.autograd.gradgradcheck(
            functools.partial(function, backend="reference"), gradable(inputs), fast_mode=True
        )
    expected = second_order(loss_of(function, "reference"), inputs)
    assert all(grad.abs().max() > 0 for grad in expected if function is not score_and_select.score)
    single = [x.float() for x in inputs]
    assert_close(second_order(loss_of(function, "cpu"), single), expected, 1e-3)
    assert_close(gradients(loss_of(function, "cpu"), single), gradients(loss_of(function, "reference"), inputs), 1e-3)


@pytest.mark.parametrize(
    "function", [attention.attention, gather_merge_layernorm.gather_layernorm, sparse24_linear.linear]
)
def test_third_order(function):
    inputs = CALLS[function]()
    expected = second_order(loss_of(function, "reference"), inputs, 3)
    assert_close(second_order(loss_of(function, "cpu"), [x.float() for x in inputs], 3), expected, 1e-2)


def test_functional_transforms(call):
    function, inputs = call
    inputs = tuple(x.float() for x in inputs)
    run, loss = functools.partial(function, backend="cpu"), loss_of(function, "cpu")
    at = tuple(range(len(inputs)))
    expected = gradients(loss, inputs)
    assert_close(torch.func.grad(loss, at)(*inputs), expected, 1e-5)
    out, pull = torch.func.vjp(run, *inputs)
    assert_close(pull(2 * out / out.numel()), expected, 1e-5)
    assert_close(torch.func.jacrev(lambda *inputs: loss(*inputs)[None], at)(*inputs), [g[None] for g in expected], 1e-5)
    nested = torch.func.grad(lambda *x: sum(grad.cos().sum() for grad in torch.func.grad(loss, at)(*x)), at)
    assert_close(nested(*inputs), second_order(loss, inputs), 1e-4)
    pairs = [torch.stack([x, 0.5 * x]) for x in inputs]
    assert_close(torch.func.vmap(run)(*pairs), [run(*(x[i] for x in pairs)) for i in range(2)], 1e-6)
    each = [gradients(loss, [x[i] for x in pairs]) for i in range(2)]
    batched = torch.func.vmap(torch.func.grad(loss, at))(*pairs)
    assert_close(batched, [torch.stack(grads) for grads in zip(*each, strict=True)], 1e-5)


def test_forward_mode_is_refused(call):
    function, inputs = call
    inputs = tuple(x.float() for x in inputs)
    run, tangents = functools.partial(function, backend="cpu"), tuple(map(torch.ones_like, inputs))
    run(*inputs)  # so that what is fast the second time knows the call
    run(*inputs)
    refused = functools.partial(pytest.raises, NotImplementedError, match="no forward-mode derivative; use reverse")
    with refused():
        torch.func.jvp(run, inputs, tangents)
    with forward_ad.dual_level(), torch.no_grad(), refused():
        run(*map(forward_ad.make_dual, inputs, tangents))
    with refused():
        torch.func.hessian(loss_of(function, "cpu"))(*inputs)
    with forward_ad.dual_level():  # of something else
        assert torch.equal(run(*inputs), run(*inputs))


def test_recomputed_saved_and_inferred(call):
    function, inputs = call
    inputs = tuple(x.float() for x in inputs)
    run, loss = functools.partial(function, backend="cpu"), loss_of(function, "cpu")
    expected = gradients(loss, inputs)
    assert_close(gradients(lambda *x: checkpoint(loss, *x, use_reentrant=False), inputs), expected, 0)
    leaves = gradable(inputs)
    checkpoint(loss, *leaves, use_reentrant=True).backward()
    assert_close([x.grad for x in leaves], expected, 0)
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.clone, lambda saved: saved):
        assert_close(gradients(loss, inputs), expected, 0)
    seen = []
    leaves = gradable(inputs)
    leaves[0].register_hook(seen.append)
    loss(*leaves).backward()
    assert_close(seen, expected[:1], 0)
    with torch.inference_mode():
        assert torch.equal(run(*inputs), run(*inputs))


def test_traced_by_make_fx(call):
    function, inputs = call
    inputs = tuple(x.float() for x in inputs)
    loss = loss_of(function, "cpu")
    traced = make_fx(lambda *inputs: gradients(loss, [x.detach() for x in inputs]))(*inputs)
    assert any("madtp" in str(node.target) for node in traced.graph.nodes)
    assert_close(traced(*inputs), gradients(loss, inputs), 1e-6)
    if function is gather_merge.gather:
        traced = make_fx(lambda *inputs: second_order(loss, [x.detach() for x in inputs]))(*inputs)
        assert_close(traced(*inputs), second_order(loss, inputs), 1e-5)
