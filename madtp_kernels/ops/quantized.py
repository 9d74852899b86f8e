# SPDX-License-Identifier: Apache-2.0
"""Linear layers with an int8 or fp8 weight, dense or 2:4; x is rounded as the weight is, row by row inside the op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from madtp_kernels import dispatch
from madtp_kernels.checks import (
    check_device,
    check_gradient,
    check_optional_types,
    check_tensor,
    check_types,
    require,
)
from madtp_kernels.flops import flop_formula
from madtp_kernels.layouts import LayoutsOfTensors
from madtp_kernels.native import quantized as native
from madtp_kernels.ops.autograd import register_autograd, register_second_order
from madtp_kernels.ops.epilogue import check_epilogue, check_epilogue_types, in_any_shape
from madtp_kernels.ops.fast_path import fast_path_key
from madtp_kernels.ops.sparse24 import check_weight
from madtp_kernels.quantized import backend_dense as dense
from madtp_kernels.quantized import torch_product
from madtp_kernels.quantized import tuning_cpu as tuning
from madtp_kernels.quantized.weight import (
    DTYPES_OF_VALUES,
    QuantizedWeight,
    register_layout,
    scheme_of,
)
from madtp_kernels.reference import quantized as reference
from madtp_kernels.reference.quantized import INT8, MAX_IN_FEATURES
from madtp_kernels.sparse24.weight import check_nibbles

MANY_ROWS = "cpu_many_rows"  # a second layout of 2:4 weights on a CPU, where `native.takes_many_rows`


@dispatch.public
def quantized_linear(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    num_rows: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A linear layer in int8 or fp8 with its epilogue: y = residual + scale * activation(x W^T + bias).

    With an int8 weight each row of x is rounded to int8 with a scale of its own, amax / 127; the products are summed in
    int32, exactly. Then, in float32 and one rounding after another: the sum times the scale of the row, times the scale
    of the weight's row, plus the bias. So without an activation, or with relu, all backends, CPUs and thread counts
    give the same bits.

    With an fp8 weight x is rounded to float8_e4m3fn, with the scale amax / 448, and the same follows. The reference
    sums exactly, and so does a CPU, which runs it; a GPU sums with the bits of its accumulator, of which
    `reference.quantized` has the rule.

    Args:
        x: (T, C) float32, bfloat16 or float16; any row stride. Or (..., C), as for a Linear. C is at most 65536. A row
            with a NaN or an infinity gives NaN in all of its outputs. One whose largest magnitude is below 2^-119, or
            for fp8 2^-117, counts as zeros.
        weight: a `QuantizedWeight` of shape (N, C).
        bias: (N,) float32 or the dtype of x.
        activation: gelu, gelu_tanh, quick_gelu (x sigmoid(1.702 x)), relu, or None.
        residual: (T, N) dtype of x; any row stride. Or (..., N).
        scale: (N,) float32 or the dtype of x.
        num_rows: int32, one element: rows from it on are zeros. None: all rows are computed. With x (T, C) only.
        backend: auto, reference, cpu, cuda (2:4 weights on Sparse Tensor Cores: int8 on sm_80 and newer, fp8 where
            code for sm_90a runs) or dense, for which a 2:4 weight is made dense and kept so as well: on a CPU the
            kernel of dense int8 weights, on a GPU torch's product, of fp8 from compute capability 8.9. For an int8 2:4
            weight auto measures on a CPU, at the first use of a shape, whether cpu or dense is faster
            (`quantized.tuning_cpu`); under torch.compile it is cpu. On a GPU it is cuda where that runs, else dense.
            fp8 runs the reference on a CPU, and other devices run that alone.

    Returns:
        (T, N) dtype of x, or (..., N); the same bits on cpu and dense of a CPU, whatever the activation.
        Differentiable in x, bias, residual and scale: the rounding of x counts as the identity (the straight-through
        estimator, https://arxiv.org/abs/1308.3432). The weight gets no gradient.

    Raises:
        ValueError: an argument breaks a rule. RuntimeError: the backend cannot run here.
    """
    key = None if num_rows is not None else fast_path_key(x, weight, bias, activation, residual, scale, backend)
    if key is not None and (known := weight.fast_paths.get(key)) is not None and _has_its_scale(weight):
        form, run, activation = known
        layout = weight.layout(form)
        return run(x, weight.values, weight.indices, weight.scale, layout, bias, activation, residual, scale, None)
    check_types(x=x)
    require(isinstance(weight, QuantizedWeight), "weight", "a QuantizedWeight", type(weight).__name__)
    check_epilogue_types(bias, activation, residual, scale, num_rows)
    backend = dispatch.as_argument(backend)
    if x.ndim != 2:

        def run_rows(x: Tensor, residual: Tensor | None) -> Tensor:
            return quantized_linear(
                x, weight, bias, activation=activation, residual=residual, scale=scale, backend=backend
            )

        return in_any_shape(run_rows, x, weight.shape, residual, num_rows)
    runs = _backend_of(backend, x, weight.values, weight.indices)
    if runs == "cpu" and weight.indices is not None and dispatch.is_auto(backend):
        if not torch.compiler.is_compiling():
            # The op checks too, but after a measurement of this.
            parts = weight.values, weight.indices, weight.scale
            _check(x, *parts, None, bias, activation or "none", residual, scale, num_rows)
            runs = tuning.fastest(tuning.quantized_call(x, weight, activation, residual, scale))
    # In an exported program the op keeps the layout: what is packed here is of this machine.
    here = runs != "reference" and not torch.compiler.is_exporting()
    form = _form(runs, x, weight)
    layout = weight.layout(form) if here else None
    y: Tensor = torch.ops.madtp.quantized_linear(
        x,
        weight.values,
        weight.indices,
        weight.scale,
        layout,
        bias,
        activation or "none",
        residual,
        scale,
        num_rows,
        runs,
    )
    if key is not None and layout is not None:
        run = dispatch.implementation("quantized_linear", runs, x.dtype, x.device, (), weight.scheme)
        weight.fast_paths[key] = form, run, activation or "none"
    return y


