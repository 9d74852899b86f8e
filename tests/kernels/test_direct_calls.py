# SPDX-License-Identifier: Apache-2.0
"""torch.ops.madtp called without the public functions: every argument of every op is changed in turn, and the call is
refused with one clear error or is right, by the reference. A kernel that reads past its inputs fails, or crashes."""

import math

import pytest
import torch
from op_examples import EXAMPLES, derived, good_call, ops
from op_examples.common import Sizes

from madtp_kernels import checks, dispatch

pytestmark = pytest.mark.sanitized

needs_extension = pytest.mark.skipif(dispatch.extension_unsupported_reason() is not None, reason="no C++ extension")

REFUSED = (ValueError, RuntimeError, NotImplementedError)


def changes(value):
    """Values in the place of a good one, most of them bad."""
    if isinstance(value, torch.Tensor):
        yield from tensors(value)
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (-1, 0, 6, 100, 2**31, 2**62)
    elif isinstance(value, float):
        yield from (math.nan, math.inf, -math.inf, 0.0, -0.5, 1e-45, 1e300)
    elif isinstance(value, str):
        yield from ("", "swish", "cuda", "auto", "none")
    else:
        yield from (torch.zeros(3), torch.zeros((), dtype=torch.uint8))


def tensors(good):
    yield from (
        good.to("meta"),
        good.to_sparse(),
        good[None],
        good.flatten()[0],
        good.flatten()[:0],
        good.new_empty(0, 0),
    )
    yield from (good.to(dtype) for dtype in (torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64))
    if good.ndim:
        yield from (good[:0], good[:-1], torch.cat([good, good[:1]]), good[..., :0], good[..., :-1])
        yield from (good.repeat_interleave(2, -1)[..., ::2], good[:1].expand_as(good), good.flip(0))
    if good.is_floating_point():
        yield from (torch.full_like(good, value) for value in (math.nan, math.inf, -math.inf, 0, 1e30, -1e30))
    elif good.dtype == torch.bool:
        yield from (torch.zeros_like(good), torch.ones_like(good))
    else:
        bits = torch.iinfo(good.dtype)
        yield from (torch.full_like(good, value) for value in (bits.min, bits.max, 0, 1))
        yield from (good + 1, good - 1, good * 1000, -good)


def outcome(op, call):
    """What it returns, or the error."""
    try:
        result = getattr(torch.ops.madtp, op)(**call)
    except REFUSED as error:
        return error
    return result if isinstance(result, tuple) else (result,)


def is_finite(call):
    tensors = (value for value in call.values() if isinstance(value, torch.Tensor) and value.is_floating_point())
    return all(bool((tensor.abs() < 1e20).all()) for tensor in tensors)


def assert_like_the_reference(op, call, got, what):
    expected = outcome(op, call | {"backend": "reference"})
    assert not isinstance(expected, Exception), f"{what}; the reference: {expected}"
    for ours, reference in zip(got, expected, strict=True):
        assert (ours.shape, ours.dtype) == (reference.shape, reference.dtype), what
        if ours.device.type != "meta" and is_finite(call):
            assert bool(torch.isclose(ours.double(), reference.double(), 1e-3, 1e-4, equal_nan=True).all()), what


def test_every_op_has_examples():
    assert EXAMPLES.keys() == set(ops())
    public = {op for op, known in dispatch._records.items() if known.public is not None}
    assert public & EXAMPLES.keys() == {op for op, example in EXAMPLES.items() if getattr(example, "CALLS", {})}


@needs_extension
@pytest.mark.parametrize("op", ops())
def test_each_argument_is_refused_or_right(op):
    good = good_call(op)
    assert not isinstance(outcome(op, good), Exception)
    for name, value in good.items():
        for change in changes(value):
            call = good | {name: change}
            got = outcome(op, call)
            what = f"{op}({name}={checks.describe(change)}): {str(got)[:200]}"
            if isinstance(got, Exception):
                # torch says in several lines that an argument is not of the type in the schema.
                assert type(got) is not ValueError or "\n" not in str(got), what
            elif "backend" in call and name != "backend" and name not in derived(op):
                assert_like_the_reference(op, call, got, what)


EMPTY = [
    {"lengths": ()},
    {"lengths": (0,)},
    {"lengths": (0, 3, 0)},
    {"channels": 0},
    {"features": (16, 0)},
    {"features": (0, 32)},
]


@needs_extension
@pytest.mark.filterwarnings("ignore:var")  # torch, of no channels
@pytest.mark.parametrize("sizes", EMPTY, ids=str)
def test_empty_sizes_are_refused_or_right(sizes):
    for op in ops():
        call = good_call(op, Sizes(**sizes))
        got = outcome(op, call)
        assert not isinstance(got, Exception), f"{op}: {got}"
        if "backend" in call:
            assert_like_the_reference(op, call, got, op)
