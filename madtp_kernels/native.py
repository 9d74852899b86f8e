"""The C++ kernels (madtp_kernels._C, CPU and CUDA) as functions of tensors, with the arguments of the reference.

The binding is torch-free: it takes addresses, sizes and strides. Outputs are allocated here, every element is written.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from madtp_kernels import dispatch

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # madtp::DType
_ACTIVATIONS = {"none": 0, "gelu": 1, "gelu_tanh": 2, "quick_gelu": 3, "relu": 4}  # madtp::Activation


def _call(op: str, device: torch.device, *args) -> None:
    """Runs one entry point on the caller's threads or on the current stream of the tensors' device."""
    if device.type == "cpu":
        getattr(dispatch.extension().cpu, op)(*args, torch.get_num_threads())
        return
    with torch.cuda.device(device):
        getattr(dispatch.extension().cuda, op)(*args, torch.cuda.current_stream(device).cuda_stream)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _rows(x: Tensor) -> Tensor:
    """x, or a copy of it when its rows are not contiguous. Any row stride will do."""
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy of it that is contiguous from a 16-byte boundary on, as CUDA kernels read."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _aligned_rows(x: Tensor) -> Tensor:
    """x (T, C), or a copy of it whose rows are contiguous and start on 16-byte boundaries."""
    if x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _map(function: Callable[[Tensor], Tensor], *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else function(tensor) for tensor in tensors)


def _matrix(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), _DTYPES[x.dtype], x.stride(0)


def _heads(x: Tensor) -> Tensor:
    """x (T, H, D), or a copy of it when the elements of a head are not contiguous."""
    return x if x.shape[2] <= 1 or x.stride(2) == 1 else x.contiguous()


def _attention_inputs(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, summary_index, return_stats
):
    """madtp::AttentionInputs, and the tensors it points to, which must outlive it."""
    q, k, v = (_heads(x) for x in (q, k, v))
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    summary_index = _contiguous(summary_index)
    inputs = dispatch.extension().cpu.AttentionInputs(
        _DTYPES[q.dtype],
        *((x.data_ptr(), x.stride(0), x.stride(1)) for x in (q, k, v)),
        _address(cu_seqlens_q),
        _address(cu_seqlens_k),
        q.shape[0],
        k.shape[0],
        cu_seqlens_q.numel() - 1,
        *q.shape[1:],
        softmax_scale,
        causal,
        _address(summary_index),
    )
    return inputs, (q, k, v, cu_seqlens_q, cu_seqlens_k, summary_index)


def _workspace(op: str, inputs, return_stats: bool) -> Tensor:
    """The scratch memory of one call, from torch's allocator, so that its profiler sees it."""
    size = getattr(dispatch.extension().cpu, f"{op}_workspace")(inputs, return_stats, torch.get_num_threads())
    return torch.empty(size, dtype=torch.uint8)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *options):
    """Arguments and results of `reference.attention.varlen_attention`."""
    return_stats = options[-1]
    inputs, _alive = _attention_inputs(q, k, v, cu_seqlens_q, cu_seqlens_k, *options)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    summary = q.new_empty(q.shape[0] if return_stats else 0, dtype=torch.float32)
    received = torch.empty_like(summary)
    workspace = _workspace("varlen_attention", inputs, return_stats)
    _call("varlen_attention", q.device, inputs, *(_address(t) for t in (out, lse, summary, received, workspace)))
    return out, summary, received, lse