def _form(runs: str, x: Tensor, weight: QuantizedWeight) -> str:
    """Which layout of the weight a backend reads for x; the smaller where torch.compile may not know the rows."""
    sparse = runs == "cpu" and weight.indices is not None and not torch.compiler.is_compiling()
    return MANY_ROWS if sparse and native.takes_many_rows(x.shape[0]) else runs


def _dtype(x: Tensor, *_: object, **__: object) -> torch.dtype:
    """For `explain`: that of x, which every backend refuses where it is another."""
    check_tensor("x", x, x.ndim, dispatch.FAST_DTYPES)
    return x.dtype


def _has_its_scale(weight: QuantizedWeight) -> bool:
    """What a write through `.data` can change of the scales that kernels read at every call, and the key has not."""
    scale = weight.scale
    return scale.numel() == weight.values.shape[0] and scale.dtype is torch.float32 and not scale.requires_grad


def _tuned(
    choice: dispatch.Choice,
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    **__: object,
) -> dispatch.Choice:
    """For `explain`: the choice with what was measured of the call."""
    if choice.backend != "reference" and not weight.values.numel():
        why = "the weight has no elements, and no product to run"
        rejected = choice.rejected | {"dense": why, choice.backend: why}
        return replace(choice, backend="reference", reason=why, rejected=rejected)
    if choice.backend != "cpu":
        return choice
    if weight.indices is None:
        return replace(choice, rejected={**choice.rejected, "dense": "the weight is dense: cpu is the same kernel"})
    choice = tuning.add_timings(choice, tuning.quantized_call(x, weight, activation, residual, scale))
    if _form(choice.backend, x, weight) != MANY_ROWS:
        return choice
    return replace(choice, reason=f"{choice.reason}; the weight in its layout for many rows")


