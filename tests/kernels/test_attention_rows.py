# SPDX-License-Identifier: Apache-2.0
"""`attention_rows`: the reference against its equation, the other backends against the reference, autograd."""

import math

import pytest
import torch
from backend_cases import BACKENDS, ON_GPU, REFERENCE_AND_CPU, device_of
from ragged_cases import cu_seqlens_of
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import madtp_kernels as mk

pytestmark = pytest.mark.sanitized

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS, KEYS = [2, 0, 9, 1, 2], [37, 5, 18, 9, 0]


class Case:
    """Inputs of one call."""

    def __init__(self, heads=4, key_heads=2, dim=16, rows=ROWS, keys=KEYS, backend=None, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)
        device = device_of(backend)
        self.q, self.k = (
            torch.randn(*shape, dtype=torch.float64, generator=generator).to(device, dtype)
            for shape in ((sum(rows), heads, dim), (sum(keys), key_heads, dim))
        )
        self.cu = cu_seqlens_of(rows).to(device), cu_seqlens_of(keys).to(device)
        # In sequence, at the last key, before the first, and past the last.
        position = torch.randint(-2, max(keys) + 5, (sum(rows),), generator=generator, dtype=torch.int32)
        self.position = position.to(device)
        self.backend = backend

    def run(self, position=None, backend=None, dtype=None, **options):
        q, k = (x if dtype is None else x.to(dtype) for x in (self.q, self.k))
        return mk.attention_rows(q, k, *self.cu, position, backend=backend or self.backend, **options)


def test_follows_its_equation():
    case = Case(dtype=torch.float64)
    for position in (None, case.position):
        got = case.run(position, softmax_scale=0.3)
        expected = torch.zeros_like(got)
        spans = [list(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)) for cu in case.cu]
        for (first, last), (begin, end) in zip(*spans, strict=True):
            seen = [
                end - begin if position is None else min(int(position[i]) + 1, end - begin) for i in range(first, last)
            ]
            rows = [i for i, count in zip(range(first, last), seen, strict=True) if count > 0]
            for i in rows:
                count = seen[i - first]
                for head in range(4):
                    scores = 0.3 * case.k[begin : begin + count, head // 2] @ case.q[i, head]
                    expected[begin : begin + count] += scores.softmax(0) / (4 * len(rows))
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "key_heads", "dim"), [(2, 2, 8), (4, 1, 72), (14, 2, 64), (3, 3, 20), (2, 1, 264)])
def test_within_twice_the_reference_error(backend, dtype, heads, key_heads, dim):
    if backend == "triton" and dtype == torch.bfloat16 and not ON_GPU:
        pytest.skip("the interpreter does bfloat16 arithmetic on the bits of its storage")
    case = Case(heads, key_heads, dim, backend=backend, dtype=dtype)
    for position in (None, case.position):
        exact = case.run(position, backend="reference", dtype=torch.float64)
        bound, got = case.run(position, backend="reference"), case.run(position)
        assert got.dtype == torch.float32
        assert (got - exact).abs().max() <= 2 * (bound - exact).abs().max() + 1e-7


