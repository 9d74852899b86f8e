# SPDX-License-Identifier: Apache-2.0
"""The backends that an op of tokens is tested on, each where it can run."""

import os

import pytest
import torch

from madtp_kernels import dispatch

ON_GPU = torch.cuda.is_available()
REFERENCE_AND_CPU = [
    "reference",
    pytest.param(
        "cpu", marks=pytest.mark.skipif(dispatch.extension_unsupported_reason() is not None, reason="no C++ extension")
    ),
]
BACKENDS = [
    *REFERENCE_AND_CPU,
    pytest.param(
        "triton",
        marks=[
            pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning"),  # numpy, on masked lanes
            pytest.mark.skipif(
                not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU or the interpreter"
            ),
        ],
    ),
]


def device_of(backend):
    return "cuda" if backend == "triton" and ON_GPU else "cpu"