def quantized_pack(values: Tensor, indices: Tensor | None) -> Tensor:
    """The layout of an int8 weight for the C++ kernel of a CPU.

    Args:
        values: int8 (N, C), or (N, C/2) with indices.
        indices: (N, C/8) uint8, as in `Sparse24Weight`: N is a multiple of 8, C of 16. None: the weight is dense.

    Returns:
        (bytes,) uint8. It depends on the instruction set, so it belongs to this process: keep values and indices, and
        pack again.

    Raises:
        ValueError: an argument breaks a rule. RuntimeError: the C++ extension cannot be loaded.
    """
    layout: Tensor = torch.ops.madtp.quantized_pack(values, indices)
    return layout


_ARGUMENTS = (
    "Tensor x, Tensor values, Tensor? indices, Tensor weight_scale, Tensor? layout, Tensor? bias, str activation, "
    "Tensor? residual, Tensor? scale, Tensor? num_rows, str backend"
)
torch.library.define("madtp::quantized_pack", "(Tensor values, Tensor? indices) -> Tensor")
torch.library.define("madtp::quantized_linear", f"({_ARGUMENTS}) -> Tensor")
torch.library.define(
    "madtp::quantized_linear_backward", f"(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _shape(values: Tensor, indices: Tensor | None) -> tuple[int, int]:
    """(N, C) of the dense weight."""
    return values.shape[0], values.shape[1] * (1 if indices is None else 2)


def _check_weight(values: Tensor, indices: Tensor | None) -> None:
    """The metadata of the stored form, as every kernel needs it."""
    if indices is None:
        check_tensor("values", values, 2, DTYPES_OF_VALUES)
    else:
        check_weight(values, indices, DTYPES_OF_VALUES)
    in_features = _shape(values, indices)[1]
    require(in_features <= MAX_IN_FEATURES, "values", f"of at most {MAX_IN_FEATURES} input features", values)


def _check(
    x: Tensor,
    values: Tensor,
    indices: Tensor | None,
    weight_scale: Tensor,
    layout: Tensor | None,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
    num_rows: Tensor | None,
) -> None:
    # torch.ops can be called without the public function, and kernels trust these.
    check_tensor("x", x, 2, dispatch.FAST_DTYPES)
    _check_weight(values, indices)
    out_features, in_features = _shape(values, indices)
    require(x.shape[1] == in_features, "x", f"of {in_features} channels like weight", x)
    check_tensor("weight_scale", weight_scale, 1, (torch.float32,))
    ok = tuple(weight_scale.shape) == (out_features,)
    require(ok, "weight_scale", f"of shape ({out_features},), (N,)", weight_scale)
    check_epilogue(x, out_features, bias, activation, residual, scale, num_rows)
    check_device(
        x.device,
        values=values,
        weight_scale=weight_scale,
        layout=layout,
        bias=bias,
        residual=residual,
        scale=scale,
        num_rows=num_rows,
    )


def _check_packable(values: Tensor, indices: Tensor | None) -> None:
    check_types(values=values)
    check_optional_types(indices=indices)
    ok = values.device.type == "cpu" and values.dtype == INT8.dtype
    require(ok, "values", "int8 on cpu", values)
    _check_weight(values, indices)


def _pack(values: Tensor, indices: Tensor | None, many_rows: bool = False) -> Tensor:
    _check_packable(values, indices)
    if (why := dispatch.extension_unsupported_reason()) is not None:
        raise RuntimeError(f"quantized_pack cannot run on {values.device}: {why}")
    if indices is not None:
        check_nibbles(indices, "indices")
    return native.quantized_pack(values, indices, many_rows)


torch.library.impl("madtp::quantized_pack", "CompositeExplicitAutograd", _pack)
_kept = LayoutsOfTensors(_pack)


def _check_layout(layout: Tensor | None, values: Tensor, indices: Tensor | None) -> Tensor:
    """`layout`, or a new one where it is None. Raises ValueError for one of another weight."""
    layout = _kept(values, indices) if layout is None else layout
    weight = *_shape(values, indices), indices is not None
    sizes = native.quantized_layout_bytes(*weight), native.quantized_layout_bytes(*weight, True)
    ok = layout.dtype == torch.uint8 and layout.is_contiguous() and layout.ndim == 1 and layout.shape[0] in sizes
    require(ok, "layout", f"contiguous uint8 of shape ({sizes[0]},), from quantized_pack", layout)
    return layout


def _check_dense_layout(layout: Tensor | None, values: Tensor, indices: Tensor | None) -> Tensor | None:
    """`_check_layout` of the weight made dense."""
    if values.device.type != "cpu":
        return torch_product.check_layout(layout, values, _shape(values, indices))
    if layout is None:
        return _check_layout(None, reference.to_dense_values(values, indices), None)
    return _check_layout(layout, values.new_empty(_shape(values, indices), device="meta"), None)


def _dense_layout(weight: QuantizedWeight) -> Tensor:
    if weight.device.type != "cpu":
        return torch_product.pack(weight.values, weight.indices)
    if weight.indices is None:
        return cast(Tensor, weight.layout("cpu"))
    return quantized_pack(reference.to_dense_values(weight.values, weight.indices), None)


def _check_cuda_layout(layout: Tensor | None, values: Tensor, indices: Tensor | None) -> Tensor:
    """`layout`, or a new one where it is None, for the CUDA kernels. Raises ValueError for one of another weight."""
    layout = _cuda_layout(values, indices) if layout is None else layout
    size = native.quantized_layout_bytes_cuda(*_shape(values, indices))
    ok = layout.dtype == torch.uint8 and layout.is_contiguous() and tuple(layout.shape) == (size,)
    require(ok, "layout", f"contiguous uint8 of shape ({size},), from QuantizedWeight.layout", layout)
    return layout


def _cuda_layout(values: Tensor, indices: Tensor | None) -> Tensor:
    # A weight of another scheme comes here from `layout("cuda")` alone.
    require(indices is not None, "weight", "of scheme int8_24 or fp8_24 for cuda", scheme_of(values, indices))
    indices = cast(Tensor, indices)
    check_nibbles(indices, "indices")
    return native.quantized_pack_cuda(values.detach(), indices)


# backend -> the schemes that its kernels multiply by; the reference knows all
_SCHEMES = {
    "cpu": ("int8", "int8_24"),
    "cuda": ("int8_24", "fp8_24"),
    "dense": ("int8", "int8_24", "fp8", "fp8_24"),
}


def _scheme_unsupported_reason(backend: str, scheme: str, device: torch.device) -> str | None:
    """Why a backend cannot multiply by weights of a scheme on a device, or None."""
    schemes, fp8 = _SCHEMES[backend], scheme.startswith("fp8")
    if scheme not in schemes:
        return f"{backend} multiplies by weights of {' and '.join(schemes)}, not {scheme}"
    if backend == "cuda" and fp8:
        arch = dispatch.running_arch(device)
        return None if not arch.isdecimal() else f"fp8_24 needs code for sm_90a, and the GPU runs that for sm_{arch}"
    if backend != "dense":
        return None
    if device.type == "cpu":
        why = "on a CPU dense multiplies by int8 weights alone; fp8 runs on the reference"
        return why if fp8 else dispatch.extension_unsupported_reason()
    if device.type != "cuda":
        return f"the tensors are on {device.type}"
    if torch.version.hip is not None:
        return "torch's products of 8 bits are used on NVIDIA GPUs alone"
    return dispatch.too_old_reason(device, (8, 9) if fp8 else (8, 0))


register_layout("cpu", lambda weight: quantized_pack(weight.values, weight.indices))
register_layout(MANY_ROWS, lambda weight: _pack(weight.values, weight.indices, many_rows=True))
register_layout("cuda", lambda weight: _cuda_layout(weight.values, weight.indices))
register_layout("dense", _dense_layout)
dispatch.register(
    "quantized_linear",
    reference=reference.quantized_linear,
    cpu=native.quantized_linear,
    cuda=native.quantized_linear_cuda,
    dense=dense.quantized_linear,
    scheme_limits=_scheme_unsupported_reason,
    dtype=_dtype,
    tuned=_tuned,
    layout_checks={"cpu": _check_layout, "cuda": _check_cuda_layout, "dense": _check_dense_layout},
)


def _backend_of(backend: str, x: Tensor, values: Tensor, indices: Tensor | None) -> str:
    """The backend of a call; a weight without elements has no product to run on one, and is left to the reference."""
    name = _backend(backend, x.dtype, x.device, scheme_of(values, indices))
    return name if values.numel() else "reference"


def _backend(backend: str | None, dtype: torch.dtype, device: torch.device, scheme: str) -> str:
    return dispatch.backend_name("quantized_linear", backend, dtype, device, (), scheme)


# As torch.compiler.assume_constant_result does, which imports torch._dynamo: as much again as torch itself.
_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


@torch.library.impl("madtp::quantized_linear", "CompositeExplicitAutograd")
def _linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor | None,
    weight_scale: Tensor,
    layout: Tensor | None,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
    num_rows: Tensor | None,
    backend: str,
) -> Tensor:
    _check(x, values, indices, weight_scale, layout, bias, activation, residual, scale, num_rows)
    name = _backend_of(backend, x, values, indices)
    check_layout = dispatch.record("quantized_linear").layout_checks.get(name)
    layout = layout if check_layout is None else check_layout(layout, values, indices)
    scheme = scheme_of(values, indices)
    run: Callable[..., Tensor] = dispatch.implementation("quantized_linear", name, x.dtype, x.device, (), scheme)
    return run(x, values, indices, weight_scale, layout, bias, activation, residual, scale, num_rows)