@pytest.mark.parametrize("backend", BACKENDS)
def test_adds_up_to_one_where_a_row_sees_a_key(backend):
    case = Case(backend=backend)
    for position in (None, case.position):
        parts = case.run(position).split(KEYS)
        assert [round(float(part.sum()), 5) for part in parts] == [1, 0, 1, 1, 0]
    none = torch.full_like(case.position, -1)
    assert not case.run(none).any()
    none[1] = 0  # of the first sequence: it sees one key, and the others of that sequence count for nothing
    one = case.run(none)
    assert one[0] == 1 and one.sum() == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_key_heads_are_shared_as_if_they_were_repeated(backend):
    case = Case(6, 2, 24, backend=backend)
    repeated = case.k.repeat_interleave(3, 1)
    got = mk.attention_rows(case.q, repeated, *case.cu, case.position, backend=backend)
    torch.testing.assert_close(got, case.run(case.position), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_no_keys_and_no_sequences(backend):
    for rows, keys in (([], []), ([0, 0], [5, 0]), ([2, 3], [0, 0]), ([0], [0])):
        case = Case(rows=rows, keys=keys or [0], backend=backend) if keys else Case(rows=[0], keys=[0], backend=backend)
        cu = cu_seqlens_of(rows).to(case.q.device), cu_seqlens_of(keys).to(case.q.device)
        got = mk.attention_rows(case.q, case.k, *cu, case.position, backend=backend)
        assert got.shape == (sum(keys),) and not got.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_sample_does_not_depend_on_its_batch(backend, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        case = Case(backend=backend)
        together, row, key = case.run(case.position), 0, 0
        for rows, keys in zip(ROWS, KEYS, strict=True):
            own = slice(row, row + rows), slice(key, key + keys)
            cu = cu_seqlens_of([rows]).to(case.q.device), cu_seqlens_of([keys]).to(case.q.device)
            alone = mk.attention_rows(case.q[own[0]], case.k[own[1]], *cu, case.position[own[0]], backend=backend)
            assert torch.equal(together[own[1]], alone)
            row, key = row + rows, key + keys
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", REFERENCE_AND_CPU)
def test_many_rows_have_the_bits_of_one_thread(backend):
    case, before = Case(2, 1, 8, [90, 3], [50, 60], backend), torch.get_num_threads()
    torch.set_num_threads(1)
    one = case.run(case.position)
    torch.set_num_threads(3)
    three = case.run(case.position)
    torch.set_num_threads(before)
    assert torch.equal(one, three)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_of_a_cache_and_of_a_fused_projection(backend):
    case = Case(backend=backend)
    expected = case.run(case.position)
    cache = case.k.transpose(0, 1).contiguous().transpose(0, 1)  # (Hk, T, D) in memory
    fused = torch.cat([case.q, case.q], 1)[:, 4:]
    channels = torch.stack([case.k, case.k], 3)[..., 0]
    every_second = torch.stack([case.position, case.position], 1)[:, 0]
    for q, k in ((case.q, cache), (fused, case.k), (fused, channels)):
        got = mk.attention_rows(q, k, *case.cu, every_second, backend=backend)
        torch.testing.assert_close(
            got, expected, rtol=0 if backend == "cpu" else 1e-5, atol=0 if backend == "cpu" else 1e-7
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_row_does_not_see_reaches_nothing(backend):
    case = Case(backend=backend, rows=[2, 1], keys=[20, 9])
    position = torch.tensor([11, 4, 8], dtype=torch.int32, device=case.q.device)
    clean = case.run(position)
    case.k[12:20] = math.nan
    got = case.run(position)
    assert torch.equal(got, clean) and not got[12:20].any()
    case.q[1, 2, 3] = math.nan  # a row that sees five keys
    broken = case.run(position)
    assert broken[:5].isnan().all() and torch.equal(broken[20:], clean[20:])
    assert broken[5:20].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_do_not_overflow(backend):
    case = Case(backend=backend)
    case.q *= 1e4
    exact = case.run(backend="reference", dtype=torch.float64)
    assert (case.run() - exact).abs().max() < 1e-3


# --- autograd and tracing


def test_gradients_in_float64():
    case = Case(2, 1, 3, [2, 0, 1], [4, 1, 3], dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (case.q, case.k)]
    for position in (None, torch.tensor([2, -1, 9], dtype=torch.int32)):

        def attend(q, k, position=position):
            return mk.attention_rows(q, k, *case.cu, position)

        assert torch.autograd.gradcheck(attend, inputs)
        assert torch.autograd.gradgradcheck(attend, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_differentiates_like_the_reference(backend, dtype):
    case = Case(4, 2, 24, backend=backend, dtype=dtype)
    weight = torch.linspace(-1, 1, sum(KEYS), device=case.q.device)

    def gradients(backend, dtype):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (case.q, case.k)]
        out = mk.attention_rows(*inputs, *case.cu, case.position, backend=backend)
        return torch.autograd.grad((out * weight.to(out.dtype)).sum(), inputs)

    exact = gradients("reference", torch.float64)
    bounds = gradients("reference", dtype)
    for got, want, bound in zip(gradients(backend, dtype), exact, bounds, strict=True):
        assert got.dtype == dtype and got.any()
        assert (got.double() - want).abs().max() <= 2 * (bound.double() - want).abs().max() + 1e-7


def test_opcheck_and_compile():
    case = Case(4, 2, 8, [2, 0, 3], [7, 2, 5])
    position = case.position
    inputs = [x.requires_grad_() for x in (case.q, case.k)]
    opcheck(torch.ops.madtp.attention_rows, (*inputs, *case.cu, position, 0.3, "auto"))
    detached = [x.detach() for x in inputs]
    opcheck(torch.ops.madtp.attention_rows_backward, (torch.rand(14), *detached, *case.cu, position, 0.3, "reference"))
    compiled = torch.compile(
        lambda q, k: mk.attention_rows(q, k, *case.cu, position), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(*inputs), case.run(position))


def test_flops_are_those_of_one_product():
    case = Case(4, 2, 8, [2, 0, 3], [7, 2, 5])
    with FlopCounterMode(display=False) as counter:
        case.run()
    assert counter.get_total_flops() == 2 * (2 * 7 + 3 * 5) * 4 * 8


# --- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_rows": torch.zeros(3, 8)}, "q_rows must be a 3-dimensional tensor of float32 or .*, got float32"),
        ({"q_rows": torch.zeros(3, 0, 8)}, r"q_rows must be \(R, H, D\) of at least one head and channel, got"),
        ({"k": torch.zeros(9, 2, 8).half()}, "k must be a 3-dimensional tensor of float32, got float16"),
        ({"k": torch.zeros(9, 2, 16)}, "k must be of heads of 8 like q_rows, and of a number of them that divides 4"),
        ({"k": torch.zeros(9, 3, 8)}, r"that divides 4, got float32 \(9, 3, 8\)"),
        ({"k": torch.zeros(9, 0, 8)}, "that divides 4, got"),
        ({"k": torch.zeros(9, 2, 8, device="meta")}, "k must be on cpu, got .* on meta"),
        ({"k": None}, "k must be a tensor, got NoneType"),
        ({"cu_seqlens_q": torch.tensor([0, 1, 4], dtype=torch.int32)}, "cu_seqlens_q must be the row count 3 at its"),
        ({"cu_seqlens_k": torch.tensor([0, 5, 4, 9], dtype=torch.int32)}, "cu_seqlens_k must be of 3 rows like"),
        ({"cu_seqlens_k": torch.tensor([0, 10, 9], dtype=torch.int32)}, "cu_seqlens_k must be non-decreasing, got 10"),
        ({"cu_seqlens_k": torch.tensor([0, 5, 9])}, r"cu_seqlens_k must be int32 of shape \(B\+1,\), got int64"),
        ({"row_position": torch.zeros(3)}, "row_position must be a 1-dimensional tensor of int32, got float32"),
        ({"row_position": torch.zeros(4, dtype=torch.int32)}, "row_position must be of 3 rows like q_rows, got"),
        ({"row_position": [1, 2, 3]}, "row_position must be a tensor or None, got list"),
        ({"softmax_scale": math.inf}, "softmax_scale must be a finite number of float32, got float inf"),
        ({"softmax_scale": "small"}, "softmax_scale must be a number, got small"),
        ({"backend": "tpu"}, "backend= must be one of auto, .*, got 'tpu'"),
    ],
)
def test_refuses(change, message):
    good = {
        "q_rows": torch.zeros(3, 4, 8),
        "k": torch.zeros(9, 2, 8),
        "cu_seqlens_q": torch.tensor([0, 1, 3], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 5, 9], dtype=torch.int32),
    }
    with pytest.raises(ValueError, match=message):
        mk.attention_rows(**(good | change))


def test_explains_itself():
    q, k, cu = torch.zeros(1, 1, 8), torch.zeros(4, 1, 8), (cu_seqlens_of([1]), cu_seqlens_of([4]))
    assert mk.explain("attention_rows", q, k, *cu).backend in ("cpu", "reference")
    assert mk.explain("attention_rows", q.double(), k.double(), *cu).backend == "reference"
