# SPDX-License-Identifier: Apache-2.0
"""2:4 on Sparse Tensor Cores: the linear layer and the pruner against the reference, in graphs and on streams."""

import itertools
import math

import pytest
import torch
from sparse24_cases import dense24

import madtp_kernels as mk
from madtp_kernels import Sparse24Weight, dispatch, sparse24_compress
from madtp_kernels.native import sparse24 as native

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ACTIVATIONS = [None, "gelu", "gelu_tanh", "quick_gelu", "relu"]
SHAPES = [(1, 8, 16), (7, 24, 48), (8, 64, 64), (63, 136, 144), (130, 264, 208), (577, 768, 256), (1154, 1032, 768)]


@pytest.fixture(autouse=True)
def needs_cuda_kernels():
    if (why := dispatch.cuda_unsupported_reason(torch.device("cuda"))) is not None:
        pytest.skip(why)


def weight24(out_features, in_features, dtype) -> Sparse24Weight:
    return sparse24_compress((dense24(out_features, in_features) * in_features**-0.5).to("cuda", dtype))


def draw(*shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def epilogue(rows, out_features, dtype, affine):
    return {
        "bias": draw(out_features, dtype=affine, seed=1),
        "residual": draw(rows, out_features, dtype=dtype, seed=2),
        "scale": draw(out_features, dtype=affine, seed=3),
    }


def assert_within_twice_the_reference(x, weight, activation=None, num_rows=None, **rest):
    got, bound = (
        mk.sparse24_linear(x, weight, activation=activation, num_rows=num_rows, **rest, backend=backend)
        for backend in ("cuda", "reference")
    )
    double = {name: t.double() for name, t in rest.items()}
    exact = mk.sparse24_linear(
        x.double(), weight.to(torch.float64), activation=activation, num_rows=num_rows, **double, backend="reference"
    )
    assert got.dtype == x.dtype and got.is_contiguous()
    rounding = torch.finfo(torch.float32).eps * exact.abs().max()
    assert (got.double() - exact).abs().max() <= 2 * (bound.double() - exact).abs().max() + 4 * rounding
    return got


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [False, True], ids=["own", "float32"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_within_twice_the_reference_error(dtype, wide, activation):
    affine = torch.float32 if wide else dtype
    for rows, out_features, in_features in SHAPES:
        x, weight = draw(rows, in_features, dtype=dtype), weight24(out_features, in_features, dtype)
        rest = epilogue(rows, out_features, dtype, affine)
        assert_within_twice_the_reference(x, weight, activation, **rest)
        assert_within_twice_the_reference(x, weight, activation)


@pytest.mark.parametrize("names", list(itertools.combinations(("bias", "residual", "scale"), 2)), ids="+".join)
def test_parts_of_the_epilogue(names):
    rest = epilogue(70, 136, torch.bfloat16, torch.float32)
    given = {name: rest[name] for name in names}
    x, weight = draw(70, 80, dtype=torch.bfloat16), weight24(136, 80, torch.bfloat16)
    assert_within_twice_the_reference(x, weight, "gelu", **given)


@pytest.mark.parametrize("num_rows", [-3, 0, 1, 64, 200, 577, 600])
def test_rows_past_num_rows_are_zeros_whatever_they_hold(num_rows):
    x, weight = draw(577, 256, dtype=torch.bfloat16), weight24(264, 256, torch.bfloat16)
    rest = epilogue(577, 264, torch.bfloat16, torch.bfloat16)
    real = min(max(num_rows, 0), 577)
    full = mk.sparse24_linear(x, weight, activation="gelu", **rest, backend="cuda")
    x[real:] = math.nan
    device_num_rows = torch.tensor([num_rows], dtype=torch.int32, device="cuda")
    out = mk.sparse24_linear(x, weight, activation="gelu", **rest, num_rows=device_num_rows, backend="cuda")
    assert torch.equal(out[:real], full[:real]) and (out[real:] == 0).all()


def test_no_bit_of_a_row_depends_on_the_others():
    x, weight = draw(1300, 768, dtype=torch.float16), weight24(776, 768, torch.float16)
    rest = epilogue(1300, 776, torch.float16, torch.float16)
    run = lambda rows: mk.sparse24_linear(  # noqa: E731
        x[rows], weight, rest["bias"], activation="gelu", residual=rest["residual"][rows], backend="cuda"
    )
    full = run(slice(None))
    for first, count in ((0, 1), (8, 7), (16, 64), (3, 65), (130, 577), (11, 1154)):
        assert torch.equal(run(slice(first, first + count)), full[first : first + count])


def test_any_strides_and_offsets():
    x, weight = draw(40, 64, dtype=torch.bfloat16), weight24(24, 64, torch.bfloat16)
    rest = epilogue(40, 24, torch.bfloat16, torch.bfloat16)
    full = mk.sparse24_linear(x, weight, **rest, backend="cuda")
    wide = torch.zeros(40, 100, device="cuda", dtype=torch.bfloat16)
    for offset in (0, 1, 8, 33):
        view = wide[:, offset : offset + 64]
        view.copy_(x)
        assert torch.equal(mk.sparse24_linear(view, weight, **rest, backend="cuda"), full)
    odd = {name: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) for name, t in rest.items()}
    assert torch.equal(mk.sparse24_linear(x, weight, **odd, backend="cuda"), full)
    odd["residual"] = rest["residual"].t().contiguous().t()
    assert torch.equal(mk.sparse24_linear(x.t().contiguous().t(), weight, **odd, backend="cuda"), full)
    assert mk.sparse24_linear(x[:0], weight, backend="cuda").shape == (0, 24)


def test_auto_and_what_cannot_run():
    weight, x = weight24(24, 32, torch.bfloat16), draw(5, 32, dtype=torch.bfloat16)
    assert mk.explain("sparse24_linear", x, weight).backend == "cuda"
    assert mk.explain("sparse24_linear", x, weight.to(torch.float32)).backend == "dense"
    assert mk.explain("sparse24_linear", x.float(), weight.to(torch.float32)).backend == "dense"
    with pytest.raises(RuntimeError, match="Sparse Tensor Cores take bfloat16 and float16.*auto would run 'dense'"):
        mk.sparse24_linear(x.float(), weight.to(torch.float32), backend="cuda")
    assert torch.equal(mk.sparse24_linear(x, weight), mk.sparse24_linear(x, weight, backend="cuda"))
    broken = weight.indices.clone()
    broken[3, 1] = 0
    with pytest.raises(ValueError, match="indices must be ascending"):
        mk.sparse24_linear(x, Sparse24Weight(weight.values, broken), backend="cuda")


def test_gradients_pass_through():
    weight = weight24(24, 32, torch.bfloat16)
    x, rest = draw(9, 32, dtype=torch.bfloat16), epilogue(9, 24, torch.bfloat16, torch.bfloat16)

    def gradients(backend):
        inputs = [t.detach().requires_grad_() for t in (x, *rest.values())]
        out = mk.sparse24_linear(
            inputs[0], weight, inputs[1], activation="gelu", residual=inputs[2], scale=inputs[3], backend=backend
        )
        return torch.autograd.grad(out.sum(), inputs)

    for got, want in zip(gradients("cuda"), gradients("reference"), strict=True):
        assert torch.equal(got, want)


def test_a_graph_and_another_stream():
    x, weight = draw(577, 768, dtype=torch.bfloat16), weight24(768, 768, torch.bfloat16)
    rest = epilogue(577, 768, torch.bfloat16, torch.bfloat16)
    num_rows = torch.tensor(400, dtype=torch.int32, device="cuda")
    run = lambda: mk.sparse24_linear(x, weight, activation="gelu", **rest, num_rows=num_rows, backend="cuda")  # noqa: E731
    expected = run()  # also packs
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    captured.fill_(math.nan)
    graph.replay()
    assert torch.equal(captured, expected)
    num_rows.fill_(100)  # the graph reads it anew
    graph.replay()
    assert torch.equal(captured[:100], expected[:100]) and not captured[100:].any()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_stream = run()
    stream.synchronize()
    assert torch.equal(on_stream[:100], expected[:100])


@pytest.mark.parametrize(("rows", "out_features", "in_features"), [(1, 8, 16), (65, 136, 144), (577, 768, 768)])
def test_every_configuration(rows, out_features, in_features):
    x, weight = draw(rows, in_features, dtype=torch.bfloat16), weight24(out_features, in_features, torch.bfloat16)
    bias = draw(out_features, dtype=torch.float32, seed=1)
    arguments = (x, weight.values, weight.indices, None, bias, "gelu", None, None, None)
    configs = native.sparse24_linear_configs(*arguments)
    assert any(config.architecture == 80 for config in configs)
    exact = mk.sparse24_linear(
        x.double(), weight.to(torch.float64), bias=bias.double(), activation="gelu", backend="reference"
    )
    same = mk.sparse24_linear(x, weight, bias=bias, activation="gelu", backend="reference")
    bound = 2 * (same.double() - exact).abs().max() + 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    results = {}
    for config in configs:
        got = native.sparse24_linear_cuda(*arguments, config)
        assert (got.double() - exact).abs().max() <= bound, config
        first = results.setdefault((config.architecture, config.split_k), got)
        assert torch.equal(got, first), config
    with pytest.raises(RuntimeError, match="sparse24_linear_workspace: invalid argument"):
        native.sparse24_linear_cuda(*arguments, native.Sparse24Config(80, 48, 48))


def test_a_workspace_too_small():
    x, weight = draw(5, 1536, dtype=torch.bfloat16), weight24(8, 1536, torch.bfloat16)
    inputs, _alive = native._sparse24_inputs(x, weight.values, weight.indices, None, None, "none", None, None, None)
    cuda = dispatch.extension().cuda
    split = [config for config in cuda.sparse24_linear_configs(inputs) if config[3] > 1]
    if not split:
        pytest.skip("no kernel of this device needs a workspace")
    need, out = cuda.sparse24_linear_workspace(inputs, split[0]), x.new_empty(5, 8)
    workspace = torch.empty(need, dtype=torch.uint8, device="cuda")
    with pytest.raises(ValueError, match=f"workspace_bytes must be at least {need}, got {need - 16}"):
        cuda.sparse24_linear(inputs, out.data_ptr(), workspace.data_ptr(), need - 16, 0, split[0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_stream_of_another_device():
    x, weight = draw(5, 64, dtype=torch.bfloat16), weight24(8, 64, torch.bfloat16)
    inputs, _alive = native._sparse24_inputs(x, weight.values, weight.indices, None, None, "none", None, None, None)
    out, stream = x.new_empty(5, 8), torch.cuda.Stream("cuda:1")
    with torch.cuda.device(0), pytest.raises(RuntimeError, match="sparse24_linear: invalid argument"):
        dispatch.extension().cuda.sparse24_linear(inputs, out.data_ptr(), 0, 0, stream.cuda_stream, (80, 16, 32, 1, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(8, 16), (24, 48), (40, 80), (72, 528), (0, 16), (8, 0)])
@pytest.mark.parametrize("transposed", [False, True])
def test_pruning_is_bit_equal(dtype, shape, transposed):
    def lay(matrix):
        return matrix.t().contiguous().t() if transposed else matrix

    ties = (torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(4)) * -0.5).to("cuda", dtype)
    for weight in (draw(*shape, dtype=dtype), ties):
        for score in (None, draw(*shape, dtype=torch.float32, seed=5), ties.float()):
            given = None if score is None else lay(score)
            got = mk.sparse24_prune(lay(weight), score=given, backend="cuda")
            want = mk.sparse24_prune(weight.cpu(), score=None if score is None else score.cpu(), backend="reference")
            bits = torch.int32 if dtype == torch.float32 else torch.int16
            assert torch.equal(got.indices.cpu(), want.indices)
            assert torch.equal(got.values.cpu().view(bits), want.values.view(bits))


def test_pruning_refuses_a_nan():
    weight = draw(24, 80, dtype=torch.bfloat16)
    broken = weight.clone()
    broken[17, 63] = math.nan
    for case, message in (((broken, None), "weight must be free of NaN"), ((weight, broken), "score must be free")):
        with pytest.raises(ValueError, match=message):
            mk.sparse24_prune(case[0], score=case[1], backend="cuda")
        with pytest.raises(ValueError, match=message):
            mk.sparse24_prune(case[0].t().contiguous().t(), score=case[1], backend="cuda")