@torch.library.impl("madtp::quantized_linear_backward", "CompositeExplicitAutograd")
def _linear_backward(
    grad: Tensor, x: Tensor, values: Tensor, indices: Tensor | None, *arguments: Any
) -> tuple[Tensor, ...]:
    _check(x, values, indices, *arguments[:7])
    check_gradient(grad, x, (x.shape[0], values.shape[0]))
    return reference.quantized_linear_backward(grad, x, values, indices, *arguments[:7])


@torch.library.register_fake("madtp::quantized_pack")
def _(values: Tensor, indices: Tensor | None) -> Tensor:
    _check_packable(values, indices)
    size = native.quantized_layout_bytes(*_shape(values, indices), indices is not None)
    return values.new_empty(size, dtype=torch.uint8)


@torch.library.register_fake("madtp::quantized_linear")
def _(x: Tensor, values: Tensor, *arguments: Any) -> Tensor:
    _check(x, values, *arguments[:8])
    return x.new_empty(x.shape[0], values.shape[0])


@torch.library.register_fake("madtp::quantized_linear_backward")
def _(grad: Tensor, x: Tensor, values: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    _check(x, values, *arguments[:8])
    check_gradient(grad, x, (x.shape[0], values.shape[0]))
    _, _, _, bias, _, residual, scale, *_ = arguments
    return x.new_empty(x.shape), *(
        x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (bias, residual, scale)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation, residual, scale, num_rows, ctx.backend = inputs
    ctx.save_for_backward(*tensors, residual, scale, num_rows)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, residual, scale, num_rows = ctx.saved_tensors
    grad_x, *grads = torch.ops.madtp.quantized_linear_backward(
        grad, *tensors, ctx.activation, residual, scale, num_rows, ctx.backend
    )
    given = zip(grads, (tensors[-1], residual, scale), strict=True)
    grad_bias, grad_residual, grad_scale = (None if tensor is None else grad for grad, tensor in given)
    return grad_x, None, None, None, None, grad_bias, None, grad_residual, grad_scale, None, None


register_autograd("madtp::quantized_linear", _backward, _setup_context)
register_second_order("madtp::quantized_linear_backward", reference.quantized_linear_backward, (0, 1, 6, 8, 9))


@flop_formula(torch.ops.madtp.quantized_linear)
def _flops(
    x: Tensor,
    values: Tensor,
    indices: Tensor | None,
    weight_scale: Tensor,
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
    """What is executed: 2 FLOP per kept weight and row, half of the dense product where it is 2:4; all on dense."""
    return 2 * x.shape[0] * values.numel() * (2 if backend == "dense" and indices is not None else 1)
