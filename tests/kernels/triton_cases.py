# SPDX-License-Identifier: Apache-2.0
"""What the tests of the Triton kernels share: where they run and the error rule."""

import pytest
import torch

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# The interpreter does bfloat16 arithmetic on the bits of its uint16 storage.
BFLOAT16 = pytest.param(
    torch.bfloat16, marks=[pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")]
)
DTYPES = [torch.float32, torch.float16, BFLOAT16]


def with_slow(quick, slow):
    """Values of a parameter, of which `slow` wait for `make test-slow` where there is only the interpreter."""
    return [*quick, *(pytest.param(value, marks=[] if ON_GPU else pytest.mark.slow) for value in slow)]


MARKS = [
    pytest.mark.usefixtures("guarded_outputs"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy, on NaN and inf of masked lanes
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
]


def largest(difference):
    return difference.abs().max().item() if difference.numel() else 0.0


def within_twice(got, exact, same_dtype, floor=0.0):
    """The error rule of every backend; `floor` is allowed beside it, relative to the largest element."""
    for g, e, r in zip(got, exact, same_dtype, strict=True):
        assert g.shape == r.shape and g.dtype == r.dtype
        assert largest(g.double() - e) <= 2 * largest(r.double() - e) + 1e-6 + floor * largest(e)


def wild_integers(n, generator):
    """(n,) int32 on the device, values that a table of 40 rows does and does not have."""
    wild = torch.tensor([-(2**31), -(2**30), -5, -1, 0, 1, 3, 20, 39, 40, 41, 2**30, 2**31 - 1], dtype=torch.int32)
    return wild[torch.randint(len(wild), (n,), generator=generator)].to(DEVICE)
