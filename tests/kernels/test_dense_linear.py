# SPDX-License-Identifier: Apache-2.0
"""`dense_linear`: torch's product or oneDNN's with the weight packed, and what is kept of a packed weight."""

import contextlib
import copy
import gc
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import madtp_kernels as mk
from madtp_kernels import measured, sparse24_compress
from madtp_kernels.dense import onednn, packed, torch_product
from madtp_kernels.dense import tuning_cpu as tuning
from madtp_kernels.measured import Timing
from madtp_kernels.ops import dense as ops
from madtp_kernels.ops import unseen

ACTIVATIONS = [None, "gelu", "gelu_tanh", "quick_gelu", "relu"]
DTYPES = (torch.float32, torch.bfloat16)
MISSING = {dtype: onednn.unsupported_reason(dtype) for dtype in DTYPES}
needs_onednn = pytest.mark.skipif(MISSING[torch.float32] is not None, reason=str(MISSING[torch.float32]))


def of_onednn(dtype):
    why = MISSING[dtype]
    return pytest.param("onednn", dtype, marks=pytest.mark.skipif(why is not None, reason=str(why)))


def forget():
    ops._choices.clear()
    packed.forget()
    tuning.measurements.forget()


@pytest.fixture
def onednn_wins(monkeypatch, tmp_path):
    """Tuning on, in an empty cache, and the classes it measures: oneDNN wins from 4 rows on."""
    cases = []

    def time_backends(case, backends):
        cases.append(case)
        times = dict.fromkeys(backends, 10.0)
        return Timing(times | {"onednn": 5.0 if case.rows >= 4 else 9.5}, "2026-01-02")

    monkeypatch.setenv("MADTP_TUNE", "on")
    monkeypatch.setenv("MADTP_CACHE", str(tmp_path))
    monkeypatch.setattr(measured, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(tuning, "time_backends", time_backends)
    monkeypatch.setattr(tuning, "MIN_MACS", 0)
    forget()
    yield cases
    forget()


@pytest.fixture
def packings(monkeypatch):
    """The shapes of the weights that are packed."""
    shapes, pack = [], onednn.pack
    monkeypatch.setattr(onednn, "pack", lambda weight: shapes.append(tuple(weight.shape)) or pack(weight))
    return shapes


def arguments(rows, out_features, in_features, dtype):
    torch.manual_seed(rows)
    shapes = {"x": (rows, in_features), "weight": (out_features, in_features), "bias": (out_features,)}
    shapes |= {"residual": (rows, out_features), "scale": (out_features,)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


# --- what is computed


@pytest.mark.parametrize(
    ("backend", "dtype"), [("dense", torch.float32), ("dense", torch.bfloat16), *map(of_onednn, DTYPES)]
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_within_twice_the_error_of_torch(backend, dtype, activation):
    for rows, out_features, in_features in ((1, 8, 16), (3, 1, 1), (7, 25, 47), (45, 264, 208)):
        given = arguments(rows, out_features, in_features, dtype)
        for names in (
            (),
            ("bias",),
            ("residual",),
            ("bias", "residual"),
            ("bias", "scale"),
            ("bias", "scale", "residual"),
        ):
            call = {name: given[name] for name in ("x", "weight", *names)} | {"activation": activation}
            wide = {name: t.double() if isinstance(t, torch.Tensor) else t for name, t in call.items()}
            exact = mk.dense_linear(**wide)
            got = mk.dense_linear(**call, backend=backend)
            assert got.dtype == dtype and got.shape == exact.shape
            bound = mk.dense_linear(**call, backend="dense").double()
            size = torch.maximum(exact.abs().max(), bound.abs().max())
            allowed = 2 * (bound - exact).abs().max() + 4 * torch.finfo(dtype).eps * size
            assert (got.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("backend", ["reference", "dense", pytest.param("onednn", marks=needs_onednn)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_nan_stays_one(backend, activation):
    given = arguments(7, 24, 40, torch.float32)
    x, weight, bias = (given[name] for name in ("x", "weight", "bias"))
    x[2] = torch.nan
    y = mk.dense_linear(x, weight, bias, activation=activation, backend=backend)
    assert y.isnan().all(1).tolist() == [row == 2 for row in range(7)] and not y[3:].isnan().any()


def running_sum(x, weight):
    """x W^T in float32, every sum in one order with one rounding a step: what a textbook's loop computes."""
    x, weight, out = x.double(), weight.double(), torch.zeros(x.shape[0], weight.shape[0])
    for column in range(x.shape[1]):
        out = (out + x[:, column, None] * weight[:, column]).float()
    return out.double()


@pytest.mark.parametrize("in_features", [208, 768, 3072])
@pytest.mark.parametrize("backend", ["dense", pytest.param("onednn", marks=needs_onednn)])
def test_a_long_float32_sum_is_as_good_as_one_in_order(backend, in_features):
    """No order of a sum is the right one, and twice the error of MKL's would refuse torch's own product without MKL."""
    torch.manual_seed(0)
    x, weight = torch.randn(48, in_features), torch.randn(64, in_features)
    exact = x.double() @ weight.double().t()
    error = (mk.dense_linear(x, weight, backend=backend) - exact).abs()
    in_order = (running_sum(x, weight) - exact).abs()
    assert error.square().mean().sqrt() <= 1.1 * in_order.square().mean().sqrt()
    assert error.max() <= 1.5 * in_order.max()
    sizes = x.double().abs() @ weight.double().abs().t()
    assert (error <= 16 * 2**-24 * sizes).all()  # the bound that holds for any order has in_features for 16


def test_the_reference_rounds_once():
    given = arguments(5, 8, 16, torch.bfloat16)
    x, weight, bias = (given[name].double() for name in ("x", "weight", "bias"))
    expected = torch.relu(x @ weight.t() + bias).mul(given["scale"].double()).add(given["residual"].double())
    got = mk.dense_linear(**given, activation="relu", backend="reference")
    torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=1e-6)
    assert mk.dense_linear(x, weight, bias).dtype == torch.float64


@needs_onednn
@pytest.mark.parametrize("backend", ["dense", "onednn"])
def test_every_shape_stride_and_size(backend):
    given = arguments(6, 8, 32, torch.float32)
    weight, bias = given["weight"], given["bias"]
    run = lambda x, **more: mk.dense_linear(x, weight, bias, backend=backend, **more)  # noqa: E731
    for shape in ((32,), (1, 32), (0, 32), (2, 0, 32), (2, 3, 32), (2, 1, 3, 32)):
        x, residual = torch.randn(shape), torch.randn(*shape[:-1], 8)
        torch.testing.assert_close(run(x), x @ weight.t() + bias)
        torch.testing.assert_close(run(x, residual=residual), residual + (x @ weight.t() + bias))
    wide = torch.randn(6, 80)
    for x in (wide[:, 3:35], wide[:, ::2][:, :32], wide[:1, :32].expand(6, 32), wide[:, :32].t().contiguous().t()):
        residual = torch.randn(8, 6).t()
        torch.testing.assert_close(run(x, residual=residual), residual + (x @ weight.t() + bias))
    assert mk.dense_linear(torch.zeros(3, 0), torch.zeros(8, 0), bias, backend=backend).equal(bias.expand(3, 8))
    assert mk.dense_linear(torch.zeros(3, 32), torch.zeros(0, 32), backend=backend).shape == (3, 0)
    x = torch.randn(3, 8)
    torch.testing.assert_close(mk.dense_linear(x, weight.t(), backend=backend), x @ weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3, 31)}, "x must be of 32 channels like weight"),
        ({"x": torch.zeros(2, 3, 31)}, r"x must be of shape \(..., 32\) like weight"),
        ({"x": torch.zeros(3, 32, dtype=torch.float64)}, "x must be a 2-dimensional tensor of float32"),
        ({"weight": torch.zeros(32)}, "weight must be a 2-dimensional tensor"),
        ({"weight": [1]}, "weight must be a tensor"),
        ({"bias": torch.zeros(7)}, "bias must be of 8 rows like weight"),
        ({"bias": torch.zeros(8, dtype=torch.float16)}, "bias must be a 1-dimensional tensor of float32"),
        ({"residual": torch.zeros(3, 7)}, r"residual must be of shape \(3, 8\)"),
        ({"activation": "tanh"}, "activation must be one of none, gelu"),
        ({"backend": "mkl"}, "backend= must be one of auto, reference, dense, onednn"),
    ],
)
def test_refuses(changes, message):
    good = {"x": torch.zeros(3, 32), "weight": torch.zeros(8, 32)}
    with pytest.raises(ValueError, match=message):
        mk.dense_linear(**good | changes)


def test_gradients_of_any_order_are_torchs():
    given = {name: t.requires_grad_() for name, t in arguments(3, 4, 5, torch.float64).items()}
    run = lambda *tensors: mk.dense_linear(**dict(zip(given, tensors, strict=True)), activation="gelu")  # noqa: E731
    assert torch.autograd.gradcheck(run, tuple(given.values()))
    assert torch.autograd.gradgradcheck(run, tuple(given.values()))
    narrow = {name: t.detach().float().requires_grad_() for name, t in given.items()}
    mk.dense_linear(**narrow, activation="gelu").sum().backward()
    assert all(t.grad is not None for t in narrow.values())


# --- which product runs


@needs_onednn
def test_auto_runs_what_was_faster(onednn_wins, packings):
    given = arguments(16, 8, 32, torch.float32)
    x, weight, bias = given["x"], given["weight"], given["bias"]
    assert "nothing was measured (16 rows, 32 to 8, float32, none" in mk.explain("dense_linear", x, weight, bias).reason
    for _ in range(2):
        for rows in (16, 17, 2):
            y = mk.dense_linear(torch.randn(rows, 32), weight, bias)
            assert y.shape == (rows, 8)
    assert [case.rows for case in onednn_wins] == [16, 2] and packings == [(8, 32)]
    choice = mk.explain("dense_linear", x, weight, bias)
    assert choice.backend == "onednn" and "dense 10.0 us, onednn 5.0 us" in choice.reason
    choice = mk.explain("dense_linear", x[:2], weight, bias)  # a tie of 5 % is not worth a copy of the weight
    assert choice.backend == "dense" and "in half of the memory" in choice.rejected["onednn"]
    assert "asked for by backend=" in mk.explain("dense_linear", x, weight, backend="dense").reason
    mk.dense_linear(x, weight, bias, activation="gelu", residual=given["residual"])
    assert onednn_wins[-1].epilogue == "gelu+residual" and packings == [(8, 32)]


@needs_onednn
def test_a_call_that_others_see_is_torchs(onednn_wins, packings, monkeypatch):
    given = arguments(16, 8, 32, torch.float32)
    x, weight, bias = given["x"], given["weight"], given["bias"]
    expected = torch.nn.functional.linear(x, weight, bias)
    run = lambda x: mk.dense_linear(x, weight, bias)  # noqa: E731
    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(x), expected)
    with FlopCounterMode(display=False) as counter:
        run(x)
    assert counter.get_total_flops() == 2 * 16 * 32 * 8
    assert torch.equal(torch.func.vmap(run)(x[None])[0], expected)
    weight.requires_grad_()
    assert run(x).requires_grad and "no gradient" in mk.explain("dense_linear", x, weight).rejected["onednn"]
    with pytest.raises(RuntimeError, match="'onednn': it has no gradient, and one is recorded; auto would run 'dense'"):
        mk.dense_linear(x, weight, backend="onednn")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(x), expected)
    assert not packings and not onednn_wins
    with torch.no_grad():
        run(x)
    with torch.inference_mode():
        run(x)
    assert packings == [(8, 32)]
    monkeypatch.setenv("MADTP_BACKEND", "reference")
    assert mk.explain("dense_linear", x, weight).backend == "reference"
    with torch.no_grad():
        run(x)
    assert len(packings) == 1


