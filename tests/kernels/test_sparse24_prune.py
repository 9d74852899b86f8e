# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

import madtp_kernels as mk
from madtp_kernels import dispatch
from madtp_kernels.sparse24.weight import sparse24_compress

pytestmark = pytest.mark.sanitized

FAST = [torch.float32, torch.bfloat16, torch.float16]
needs_extension = pytest.mark.skipif(
    dispatch.extension_unsupported_reason() is not None, reason="needs the C++ extension"
)
BACKENDS = ["reference", pytest.param("cpu", marks=needs_extension)]


def tied(rows, columns, dtype=torch.float32, seed=0):
    """Few different numbers, zeros of both signs among them."""
    torch.manual_seed(seed)
    return (torch.randint(-3, 4, (rows, columns)) * torch.tensor([-0.5, 0.5]).repeat(columns // 2)).to(dtype)


def masked(weight, score=None):
    return weight.masked_fill(~mk.nm_mask(weight, 2, 4, score=score), 0)


def assert_same(pruned, weight, score=None):
    expected = sparse24_compress(masked(weight, score))
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[weight.itemsize]
    assert pruned.dtype == weight.dtype and torch.equal(pruned.indices, expected.indices)
    assert torch.equal(pruned.values.view(bits), expected.values.view(bits))  # signs of zeros too


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def poisoned_outputs(monkeypatch):
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        out = new_empty(self, *args, **kwargs)
        return out.fill_(255 if out.dtype == torch.uint8 else torch.nan)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@needs_extension
@pytest.mark.parametrize("dtype", FAST)
@pytest.mark.parametrize("shape", [(8, 16), (24, 48), (40, 80), (16, 272), (0, 16), (8, 0)])
def test_bit_equal_to_mask_and_compress(dtype, shape, threads, poisoned_outputs):
    for weight in (torch.randn(shape).to(dtype), tied(*shape, dtype)):
        assert_same(mk.sparse24_prune(weight, backend="cpu"), weight)
        for score in (torch.randn(shape), tied(*shape, dtype, seed=1)):
            assert_same(mk.sparse24_prune(weight, score=score, backend="cpu"), weight, score)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_signs_infinities_and_subnormals(backend):
    groups = [
        [1.0, -1.0, 1.0, 1.0],
        [-0.0, 0.0, -0.0, 5.0],
        [0.0, -0.0, 0.0, 0.0],
        [-torch.inf, 1e-45, torch.inf, 3e38],
        [1e-45, -2e-45, 0.0, 1e-45],
        [1.0, 2.0, 3.0, -4.0],
        [4.0, -0.0, 0.0, -0.0],
        [-1.0, 2.0, -2.0, 1.0],
    ]
    weight = torch.tensor(groups).view(1, 32).repeat(8, 1)
    pruned = mk.sparse24_prune(weight, backend=backend)
    assert pruned.positions()[0].tolist() == [[0, 1], [0, 3], [0, 1], [0, 2], [0, 1], [2, 3], [0, 1], [1, 2]]
    assert not pruned.values[pruned.values == 0].signbit().any()
    assert torch.equal(pruned.to_dense(), masked(weight))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_score_ranks_and_zeros_take_the_lowest_columns(backend):
    weight = torch.tensor([[5.0, 0.0, 7.0, 0.0, 1.0, 2.0, 3.0, 4.0]]).repeat(8, 2)
    score = torch.tensor([[2.0, -1.0, 0.0, 1.0, 0.0, -0.0, -0.0, 0.0]]).repeat(8, 2)
    pruned = mk.sparse24_prune(weight, score=score, backend=backend)
    assert pruned.positions()[0, :2].tolist() == [[0, 1], [0, 1]]
    assert pruned.values[0, :4].tolist() == [5.0, 0.0, 1.0, 2.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_transposed_and_detached(backend):
    wide = tied(24, 80)
    rows, columns = wide[::3, 7:55], wide.T[:, :16]
    odd = torch.stack((wide, wide), dim=2)[..., 0]
    for weight in (rows, columns, odd):
        assert not weight.is_contiguous()
        assert_same(mk.sparse24_prune(weight, backend=backend), weight)
        assert_same(mk.sparse24_prune(weight, score=-weight, backend=backend), weight, -weight)
    weight = torch.randn(8, 16, requires_grad=True)
    assert not mk.sparse24_prune(weight, score=weight, backend=backend).values.requires_grad


def test_the_backend_and_float64():
    weight, score = torch.randn(8, 32).double(), torch.randn(8, 32).double()
    assert_same(mk.sparse24_prune(weight, score=score), weight, score)
    assert mk.explain("sparse24_prune", weight).backend == "reference"
    if dispatch.extension_unsupported_reason() is None:
        assert mk.explain("sparse24_prune", weight.float()).backend == "cpu"
    with pytest.raises(RuntimeError, match="float64 runs on the reference only"):
        mk.sparse24_prune(weight, backend="cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_is_refused_with_the_same_words(backend, threads):
    weight, nan = torch.randn(24, 80), torch.randn(24, 80)
    for at in (0, 47, 64, 79):
        nan[at % 24, at] = torch.nan
        with pytest.raises(ValueError, match=r"^weight must be free of NaN, got float32 \(24, 80\) on cpu$"):
            mk.sparse24_prune(nan, backend=backend)
        with pytest.raises(ValueError, match=r"^weight must be free of NaN, got float32 \(24, 80\) on cpu$"):
            mk.sparse24_prune(nan, score=weight, backend=backend)
        with pytest.raises(ValueError, match=r"^score must be free of NaN, got float32 \(24, 80\) on cpu$"):
            mk.sparse24_prune(weight, score=nan, backend=backend)


@pytest.mark.parametrize(
    "weight, score, message",
    [
        (torch.zeros(8, 24), None, "weight must be .* N a multiple of 8 and C of 16"),
        (torch.zeros(12, 16), None, "weight must be .* N a multiple of 8 and C of 16"),
        (torch.zeros(16), None, "weight must be a 2-dimensional tensor of float32"),
        (torch.zeros(8, 16).int(), None, "weight must be a 2-dimensional tensor of float32"),
        ([[0.0]], None, "weight must be a 2-dimensional tensor of float32"),
        (torch.zeros(8, 16), torch.zeros(8, 32), r"score must be of shape \(8, 16\) like weight"),
        (
            torch.zeros(8, 16),
            torch.zeros(8, 16).double(),
            "score must be .* of float32, got float64",
        ),
        (torch.zeros(8, 16).half(), torch.zeros(8, 16).bool(), "score must be .* of float16 or float32, got bool"),
        (torch.zeros(8, 16), torch.zeros(8, 16, device="meta"), "score must be on cpu"),
    ],
)
def test_prune_refuses(weight, score, message):
    with pytest.raises(ValueError, match=message):
        mk.sparse24_prune(weight, score=score)
