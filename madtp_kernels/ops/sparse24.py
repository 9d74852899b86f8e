# SPDX-License-Identifier: Apache-2.0
"""Linear layers with a 2:4 sparse weight: at most 2 non-zeros in every aligned group of 4 columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from madtp_kernels import dispatch
from madtp_kernels.checks import (
    check_device,
    check_gradient,
    check_tensor,
    check_types,
    require,
)
from madtp_kernels.dense import onednn
from madtp_kernels.flops import flop_formula
from madtp_kernels.layouts import LayoutsOfTensors
from madtp_kernels.native import sparse24 as native
from madtp_kernels.ops.autograd import register_autograd, register_second_order
from madtp_kernels.ops.epilogue import check_epilogue, check_epilogue_types, in_any_shape
from madtp_kernels.ops.fast_path import fast_path_key
from madtp_kernels.reference import sparse24 as reference
from madtp_kernels.renamed import refuse_old, takes_old
from madtp_kernels.sparse24 import backend_cusparselt as cusparselt
from madtp_kernels.sparse24 import backend_dense as dense
from madtp_kernels.sparse24 import backend_onednn, tuning_cuda
from madtp_kernels.sparse24 import tuning_cpu as tuning
from madtp_kernels.sparse24.weight import IN_MULTIPLE, OUT_MULTIPLE, Sparse24Weight, register_layout

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DENSE = ("dense", "onednn")  # the backends that multiply with the dense weight


@dispatch.public
@takes_old
def sparse24_linear(
    x: Tensor,
    weight: Sparse24Weight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    num_rows: Tensor | None = None,
    backend: str | None = None,
    **old: object,
) -> Tensor:
    """A linear layer with its epilogue: y = residual + scale * activation(x W^T + bias).

    Args:
        x: (T, C) float32, bfloat16 or float16; any row stride. C is a multiple of 16. Or (..., C), as for a Linear.
        weight: a `Sparse24Weight` of shape (N, C) in float32 or the dtype of x. N is a multiple of 8.
        bias: (N,) float32 or the dtype of x.
        activation: gelu, gelu_tanh, quick_gelu (x sigmoid(1.702 x)), relu, or None.
        residual: (T, N) dtype of x; any row stride. Or (..., N).
        scale: (N,) float32 or the dtype of x.
        num_rows: int32, one element: rows from it on are zeros. None: all rows are computed. With x (T, C) only.
        backend: auto, reference, cpu, cuda (Sparse Tensor Cores of sm_80 and newer; x and weight are both bfloat16 or
            both float16), cusparselt (as cuda, but NVIDIA's library through torch), dense (torch's product on the
            dense weight, which is then kept as well) or onednn (a CPU's float32 and bfloat16: oneDNN's, on the same).
            On a CPU auto measures, at the first use of a shape, whether cpu, dense or onednn is faster
            (`sparse24.tuning_cpu`); under torch.compile it is cpu. On a GPU it is cuda where that runs, or what a table
            of this GPU says is faster (`sparse24.tuning_cuda`), else dense.

    Returns:
        (T, N) dtype of x, or (..., N); accumulated in float32, cast once, on dense, onednn and cusparselt twice. On
        cpu and, before compute capability 9.0, on cuda a row has the same bits whatever the other rows are and however
        many; on cuda of 9.0, dense, onednn and cusparselt the last bits may follow their number, and so they may on
        auto, which chooses by it: backend="cpu" pins them.
        Differentiable in x, bias, residual and scale; the weight gets no gradient. That of x goes through the dense
        weight, or through W^T in its 2:4 form on the backend of the call (but dense, onednn) where the weight has one:
        `Sparse24Weight.keep_transposed`. There what the activation was given and its gradient are rounded to the dtype
        of x.

    Raises:
        ValueError: an argument breaks a rule. RuntimeError: the backend cannot run here.
    """
    if old:
        refuse_old("sparse24_linear", old, total="num_rows")
    key = None if num_rows is not None else fast_path_key(x, weight, bias, activation, residual, scale, backend)
    if key is not None and (known := weight.fast_paths.get(key)) is not None:
        runs, run, activation = known
        return run(x, weight.values, weight.indices, weight.layout(runs), bias, activation, residual, scale, None)
    check_types(x=x)
    require(isinstance(weight, Sparse24Weight), "weight", "a Sparse24Weight", type(weight).__name__)
    check_epilogue_types(bias, activation, residual, scale, num_rows)
    backend = dispatch.as_argument(backend)
    if x.ndim != 2:

        def run_rows(x: Tensor, residual: Tensor | None) -> Tensor:
            return sparse24_linear(
                x, weight, bias, activation=activation, residual=residual, scale=scale, backend=backend
            )

        return in_any_shape(run_rows, x, weight.shape, residual, num_rows)
    runs = _backend_of(backend, x, weight.values)
    if runs in ("cpu", "cuda") and not torch.compiler.is_compiling() and dispatch.is_auto(backend):
        # The op checks too, but after a measurement of this.
        _check(x, weight.values, weight.indices, None, bias, activation or "none", residual, scale, num_rows)
        epilogue = activation, residual, scale
        if runs == "cpu":
            runs = tuning.fastest(tuning.linear_call(x, weight, *epilogue))
        else:
            runs = tuning_cuda.fastest(tuning_cuda.linear_call(x, weight.values, *epilogue), x.device)
    # In an exported program the op keeps the layout: what is packed here is of this machine.
    here = runs != "reference" and not torch.compiler.is_exporting()
    layout = weight.layout(runs) if here else None
    y: Tensor = torch.ops.madtp.sparse24_linear(
        x,
        weight.values,
        weight.indices,
        layout,
        bias,
        activation or "none",
        residual,
        scale,
        num_rows,
        runs,
        *_transposed(weight, runs),
    )
    if key is not None and layout is not None:
        run = dispatch.implementation("sparse24_linear", runs, x.dtype, x.device)
        weight.fast_paths[key] = runs, run, activation or "none"
    return y


def _transposed(weight: Sparse24Weight, backend: str) -> tuple[Tensor | None, ...]:
    """values, indices and layout of W^T, where a gradient may go through them."""
    if backend in _DENSE or not torch.is_grad_enabled() or (transposed := weight.transposed) is None:
        return ()
    layout = None if backend == "reference" else transposed.layout(backend)
    return transposed.values, transposed.indices, layout


def _backend(backend: str | None, dtype: torch.dtype, device: torch.device) -> str:
    return dispatch.backend_name("sparse24_linear", backend, dtype, device)


# As torch.compiler.assume_constant_result does, which imports torch._dynamo: as much again as torch itself.
_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _backend_of(backend: str, x: Tensor, values: Tensor) -> str:
    """The backend of a call; a weight without elements has no product to run on one, and is left to the reference."""
    name = _backend(backend, _dtype(x, values), x.device)
    return name if values.numel() else "reference"


def _dtype(x: Tensor, weight: Sparse24Weight | Tensor, *_: object, **__: object) -> torch.dtype:
    """What backends are chosen by: float32 for a float32 weight, whatever x is."""
    return torch.promote_types(x.dtype, weight.dtype)


def _limits(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
    if backend in ("cuda", "cusparselt") and dtype == torch.float32:
        return "Sparse Tensor Cores take bfloat16 and float16, the same in x and weight, and one is float32"
    return onednn.unsupported_reason(dtype) if backend == "onednn" else None


def _tuned(
    choice: dispatch.Choice,
    x: Tensor,
    weight: Sparse24Weight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    **__: object,
) -> dispatch.Choice:
    """For `explain`: the choice with what was measured of the call."""
    if choice.backend == "cuda":
        call = tuning_cuda.linear_call(x, weight.values, activation, residual, scale)
        return tuning_cuda.add_timings(choice, call, x.device)
    if choice.backend != "cpu":
        return choice
    return tuning.add_timings(choice, tuning.linear_call(x, weight, activation, residual, scale))


def sparse24_pack(values: Tensor, indices: Tensor) -> Tensor:
    """The layout of a weight for the C++ kernel of its device.

    Args:
        values: (N, C/2) float32 (not on a GPU), bfloat16 or float16: two of every four weights. N is a multiple of 8,
            C of 16.
        indices: (N, C/8) uint8: their columns inside the group, i0 | i1 << 2 with i0 < i1, two groups a byte, the first
            in the low nibble.

    Returns:
        (bytes,) uint8, on a CPU about 0.64 of the dense weight's bytes in float32 and on a GPU 0.56. It depends on the
        instruction set or the architecture, so it belongs to this process: keep values and indices, and pack again.

    Raises:
        ValueError: an argument breaks a rule; the indices are read on the host. RuntimeError: the C++ extension cannot
            be loaded or run there.
    """
    layout: Tensor = torch.ops.madtp.sparse24_pack(values, indices)
    return layout


_ARGUMENTS = (
    "Tensor x, Tensor values, Tensor indices, Tensor? layout, Tensor? bias, str activation, Tensor? residual, "
    "Tensor? scale, Tensor? num_rows, str backend, "
    "Tensor? values_t=None, Tensor? indices_t=None, Tensor? layout_t=None"  # of W^T, for the backward
)
torch.library.define("madtp::sparse24_pack", "(Tensor values, Tensor indices) -> Tensor")
torch.library.define("madtp::sparse24_linear", f"({_ARGUMENTS}) -> Tensor")
torch.library.define(
    "madtp::sparse24_linear_backward", f"(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)"
)


def check_weight(values: Tensor, indices: Tensor, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    """The metadata of the canonical form, as every kernel needs it."""
    check_tensor("values", values, 2, dtypes)
    check_tensor("indices", indices, 2, (torch.uint8,))
    out_features, in_features = values.shape[0], 2 * values.shape[1]
    require(out_features % OUT_MULTIPLE == 0, "values", f"of a multiple of {OUT_MULTIPLE} rows (features)", values)
    require(in_features % IN_MULTIPLE == 0, "values", f"of shape (N, C/2), C a multiple of {IN_MULTIPLE}", values)
    expected = (out_features, in_features // 8)
    require(tuple(indices.shape) == expected, "indices", f"of shape {expected}, (N, C/8)", indices)
    check_device(values.device, indices=indices)


def _check(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    layout: Tensor | None,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
    num_rows: Tensor | None,
) -> None:
    # torch.ops can be called without the public function, and kernels trust these.
    check_tensor("x", x, 2, FLOATS)
    check_weight(values, indices)
    either = tuple(dict.fromkeys((x.dtype, torch.float32)))
    check_tensor("values", values, 2, either)
    out_features, in_features = values.shape[0], 2 * values.shape[1]
    require(x.shape[1] == in_features, "x", f"of {in_features} channels like weight", x)
    check_epilogue(x, out_features, bias, activation, residual, scale, num_rows)
    check_device(x.device, values=values, layout=layout, bias=bias, residual=residual, scale=scale, num_rows=num_rows)


def _check_packable(values: Tensor, indices: Tensor) -> None:
    require(values.device.type in ("cpu", "cuda"), "values", "on cpu or cuda", values)
    on_gpu = values.device.type == "cuda"
    check_tensor("values", values, 2, dispatch.FAST_DTYPES[1:] if on_gpu else dispatch.FAST_DTYPES)
    check_weight(values, indices)


def _pack(values: Tensor, indices: Tensor) -> Tensor:
    _check_packable(values, indices)
    on_gpu = values.device.type == "cuda"
    why = dispatch.cuda_unsupported_reason(values.device) if on_gpu else dispatch.extension_unsupported_reason()
    if why is not None:
        raise RuntimeError(f"sparse24_pack cannot run on {values.device}: {why}")
    nibbles = torch.stack([indices & 15, indices >> 4])
    require(bool(((nibbles & 3) < nibbles >> 2).all()), "indices", "ascending in every group (i0 < i1)", "others")
    return native.sparse24_pack(values.detach(), indices)


torch.library.impl("madtp::sparse24_pack", "CompositeExplicitAutograd", _pack)
_kept = LayoutsOfTensors(_pack)  # type: ignore[arg-type]  # a 2:4 weight has indices


def _check_layout(layout: Tensor | None, values: Tensor, indices: Tensor) -> Tensor:
    """`layout`, or a new one where it is None, for the C++ kernels. Raises ValueError for one of another weight."""
    layout = _kept(values, indices) if layout is None else layout
    size = native.sparse24_layout_bytes(values.shape[0], 2 * values.shape[1], values.dtype, values.device)
    ok = layout.dtype == torch.uint8 and layout.is_contiguous() and tuple(layout.shape) == (size,)
    require(ok, "layout", f"contiguous uint8 of shape ({size},), from sparse24_pack", layout)
    return layout


register_layout("cpu", lambda weight: sparse24_pack(weight.values, weight.indices))
register_layout("cuda", lambda weight: sparse24_pack(weight.values, weight.indices))
register_layout("cusparselt", lambda weight: cusparselt.pack(weight.values.detach(), weight.indices))
register_layout("dense", lambda weight: weight.to_dense().detach())
register_layout("onednn", lambda weight: backend_onednn.pack(weight.values, weight.indices))
dispatch.register(
    "sparse24_linear",
    reference=reference.sparse24_linear,
    cpu=native.sparse24_linear,
    cuda=tuning_cuda.sparse24_linear_cuda,
    cusparselt=tuning_cuda.sparse24_linear_cusparselt,
    dense=dense.sparse24_linear,
    onednn=backend_onednn.sparse24_linear,
    limits=_limits,
    dtype=_dtype,
    tuned=_tuned,
    layout_checks={
        "cpu": _check_layout,
        "cuda": _check_layout,
        "cusparselt": cusparselt.check_layout,
        "dense": dense.check_layout,
        "onednn": backend_onednn.check_layout,
    },
)


def _linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    layout: Tensor | None,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
    num_rows: Tensor | None,
    backend: str,
    *transposed: Tensor | None,
) -> Tensor:
    _check(x, values, indices, layout, bias, activation, residual, scale, num_rows)
    name = _backend_of(backend, x, values)
    check_layout = dispatch.record("sparse24_linear").layout_checks.get(name)
    layout = layout if check_layout is None else check_layout(layout, values, indices)
    run: Callable[..., Tensor] = dispatch.implementation("sparse24_linear", name, _dtype(x, values), x.device)
    return run(x, values, indices, layout, bias, activation, residual, scale, num_rows)


torch.library.impl("madtp::sparse24_linear", "CompositeExplicitAutograd", _linear)


@torch.library.impl("madtp::sparse24_linear_backward", "CompositeExplicitAutograd")
def _linear_backward(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    layout: Tensor | None,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
    num_rows: Tensor | None,
    backend: str,
    values_t: Tensor | None = None,
    indices_t: Tensor | None = None,
    layout_t: Tensor | None = None,
) -> tuple[Tensor, ...]:
    _check(x, values, indices, layout, bias, activation, residual, scale, num_rows)
    check_gradient(grad, x, (x.shape[0], values.shape[0]))
    # Weights that train stay dense and masked: their gradient is not here.
    if values_t is None or indices_t is None:
        return reference.sparse24_linear_backward(
            grad, x, values, indices, layout, bias, activation, residual, scale, num_rows
        )
    expected = 2 * values.shape[1], values.shape[0] // 2
    ok = tuple(values_t.shape) == expected and values_t.dtype == values.dtype
    require(ok, "values_t", f"{values.dtype} of shape {expected}, (C, N/2), of W^T", values_t)
    before = None
    if reference.needs_product(activation, scale):
        before = _linear(x, values, indices, layout, bias, "none", None, None, num_rows, backend)
        before = before.to(torch.promote_types(x.dtype, torch.float32))
    grad = torch.where(reference.valid_rows(x, num_rows), grad, 0)
    grad_before, *grads = reference.epilogue_backward(grad, before, bias, activation, residual, scale)
    grad_before = grad_before.to(x.dtype)
    grad_x = _linear(grad_before, values_t, indices_t, layout_t, None, "none", None, None, num_rows, backend)
    return grad_x, *grads


@torch.library.register_fake("madtp::sparse24_pack")
def _(values: Tensor, indices: Tensor) -> Tensor:
    _check_packable(values, indices)
    size = native.sparse24_layout_bytes(values.shape[0], 2 * values.shape[1], values.dtype, values.device)
    return values.new_empty(size, dtype=torch.uint8)


@torch.library.register_fake("madtp::sparse24_linear")
def _(x: Tensor, values: Tensor, *arguments: Any) -> Tensor:
    _check(x, values, *arguments[:7])
    return x.new_empty(x.shape[0], values.shape[0])


@torch.library.register_fake("madtp::sparse24_linear_backward")
def _(grad: Tensor, x: Tensor, values: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    _check(x, values, *arguments[:7])
    check_gradient(grad, x, (x.shape[0], values.shape[0]))
    _, _, bias, _, residual, scale, *_ = arguments
    return x.new_empty(x.shape), *(
        x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (bias, residual, scale)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, indices, layout, bias, ctx.activation, residual, scale, num_rows, ctx.backend, *transposed = inputs
    ctx.save_for_backward(x, values, indices, layout, bias, residual, scale, num_rows, *transposed)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, values, indices, layout, bias, residual, scale, num_rows, *transposed = ctx.saved_tensors
    arguments = x, values, indices, layout, bias, ctx.activation, residual, scale, num_rows, ctx.backend, *transposed
    grad_x, *grads = torch.ops.madtp.sparse24_linear_backward(grad, *arguments)
    given = zip(grads, (bias, residual, scale), strict=True)
    grad_bias, grad_residual, grad_scale = (None if tensor is None else grad for grad, tensor in given)
    return grad_x, None, None, None, grad_bias, None, grad_residual, grad_scale, *(None,) * 5


register_autograd("madtp::sparse24_linear", _backward, _setup_context)
register_second_order("madtp::sparse24_linear_backward", reference.sparse24_linear_backward, (0, 1, 5, 7, 8))


@flop_formula(torch.ops.madtp.sparse24_linear)
def _flops(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    layout: Tensor | None,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
    num_rows: Tensor | None,
    backend: str,
    *_: object,
    **__: object,
) -> int:
    """What is executed: 2 FLOP per kept weight and row, half of the dense product; all of it on dense and onednn."""
    return 2 * x.shape[0] * values.numel() * (2 if backend in _DENSE else 1)