@needs_onednn
@pytest.mark.parametrize("switch", ["variable", "torch"])
def test_it_can_be_switched_off(onednn_wins, packings, monkeypatch, switch):
    x, weight = torch.randn(16, 32), torch.randn(8, 32)
    mk.dense_linear(x, weight)
    assert len(packings) == 1
    packed.forget()
    if switch == "variable":
        monkeypatch.setenv("MADTP_ONEDNN", "off")
        why = "MADTP_ONEDNN is off"
    else:
        torch._C._set_mkldnn_enabled(False)  # as torch.backends.mkldnn.flags does, which warns of another flag
        why = "torch.backends.mkldnn is off"
    with contextlib.ExitStack() as stack:
        stack.callback(torch._C._set_mkldnn_enabled, True)
        assert torch.equal(mk.dense_linear(x, weight), x @ weight.t()) and len(packings) == 1
        choice = mk.explain("dense_linear", x, weight)
        assert choice.backend == "dense" and choice.rejected["onednn"] == why
        with pytest.raises(RuntimeError, match=why):
            mk.dense_linear(x, weight, backend="onednn")
    monkeypatch.setenv("MADTP_ONEDNN", "maybe")
    with pytest.raises(ValueError, match="MADTP_ONEDNN must be on or off, got 'maybe'"):
        mk.dense_linear(x, weight)


