# SPDX-License-Identifier: Apache-2.0
import copy
import pickle

import pytest
import torch
from torch import nn

import madtp_kernels as mk
from madtp_kernels import dispatch, sparse24_linear
from madtp_kernels.sparse24 import weight as sparse24_weight
from madtp_kernels.sparse24.weight import ASCENDING, Sparse24Weight, register_layout, sparse24_compress

pytestmark = pytest.mark.sanitized

needs_extension = pytest.mark.skipif(dispatch.extension_unsupported_reason() is not None, reason="no C++ extension")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def masked(rows=24, columns=48, dtype=torch.float32, n=2, m=4):
    torch.manual_seed(0)
    weight = torch.randn(rows, columns).to(dtype)
    return weight.masked_fill(~mk.nm_mask(weight, n, m), 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (2, 8), (1, 16)])
def test_round_trip_is_exact(dtype, n, m):
    weight = masked(dtype=dtype, n=n, m=m)
    compressed = sparse24_compress(weight)
    assert torch.equal(compressed.to_dense(), weight) and compressed.shape == (24, 48) and compressed.dtype == dtype
    assert compressed.values.shape == (24, 24) and compressed.indices.shape == (24, 6)
    compressed.check_indices()


def test_the_canonical_form_group_by_group():
    weight = masked(n=1, m=3).masked_fill(torch.rand(24, 48) < 0.3, 0)
    compressed = sparse24_compress(weight)
    for row in range(24):
        for group in range(12):
            nibble = (int(compressed.indices[row, group // 2]) >> (4 * (group % 2))) & 15
            first, second = nibble & 3, nibble >> 2
            values = weight[row, 4 * group : 4 * group + 4].tolist()
            filled = [c for c in range(4) if values[c]]
            expected = sorted(filled + [c for c in range(4) if not values[c]][: 2 - len(filled)])
            assert nibble in ASCENDING and [first, second] == expected
            stored = compressed.values[row, 2 * group : 2 * group + 2].tolist()
            assert stored == [values[first], values[second]]


def test_negative_zero_is_zero():
    weight = masked()
    negative = torch.where(weight == 0, -0.0, weight)
    assert torch.equal(sparse24_compress(negative).indices, sparse24_compress(weight).indices)
    dense = sparse24_compress(negative).to_dense()
    assert torch.equal(dense, weight) and not dense[dense == 0].signbit().any()
    tiny = torch.full((8, 16), -1e-30).masked_fill(~mk.nm_mask(torch.ones(8, 16), 2, 4), 0)
    assert not sparse24_compress(tiny).to(torch.float16).to_dense().signbit().any()


def test_empty_non_contiguous_and_infinite_weights():
    assert sparse24_compress(torch.empty(0, 16)).to_dense().shape == (0, 16)
    weight = masked(48, 48)
    strided = torch.stack((weight, torch.ones_like(weight)), dim=2)[..., 0]
    assert not strided.is_contiguous() and torch.equal(sparse24_compress(strided).to_dense(), weight)
    weight[0, weight[0].nonzero()[0]] = -torch.inf
    assert torch.equal(sparse24_compress(weight).to_dense(), weight)


def test_to_pickle_deepcopy_and_bytes():
    compressed = sparse24_compress(masked())
    assert compressed.to("cpu") is compressed and compressed.to(torch.float32) is compressed
    half = compressed.to(dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and torch.equal(half.to_dense(), masked().bfloat16())
    assert compressed.nbytes == 24 * 24 * 4 + 24 * 6
    for other in (pickle.loads(pickle.dumps(compressed)), copy.deepcopy(compressed)):
        assert torch.equal(other.to_dense(), compressed.to_dense())
        assert other.values.data_ptr() != compressed.values.data_ptr()
    assert repr(half) == "Sparse24Weight(shape=(24, 48), dtype=torch.bfloat16, device=cpu)"
    assert compressed.to("meta").device.type == "meta"
    with pytest.raises(ValueError, match="values must be a 2-dimensional tensor of float32 .*, got int8"):
        compressed.to(torch.int8)


def test_as_the_buffers_of_a_module(monkeypatch):
    monkeypatch.setitem(sparse24_weight._layouts, "cpu", lambda weight: weight.to_dense())

    class Holder(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.register_buffer("values", weight.values)
            self.register_buffer("indices", weight.indices)

        def weight(self):
            return Sparse24Weight(self.values, self.indices)

    first, second = Holder(sparse24_compress(masked())), Holder(sparse24_compress(torch.zeros(24, 48)))
    weight = second.weight()
    assert not weight.layout("cpu").any()
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.weight().to_dense(), masked())
    assert torch.equal(weight.layout("cpu"), masked())  # written to in place: packed again


def test_inside_a_compiled_function(monkeypatch):
    monkeypatch.setitem(sparse24_weight._layouts, "cpu", lambda weight: weight.to_dense())
    x = torch.randn(3, 48)

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = sparse24_compress(masked())

        def forward(self, x):
            rebuilt = Sparse24Weight(self.weight.values, self.weight.indices)
            return x @ self.weight.layout("cpu").T, x @ rebuilt.to_dense().T

    linear = Linear()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert all(torch.equal(out, x @ masked().T) for out in compiled(x))
    linear.weight = sparse24_compress(2 * masked())
    assert all(torch.equal(out, x @ (2 * masked()).T) for out in compiled(x))
    linear.weight.values.zero_()
    linear.weight.layout("cpu")  # outside the compiled function the write is noticed
    assert not any(out.any() for out in compiled(x))


def test_layouts_are_packed_once(monkeypatch):
    monkeypatch.setattr(sparse24_weight, "_layouts", {})
    packed = []
    register_layout("cpu", lambda weight: packed.append(weight.shape) or len(packed))
    compressed = sparse24_compress(masked())
    assert [compressed.layout("cpu") for _ in range(3)] == [1, 1, 1] and packed == [(24, 48)]
    assert copy.deepcopy(compressed).layout("cpu") == 2
    with torch.inference_mode():
        frozen = sparse24_compress(masked())
        assert frozen.layout("cpu") == frozen.layout("cpu") == 3
    with pytest.raises(ValueError, match=r"backend must be one with a 2:4 layout \(cpu\), got cuda"):
        compressed.layout("cuda")


def test_indices_that_do_not_ascend_are_named():
    for nibble in set(range(16)) - set(ASCENDING):
        compressed = sparse24_compress(masked())
        compressed.indices[3, 2] = (compressed.indices[3, 2] & 15) | (nibble << 4)
        message = f"indices must be two ascending columns .*, got {nibble & 3}, {nibble >> 2} at row 3, group 5"
        with pytest.raises(ValueError, match=message):
            compressed.check_indices()
        assert compressed.to_dense().shape == (24, 48)  # and nothing is written outside


OFFENCE = torch.zeros(8, 32)
OFFENCE[5, 20:23] = 1.0


@pytest.mark.parametrize(
    "weight, message",
    [
        (OFFENCE, r"weight must be 2:4, at most 2 .*, got 3 at row 5, group 5 \(columns 20 and on\)"),
        (torch.full((8, 16), torch.nan), "weight must be free of NaN"),
        (torch.zeros(8, 24), "weight must be .* N a multiple of 8 and C of 16"),
        (torch.zeros(12, 16), "weight must be .* N a multiple of 8 and C of 16"),
        (torch.zeros(8), "weight must be a 2-dimensional tensor of float32"),
        (torch.zeros(8, 16).int(), "weight must be a 2-dimensional tensor of float32"),
    ],
)
def test_compress_refuses(weight, message):
    with pytest.raises(ValueError, match=message):
        sparse24_compress(weight)


@pytest.mark.parametrize(
    "values, indices, message",
    [
        (torch.zeros(8, 8), torch.zeros(8, 3, dtype=torch.uint8), r"indices must be \(N, C/8\) = \(8, 2\) on cpu"),
        (torch.zeros(8, 8), torch.zeros(8, 2), "indices must be a 2-dimensional tensor of uint8"),
        (torch.zeros(8, 4), torch.zeros(8, 1, dtype=torch.uint8), r"values must be \(N, C/2\) with N"),
        (torch.zeros(8, 8).int(), torch.zeros(8, 2, dtype=torch.uint8), "values must be a 2-dimensional tensor of f"),
        (torch.zeros(8, 8), torch.zeros(8, 2, dtype=torch.uint8, device="meta"), "indices must be .* on cpu"),
    ],
)
def test_constructor_refuses(values, indices, message):
    with pytest.raises(ValueError, match=message):
        Sparse24Weight(values, indices)


def test_a_layout_made_in_inference_mode_serves_a_backward_too():
    weight, x = sparse24_compress(masked()), torch.randn(3, 48, requires_grad=True)
    with torch.inference_mode():
        expected = sparse24_linear(x, weight)
    out = sparse24_linear(x, weight)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    torch.testing.assert_close(x.grad, weight.to_dense().sum(0).expand(3, -1))


# --- writes, pickles


WRITES = {
    "assigned values": lambda w: setattr(w, "values", 2 * w.values),
    "assigned indices": lambda w: setattr(w, "indices", w.indices.flip(0)),
    "assigned itself after .data": lambda w: (w.values.data.mul_(2), setattr(w, "values", w.values)),
    "mul_": lambda w: w.values.mul_(2),
    "index": lambda w: w.values.__setitem__(0, 1),
    "copy_": lambda w: w.values.copy_(w.values.flip(0)),
    "view": lambda w: w.values.view(-1)[3:].add_(1),
    "indices copy_": lambda w: w.indices.copy_(w.indices.flip(0)),
    "load_state_dict": lambda w: holder(w).load_state_dict({"values": -w.values, "indices": w.indices.flip(1)}),
}


def holder(weight):
    module = torch.nn.Module()
    module.register_buffer("values", weight.values)
    module.register_buffer("indices", weight.indices)
    return module


@needs_extension
@pytest.mark.parametrize("backend", ["cpu", "dense"])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_no_write_is_missed(write, backend):
    with torch.inference_mode():  # whose own tensors would count none
        weight, x = mk.sparse24_prune(torch.randn(24, 32)), torch.randn(3, 32)
        for _ in range(2):
            before = sparse24_linear(x, weight, backend=backend)
        write(weight)
        for _ in range(2):
            after = sparse24_linear(x, weight, backend=backend)
            torch.testing.assert_close(after, x @ weight.to_dense().T)
        assert not torch.allclose(before, after)


@needs_extension
def test_a_transposed_weight_follows_an_assignment():
    dense = torch.randn(16, 32)
    weight = sparse24_compress(dense * mk.transposable_mask(dense)).keep_transposed()
    weight.values = 3 * weight.values
    assert torch.equal(weight.transposed.to_dense(), weight.to_dense().T)


def test_assignments_are_checked():
    weight = sparse24_compress(masked(24, 32))
    for name, value in (("values", weight.values[:8]), ("values", weight.values.long()), ("indices", weight.values)):
        with pytest.raises(ValueError, match=r"^(values|indices) must be"):
            setattr(weight, name, value)
    assert weight.values.shape == (24, 16)


@needs_extension
def test_a_shape_changed_behind_its_back_is_refused():
    weight = sparse24_compress(masked(24, 32))
    for _ in range(2):
        sparse24_linear(torch.zeros(1, 32), weight, backend="cpu")
    weight.values.data = torch.zeros(4096, 16)
    with pytest.raises(ValueError, match="^indices must be of shape"):
        sparse24_linear(torch.zeros(1, 32), weight, backend="cpu")


def test_torch_load_takes_only_what_is_sound(tmp_path):
    dense = torch.randn(16, 32)
    weight = sparse24_compress(dense * mk.transposable_mask(dense)).keep_transposed()
    torch.save({"weight": weight}, tmp_path / "weight.pt")
    loaded = torch.load(tmp_path / "weight.pt", weights_only=True)["weight"]
    assert torch.equal(loaded.to_dense(), weight.to_dense())
    assert torch.equal(loaded.transposed.to_dense(), weight.to_dense().T)
    for copied in (pickle.loads(pickle.dumps(weight)), copy.copy(weight), copy.deepcopy(weight)):
        assert torch.equal(copied.transposed.to_dense(), weight.to_dense().T)
        broken = Sparse24Weight(copied.values, torch.zeros_like(copied.indices))
        torch.save(broken, tmp_path / "broken.pt")
        with pytest.raises((ValueError, pickle.UnpicklingError), match="indices must be two ascending columns"):
            torch.load(tmp_path / "broken.pt", weights_only=True)
        with pytest.raises(ValueError, match="indices must be two ascending columns"):
            pickle.loads(pickle.dumps(broken))


def _double(weight, results):
    results.put(2 * weight.to_dense())


@pytest.mark.slow
def test_a_weight_goes_to_another_process():
    context = torch.multiprocessing.get_context("spawn")
    weight, results = sparse24_compress(masked(24, 32)), context.Queue()
    weight.values.share_memory_()
    process = context.Process(target=_double, args=(weight, results))
    process.start()
    assert torch.equal(results.get(timeout=120), 2 * weight.to_dense())
    process.join()
