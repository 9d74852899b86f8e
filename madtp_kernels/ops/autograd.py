# SPDX-License-Identifier: Apache-2.0
"""How the ops are differentiated: once by their own backward ops, again through the reference, under any transform.

`torch.library.register_autograd` alone gives silent zeros in forward mode and raises under the transforms of
torch.func, and a backward op without autograd gives silent zeros the second time. So autograd is registered here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function

_library = torch.library.Library("madtp", "FRAGMENT")  # registrations last as long as this does
_transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
_below_autograd, _after_autograd = torch._C._AutoDispatchBelowAutograd, torch._C._after_autograd_keyset
_any_requires_grad: Callable[..., bool] = torch._C._any_requires_grad


def register_autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """As `torch.library.register_autograd`, and under torch.func too; forward mode is refused."""
    op = _overload(name)
    defaults = [argument.default_value for argument in op._schema.arguments]

    def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
        if _transforms_active():
            # A Function hides gradients of both modes from its forward; levels of torch.func below may want theirs.
            with _below_autograd(), torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                output = op.redispatch(keyset & _after_autograd, *args)
        else:
            with _below_autograd():
                output = op.redispatch(keyset & _after_autograd, *args)
        setup_context(ctx, args, output)
        return output

    def backward_of_all(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *backward(ctx, *grads)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward_of_all)}
    differentiable: Any = type(f"Backward of {name}", (Function,), methods)
    # Function.apply hands a call under torch.func to that, for all levels of it at once. Here it is at one level
    # already, as the kernels of torch's own ops are.
    apply_at_level = super(Function, differentiable).apply

    def autograd(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0 and any(map(_has_tangent, args)):
            raise NotImplementedError(
                f"{name} has no forward-mode derivative; use reverse mode: torch.func.vjp, grad or jacrev, "
                "and jacrev of jacrev for a Hessian"
            )
        if not (torch.is_grad_enabled() and _any_requires_grad(*args)):
            with _below_autograd():
                return op.redispatch(keyset & _after_autograd, *args)
        args = (*args, *defaults[len(args) :])  # which the dispatcher cuts off
        if not _transforms_active():
            return differentiable.apply(keyset, *args)
        from torch._functorch.utils import enable_single_level_autograd_function

        with enable_single_level_autograd_function():
            return apply_at_level(keyset, *args)

    _library.impl(name, autograd, "Autograd", with_keyset=True)


def register_second_order(name: str, reference: Callable[..., Any], inputs: Sequence[int]) -> None:
    """Makes a backward op differentiable through its reference, in plain PyTorch, and so to any order.

    reference: takes the arguments of the op but the backend and what follows that.
    inputs: positions of the arguments that the gradients come from, each a floating-point tensor or None.
    """
    names = [argument.name for argument in _overload(name)._schema.arguments]
    backend = names.index("backend")

    def setup_context(ctx: Any, args: tuple[Any, ...], output: Any) -> None:
        ctx.is_tensor = [isinstance(arg, Tensor) for arg in args]
        ctx.others = [None if isinstance(arg, Tensor) else arg for arg in args]
        ctx.save_for_backward(*(arg for arg in args if isinstance(arg, Tensor)))

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        args = [next(saved) if tensor else other for tensor, other in zip(ctx.is_tensor, ctx.others, strict=True)]
        at = [position for position in inputs if args[position] is not None]

        def gradients(*chosen: Tensor) -> Any:
            given = args.copy()
            for position, tensor in zip(at, chosen, strict=True):
                given[position] = tensor
            return reference(*given[:backend])

        pull: Callable[..., Any] = torch.func.vjp(gradients, *(args[position] for position in at))[1]
        results: list[Tensor | None] = [None] * len(args)
        for position, grad in zip(at, pull(grads), strict=True):
            results[position] = grad
        return tuple(results)

    register_autograd(name, backward, setup_context)


def _overload(name: str) -> Any:
    return functools.reduce(getattr, name.split("::"), torch.ops).default


def _has_tangent(value: object) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None
