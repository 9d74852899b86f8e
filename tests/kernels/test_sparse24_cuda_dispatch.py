# SPDX-License-Identifier: Apache-2.0
"""Which backend a 2:4 layer on a GPU gets: decided here without one."""

import re
import types

import pytest
import torch
from torch._subclasses import FakeTensorMode

import madtp_kernels as mk
from madtp_kernels import dispatch, sparse24_compress
from madtp_kernels.native import common as native
from madtp_kernels.native import sparse24
from madtp_kernels.ops import tokens

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


ALL = ("80", "90a", "100a", "120a")


@pytest.mark.parametrize(
    ("archs", "capability", "text"),
    [
        (("80", "90a"), (8, 0), "on sm_80 the kernels of sm_80 run, as code for sm_80"),
        (("80", "90a"), (8, 9), "on sm_89 the kernels of sm_80 run, as code for sm_80"),
        (("80", "89", "90a"), (8, 9), "on sm_89 the kernels of sm_80 run, as code for sm_89"),
        (("80", "90a"), (9, 0), "on sm_90 the kernels of sm_90a run, as code for sm_90a"),
        (("80",), (9, 0), "on sm_90 the kernels of sm_80 run, as PTX for sm_80, which the driver compiles"),
        (("80", "90"), (9, 0), "on sm_90 the kernels of sm_80 run, as code for sm_90"),
        (("80", "90a"), (10, 0), "on sm_100 the kernels of sm_80 run, as PTX for sm_80, which the driver compiles"),
        (("80", "90a"), (12, 0), "on sm_120 the kernels of sm_80 run, as PTX for sm_80, which the driver compiles"),
        (
            ("80", "90", "90a"),
            (12, 0),
            "on sm_120 the kernels of sm_80 run, as PTX for sm_90, which the driver compiles",
        ),
        (ALL, (10, 0), "on sm_100 the kernels of sm_80 run, as code for sm_100a"),
        (ALL, (10, 3), "on sm_103 the kernels of sm_80 run, as PTX for sm_80, which the driver compiles"),
        (("80", "100f"), (10, 3), "on sm_103 the kernels of sm_80 run, as code for sm_100f"),
        (ALL, (12, 0), "on sm_120 the kernels of sm_80 run, as code for sm_120a"),
    ],
)
def test_what_a_gpu_runs_of_a_build(archs, capability, text):
    assert dispatch.explain_code(archs, capability).startswith(text)


@pytest.mark.parametrize(
    ("archs", "capability", "built", "driver", "why"),
    [
        (("80", "90a"), (9, 0), (13, 0), (13, 0), None),
        (("80", "90a"), (9, 0), (12, 8), (13, 0), None),
        (("80", "90a"), (9, 0), (12, 8), (12, 4), None),
        (
            ("80", "90a"),
            (12, 0),
            (12, 8),
            (12, 4),
            "the NVIDIA driver is for CUDA 12.4, .* PTX for sm_80 of CUDA 12.8",
        ),
        (("80", "90a"), (9, 0), (13, 0), (12, 8), "the NVIDIA driver is for CUDA 12.8, and .* has code of CUDA 13.0"),
        (("80", "90a"), (9, 0), (13, 0), None, None),
    ],
)
def test_an_older_driver(archs, capability, built, driver, why):
    found = dispatch.driver_unsupported_reason(archs, capability, built, driver)
    assert found is None if why is None else re.match(why, found) and found.endswith("with an older nvcc")


@pytest.fixture
def pretended(monkeypatch):
    """set(capability, driver, archs): a GPU, its driver and a build, as far as anything asks for them."""

    def set(capability, driver=(13, 0), archs=("80", "90a")):
        info = {"cuda": "13.0.48", "cuda_archs": list(archs), "version": ""}
        monkeypatch.setattr(dispatch, "extension", lambda: types.SimpleNamespace(cuda=None, build_info=lambda: info))
        monkeypatch.setattr(dispatch, "extension_unsupported_reason", lambda: None)
        monkeypatch.setattr(dispatch, "_build_archs", lambda: list(archs))
        monkeypatch.setattr(dispatch, "_build_cuda", dispatch._build_cuda.__wrapped__)
        monkeypatch.setattr(dispatch, "_driver_version", lambda: driver)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return set


def fake_call():
    """x and a weight on a GPU that is not there."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 16, device=GPU, dtype=torch.bfloat16)
        values, indices = torch.empty(8, 8, device=GPU, dtype=x.dtype), torch.empty(8, 2, device=GPU, dtype=torch.uint8)
        return x, mk.Sparse24Weight(values, indices)


@pytest.mark.parametrize(
    ("capability", "text"),
    [
        ((8, 9), "on sm_89 the kernels of sm_80 run, as code for sm_80"),
        ((9, 0), "on sm_90 the kernels of sm_90a run, as code for sm_90a"),
        ((10, 0), "on sm_100 the kernels of sm_80 run, as PTX for sm_80, which the driver compiles at its first use"),
        ((12, 0), "on sm_120 the kernels of sm_80 run, as PTX for sm_80, which the driver compiles at its first use"),
    ],
)
def test_explain_says_what_a_newer_gpu_runs(pretended, monkeypatch, capability, text):
    pretended(capability)
    monkeypatch.setattr(dispatch.record("sparse24_linear"), "tuned", None)
    choice = mk.explain("sparse24_linear", *fake_call())
    assert choice.backend == "cuda" and choice.reason.endswith(f"; {text}")
    assert mk.explain("sparse24_linear", *fake_call(), backend="cuda").reason == f"asked for by backend=; {text}"


def test_a_driver_that_is_too_old_runs_dense_and_says_so(pretended):
    pretended((9, 0), driver=(12, 8))
    why = r"the NVIDIA driver is for CUDA 12.8, and madtp_kernels._C has code of CUDA 13.0: update the driver, or build"
    choice = dispatch.choose("sparse24_linear", None, torch.bfloat16, GPU)
    assert choice.backend == "dense" and re.match(why, choice.rejected["cuda"])
    with pytest.raises(RuntimeError, match=f"cannot run on backend 'cuda' .*: {why}.*; auto would run 'dense'"):
        dispatch.choose("sparse24_linear", "cuda", torch.bfloat16, GPU)


def test_the_version_of_the_driver(monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 12080, raising=False)
    assert dispatch._driver_version.__wrapped__() == (12, 8)
    monkeypatch.delattr(torch._C, "_cuda_getDriverVersion")
    assert dispatch._driver_version.__wrapped__() is None


def test_what_a_cuda_graph_cannot_hold_is_refused_before_it_is_lost(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    x, weight = fake_call()
    packed = "a 2:4 weight is packed for cuda at its first call, which a CUDA graph cannot record: call it once"
    with pytest.raises(RuntimeError, match=packed):
        weight.layout("cuda")
    assert not weight._packed
    with pytest.raises(RuntimeError, match="pruning asks the GPU for a NaN, which .* cannot record: prune before"):
        sparse24.sparse24_prune(x, None)
    with pytest.raises(RuntimeError, match='capacity="exact" reads .* cannot record: use capacity="upper_bound"'):
        tokens.sized(x, x, "exact")
    assert tokens.sized(x, x, "upper_bound") is x
    sparse24_compress(torch.zeros(8, 16)).layout("cpu")  # of no concern to a graph


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