def no_ops(monkeypatch):
    monkeypatch.setattr(onednn.torch, "ops", SimpleNamespace(mkldnn=SimpleNamespace()))


def another_signature(monkeypatch):
    def refuse(*args):
        raise TypeError("takes no such arguments")

    monkeypatch.setattr(onednn, "_products", lambda: (refuse, refuse))


def wrong_numbers(monkeypatch):
    run, added = onednn._products()
    monkeypatch.setattr(onednn, "_products", lambda: (lambda *args: run(*args) * 1.001, added))


@needs_onednn
@pytest.mark.parametrize("broken", [no_ops, another_signature, wrong_numbers])
def test_without_the_private_ops_it_is_torchs(onednn_wins, monkeypatch, broken):
    x, weight = torch.randn(16, 32), torch.randn(8, 32)
    expected = torch.nn.functional.linear(x, weight)
    onednn._failure.cache_clear()
    onednn._products.cache_clear()
    with monkeypatch.context() as patch:
        broken(patch)
        why = onednn.unsupported_reason(torch.float32)
    assert why is not None and ("cannot pack" in why or "is wrong by" in why)
    try:
        assert torch.equal(mk.dense_linear(x, weight), expected) and not onednn_wins
        assert mk.explain("dense_linear", x, weight).rejected["onednn"] == why
        sparse = sparse24_compress(weight * mk.nm_mask(weight, 2, 4))
        assert "onednn" in mk.explain("sparse24_linear", x, sparse).rejected
    finally:
        onednn._failure.cache_clear()


