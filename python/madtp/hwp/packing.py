"""Linear layers that run 2:4: `pack` puts them in place of masked ones, `unpack` takes them out again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import activations

from madtp.hwp.modules import matches
from madtp_kernels import Sparse24Weight, explain, sparse24_compress, sparse24_linear
from madtp_kernels.nm_patterns import is_pattern

ACTIVATIONS = {
    activations.GELUActivation: "gelu",
    activations.NewGELUActivation: "gelu_tanh",
    activations.GELUTanh: "gelu_tanh",
    activations.QuickGELUActivation: "quick_gelu",
    nn.ReLU: "relu",
}


class Sparse24Linear(nn.Module):
    """A Linear with a 2:4 weight, and what follows it, in one kernel: residual + activation(x W^T + bias).

    `values` (N, C/2) and `indices` (N, C/8) are buffers, in the canonical form of `Sparse24Weight`: saved, loaded and
    moved as any other. Gradients pass through to x, residual and bias; the weight has none.

    Args:
        weight: (N, C).
        bias: (N,), or None.
        activation: of `sparse24_linear`.
    """

    def __init__(self, weight: Sparse24Weight, bias: nn.Parameter | None = None, activation: str | None = None):
        super().__init__()
        self.register_buffer("values", weight.values)
        self.register_buffer("indices", weight.indices)
        self.register_parameter("bias", bias)
        self.activation = activation
        self._weight = weight
        self._last = (1, False)  # rows of the last call, and whether it had a residual

    @classmethod
    def empty(cls, linear: nn.Linear, activation: str | None = None) -> Sparse24Linear:
        """One of the shape of `linear`, to load a state into; all weights are zero."""
        return cls(sparse24_compress(torch.zeros_like(linear.weight)), linear.bias, activation)

    @property
    def sparse_weight(self) -> Sparse24Weight:
        weight, buffers = self._weight, self._buffers
        if weight.values is not buffers["values"] or weight.indices is not buffers["indices"]:  # moved, or cast
            weight = self._weight = Sparse24Weight(self.values, self.indices)
        return weight

    @property
    def weight(self) -> Tensor:
        """(N, C): the dense weight, made anew at every read."""
        return self.sparse_weight.to_dense()

    @property
    def in_features(self) -> int:
        return 2 * self.values.shape[1]

    @property
    def out_features(self) -> int:
        return self.values.shape[0]

    @property
    def executes_sparse(self) -> bool:
        """Whether a call like the last one runs on a sparse kernel, and not on the dense weight."""
        (rows, with_residual), weight = self._last, self.sparse_weight
        x = self.values.new_empty(rows, self.in_features)
        residual = self.values.new_empty(rows, self.out_features) if with_residual else None
        choice = explain("sparse24_linear", x, weight, self.bias, activation=self.activation, residual=residual)
        return choice.backend not in ("reference", "dense")

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x (..., C), residual (..., N) -> (..., N)"""
        leading = x.shape[:-1]
        last = (leading.numel(), residual is not None)
        if torch.compiler.is_compiling() or last != self._last:  # a module sets slowly; a compiler guards what is read
            self._last = last
        if len(leading) != 1:
            x, residual = x.flatten(0, -2), None if residual is None else residual.flatten(0, -2)
        y = sparse24_linear(x, self.sparse_weight, self.bias, activation=self.activation, residual=residual)
        return y if len(leading) == 1 else y.view(*leading, y.shape[1])

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, activation={self.activation}"


def residual_linear(module: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    """residual + module(x), as one kernel where the module is packed."""
    return module(x, residual) if isinstance(module, Sparse24Linear) else module(x) + residual


def pack(
    model: nn.Module, names: Iterable[str] | None = None, *, activations: Mapping[str, str] | None = None
) -> dict[str, str | None]:
    """Puts a `Sparse24Linear` in the place of every Linear whose weight is 2:4 and fits the kernels.

    Weights are final from here on; `unpack` brings them back as plain Linears.

    Args:
        names: of the Linears to pack; None takes all that can be. Those that cannot stay as they are.
        activations: pattern of module names -> the attribute of their parent that is applied to what they return; it
            is folded into the kernel where it is known. None takes what the model's family says.

    Returns:
        name -> the activation folded into it, or None, of every layer packed now.
    """
    if activations is None:
        activations = getattr(getattr(model, "madtp_handle", None), "activations", {})
    chosen = None if names is None else set(names)
    packed = {}
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and (chosen is None or name in chosen) and _fits(module):
            packed[name] = _activation(model, name, activations)
            layer = Sparse24Linear(sparse24_compress(module.weight), module.bias, packed[name])
            replace_linear(model, name, layer, activations)
    return packed


def replace_linear(model: nn.Module, name: str, module: nn.Module, activations: Mapping[str, str]) -> None:
    """Puts a packed module at `name`, and an Identity in the place of the activation it has taken over."""
    parent = model.get_submodule(name.rpartition(".")[0])
    if module.activation is not None:
        attribute = _attribute(name, activations)
        module.folded = (attribute, getattr(parent, attribute))  # a tuple: no submodule, `unpack` puts it back
        setattr(parent, attribute, nn.Identity())
    setattr(parent, name.rpartition(".")[2], module)


def unpack(model: nn.Module) -> None:
    """Puts plain Linears, and the activations folded into them, back where `pack` took them from."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, Sparse24Linear):
            continue
        with torch.device("meta"):
            plain = nn.Linear(module.in_features, module.out_features, bias=False)
        plain.weight, plain.bias = nn.Parameter(module.weight), module.bias
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], plain.train(module.training))
        if module.activation is not None:
            setattr(parent, *module.folded)


def _fits(module: nn.Linear) -> bool:
    rows, columns = module.weight.shape
    return rows % 8 == 0 and columns % 16 == 0 and is_pattern(module.weight, "2:4")


def _attribute(name: str, activations: Mapping[str, str]) -> str | None:
    return next((attribute for pattern, attribute in activations.items() if matches(name, (pattern,))), None)


def _activation(model: nn.Module, name: str, activations: Mapping[str, str]) -> str | None:
    attribute = _attribute(name, activations)
    if attribute is None:
        return None
    return ACTIVATIONS.get(type(getattr(model.get_submodule(name.rpartition(".")[0]), attribute)))
