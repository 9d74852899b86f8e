# SPDX-License-Identifier: Apache-2.0
"""Which calls of `sparse24_linear` go straight to their backend; test_fast_path has those that others see."""

import pytest
import torch
from sparse24_cases import dense24

import madtp_kernels as mk
from madtp_kernels import dispatch, sparse24_compress
from madtp_kernels.ops import sparse24

pytestmark = [
    pytest.mark.sanitized,
    pytest.mark.skipif(dispatch.extension_unsupported_reason() is not None, reason="no C++ extension"),
]


@pytest.fixture
def checked(monkeypatch):
    """The calls that went the long way: a list that grows by one with each."""
    calls, check = [], sparse24.check_types
    monkeypatch.setattr(sparse24, "check_types", lambda **args: calls.append(args) or check(**args))
    return calls


@pytest.fixture
def weight():
    return sparse24_compress(dense24(24, 32))


@pytest.mark.parametrize("backend", ["cpu", "dense"])
def test_the_second_of_a_class_is_direct_and_has_the_same_bits(backend, weight, checked):
    rest = {"residual": torch.randn(6, 24), "scale": torch.randn(24), "activation": "gelu", "backend": backend}
    calls = [{"backend": backend}, {"bias": torch.randn(24), "backend": backend}, rest]
    x = torch.randn(6, 32)
    first = [mk.sparse24_linear(x, weight, **call) for call in calls]
    assert len(checked) == 3
    for call, expected in zip(calls, first, strict=True):
        assert torch.equal(mk.sparse24_linear(x, weight, **call), expected)
        with torch.no_grad():
            assert torch.equal(mk.sparse24_linear(x, weight, **call), expected)
        wide = torch.randn(6, 40)
        wide[:, 3:35] = x
        strided = mk.sparse24_linear(wide[:, 3:35], weight, **call)
        if backend == "cpu":
            assert torch.equal(strided, expected)
        torch.testing.assert_close(strided, expected)  # torch's product may sum otherwise where rows lie otherwise
    assert len(checked) == 3
    mk.sparse24_linear(torch.randn(40, 32), weight, backend=backend)  # of another class of rows
    mk.sparse24_linear(x.bfloat16(), weight, backend=backend)
    mk.sparse24_linear(x, weight, activation="relu", backend=backend)
    assert len(checked) == 6


def test_views_that_a_pointer_does_not_tell(weight):
    for _ in range(2):
        z = torch.randn(6, 32, dtype=torch.complex64)
        x = z.conj().imag  # negative by a flag
        assert x.is_neg()
        got = mk.sparse24_linear(x, weight, backend="cpu")
        assert torch.equal(got, mk.sparse24_linear(-z.imag, weight, backend="cpu"))


def test_writes_and_variables_are_noticed(weight, monkeypatch):
    x = torch.randn(6, 32)
    for _ in range(2):
        before = mk.sparse24_linear(x, weight, backend="cpu")
    weight.values.mul_(2)
    assert torch.equal(mk.sparse24_linear(x, weight, backend="cpu"), 2 * before)
    monkeypatch.setenv("MADTP_TUNE", "off")
    for _ in range(2):
        mk.sparse24_linear(x, weight)
    monkeypatch.setenv("MADTP_BACKEND", "tpu")
    with pytest.raises(ValueError, match="MADTP_BACKEND must be one of auto"):
        mk.sparse24_linear(x, weight)
