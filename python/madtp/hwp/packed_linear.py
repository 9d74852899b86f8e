# SPDX-License-Identifier: Apache-2.0
"""What the layers that `pack` puts in place have in common, whatever form their weight has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from madtp.hooks import is_watched
from madtp.hwp.dense_linear import kernel_of, run_on_onednn
from madtp.hwp.folding import Folded
from madtp_kernels import explain
from madtp_kernels.checks import require
from madtp_kernels.dispatch import Choice
from madtp_kernels.layouts import KeepsLayouts
from madtp_kernels.reference.sparse24 import ACTIVATIONS as REFERENCES

# scheme -> what tables say
FORMS = {"sparse24": "2:4", "int8": "int8", "int8_24": "int8 2:4", "fp8": "fp8", "fp8_24": "fp8 2:4"}


class PackedLinear(nn.Module):
    """A Linear in one kernel with what follows it: residual + scale * activation(x W^T + bias).

    The parts of the weight are buffers: saved, loaded and moved as any other. Gradients pass through to x, residual,
    bias and scale; the weight has none.

    Args:
        bias: (N,), or None.
        activation: of the op.
        scale: (N,), or None: LayerScale.
    """

    _op_name: ClassVar[str]
    _op: ClassVar[Callable[..., Tensor]]
    scheme: str  # "sparse24", or that of the `QuantizedWeight`
    packed_weight: Any  # what the op takes; of the buffers as they are now
    _weight: KeepsLayouts  # that of the last call
    dense_dtype: torch.dtype  # of the weight that this one stands for

    weight: Tensor
    bias: nn.Parameter | None
    scale: nn.Parameter | None

    def __init__(self, bias: nn.Parameter | None, activation: str | None, scale: nn.Parameter | None):
        super().__init__()
        self.register_parameter("bias", bias)
        self.register_parameter("scale", scale)
        self.activation = activation
        self.folded: list[Folded] = []  # what stands where something was that is a part of this now
        self.weight_attributes: tuple[bool, dict[str, Any]] = True, {}  # requires_grad and the like of the dense weight
        self._last = (1, False)  # rows of the last call, and whether it had a residual

    @property
    def form(self) -> str:
        """The scheme, as tables say it."""
        return FORMS[self.scheme]

    @property
    def sparse(self) -> bool:
        """Whether the weight is 2:4."""
        return self.scheme.endswith("24")

    @property
    def in_features(self) -> int:
        columns: int = self.packed_weight.shape[1]
        return columns

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def choice(self) -> Choice:
        """Which backend runs a call like the last one (before the first: of one row), and why."""
        (tokens, with_residual), weight = self._last, self.packed_weight
        x = self.weight.new_empty(tokens, self.in_features, dtype=self.dense_dtype)
        residual = x.new_empty(tokens, self.out_features) if with_residual else None
        options = {"activation": self.activation, "residual": residual, "scale": self.scale}
        return explain(self._op_name, x, weight, self.bias, **options)

    @property
    def executes_sparse(self) -> bool:
        """Whether a call like the last one runs on a sparse kernel, and not on the dense weight."""
        return self.sparse and self.choice.backend not in ("reference", "dense", "onednn")

    @property
    def fused(self) -> tuple[str, ...]:
        """What a call like the last one does in the same kernel, beside the product and the bias."""
        scale = "scale" if self.scale is not None else None
        residual = "residual" if self._last[1] else None
        return tuple(part for part in (self.activation, scale, residual) if part is not None)

    def forward(
        self, input: Tensor, residual: Tensor | None = None, num_rows: Tensor | None = None, *, epilogue: bool = True
    ) -> Tensor:
        """input (..., C), residual (..., N) -> (..., N); zeros from row `num_rows` on, which cost nothing on a GPU.

        epilogue: without, it is the product and the bias alone; `finish` does the rest.
        """
        leading = input.shape[:-1]
        if torch.compiler.is_compiling():  # which guards what is read
            if not torch.compiler.is_exporting():  # whose sizes may be symbols
                self._last = (leading.numel(), residual is not None)
        elif (last := (leading.numel(), residual is not None)) != self._last:  # a module sets slowly
            self._last = last
        if residual is not None:
            if residual.dtype != input.dtype:  # under autocast: the sum has the wider type
                y = PackedLinear.forward(self, input, None, num_rows, epilogue=epilogue)
                if residual.shape != y.shape:
                    require(False, "residual", f"of shape {tuple(y.shape)} like the output", residual)
                return y + residual
            if len(leading) != 1:
                if residual.shape[:-1] != leading:
                    require(False, "residual", f"of shape {(*leading, self.out_features)} like the output", residual)
                residual = residual.flatten(0, -2) if leading else residual[None]
        y = self._op(
            input if len(leading) == 1 else input.flatten(0, -2) if leading else input[None],
            self.packed_weight,
            self.bias,
            activation=self.activation if epilogue else None,
            residual=residual,
            scale=self.scale if epilogue else None,
            num_rows=num_rows,
        )
        return y if len(leading) == 1 else y.view(*leading, y.shape[1])

    def check_weight(self, prefix: str = "") -> None:
        """Raises ValueError where the parts of the weight hold what no kernel may read; they are on the host then.

        prefix: of the names of the parts, in the message.
        """
        raise NotImplementedError

    def _check_state(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Raises ValueError where a state has parts of the weight that no kernel may read."""
        raise NotImplementedError

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        try:
            self._check_state(state_dict, prefix)
        except ValueError as error:
            error_msgs.append(str(error))
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._weight.forget()  # or a compiled function would not see what was loaded

    def finish(self, y: Tensor) -> Tensor:
        """The activation and the scale, of what `forward` returns without its epilogue."""
        y = y if self.activation is None else REFERENCES[self.activation](y)
        return y if self.scale is None else y * self.scale

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, activation={self.activation}"


def linear(module: nn.Module, x: Tensor, num_rows: Tensor | None = None) -> Tensor:
    """module(x), of rows (T, C); what `PackedLinear` makes of `num_rows` where the module is packed.

    A Linear that nothing was put on runs on oneDNN where that is faster and has no gradient.

    Hooks on the module see the product and the bias alone, as they did when it was plain: what it has taken over comes
    after it then.
    """
    if not isinstance(module, PackedLinear):
        y = run_on_onednn(module, x)
        return module(x) if y is None else y
    if is_watched(module):
        took_over = module.activation is not None or module.scale is not None
        return module.finish(module(x, epilogue=False)) if took_over else module(x)
    return module(x, num_rows=num_rows)


def residual_linear(module: nn.Module, x: Tensor, residual: Tensor, num_rows: Tensor | None = None) -> Tensor:
    """residual + module(x), as one kernel where the module is packed or runs on oneDNN; the rest as in `linear`.

    Hooks on the module see a call of it alone, as they did when it was plain: the sum is apart then.
    """
    if isinstance(module, PackedLinear):
        return linear(module, x, num_rows) + residual if is_watched(module) else module(x, residual, num_rows)
    y = run_on_onednn(module, x, residual=residual)
    return module(x) + residual if y is None else y


def activated_linear(module: nn.Module, activation: nn.Module, x: Tensor, num_rows: Tensor | None = None) -> Tensor:
    """activation(module(x)), as one kernel where the module runs on oneDNN; the rest as in `linear`."""
    kernel = kernel_of(activation)
    y = None if kernel is None else run_on_onednn(module, x, kernel)
    return linear(activation, linear(module, x, num_rows), num_rows) if y is None else y