def varlen_attention_backward(
    grad_out: Tensor,
    grad_summary: Tensor,
    grad_received: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results of `reference.attention.varlen_attention_backward`."""
    return_stats = options[-1]
    inputs, _alive = _attention_inputs(q, k, v, cu_seqlens_q, cu_seqlens_k, *options)
    given = [t.contiguous() for t in (out, lse, grad_out, grad_summary, grad_received)]
    gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    workspace = _workspace("varlen_attention_backward", inputs, return_stats)
    _call("varlen_attention_backward", q.device, inputs, *(_address(t) for t in (*given, *gradients, workspace)))
    return tuple(gradients)


def token_importance(
    summary: Tensor, received: Tensor, mag_logits: Tensor, cu_seqlens: Tensor, summary_index: Tensor | None
) -> Tensor:
    summary, received, mag_logits = summary.contiguous(), received.contiguous(), _rows(mag_logits)
    cu_seqlens, summary_index = cu_seqlens.contiguous(), _contiguous(summary_index)
    importance = torch.empty_like(summary)
    _call(
        "token_importance",
        summary.device,
        _address(summary),
        _address(received),
        *_matrix(mag_logits),
        mag_logits.shape[1],
        _address(cu_seqlens),
        summary.shape[0],
        cu_seqlens.numel() - 1,
        _address(summary_index),
        _address(importance),
    )
    return importance


def select_tokens(
    importance: Tensor, mag_logits: Tensor, cu_seqlens: Tensor, temperature: float, summary_index: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    importance, mag_logits = importance.contiguous(), _rows(mag_logits)
    cu_seqlens, summary_index = cu_seqlens.contiguous(), _contiguous(summary_index)
    selection = _empty_selection(importance, cu_seqlens)
    _call(
        "select_tokens",
        importance.device,
        _address(importance),
        *_matrix(mag_logits),
        mag_logits.shape[1],
        _address(cu_seqlens),
        importance.shape[0],
        cu_seqlens.numel() - 1,
        _address(summary_index),
        temperature,
        *(_address(t) for t in selection),
    )
    return selection


def score_and_select(
    summary: Tensor,
    received: Tensor,
    mag_logits: Tensor,
    cu_seqlens: Tensor,
    temperature: float,
    summary_index: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    summary, received, mag_logits = summary.contiguous(), received.contiguous(), _rows(mag_logits)
    cu_seqlens, summary_index = cu_seqlens.contiguous(), _contiguous(summary_index)
    importance = torch.empty_like(summary)
    selection = _empty_selection(importance, cu_seqlens)
    _call(
        "score_and_select",
        summary.device,
        _address(summary),
        _address(received),
        *_matrix(mag_logits),
        mag_logits.shape[1],
        _address(cu_seqlens),
        summary.shape[0],
        cu_seqlens.numel() - 1,
        _address(summary_index),
        temperature,
        *(_address(t) for t in (importance, *selection)),
    )
    return importance, *selection


def _empty_selection(importance: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """keep, cu_seqlens_out, source and merge_weight, to be written."""
    keep, source = (torch.empty_like(importance, dtype=dtype) for dtype in (torch.bool, torch.int32))
    return keep, torch.empty_like(cu_seqlens), source, torch.empty_like(importance)


def gather_merge(x: Tensor, *selection: Tensor) -> Tensor:
    x, selection = _rows(x), _Selection(*selection)
    out = x.new_empty(selection.capacity, x.shape[1])
    _call("gather_merge", x.device, *_matrix(x), x.shape[1], *selection.arguments(), _address(out))
    return out


def gather_merge_backward(grad: Tensor, x: Tensor, *selection: Tensor) -> tuple[Tensor, Tensor]:
    grad, x, selection = _rows(grad), _rows(x), _Selection(*selection)
    grad_x = x.new_empty(x.shape)
    grad_weight = torch.empty_like(selection.merge_weight)
    _call(
        "gather_merge_backward",
        x.device,
        _address(grad),
        grad.stride(0),
        *_matrix(x),
        x.shape[1],
        *selection.arguments(),
        _address(grad_x),
        _address(grad_weight),
    )
    return grad_x, grad_weight


def gather_merge_layernorm(x: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *selection, weight, bias, eps = arguments
    x, weight, bias, selection = _rows(x), weight.contiguous(), bias.contiguous(), _Selection(*selection)
    x_out = x.new_empty(selection.capacity, x.shape[1])
    normed = torch.empty_like(x_out)
    mean = x.new_empty(selection.capacity, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    _call(
        "gather_merge_layernorm",
        x.device,
        *_matrix(x),
        x.shape[1],
        *selection.arguments(),
        _address(weight),
        _address(bias),
        _DTYPES[weight.dtype],
        eps,
        _address(x_out),
        _address(normed),
        _address(mean),
        _address(rstd),
    )
    return x_out, normed, mean, rstd


def sparse24_layout_bytes(features: int, channels: int, dtype: torch.dtype, device: torch.device) -> int:
    """Size of the layout of a weight; on a CPU it depends on the instruction set of this process."""
    return getattr(dispatch.extension(), device.type).sparse24_layout_bytes(features, channels, _DTYPES[dtype])


def sparse24_pack(values: Tensor, indices: Tensor) -> Tensor:
    prepare = Tensor.contiguous if values.device.type == "cpu" else _aligned
    values, indices = prepare(values), prepare(indices)
    features, channels = values.shape[0], 2 * values.shape[1]
    size = sparse24_layout_bytes(features, channels, values.dtype, values.device)
    layout = values.new_empty(size, dtype=torch.uint8)
    _call(
        "sparse24_pack",
        values.device,
        _address(values),
        _DTYPES[values.dtype],
        _address(indices),
        features,
        channels,
        _address(layout),
    )
    return layout


def sparse24_prune(weight: Tensor, score: Tensor | None) -> tuple[Tensor, Tensor]:
    """Arguments and results of the reference; RuntimeError for a NaN, which a GPU is asked for once."""
    score = None if score is None else score.float()
    features, channels = weight.shape
    values = weight.new_empty(features, channels // 2)
    indices = weight.new_empty(features, channels // 8, dtype=torch.uint8)
    sizes, outputs = weight.shape, (_address(values), _address(indices))
    if weight.device.type == "cpu":
        weight, score = _map(_rows, weight, score)
        _call("sparse24_prune", weight.device, *_matrix(weight), *_optional_matrix(score), *sizes, *outputs)
        return values, indices
    transposed = weight.stride(0) == 1 and weight.stride(1) != 1
    if transposed:  # as it lies: the kernel turns it over
        weight, score = _map(Tensor.t, weight, score)
    weight, score = _map(_aligned_rows, weight, score)
    has_nan = torch.empty(1, dtype=torch.int32, device=weight.device)
    _call(
        "sparse24_prune",
        weight.device,
        *_matrix(weight),
        *_optional_matrix(score),
        *sizes,
        transposed,
        *outputs,
        _address(has_nan),
    )
    if has_nan.item():
        raise RuntimeError("madtp::cuda::sparse24_prune: there is a NaN")
    return values, indices


def sparse24_linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    layout: Tensor | None,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
    total: Tensor | None,
) -> Tensor:
    # Every microsecond counts here: a layer may take as few.
    layout = sparse24_pack(values, indices) if layout is None else layout
    x_stride, unit = x.stride()
    if unit != 1:
        x = x.contiguous()
        x_stride = x.stride(0)
    (rows, channels), features = x.shape, values.shape[0]
    bias_at = scale_at = residual_at = residual_stride = bias_dtype = scale_dtype = 0
    if bias is not None:
        bias = bias.contiguous()
        bias_at, bias_dtype = bias.data_ptr(), _DTYPES[bias.dtype]
    if scale is not None:
        scale = scale.contiguous()
        scale_at, scale_dtype = scale.data_ptr(), _DTYPES[scale.dtype]
    if residual is not None:
        residual = _rows(residual)
        residual_at, residual_stride = residual.data_ptr(), residual.stride(0)
    out = x.new_empty(rows, features)
    dispatch.extension().cpu.sparse24_linear(
        x.data_ptr(),
        _DTYPES[x.dtype],
        x_stride,
        rows,
        layout.data_ptr(),
        _DTYPES[values.dtype],
        features,
        channels,
        bias_at,
        bias_dtype,
        _ACTIVATIONS[activation],
        scale_at,
        scale_dtype,
        residual_at,
        residual_stride,
        0 if total is None else total.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


class Sparse24Config(NamedTuple):
    """madtp::cuda::Sparse24Config: how a linear layer is laid out on a GPU."""

    architecture: int  # of the kernel: 80 (mma.sp) or 90 (wgmma.sp)
    tile_tokens: int  # of a block
    tile_features: int  # of a block
    split_k: int = 1  # blocks that share the channels of a tile
    cluster: int = 1  # blocks that share the tokens of a tile


def sparse24_linear_cuda(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    layout: Tensor | None,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
    total: Tensor | None,
    config: Sparse24Config | None = None,
) -> Tensor:
    """`sparse24_linear` on Sparse Tensor Cores, of x and values in bfloat16 or float16.

    config: one of `sparse24_linear_configs`, None for the one that a model of the device expects to be fastest;
        RuntimeError for one that cannot run here.
    """
    inputs, _alive = _sparse24_inputs(x, values, indices, layout, bias, activation, residual, scale, total)
    out = x.new_empty(x.shape[0], values.shape[0])
    cuda = dispatch.extension().cuda
    with torch.cuda.device(x.device):
        workspace = x.new_empty(cuda.sparse24_linear_workspace(inputs, config), dtype=torch.uint8)
        stream = torch.cuda.current_stream().cuda_stream
        cuda.sparse24_linear(inputs, _address(out), _address(workspace), workspace.numel(), stream, config)
    return out


def sparse24_linear_configs(x: Tensor, *arguments) -> list[Sparse24Config]:
    """Every configuration that can run `sparse24_linear_cuda` of these arguments on the device of x."""
    inputs, _alive = _sparse24_inputs(x, *arguments)
    with torch.cuda.device(x.device):
        return [Sparse24Config(*config) for config in dispatch.extension().cuda.sparse24_linear_configs(inputs)]


def _sparse24_inputs(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    layout: Tensor | None,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
    total: Tensor | None,
):
    """madtp::Sparse24Linear, and the tensors it points to, which must outlive it."""
    layout = sparse24_pack(values, indices) if layout is None else layout
    x, residual = _map(_aligned_rows, x, residual)
    bias, scale = _map(_aligned, bias, scale)
    inputs = dispatch.extension().cuda.Sparse24Linear(
        _address(x),
        _DTYPES[x.dtype],
        x.stride(0),
        x.shape[0],
        _address(layout),
        _DTYPES[values.dtype],
        values.shape[0],
        x.shape[1],
        _address(bias),
        0 if bias is None else _DTYPES[bias.dtype],
        _ACTIVATIONS[activation],
        _address(scale),
        0 if scale is None else _DTYPES[scale.dtype],
        _address(residual),
        0 if residual is None else residual.stride(0),
        _address(total),
    )
    return inputs, (x, layout, bias, residual, scale, total)


def _optional_matrix(x: Tensor | None) -> tuple[int, int]:
    """Address and row stride."""
    return (0, 0) if x is None else (x.data_ptr(), x.stride(0))


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


class _Selection:
    """madtp::TokenSelection: keeps its contiguous tensors alive for the call."""

    def __init__(self, keep: Tensor, source: Tensor, merge_weight: Tensor, cu_seqlens: Tensor, cu_seqlens_out: Tensor):
        self.merge_weight = merge_weight.contiguous()
        self._tensors = [t.contiguous() for t in (keep, source, self.merge_weight, cu_seqlens, cu_seqlens_out)]
        self.capacity = source.shape[0]
        self._sizes = (keep.shape[0], self.capacity, cu_seqlens.numel() - 1)

    def arguments(self) -> tuple[int, ...]:
        return (*(t.data_ptr() for t in self._tensors), *self._sizes)
