# SPDX-License-Identifier: Apache-2.0
"""What the property tests draw: shapes, layouts and values at which kernels go wrong.

Hypothesis chooses sizes, options and the kinds of values; the numbers come from a generator whose seed is drawn. So a
failure prints a small case, and that case is the same everywhere.
"""

from __future__ import annotations

import functools
import inspect

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from madtp_kernels import dispatch

settings.register_profile(
    "madtp",
    derandomize=True,  # the same cases in every run
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
)

needs_extension = pytest.mark.skipif(dispatch.extension_unsupported_reason() is not None, reason="no C++ extension")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = torch.finfo(torch.float32).eps
LARGEST = {torch.float32: 1e38, torch.bfloat16: 1e38, torch.float16: 6e4}
LEAST = {torch.float32: 1e-40, torch.bfloat16: 1e-40, torch.float16: 1e-6}  # subnormal, all of them


def cases(quick: int, thorough: int, **strategies: st.SearchStrategy):
    """A property for `quick` cases in the default run, and for `thorough` ones where slow tests run."""

    def decorate(check):
        @pytest.mark.parametrize(
            "examples", [pytest.param(quick, id="quick"), pytest.param(thorough, id="thorough", marks=pytest.mark.slow)]
        )
        @functools.wraps(check)
        def test(examples):
            drawn = given(**strategies)(check)  # here: settings are put on a function once
            settings(settings.get_profile("madtp"), max_examples=examples)(drawn)()

        test.__signature__ = inspect.Signature([inspect.Parameter("examples", inspect.Parameter.KEYWORD_ONLY)])
        return test

    return decorate


# --- sizes and layouts

seeds = st.integers(0, 2**31 - 1)
dtypes = st.sampled_from(DTYPES)
length = st.one_of(st.integers(0, 4), st.integers(5, 20), st.sampled_from([15, 16, 17, 31, 32, 33, 48, 63, 64, 65]))
lengths = st.lists(length, max_size=5)
channels = st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 48, 63, 64, 65, 100, 129]))
layouts = st.sampled_from(
    ["contiguous", "offset", "wide rows", "every second row", "transposed", "every second column"]
)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in memory of another form; what lies between them is NaN."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    rows, last = x.shape[0], x.shape[-1]
    poison = torch.nan if x.is_floating_point() else 1
    if layout == "offset":
        buffer = x.new_full((x.numel() + 3,), poison)
        view = buffer[3:].view(x.shape)
    elif layout == "wide rows":
        view = x.new_full((*x.shape[:-1], last + 5), poison)[..., 2 : 2 + last]
    elif layout == "every second row":
        view = x.new_full((2 * rows, *x.shape[1:]), poison)[::2]
    else:
        view = x.new_full((*x.shape[:-1], 2 * last), poison)[..., ::2]
    return view.copy_(x)


# --- values

values = st.sampled_from(["normal", "normal", "equal", "zeros", "large", "least", "rows of all sizes", "few integers"])
ordinary = values.filter(lambda kind: kind not in ("large", "least", "rows of all sizes"))


def numbers(shape: tuple[int, ...], kind: str, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Of this kind, finite, rounded to the dtype."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "equal":
        x = torch.full_like(x, 0.3)
    elif kind == "zeros":
        x = torch.zeros_like(x)
    elif kind == "large":
        x = x.clamp(-1, 1) * LARGEST[dtype]
    elif kind == "least":
        x = x * LEAST[dtype]
    elif kind == "rows of all sizes":
        exponents = torch.linspace(-4, 4, max(shape[0], 1), dtype=torch.float64)[: shape[0]]
        x = x * (10.0**exponents).view(-1, *[1] * (len(shape) - 1))
    elif kind == "few integers":
        x = x.round()
    return x.to(dtype)


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- what is asserted


def assert_within(got: Tensor, exact: Tensor, bound: Tensor, floor: Tensor | float, what: object = "") -> None:
    """The error against float64 is at most twice that of the same-dtype reference, beside `floor`: roundings of float32
    at the size of what is summed, where the reference is right by luck."""
    assert got.shape == exact.shape and got.dtype == bound.dtype, what
    if got.numel():
        error = (got.double() - exact).abs().max()
        allowed = 2 * (bound.double() - exact).abs().max() + torch.as_tensor(floor)
        assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, a NaN being equal to any other."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


def rows_of(lengths: list[int]) -> list[slice]:
    """The rows of each sequence."""
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    return [slice(begin, end) for begin, end in zip(ends[:-1], ends[1:], strict=True)]