@needs_onednn
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_measurement_runs_both(mode):
    state = torch.get_rng_state()
    for epilogue in ("none", "gelu+scale+residual", "quick_gelu", "none+residual"):
        case = tuning.LinearCall(4, 24, 32, "float32", epilogue, 1)
        with mode():
            timing = tuning.time_backends(case, ("dense", "onednn"))
        assert timing.times.keys() == {"dense", "onednn"} and min(timing.times.values()) > 0
    assert torch.equal(torch.get_rng_state(), state) and not packed._entries


@needs_onednn
def test_what_is_small_is_never_measured(onednn_wins, monkeypatch):
    x, weight = torch.randn(16, 32), torch.randn(8, 32)
    monkeypatch.setattr(tuning, "MIN_MACS", 16 * 32 * 8 + 1)
    assert torch.equal(mk.dense_linear(x, weight), x @ weight.t()) and not onednn_wins
    assert "below 4097 MACs (16 rows, 32 to 8" in mk.explain("dense_linear", x, weight).rejected["onednn"]
    for rows in range(1, 700):  # the short way to say so and the class agree
        x = torch.empty(1).expand(rows, 32)
        if ops.is_small(x, 8):
            assert not tuning.is_worth_asking(tuning.dense_call(x, weight, None, None, None))
    ops._choices.clear()
    monkeypatch.setattr(tuning, "MIN_MACS", 16 * 32 * 8)
    mk.dense_linear(torch.randn(16, 32), weight)
    assert len(onednn_wins) == 1


