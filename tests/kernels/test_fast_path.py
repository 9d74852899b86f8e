# SPDX-License-Identifier: Apache-2.0
"""Calls of linear layers that others see, or that have a gradient, do not go straight to their backend."""

from typing import Any, NamedTuple

import pytest
import torch
from sparse24_cases import dense24
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import madtp_kernels as mk
from madtp_kernels import dispatch, quantize, sparse24_compress
from madtp_kernels.ops import quantized, sparse24

pytestmark = [
    pytest.mark.sanitized,
    pytest.mark.skipif(dispatch.extension_unsupported_reason() is not None, reason="no C++ extension"),
]


class Op(NamedTuple):
    """An op, its module, and what makes its weight of one that is 2:4."""

    name: str
    module: Any
    make: Any


@pytest.fixture(
    params=[Op("sparse24_linear", sparse24, sparse24_compress), Op("quantized_linear", quantized, quantize)],
    ids=lambda op: op.name,
)
def op(request):
    return request.param


@pytest.fixture
def weight(op):
    return op.make(dense24(24, 32))


@pytest.fixture
def run(op, weight):
    """The op on the kernel of the CPU."""
    return lambda x, bias=None: getattr(mk, op.name)(x, weight, bias, backend="cpu")


@pytest.fixture
def checked(op, monkeypatch):
    """The calls that went the long way: a list that grows by one with each."""
    calls, check = [], op.module.check_types

    def spy(**args):
        if "x" in args:  # of a call: a weight is checked where it is packed
            calls.append(args)
        check(**args)

    monkeypatch.setattr(op.module, "check_types", spy)
    return calls


class Recorder(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_call_that_others_see_goes_the_long_way(op, weight, checked):
    x, call = torch.randn(6, 32), getattr(mk, op.name)
    run = lambda x: call(x, weight, backend="cpu")  # noqa: E731
    expected = run(x)
    assert torch.equal(run(x), expected) and len(checked) == 1
    with FlopCounterMode(display=False) as counter:
        run(x)
    assert counter.get_total_flops() == 6 * 24 * 32 and len(checked) == 2
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run(x)
    assert f"madtp::{op.name}" in [event.name for event in profiler.events()] and len(checked) == 3
    with Recorder() as recorder:
        run(x)
    assert any(f"madtp.{op.name}" in name for name in recorder.names) and len(checked) == 4
    assert isinstance(run(x.as_subclass(Subclass)), Subclass) and len(checked) == 5
    traced = torch.jit.trace(run, x, check_trace=False)
    assert f"madtp::{op.name}" in str(traced.graph) and len(checked) == 6
    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(x), expected)


def test_gradients_flow_through_a_known_class(run, weight, checked):
    x, bias = torch.randn(6, 32), torch.nn.Parameter(torch.randn(24))
    with torch.no_grad():
        for _ in range(2):
            assert run(x, bias).grad_fn is None
    run(x, bias).sum().backward()
    torch.testing.assert_close(bias.grad, torch.full((24,), 6.0))
    x.requires_grad_()
    run(x, bias.detach()).sum().backward()
    torch.testing.assert_close(x.grad, weight.to_dense().sum(0).expand(6, 32))
    with torch.inference_mode():
        run(x, bias)
    assert len(checked) == 3
