# SPDX-License-Identifier: Apache-2.0
"""Which backend a 2:4 layer on a GPU gets: decided here without one."""

import types

import pytest
import torch

import madtp_kernels as mk
from madtp_kernels import dispatch, sparse24_compress
from madtp_kernels.native import common as native

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that can run everything, as far as choosing goes."""
    monkeypatch.setitem(dispatch._BACKEND_UNSUPPORTED_REASONS, "cuda", lambda device: None)


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (("80", "90a"), (8, 0), True),
        (("80", "90a"), (8, 6), True),
        (("80", "90a"), (9, 0), True),
        (("80", "90a"), (12, 0), True),
        (("90a",), (8, 0), False),
        (("90a",), (9, 0), True),
        (("90a",), (10, 0), False),
        (("89",), (8, 6), False),
        (("100f",), (10, 3), True),
        (("100f",), (12, 0), False),
        (("103f",), (10, 0), False),
        (("80", "90a"), (7, 5), False),
        ((), (9, 0), False),
    ],
)
def test_code_for_an_architecture(archs, capability, runs):
    why = dispatch.arch_unsupported_reason(archs, capability)
    assert (why is None) == runs
    if not runs:
        assert why.startswith(f"madtp_kernels._C was built with MADTP_CUDA_ARCHS={';'.join(archs)}, none")
        assert why.endswith(f"sm_{capability[0]}{capability[1]}")


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [(torch.bfloat16, "cuda"), (torch.float16, "cuda"), (torch.float32, "dense"), (torch.float64, "reference")],
)
def test_auto_on_a_gpu(gpu, dtype, backend):
    choice = dispatch.choose("sparse24_linear", None, dtype, GPU)
    assert choice.backend == backend == dispatch.backend_name("sparse24_linear", None, dtype, GPU)
    assert choice.reason == f"first of cuda, triton, dense, reference that runs {dtype} on cuda"
    if backend == "dense":
        assert choice.rejected["cuda"].startswith("Sparse Tensor Cores take bfloat16 and float16")
        with pytest.raises(RuntimeError, match="Sparse Tensor Cores take .*; auto would run 'dense'"):
            dispatch.choose("sparse24_linear", "cuda", dtype, GPU)


@pytest.mark.parametrize("why", ["madtp_kernels._C was built without CUDA", "needs compute capability 8.0 or newer"])
def test_a_gpu_without_our_kernels_runs_dense(monkeypatch, why):
    monkeypatch.setitem(dispatch._BACKEND_UNSUPPORTED_REASONS, "cuda", lambda device: why)
    choice = dispatch.choose("sparse24_linear", None, torch.bfloat16, GPU)
    assert choice.backend == "dense" and choice.rejected["cuda"] == why


@pytest.mark.parametrize(
    ("archs", "capability", "why"),
    [
        (["80", "90a"], (7, 5), r"needs compute capability 8.0 or newer, got \(7, 5\)"),
        (["90a"], (8, 0), "built with MADTP_CUDA_ARCHS=90a, none of which runs on sm_80"),
    ],
)
def test_a_gpu_that_is_too_old_or_that_the_library_has_no_code_for(monkeypatch, archs, capability, why):
    monkeypatch.setattr(dispatch, "extension", lambda: types.SimpleNamespace(cuda=None))
    monkeypatch.setattr(dispatch, "extension_unsupported_reason", lambda: None)
    monkeypatch.setattr(dispatch, "_build_archs", lambda: archs)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert dispatch.choose("sparse24_linear", None, torch.bfloat16, GPU).backend == "dense"
    with pytest.raises(RuntimeError, match=f"{why}; auto would run 'dense'"):
        dispatch.choose("sparse24_linear", "cuda", torch.bfloat16, GPU)


def test_pruning_takes_every_dtype(gpu):
    for dtype in dispatch.FAST_DTYPES:
        assert dispatch.choose("sparse24_prune", None, dtype, GPU).backend == "cuda"


def test_a_float32_weight_counts_as_float32(monkeypatch):
    monkeypatch.setitem(dispatch._BACKEND_UNSUPPORTED_REASONS, "cuda", lambda device: None)
    weight, x = sparse24_compress(torch.zeros(8, 16)), torch.zeros(2, 16).bfloat16()
    with pytest.raises(RuntimeError, match="Sparse Tensor Cores take bfloat16 and float16"):
        mk.sparse24_linear(x, weight, backend="cuda")
    with pytest.raises(RuntimeError, match="Sparse Tensor Cores take bfloat16 and float16"):
        mk.explain("sparse24_linear", x, weight, backend="cuda")
    assert mk.explain("sparse24_linear", x, weight.to(torch.bfloat16), backend="cuda").backend == "cuda"


def test_what_16_byte_accesses_cannot_serve_is_copied():
    matrix = torch.arange(40 * 104, dtype=torch.float32).view(40, 104).bfloat16()
    assert matrix.data_ptr() % 16 == 0
    for view in (matrix, matrix[:, 8:72], matrix[::2], matrix[3:4, :64]):
        assert native.aligned_rows(view) is view
    odd = torch.arange(40 * 99, dtype=torch.float32).view(40, 99).bfloat16()[:, :64]
    for view in (matrix[:, 1:65], matrix.t(), odd, odd[:1, 3:35], matrix[:, ::2]):
        copy = native.aligned_rows(view)
        assert copy is not view and torch.equal(copy, view) and copy.data_ptr() % 16 == 0
        assert copy.stride() == (view.shape[1], 1)
    vector = matrix[0]
    assert native.aligned(vector) is vector
    for view in (vector[1:], matrix[:, 0]):
        copy = native.aligned(view)
        assert torch.equal(copy, view) and copy.data_ptr() % 16 == 0 and copy.is_contiguous()
