# SPDX-License-Identifier: Apache-2.0
"""The token ops as torch sees them: schema, backends, fake and autograd."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from madtp_kernels import checks, dispatch
from madtp_kernels.checks import check_device, check_rows, check_tensor, require
from madtp_kernels.native import tokens as native
from madtp_kernels.ops.autograd import register_autograd, register_second_order
from madtp_kernels.ops.token_gradients import importance_gradient, rmsnorm_gradient, selection_gradient
from madtp_kernels.reference import tokens as reference
from madtp_kernels.selection import PADDING

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STATISTICS = (torch.float32, torch.float64)  # float64 runs on the reference, for gradcheck

FIELDS = ("keep", "cu_seqlens_in", "cu_seqlens_out", "source", "merge_weight")  # of a Selection
SELECTION = ", ".join(f"Tensor {name}" for name in FIELDS)
STATS = "Tensor summary_attention, Tensor received_attention"
SCORES = "Tensor mag_logits, Tensor cu_seqlens"

# `protected` came later: behind the rest and with a default, so that a program that was exported before still loads.
KEPT_ROWS = "Tensor? summary_index, str backend, Tensor? protected=None"

torch.library.define("madtp::token_importance", f"({STATS}, {SCORES}, {KEPT_ROWS}) -> Tensor")
torch.library.define(
    "madtp::select_tokens",
    f"(Tensor importance, {SCORES}, float temperature, {KEPT_ROWS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "madtp::score_and_select",
    f"({STATS}, {SCORES}, float temperature, {KEPT_ROWS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define("madtp::gather_merge", f"(Tensor x, {SELECTION}, str backend) -> Tensor")
torch.library.define(
    "madtp::gather_merge_backward", f"(Tensor grad, Tensor x, {SELECTION}, str backend) -> (Tensor, Tensor)"
)
torch.library.define(
    "madtp::gather_merge_layernorm",
    f"(Tensor x, {SELECTION}, Tensor weight, Tensor bias, float eps, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "madtp::gather_merge_rmsnorm",
    f"(Tensor x, {SELECTION}, Tensor weight, float eps, str backend) -> (Tensor, Tensor)",
)


# --- backends


for _op in ("token_importance", "select_tokens", "score_and_select"):
    dispatch.register(
        _op,
        reference=getattr(reference, _op),
        cpu=getattr(native, _op),
        triton=dispatch.triton_launcher("tokens.scores", _op),
    )
for _op in ("gather_merge", "gather_merge_backward", "gather_merge_layernorm"):
    dispatch.register(
        _op,
        reference=getattr(reference, _op),
        cpu=getattr(native, _op),
        triton=dispatch.triton_launcher("tokens.gather_merge", _op),
        cuda=getattr(native, _op),
    )
dispatch.register(
    "gather_merge_rmsnorm",
    reference=reference.gather_merge_rmsnorm,
    cpu=native.gather_merge_rmsnorm,
    triton=dispatch.triton_launcher("tokens.gather_merge", "gather_merge_rmsnorm"),
)


# --- checks, of which the fakes run those that read no tensor


def _check_statistics(
    summary_attention: Tensor,
    received_attention: Tensor,
    mag_logits: Tensor,
    cu_seqlens: Tensor,
    summary_index: Tensor | None,
    protected: Tensor | None,
) -> None:
    check_tensor("stats.summary_attention", summary_attention, 1, STATISTICS)
    check_tensor("stats.received_attention", received_attention, 1, (summary_attention.dtype,))
    rows = summary_attention.shape[0]
    check_rows("stats.received_attention", received_attention, rows, "stats.summary_attention")
    check_device(summary_attention.device, **{"stats.received_attention": received_attention})
    _check_scores("stats.summary_attention", summary_attention, mag_logits, cu_seqlens, summary_index, protected)


def _check_scores(
    name: str,
    scores: Tensor,
    mag_logits: Tensor,
    cu_seqlens: Tensor,
    summary_index: Tensor | None,
    protected: Tensor | None,
) -> None:
    check_tensor(name, scores, 1, STATISTICS)
    check_tensor("mag_logits", mag_logits, 2, FLOATS)
    require(mag_logits.shape[1] > 0, "mag_logits", "of at least one alignment token, (T, K)", mag_logits)
    check_rows("mag_logits", mag_logits, scores.shape[0], name)
    checks.check_ragged(scores.shape[0], cu_seqlens, summary_index, name)
    if protected is not None:
        check_tensor("protected", protected, 1, (torch.bool,))
        check_rows("protected", protected, scores.shape[0], name)
    check_device(
        scores.device,
        mag_logits=mag_logits,
        cu_seqlens=cu_seqlens,
        summary_index=summary_index,
        protected=protected,
    )


def _check_gather(x: Tensor, selection: Sequence[Tensor]) -> None:
    keep, cu_seqlens_in, cu_seqlens_out, source, merge_weight = selection
    check_tensor("x", x, 2, FLOATS)
    rows = x.shape[0]
    checks.check_row_count("x", rows)
    checks.check_cu_seqlens("selection.cu_seqlens_in", cu_seqlens_in)
    checks.check_cu_seqlens("selection.cu_seqlens_out", cu_seqlens_out)
    check_tensor("selection.keep", keep, 1, (torch.bool,))
    check_tensor("selection.source", source, 1, (torch.int32,))
    weight_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    check_tensor("selection.merge_weight", merge_weight, 1, (weight_dtype,))
    check_rows("selection.keep", keep, rows, "x")
    check_rows("selection.merge_weight", merge_weight, rows, "x")
    check_rows("selection.cu_seqlens_out", cu_seqlens_out, cu_seqlens_in.shape[0], "its cu_seqlens_in")
    for name, value in zip(FIELDS, selection, strict=True):
        if value.device != x.device:
            require(False, f"selection.{name}", f"on {x.device}", value)


def _check_gather_values(x: Tensor, selection: Sequence[Tensor]) -> None:
    _, cu_seqlens_in, cu_seqlens_out, source, _ = selection
    checks.check_cu_seqlens_values("selection.cu_seqlens_in", cu_seqlens_in, x.shape[0])
    checks.check_cu_seqlens_values("selection.cu_seqlens_out", cu_seqlens_out, source.shape[0], at_most=True)


def check_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, of: str = "") -> None:
    """The LayerNorm of the rows of x, or without bias the RMSNorm; `of` goes before the names of its arguments."""
    for name, value in ((f"{of}weight", weight), (f"{of}bias", bias)):
        if value is not None:
            check_tensor(name, value, 1, tuple(dict.fromkeys((x.dtype, torch.float32))))
            require(value.shape[0] == x.shape[1], name, f"of shape ({x.shape[1]},) like the channels of x", value)
    require(bias is None or weight.dtype == bias.dtype, f"{of}bias", f"{weight.dtype} like {of}weight", bias)
    check_device(x.device, **{f"{of}weight": weight, f"{of}bias": bias})
    require(0 < eps < math.inf, f"{of}eps", "a finite number > 0", eps)


# --- the ops


def _score_dtype(scores: Tensor, mag_logits: Tensor) -> torch.dtype:
    return torch.promote_types(scores.dtype, mag_logits.dtype)


def _check_score_values(scores: Tensor, cu_seqlens: Tensor, summary_index: Tensor | None) -> None:
    lengths = checks.check_cu_seqlens_values("cu_seqlens", cu_seqlens, scores.shape[0])
    checks.check_summary_index_values(summary_index, lengths)


@torch.library.impl("madtp::token_importance", "CompositeExplicitAutograd")
def _token_importance(
    summary_attention: Tensor,
    received_attention: Tensor,
    mag_logits: Tensor,
    cu_seqlens: Tensor,
    summary_index: Tensor | None,
    backend: str,
    protected: Tensor | None = None,
) -> Tensor:
    _check_statistics(summary_attention, received_attention, mag_logits, cu_seqlens, summary_index, protected)
    _check_score_values(summary_attention, cu_seqlens, summary_index)
    dtype = _score_dtype(summary_attention, mag_logits)
    run: Callable[..., Tensor] = dispatch.implementation("token_importance", backend, dtype, summary_attention.device)
    return run(summary_attention, received_attention, mag_logits, cu_seqlens, summary_index, protected)


@torch.library.impl("madtp::select_tokens", "CompositeExplicitAutograd")
def _select_tokens(
    importance: Tensor,
    mag_logits: Tensor,
    cu_seqlens: Tensor,
    temperature: float,
    summary_index: Tensor | None,
    backend: str,
    protected: Tensor | None = None,
) -> tuple[Tensor, ...]:
    _check_scores("importance", importance, mag_logits, cu_seqlens, summary_index, protected)
    checks.check_temperature(temperature)
    _check_score_values(importance, cu_seqlens, summary_index)
    dtype = _score_dtype(importance, mag_logits)
    run = dispatch.implementation("select_tokens", backend, dtype, importance.device)
    keep, cu_seqlens_out, source, merge_weight = run(
        importance, mag_logits, cu_seqlens, temperature, summary_index, protected
    )
    return merge_weight, keep, cu_seqlens_out, source  # not in the order of a Selection: opcheck needs a float first


@torch.library.impl("madtp::score_and_select", "CompositeExplicitAutograd")
def _score_and_select(
    summary_attention: Tensor,
    received_attention: Tensor,
    mag_logits: Tensor,
    cu_seqlens: Tensor,
    temperature: float,
    summary_index: Tensor | None,
    backend: str,
    protected: Tensor | None = None,
) -> tuple[Tensor, ...]:
    _check_statistics(summary_attention, received_attention, mag_logits, cu_seqlens, summary_index, protected)
    checks.check_temperature(temperature)
    _check_score_values(summary_attention, cu_seqlens, summary_index)
    run: Callable[..., tuple[Tensor, ...]] = dispatch.implementation(
        "score_and_select", backend, _score_dtype(summary_attention, mag_logits), summary_attention.device
    )
    return run(summary_attention, received_attention, mag_logits, cu_seqlens, temperature, summary_index, protected)


@torch.library.impl("madtp::gather_merge", "CompositeExplicitAutograd")
def _gather_merge(x: Tensor, *selection_and_backend: Any) -> Tensor:
    *selection, backend = selection_and_backend
    _check_gather(x, selection)
    _check_gather_values(x, selection)
    run: Callable[..., Tensor] = dispatch.implementation("gather_merge", backend, x.dtype, x.device)
    return run(x, *selection)


@torch.library.impl("madtp::gather_merge_backward", "CompositeExplicitAutograd")
def _gather_merge_backward(grad: Tensor, x: Tensor, *selection_and_backend: Any) -> tuple[Tensor, ...]:
    *selection, backend = selection_and_backend
    _check_gather(x, selection)
    checks.check_gradient(grad, x, (selection[3].shape[0], x.shape[1]))
    _check_gather_values(x, selection)
    run: Callable[..., tuple[Tensor, ...]] = dispatch.implementation(
        "gather_merge_backward", backend, x.dtype, x.device
    )
    return run(grad, x, *selection)


@torch.library.impl("madtp::gather_merge_layernorm", "CompositeExplicitAutograd")
def _gather_merge_layernorm(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *selection, weight, bias, eps, backend = arguments
    _check_gather(x, selection)
    check_norm(x, weight, bias, eps)
    _check_gather_values(x, selection)
    run: Callable[..., tuple[Tensor, ...]] = dispatch.implementation(
        "gather_merge_layernorm", backend, x.dtype, x.device
    )
    return run(x, *selection, weight, bias, eps)


@torch.library.impl("madtp::gather_merge_rmsnorm", "CompositeExplicitAutograd")
def _gather_merge_rmsnorm(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *selection, weight, eps, backend = arguments
    _check_gather(x, selection)
    check_norm(x, weight, None, eps)
    _check_gather_values(x, selection)
    run: Callable[..., tuple[Tensor, ...]] = dispatch.implementation("gather_merge_rmsnorm", backend, x.dtype, x.device)
    return run(x, *selection, weight, eps)


# --- fake


@torch.library.register_fake("madtp::token_importance")
def _(
    summary_attention: Tensor,
    received_attention: Tensor,
    mag_logits: Tensor,
    cu_seqlens: Tensor,
    summary_index: Tensor | None,
    backend: str,
    protected: Tensor | None = None,
) -> Tensor:
    _check_statistics(summary_attention, received_attention, mag_logits, cu_seqlens, summary_index, protected)
    return torch.empty_like(summary_attention)


@torch.library.register_fake("madtp::select_tokens")
def _fake_select_tokens(
    importance: Tensor,
    mag_logits: Tensor,
    cu_seqlens: Tensor,
    temperature: float,
    summary_index: Tensor | None,
    backend: str,
    protected: Tensor | None = None,
) -> tuple[Tensor, ...]:
    _check_scores("importance", importance, mag_logits, cu_seqlens, summary_index, protected)
    checks.check_temperature(temperature)
    rows = importance.shape[0]
    return (
        torch.empty_like(importance),
        importance.new_empty(rows, dtype=torch.bool),
        torch.empty_like(cu_seqlens),
        cu_seqlens.new_empty(rows),
    )


@torch.library.register_fake("madtp::score_and_select")
def _(
    summary_attention: Tensor,
    received_attention: Tensor,
    mag_logits: Tensor,
    cu_seqlens: Tensor,
    temperature: float,
    summary_index: Tensor | None,
    backend: str,
    protected: Tensor | None = None,
) -> tuple[Tensor, ...]:
    _check_statistics(summary_attention, received_attention, mag_logits, cu_seqlens, summary_index, protected)
    importance = torch.empty_like(summary_attention)
    merge_weight, *selection = _fake_select_tokens(
        importance, mag_logits, cu_seqlens, temperature, summary_index, backend, protected
    )
    return importance, *selection, merge_weight


@torch.library.register_fake("madtp::gather_merge")
def _(x: Tensor, *selection_and_backend: Any) -> Tensor:
    *selection, _ = selection_and_backend
    _check_gather(x, selection)
    return x.new_empty(selection[3].shape[0], x.shape[1])


@torch.library.register_fake("madtp::gather_merge_backward")
def _(grad: Tensor, x: Tensor, *selection_and_backend: Any) -> tuple[Tensor, ...]:
    *selection, _ = selection_and_backend
    _check_gather(x, selection)
    checks.check_gradient(grad, x, (selection[3].shape[0], x.shape[1]))
    return x.new_empty(x.shape), torch.empty_like(selection[4])


@torch.library.register_fake("madtp::gather_merge_layernorm")
def _(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *selection, weight, bias, eps, _ = arguments
    _check_gather(x, selection)
    check_norm(x, weight, bias, eps)
    out_rows = selection[3].shape[0]
    out = x.new_empty(out_rows, x.shape[1])
    statistic = x.new_empty(out_rows, dtype=torch.promote_types(x.dtype, torch.float32))
    return out, torch.empty_like(out), statistic, torch.empty_like(statistic)


@torch.library.register_fake("madtp::gather_merge_rmsnorm")
def _(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *selection, weight, eps, _ = arguments
    _check_gather(x, selection)
    check_norm(x, weight, None, eps)
    out = x.new_empty(selection[3].shape[0], x.shape[1])
    return out, torch.empty_like(out)


# --- autograd


def _importance_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, received_attention, mag_logits, cu_seqlens, summary_index, _, protected = inputs
    ctx.save_for_backward(received_attention, mag_logits, cu_seqlens, summary_index, protected)


def _importance_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *importance_gradient(grad, *ctx.saved_tensors), None, None, None, None


register_autograd("madtp::token_importance", _importance_backward, _importance_setup)


def _selection_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    importance, _, cu_seqlens, *_ = inputs
    merge_weight, keep, _, _ = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(importance, cu_seqlens, keep, merge_weight)


def _selection_backward(
    ctx: Any, grad_merge_weight: Tensor, grad_keep: Tensor, grad_cu_seqlens_out: Tensor, grad_source: Tensor
) -> tuple[Tensor | None, ...]:
    return selection_gradient(grad_merge_weight, *ctx.saved_tensors), *(None,) * 6


register_autograd("madtp::select_tokens", _selection_backward, _selection_setup)


def _score_and_select_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *scores, _, summary_index, _, protected = inputs
    importance, keep, _, _, merge_weight = output
    ctx.mark_non_differentiable(*output[1:4])
    ctx.save_for_backward(*scores, summary_index, protected, importance, keep, merge_weight)


def _score_and_select_backward(
    ctx: Any,
    grad_importance: Tensor,
    grad_keep: Tensor,
    grad_cu_seqlens_out: Tensor,
    grad_source: Tensor,
    grad_merge_weight: Tensor,
) -> tuple[Tensor | None, ...]:
    # mag_logits reach the loss through importance alone: which tokens they select is a constant.
    *inputs, importance, keep, merge_weight = ctx.saved_tensors
    cu_seqlens = inputs[2]
    grad = grad_importance + selection_gradient(grad_merge_weight, importance, cu_seqlens, keep, merge_weight)
    return *importance_gradient(grad, *inputs), *(None,) * 5


register_autograd("madtp::score_and_select", _score_and_select_backward, _score_and_select_setup)


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, *selection = ctx.saved_tensors
    grad_x, grad_weight = torch.ops.madtp.gather_merge_backward(grad, x, *selection, ctx.backend)
    return grad_x, None, None, None, None, grad_weight, None


register_autograd("madtp::gather_merge", _gather_backward, _gather_setup)
register_second_order("madtp::gather_merge_backward", reference.gather_merge_backward, (0, 1, 6))


def _layernorm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eps, ctx.backend = inputs
    x_out, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(*tensors, x_out, mean, rstd)


def _layernorm_backward(
    ctx: Any, grad_out: Tensor, grad_normed: Tensor, grad_mean: Tensor, grad_rstd: Tensor
) -> tuple[Tensor | None, ...]:
    x, *selection, weight, bias, x_out, mean, rstd = ctx.saved_tensors
    source = selection[3]
    wide = mean.dtype
    # A padding row has zero outputs whatever the parameters are, so its gradient must not reach the bias.
    grad_normed = grad_normed.to(wide) * (source != PADDING)[:, None]
    grad_x_out, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad_normed,
        x_out.to(wide),
        [x.shape[1]],
        mean[:, None],
        rstd[:, None],
        weight.to(wide),
        bias.to(wide),
        [True, True, True],
    )
    grad_rows = (grad_x_out + grad_out).to(x.dtype)
    grad_x, grad_merge_weight = torch.ops.madtp.gather_merge_backward(grad_rows, x, *selection, ctx.backend)
    return (
        grad_x,
        None,
        None,
        None,
        None,
        grad_merge_weight,
        grad_weight.to(weight.dtype),
        grad_bias.to(bias.dtype),
        None,
        None,
    )


register_autograd("madtp::gather_merge_layernorm", _layernorm_backward, _layernorm_setup)


def _rmsnorm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[0])


def _rmsnorm_backward(ctx: Any, grad_out: Tensor, grad_normed: Tensor) -> tuple[Tensor | None, ...]:
    x, *selection, weight, x_out = ctx.saved_tensors
    grad_rows, grad_weight = rmsnorm_gradient(grad_normed, x_out, weight, ctx.eps)
    grad_rows = (grad_rows + grad_out).to(x.dtype)
    grad_x, grad_merge_weight = torch.ops.madtp.gather_merge_backward(grad_rows, x, *selection, ctx.backend)
    return grad_x, None, None, None, None, grad_merge_weight, grad_weight.to(weight.dtype), None, None


register_autograd("madtp::gather_merge_rmsnorm", _rmsnorm_backward, _rmsnorm_setup)
