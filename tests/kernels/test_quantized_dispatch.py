# SPDX-License-Identifier: Apache-2.0
"""What runs a call of `quantized_linear`: what auto takes from made-up measurements, and who goes straight there."""

import pytest
import torch
from sparse24_cases import dense24
from sparse24_cases import epilogue as arguments
from torch.utils.flop_counter import FlopCounterMode

import madtp_kernels as mk
from madtp_kernels import dispatch, quantize
from madtp_kernels import measured as kept
from madtp_kernels.measured import LinearCall, Timing
from madtp_kernels.native import quantized as native
from madtp_kernels.ops import quantized
from madtp_kernels.ops.quantized import quantized_pack
from madtp_kernels.quantized import backend_dense as dense
from madtp_kernels.quantized import tuning_cpu as tuning
from madtp_kernels.reference.quantized import to_dense_values

pytestmark = [
    pytest.mark.sanitized,
    pytest.mark.skipif(dispatch.extension_unsupported_reason() is not None, reason="no C++ extension"),
]
SCHEMES = ("int8", "int8_24")
DAY = "2026-01-02"


@pytest.fixture
def weight():
    return quantize(dense24(24, 32))


@pytest.fixture
def checked(monkeypatch):
    """The calls that went the long way: a list that grows by one with each."""
    calls, check = [], quantized.check_types

    def spy(**args):
        if "x" in args:  # of a call: a weight is checked where it is packed
            calls.append(args)
        check(**args)

    monkeypatch.setattr(quantized, "check_types", spy)
    return calls


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Tuning on, in an empty cache, and the cases it measures: dense wins from 16 rows on."""
    cases = []

    def time_backends(case, backends):
        cases.append(case)
        times = (20.0, 10.0) if case.rows >= 16 else (10.0, 20.0)
        return Timing(dict(zip(backends, times, strict=True)), DAY)

    monkeypatch.setenv("MADTP_TUNE", "on")
    monkeypatch.setenv("MADTP_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "time_backends", time_backends)
    monkeypatch.setattr(kept, "SHIPPED", tmp_path / "shipped")
    tuning.measurements.forget()
    yield cases
    tuning.measurements.forget()


# --- auto


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "quick_gelu", "relu"])
@pytest.mark.parametrize("dtype", dispatch.FAST_DTYPES)
def test_what_auto_takes_does_not_show_in_the_bits(activation, dtype):
    for rows, out_features, in_features in [(1, 8, 16), (7, 24, 48), (45, 264, 208), (133, 40, 144), (33, 520, 400)]:
        weight = quantize(dense24(out_features, in_features))
        x, rest = torch.randn(rows, in_features).to(dtype), arguments(rows, out_features, dtype)
        for options in ({}, rest, {**rest, "num_rows": torch.tensor(rows // 2, dtype=torch.int32)}):
            sparse, full = (
                mk.quantized_linear(x, weight, activation=activation, **options, backend=backend)
                for backend in ("cpu", "dense")
            )
            assert torch.equal(sparse, full)


def test_auto_runs_what_was_faster_and_keeps_the_layout_of_that_alone(measured, monkeypatch):
    ran = []
    for name, module in (("cpu", native), ("dense", dense)):
        run = module.quantized_linear
        spy = lambda *args, name=name, run=run: ran.append(name) or run(*args)  # noqa: E731
        monkeypatch.setitem(dispatch.record("quantized_linear").implementations, name, spy)
    weight, many, few = (quantize(dense24(24, 32)) for _ in range(3))
    for rows in (2, 16, 17, 16, 2):
        mk.quantized_linear(torch.randn(rows, 32), weight)
    mk.quantized_linear(torch.randn(16, 32), many)
    mk.quantized_linear(torch.randn(2, 32), few)
    assert ran == ["cpu", "dense", "dense", "dense", "cpu", "dense", "cpu"]
    assert [case.rows for case in measured] == [2, 16]
    assert (set(weight._packed), set(many._packed), set(few._packed)) == ({"cpu", "dense"}, {"dense"}, {"cpu"})
    monkeypatch.setenv("MADTP_BACKEND", "cpu")
    mk.quantized_linear(torch.randn(16, 32), weight)
    monkeypatch.delenv("MADTP_BACKEND")
    mk.quantized_linear(torch.randn(16, 32), weight, backend="cpu")
    mk.quantized_linear(torch.randn(2, 32), weight, backend="dense")
    assert ran[7:] == ["cpu", "cpu", "dense"] and len(measured) == 2


def test_what_was_measured_outlives_the_process(measured, tmp_path, weight):
    case = tuning.quantized_call(torch.zeros(16, 32), weight, "gelu", None, torch.ones(24))
    assert case == LinearCall(16, 24, 32, "float32", "gelu+scale", torch.get_num_threads())
    assert tuning.fastest(case) == "dense"
    tuning.measurements.forget()
    assert tuning.fastest(case) == "dense" and measured == [case]
    (file,) = (tmp_path / "tuning").iterdir()
    assert file.name.startswith("quantized-") and file.name == tuning.measurements.file_name()


def test_off_takes_ours_and_a_tie_is_ours(measured, monkeypatch, weight):
    assert Timing({"cpu": 10.0, "dense": 9.9}, DAY).fastest(tuning.BACKENDS, tuning.MARGIN) == "cpu"
    monkeypatch.setenv("MADTP_TUNE", "off")
    mk.quantized_linear(torch.randn(16, 32), weight)
    assert set(weight._packed) == {"cpu"} and not measured


def test_nothing_is_measured_where_there_is_no_choice(measured, weight):
    x = torch.randn(16, 32)
    mk.quantized_linear(x, quantize(torch.randn(24, 32), "int8"))
    with FlopCounterMode(display=False) as counter:
        mk.quantized_linear(x, weight)
    assert counter.get_total_flops() == 16 * 24 * 32
    compiled = torch.compile(lambda x: mk.quantized_linear(x, weight), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), mk.quantized_linear(x, weight, backend="cpu"))
    for bad in ({"residual": torch.randn(3, 24)}, {"bias": torch.randn(23)}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            mk.quantized_linear(x, weight, **bad)
    assert not measured
    mk.quantized_linear(x, weight)
    with FlopCounterMode(display=False) as counter:
        mk.quantized_linear(x, weight)
    assert counter.get_total_flops() == 2 * 16 * 24 * 32 and len(measured) == 1  # of dense


def test_explain_shows_the_numbers(measured, weight):
    x = torch.randn(16, 32)
    choice = mk.explain("quantized_linear", x, weight)
    assert choice.backend == "cpu" and "nothing was measured (16 rows, 32 to 24, float32, none, " in choice.reason
    mk.quantized_linear(x, weight)
    choice = mk.explain("quantized_linear", x, weight)
    assert choice.backend == "dense" and f"measured {DAY} (16 rows" in choice.reason
    assert "cpu 20.0 us, dense 10.0 us" in choice.reason and choice.rejected["cpu"] == "dense is faster here"
    mk.quantized_linear(x[:2], weight)
    choice = mk.explain("quantized_linear", x[:2], weight)
    assert choice.backend == "cpu" and choice.rejected["dense"] == "cpu is faster here, or as fast in less memory"
    assert "asked for by backend=" in mk.explain("quantized_linear", x, weight, backend="dense").reason
    choice = mk.explain("quantized_linear", x, quantize(torch.randn(24, 32), "int8"))
    assert choice.backend == "cpu" and choice.rejected["dense"] == "the weight is dense: cpu is the same kernel"


def test_dense_needs_the_kernels_that_cpu_needs(monkeypatch):
    reason = lambda device: dispatch.unsupported_reason(  # noqa: E731
        "quantized_linear", "dense", torch.float32, torch.device(device), (), "int8"
    )
    assert reason("cpu") is None and reason("xpu") == "the tensors are on xpu"
    monkeypatch.setattr(dispatch, "extension_unsupported_reason", lambda: "it is not there")
    assert reason("cpu") == "it is not there"


def test_many_rows_have_a_layout_of_their_own_where_that_is_faster():
    weight, x = quantize(dense24(72, 144)), torch.randn(native.MANY_ROWS, 144)
    two = native.quantized_layout_bytes(72, 144, True) != native.quantized_layout_bytes(72, 144, True, True)
    many, few = ("cpu_many_rows" if two else "cpu"), "cpu"
    for rows in (native.MANY_ROWS, native.MANY_ROWS - 1):
        assert native.takes_many_rows(rows) == (two and rows == native.MANY_ROWS)
        y = mk.quantized_linear(x[:rows], weight, backend="cpu")
        assert torch.equal(mk.quantized_linear(x[:rows], weight, backend="cpu"), y)  # on the fast path
        assert torch.equal(mk.quantized_linear(x[:rows], weight, backend="reference"), y)
        assert set(weight._packed) == ({many} if rows == native.MANY_ROWS else {many, few})
        for layout in {many, few}:  # either takes any rows
            call = x[:rows], weight.values, weight.indices, weight.scale, weight.layout(layout), None
            assert torch.equal(torch.ops.madtp.quantized_linear(*call, "none", None, None, None, "cpu"), y)
        why = mk.explain("quantized_linear", x[:rows], weight, backend="auto").reason
        assert why.endswith("; the weight in its layout for many rows") == native.takes_many_rows(rows)
        weight.forget()
        weight.layout(many)


def test_many_rows_begin_with_a_class_of_rows():
    x, weight = torch.randn(native.MANY_ROWS, 32), quantize(dense24(24, 32))
    classes = [tuning.quantized_call(x[:rows], weight, None, None, None).rows for rows in (181, 182)]
    assert native.MANY_ROWS == 182 and classes == [128, 256]


def test_a_dense_weight_has_one_layout_whatever_it_is_called():
    weight, x = quantize(torch.randn(24, 32), "int8"), torch.randn(3, 32)
    y = mk.quantized_linear(x, weight, backend="cpu")
    assert torch.equal(mk.quantized_linear(x, weight, backend="dense"), y)
    assert weight.layout("dense") is weight.layout("cpu")


def test_a_direct_call_of_dense_checks_its_layout(weight):
    x = torch.randn(5, 32)
    call = lambda layout: torch.ops.madtp.quantized_linear(  # noqa: E731
        x, weight.values, weight.indices, weight.scale, layout, None, "none", None, None, None, "dense"
    )
    layout = quantized_pack(to_dense_values(weight.values, weight.indices), None)
    expected = mk.quantized_linear(x, weight, backend="cpu")
    assert torch.equal(call(None), expected) and torch.equal(call(layout), expected)
    with pytest.raises(ValueError, match="layout must be contiguous uint8"):
        call(layout[:-1])


def test_a_measurement_runs_every_class_of_calls(monkeypatch):
    ticks = iter(range(10**6))  # the clock is a counter: only that both run is of interest
    monkeypatch.setattr(kept.time, "perf_counter", lambda: next(ticks))
    state = torch.get_rng_state()
    for dtype, epilogue in (("float32", "gelu+residual"), ("bfloat16", "none+scale+residual"), ("float16", "relu")):
        timing = tuning.time_backends(LinearCall(4, 24, 32, dtype, epilogue, 1), tuning.BACKENDS)
        assert timing.times == {"cpu": 1e6, "dense": 1e6}
    assert torch.equal(torch.get_rng_state(), state)


# --- the fast path


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("backend", ["cpu", "dense", None])
def test_the_second_of_a_class_is_direct_and_has_the_same_bits(backend, scheme, checked):
    weight, x = quantize(dense24(24, 32), scheme), torch.randn(6, 32)
    rest = {"residual": torch.randn(6, 24), "scale": torch.randn(24), "activation": "gelu", "backend": backend}
    calls = [{"backend": backend}, {"bias": torch.randn(24), "backend": backend}, rest]
    first = [mk.quantized_linear(x, weight, **call) for call in calls]
    assert len(checked) == 3
    for call, expected in zip(calls, first, strict=True):
        wide = torch.randn(6, 40)
        wide[:, 3:35] = x
        for rows in (x, wide[:, 3:35]):
            assert torch.equal(mk.quantized_linear(rows, weight, **call), expected)
        with torch.no_grad():
            assert torch.equal(mk.quantized_linear(x, weight, **call), expected)
    assert len(checked) == 3
    mk.quantized_linear(torch.randn(40, 32), weight, backend=backend)  # of another class of rows
    mk.quantized_linear(x.bfloat16(), weight, backend=backend)
    mk.quantized_linear(x, weight, activation="relu", backend=backend)
    mk.quantized_linear(x, weight, num_rows=torch.tensor(3, dtype=torch.int32), backend=backend)
    assert len(checked) == 7
    with pytest.raises(ValueError, match="x must be of 32 channels like weight"):
        mk.quantized_linear(torch.randn(6, 16), weight, backend=backend)


def test_rows_of_other_shapes_are_direct_too(weight, checked):
    x, residual = torch.randn(2, 3, 32), torch.randn(2, 3, 24)
    calls = [mk.quantized_linear(x, weight, residual=residual, backend="cpu") for _ in range(2)]
    flat = mk.quantized_linear(x.view(6, 32), weight, residual=residual.view(6, 24), backend="cpu")
    assert all(torch.equal(y.view(6, 24), flat) for y in calls)
    assert [args["x"].ndim for args in checked] == [3, 2, 3]


def test_writes_and_variables_are_noticed(weight, monkeypatch):
    x = torch.randn(6, 32)
    for backend in ("cpu", "dense"):
        before = [mk.quantized_linear(x, weight, backend=backend) for _ in range(2)][0]
        weight.scale.mul_(2)
        assert torch.equal(mk.quantized_linear(x, weight, backend=backend), 2 * before)
        weight.values.neg_()
        assert torch.equal(mk.quantized_linear(x, weight, backend=backend), -2 * before)
    weight.scale.data = torch.ones(3)  # which no kernel may read for 24 rows
    with pytest.raises(ValueError, match=r"weight_scale must be of shape \(24,\)"):
        mk.quantized_linear(x, weight, backend="cpu")
    monkeypatch.setenv("MADTP_BACKEND", "tpu")
    with pytest.raises(ValueError, match="MADTP_BACKEND must be one of auto"):
        mk.quantized_linear(x, weight)


def test_weights_of_inference_mode_are_packed_once(checked):
    with torch.inference_mode():
        dense_weight = quantize(dense24(24, 32))
        weight = mk.QuantizedWeight(dense_weight.values.clone(), dense_weight.scale, dense_weight.indices.clone())
        assert weight.values.is_inference()
        x = torch.randn(6, 32)
        first = mk.quantized_linear(x, weight, backend="cpu")
        layout = weight.layout("cpu")
        assert torch.equal(mk.quantized_linear(x, weight, backend="cpu"), first)
        assert weight.layout("cpu") is layout and len(checked) == 1