@pytest.mark.parametrize("name", ["_len_torch_dispatch_stack", "_get_mkldnn_enabled"])
def test_a_torch_without_a_private_question_is_asked_nothing(monkeypatch, name):
    monkeypatch.delattr(torch._C, name)
    state_of_process, is_profiled = unseen._probes()
    assert state_of_process() is None and is_profiled()
    monkeypatch.setattr(ops, "state_of_process", state_of_process)
    x, weight = torch.randn(16, 32), torch.randn(8, 32)
    assert torch.equal(mk.dense_linear(x, weight), x @ weight.t())
    with pytest.raises(RuntimeError, match="auto would run 'dense'"):
        mk.dense_linear(x, weight, backend="onednn")


# --- what is kept of a packed weight


def kept(weight):
    return [key for key in packed._entries if key[0] == weight.data_ptr()]


def right(x, weight):
    torch.testing.assert_close(mk.dense_linear(x, weight), x @ weight.t())


@needs_onednn
def test_a_write_is_seen(onednn_wins, packings):
    x, weight = torch.randn(16, 32), torch.nn.Parameter(torch.randn(96, 32))
    with torch.no_grad():
        right(x, weight)
        right(x, weight.detach())  # the same memory
        assert len(packings) == 1
        weight.mul_(2)
        right(x, weight)
        weight.data.mul_(2)  # which torch does not count
        right(x, weight)
        weight.data[-4:] = 0
        right(x, weight)
        weight.data = torch.randn(96, 32)
        right(x, weight)
        assert len(packings) == 5
        right(x, weight)
        assert len(packings) == 5 and len(kept(weight)) == 1
    right(x, torch.randn(32, 96).t())  # another order of rows is not packed
    with torch.inference_mode():
        counts_none = torch.randn(96, 32)
    right(x, counts_none)
    assert len(packings) == 5
    square = torch.randn(32, 32)
    right(x, square)
    right(x, square.t())
    right(x, square[:8])
    assert packings[5:] == [(32, 32), (8, 32)]


def sgd(layer):
    return torch.optim.SGD(layer.parameters(), lr=0.1, foreach=True).step


def fused_adamw(layer):
    return torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True).step


def loaded(layer):
    state = {name: tensor + 1 for name, tensor in layer.state_dict().items()}
    return lambda: layer.load_state_dict(state)


def one_value(layer):
    return lambda: layer.weight[11, 5].add_(1)


@needs_onednn
@pytest.mark.parametrize("change", [sgd, fused_adamw, loaded, one_value])
def test_what_changes_in_training_is_seen(onednn_wins, packings, change):
    layer, x = torch.nn.Linear(32, 96), torch.randn(16, 32)
    layer.weight.grad, layer.bias.grad = torch.zeros(96, 32), torch.ones(96)
    layer.weight.grad[11, 5] = 1  # no value that is compared at every call
    step = change(layer)
    with torch.no_grad():
        before = mk.dense_linear(x, layer.weight, layer.bias)
        step()
        after = mk.dense_linear(x, layer.weight, layer.bias)
        assert len(packings) == 2 and not torch.allclose(before, after)
        torch.testing.assert_close(after, layer(x))


@needs_onednn
def test_training_carries_no_packed_weights(onednn_wins):
    layer, frozen, x = torch.nn.Linear(32, 96), torch.randn(96, 32), torch.randn(16, 32)
    with torch.no_grad():
        mk.dense_linear(x, layer.weight, layer.bias)
        mk.dense_linear(x, frozen)
    assert len(packed._entries) == 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mk.dense_linear(x, layer.weight, layer.bias)
    mk.dense_linear(x.requires_grad_(), frozen)
    packed.drop(frozen.to_sparse())
    assert not kept(layer.weight) and len(kept(frozen)) == 1


