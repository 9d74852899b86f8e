# SPDX-License-Identifier: Apache-2.0
"""The token ops as torch sees them: schema, backends, fake and autograd."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from madtp_kernels import dispatch
from madtp_kernels.checks import check_cu_seqlens_values, check_rows, check_summary_index_values, require
from madtp_kernels.native import tokens as native
from madtp_kernels.ops.token_gradients import importance_gradient, selection_gradient
from madtp_kernels.reference import tokens as reference
from madtp_kernels.selection import PADDING

SELECTION = "Tensor keep, Tensor cu_seqlens_in, Tensor cu_seqlens_out, Tensor source, Tensor merge_weight"
STATS = "Tensor summary_attention, Tensor received_attention"
SCORES = "Tensor mag_logits, Tensor cu_seqlens"

torch.library.define(
    "madtp::token_importance",
    f"({STATS}, {SCORES}, Tensor? summary_index, str backend) -> Tensor",
)
torch.library.define(
    "madtp::select_tokens",
    f"(Tensor importance, {SCORES}, float temperature, Tensor? summary_index, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "madtp::score_and_select",
    f"({STATS}, {SCORES}, float temperature, Tensor? summary_index, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define("madtp::gather_merge", f"(Tensor x, {SELECTION}, str backend) -> Tensor")
torch.library.define(
    "madtp::gather_merge_backward", f"(Tensor grad, Tensor x, {SELECTION}, str backend) -> (Tensor, Tensor)"
)
torch.library.define(
    "madtp::gather_merge_layernorm",
    f"(Tensor x, {SELECTION}, Tensor weight, Tensor bias, float eps, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
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


def _score_dtype(scores: Tensor, mag_logits: Tensor) -> torch.dtype:
    return torch.promote_types(scores.dtype, mag_logits.dtype)


def _check_scores(
    scores: Tensor,
    mag_logits: Tensor,
    cu_seqlens: Tensor,
    summary_index: Tensor | None,
    received_attention: Tensor | None = None,
) -> None:
    # torch.ops can be called without the public function, and kernels trust these sizes.
    for name, value in (("mag_logits", mag_logits), ("stats.received_attention", received_attention)):
        if value is not None:
            check_rows(name, value, scores.shape[0], "the scores")
    check_summary_index_values(summary_index, check_cu_seqlens_values("cu_seqlens", cu_seqlens, scores.shape[0]))


@torch.library.impl("madtp::token_importance", "CompositeExplicitAutograd")
def _token_importance(
    summary_attention: Tensor,
    received_attention: Tensor,
    mag_logits: Tensor,
    cu_seqlens: Tensor,
    summary_index: Tensor | None,
    backend: str,
) -> Tensor:
    _check_scores(summary_attention, mag_logits, cu_seqlens, summary_index, received_attention)
    dtype = _score_dtype(summary_attention, mag_logits)
    run: Callable[..., Tensor] = dispatch.implementation("token_importance", backend, dtype, summary_attention.device)
    return run(summary_attention, received_attention, mag_logits, cu_seqlens, summary_index)


@torch.library.impl("madtp::select_tokens", "CompositeExplicitAutograd")
def _select_tokens(
    importance: Tensor,
    mag_logits: Tensor,
    cu_seqlens: Tensor,
    temperature: float,
    summary_index: Tensor | None,
    backend: str,
) -> tuple[Tensor, ...]:
    _check_scores(importance, mag_logits, cu_seqlens, summary_index)
    dtype = _score_dtype(importance, mag_logits)
    run = dispatch.implementation("select_tokens", backend, dtype, importance.device)
    keep, cu_seqlens_out, source, merge_weight = run(importance, mag_logits, cu_seqlens, temperature, summary_index)
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
) -> tuple[Tensor, ...]:
    _check_scores(summary_attention, mag_logits, cu_seqlens, summary_index, received_attention)
    run: Callable[..., tuple[Tensor, ...]] = dispatch.implementation(
        "score_and_select", backend, _score_dtype(summary_attention, mag_logits), summary_attention.device
    )
    return run(summary_attention, received_attention, mag_logits, cu_seqlens, temperature, summary_index)


def _run_gather(op: str, lead: Sequence[Tensor], selection: Sequence[Tensor], rest: Sequence[Any], backend: str) -> Any:
    x = lead[-1]
    keep, cu_seqlens_in, cu_seqlens_out, source, merge_weight = selection
    # torch.ops can be called without the public function, and kernels trust these sizes.
    require(lead[0].dtype == x.dtype, "grad", f"{x.dtype} like x", lead[0])
    check_rows("selection.keep", keep, x.shape[0], "x")
    check_rows("selection.merge_weight", merge_weight, x.shape[0], "x")
    check_rows("selection.cu_seqlens_out", cu_seqlens_out, cu_seqlens_in.shape[0], "its cu_seqlens_in")
    check_cu_seqlens_values("selection.cu_seqlens_in", cu_seqlens_in, x.shape[0])
    check_cu_seqlens_values("selection.cu_seqlens_out", cu_seqlens_out, source.shape[0], at_most=True)
    run = dispatch.implementation(op, backend, x.dtype, x.device)
    return run(*lead, *selection, *rest)


@torch.library.impl("madtp::gather_merge", "CompositeExplicitAutograd")
def _gather_merge(x: Tensor, *selection_and_backend: Any) -> Tensor:
    *selection, backend = selection_and_backend
    out: Tensor = _run_gather("gather_merge", (x,), selection, (), backend)
    return out


@torch.library.impl("madtp::gather_merge_backward", "CompositeExplicitAutograd")
def _gather_merge_backward(grad: Tensor, x: Tensor, *selection_and_backend: Any) -> tuple[Tensor, ...]:
    *selection, backend = selection_and_backend
    gradients: tuple[Tensor, ...] = _run_gather("gather_merge_backward", (grad, x), selection, (), backend)
    return gradients


@torch.library.impl("madtp::gather_merge_layernorm", "CompositeExplicitAutograd")
def _gather_merge_layernorm(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *selection, weight, bias, eps, backend = arguments
    require(weight.dtype == bias.dtype, "bias", f"{weight.dtype} like weight", bias)
    for name, value in (("weight", weight), ("bias", bias)):
        check_rows(name, value, x.shape[1], "x has channels")
    results: tuple[Tensor, ...] = _run_gather("gather_merge_layernorm", (x,), selection, (weight, bias, eps), backend)
    return results


# --- fake


@torch.library.register_fake("madtp::token_importance")
def _(
    summary_attention: Tensor,
    received_attention: Tensor,
    mag_logits: Tensor,
    cu_seqlens: Tensor,
    summary_index: Tensor | None,
    backend: str,
) -> Tensor:
    return torch.empty_like(summary_attention)


@torch.library.register_fake("madtp::select_tokens")
def _fake_select_tokens(
    importance: Tensor,
    mag_logits: Tensor,
    cu_seqlens: Tensor,
    temperature: float,
    summary_index: Tensor | None,
    backend: str,
) -> tuple[Tensor, ...]:
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
) -> tuple[Tensor, ...]:
    importance = torch.empty_like(summary_attention)
    merge_weight, *selection = _fake_select_tokens(
        importance, mag_logits, cu_seqlens, temperature, summary_index, backend
    )
    return importance, *selection, merge_weight


@torch.library.register_fake("madtp::gather_merge")
def _(
    x: Tensor,
    keep: Tensor,
    cu_seqlens_in: Tensor,
    cu_seqlens_out: Tensor,
    source: Tensor,
    merge_weight: Tensor,
    backend: str,
) -> Tensor:
    return x.new_empty(source.shape[0], x.shape[1])


@torch.library.register_fake("madtp::gather_merge_backward")
def _(
    grad: Tensor,
    x: Tensor,
    keep: Tensor,
    cu_seqlens_in: Tensor,
    cu_seqlens_out: Tensor,
    source: Tensor,
    merge_weight: Tensor,
    backend: str,
) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), torch.empty_like(merge_weight)


@torch.library.register_fake("madtp::gather_merge_layernorm")
def _(
    x: Tensor,
    keep: Tensor,
    cu_seqlens_in: Tensor,
    cu_seqlens_out: Tensor,
    source: Tensor,
    merge_weight: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    backend: str,
) -> tuple[Tensor, ...]:
    out = x.new_empty(source.shape[0], x.shape[1])
    statistic = x.new_empty(source.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))
    return out, torch.empty_like(out), statistic, torch.empty_like(statistic)


# --- autograd


def _importance_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, received_attention, mag_logits, cu_seqlens, summary_index, _ = inputs
    ctx.save_for_backward(received_attention, mag_logits, cu_seqlens, summary_index)


def _importance_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *importance_gradient(grad, *ctx.saved_tensors), None, None, None


torch.library.register_autograd("madtp::token_importance", _importance_backward, setup_context=_importance_setup)


def _selection_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    importance, _, cu_seqlens, *_ = inputs
    merge_weight, keep, _, _ = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(importance, cu_seqlens, keep, merge_weight)


def _selection_backward(
    ctx: Any, grad_merge_weight: Tensor, grad_keep: Tensor, grad_cu_seqlens_out: Tensor, grad_source: Tensor
) -> tuple[Tensor | None, ...]:
    return selection_gradient(grad_merge_weight, *ctx.saved_tensors), None, None, None, None, None


torch.library.register_autograd("madtp::select_tokens", _selection_backward, setup_context=_selection_setup)


def _score_and_select_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, received_attention, mag_logits, cu_seqlens, _, summary_index, _ = inputs
    importance, keep, _, _, merge_weight = output
    ctx.mark_non_differentiable(*output[1:4])
    ctx.save_for_backward(received_attention, mag_logits, cu_seqlens, summary_index, importance, keep, merge_weight)


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
    return *importance_gradient(grad, *inputs), None, None, None, None


torch.library.register_autograd(
    "madtp::score_and_select", _score_and_select_backward, setup_context=_score_and_select_setup
)


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, *selection = ctx.saved_tensors
    grad_x, grad_weight = torch.ops.madtp.gather_merge_backward(grad, x, *selection, ctx.backend)
    return grad_x, None, None, None, None, grad_weight, None


torch.library.register_autograd("madtp::gather_merge", _gather_backward, setup_context=_gather_setup)


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


torch.library.register_autograd("madtp::gather_merge_layernorm", _layernorm_backward, setup_context=_layernorm_setup)