@needs_onednn
def test_what_was_packed_goes_with_the_memory_of_the_weight(onednn_wins):
    layer, x = torch.nn.Linear(32, 96), torch.randn(16, 32)
    with torch.no_grad():
        mk.dense_linear(x, layer.weight, layer.bias)
        assert len(packed._entries) == 1
        plain = len(pickle.dumps(layer)), set(layer.state_dict()), set(vars(layer))
        twin = copy.deepcopy(layer)
        assert len(packed._entries) == 1 and (len(pickle.dumps(twin)), set(twin.state_dict()), set(vars(twin))) == plain
        torch.testing.assert_close(mk.dense_linear(x, twin.weight, twin.bias), layer(x))
        assert len(packed._entries) == 2
        layer.double()
        assert len(packed._entries) == 1
        assert mk.dense_linear(x.double(), layer.weight, layer.bias).dtype == torch.float64
    del twin
    gc.collect()
    assert not packed._entries


@needs_onednn
def test_parts_of_one_memory_take_as_much_again_and_no_more(onednn_wins, packings):
    x, whole = torch.randn(16, 32), torch.randn(96, 32)
    for _ in range(2):
        for row in range(0, 96, 24):  # none of which has a part in another
            right(x, whole[row : row + 24])
    assert len(packings) == 4
    for row in range(60):
        right(x, whole[row : row + 36])
    assert len(packings) == 64 and len(packed._entries) == 2
    right(x, whole)
    assert list(packed._entries) == kept(whole)


@needs_onednn
def test_a_weight_with_a_nan_is_packed_once(onednn_wins, packings):
    x, weight = torch.randn(16, 32), torch.randn(96, 32)
    weight[:, 5::2] = torch.nan
    for _ in range(3):
        assert mk.dense_linear(x, weight).isnan().all()
    assert len(packings) == 1
    weight.data.nan_to_num_()
    right(x, weight)


@needs_onednn
def test_threads_share_a_weight(onednn_wins, packings):
    x, weights = torch.randn(16, 32), [torch.randn(64, 32) for _ in range(3)]
    start = threading.Barrier(8)

    def run(_):
        start.wait()
        return [mk.dense_linear(x, weight) for weight in weights * 2]

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(run, range(8)))
    assert len(packings) == 3 and len(onednn_wins) == 1
    for result in results:
        for got, weight in zip(result, weights * 2, strict=True):
            torch.testing.assert_close(got, torch_product.linear(x, weight, None, "none", None, None))


# --- 2:4 weights


@needs_onednn
def test_a_24_weight_runs_on_it():
    weight = torch.randn(24, 32)
    sparse = sparse24_compress(weight * mk.nm_mask(weight, 2, 4))
    given = arguments(9, 24, 32, torch.float32)
    options = {"bias": given["bias"], "residual": given["residual"], "activation": "gelu", "backend": "onednn"}
    x = given["x"].requires_grad_()
    for rows in (9, 0):
        call = options | {"residual": given["residual"][:rows]}
        for _ in range(2):
            with torch.no_grad():
                y = mk.sparse24_linear(x[:rows], sparse, **call)
            torch.testing.assert_close(y, mk.sparse24_linear(x[:rows], sparse, **call | {"backend": "dense"}))
    assert sparse._packed["onednn"][1].is_mkldnn
    gradients = [
        torch.autograd.grad(mk.sparse24_linear(x, sparse, **options | {"backend": name}).square().sum(), x)[0]
        for name in ("onednn", "reference")
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    count = torch.tensor(5, dtype=torch.int32)
    out = mk.sparse24_linear(x.detach(), sparse, num_rows=count, backend="onednn")
    assert (out[5:] == 0).all() and out[:5].any()
    sparse.values.mul_(2)
    torch.testing.assert_close(
        mk.sparse24_linear(x.detach(), sparse, backend="onednn"), x.detach() @ sparse.to_dense().t()
    )
    with FlopCounterMode(display=False) as counter:
        mk.sparse24_linear(x.detach(), sparse, backend="onednn")
    assert counter.get_total_flops() == 2 * 9 * 24 * 32
    with pytest.raises(ValueError, match=r"layout must be the dense weight, torch.float32 of shape \(24, 32\), packed"):
        torch.ops.madtp.sparse24_linear(
            x, sparse.values, sparse.indices, sparse.to_dense(), None, "none", None, None, None, "onednn"
        )
