# SPDX-License-Identifier: Apache-2.0
"""Linear layers that run 2:4: `pack` puts them in place of masked ones, `unpack` takes them out again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import activations

from madtp.handles import find_handle
from madtp.migration import PACKED_NAMES
from madtp_kernels import Sparse24Weight, explain, sparse24_compress, sparse24_linear
from madtp_kernels.dispatch import Choice
from madtp_kernels.nm_patterns import is_pattern
from madtp_kernels.renamed import renamed
from madtp_kernels.sparse24.weight import supports_shape

ACTIVATIONS = {
    activations.GELUActivation: "gelu",
    activations.NewGELUActivation: "gelu_tanh",
    activations.GELUTanh: "gelu_tanh",
    activations.QuickGELUActivation: "quick_gelu",
    nn.ReLU: "relu",
}


class Sparse24Linear(nn.Module):
    """A Linear with a 2:4 weight, and what follows it, in one kernel: residual + scale * activation(x W^T + bias).

    `weight` (N, C/2), the kept values, and `indices` (N, C/8) are buffers, in the canonical form of `Sparse24Weight`:
    saved, loaded and moved as any other; N is out_features, C in_features. The values have the name of a Linear's
    weight, so that whoever takes a file for one of plain Linears stops at their shape. Gradients pass through to x,
    residual, bias and scale; the weight has none.

    Args:
        weight: (N, C).
        bias: (N,), or None.
        activation: of `sparse24_linear`.
        scale: (N,), or None: LayerScale.
    """

    weight: Tensor
    indices: Tensor
    bias: nn.Parameter | None
    scale: nn.Parameter | None

    def __init__(
        self,
        weight: Sparse24Weight,
        bias: nn.Parameter | None = None,
        activation: str | None = None,
        scale: nn.Parameter | None = None,
    ):
        super().__init__()
        self.register_buffer("weight", weight.values)
        self.register_buffer("indices", weight.indices)
        self.register_parameter("bias", bias)
        self.register_parameter("scale", scale)
        self.activation = activation
        self.folded: list[tuple[str, nn.Module]] = []  # where in the model, and what, is a part of this now
        self._weight = weight
        self._last = (1, False)  # rows of the last call, and whether it had a residual

    @property
    def sparse_weight(self) -> Sparse24Weight:
        weight, buffers = self._weight, self._buffers
        if weight.values is not buffers["weight"] or weight.indices is not buffers["indices"]:  # moved, or cast
            weight = self._weight = Sparse24Weight(self.weight, self.indices)
        return weight

    @property
    def in_features(self) -> int:
        return 2 * self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def choice(self) -> Choice:
        """Which backend runs a call like the last one (before the first: of one row), and why."""
        (tokens, with_residual), weight = self._last, self.sparse_weight
        x = self.weight.new_empty(tokens, self.in_features)
        residual = self.weight.new_empty(tokens, self.out_features) if with_residual else None
        options = {"activation": self.activation, "residual": residual, "scale": self.scale}
        return explain("sparse24_linear", x, weight, self.bias, **options)

    @property
    def executes_sparse(self) -> bool:
        """Whether a call like the last one runs on a sparse kernel, and not on the dense weight."""
        return self.choice.backend not in ("reference", "dense")

    @property
    def fused(self) -> tuple[str, ...]:
        """What a call like the last one does in the same kernel, beside the product and the bias."""
        scale = "scale" if self.scale is not None else None
        residual = "residual" if self._last[1] else None
        return tuple(part for part in (self.activation, scale, residual) if part is not None)

    def forward(self, x: Tensor, residual: Tensor | None = None, num_rows: Tensor | None = None) -> Tensor:
        """x (..., C), residual (..., N) -> (..., N); zeros from row `num_rows` on, which cost nothing on a GPU."""
        leading = x.shape[:-1]
        last = (leading.numel(), residual is not None)
        if torch.compiler.is_compiling() or last != self._last:  # a module sets slowly; a compiler guards what is read
            self._last = last
        if residual is not None and residual.dtype != x.dtype:  # under autocast: the sum has the wider type
            return self(x, num_rows=num_rows) + residual
        if len(leading) != 1:
            x, residual = x.flatten(0, -2), None if residual is None else residual.flatten(0, -2)
        y = sparse24_linear(
            x,
            self.sparse_weight,
            self.bias,
            activation=self.activation,
            residual=residual,
            scale=self.scale,
            num_rows=num_rows,
        )
        return y if len(leading) == 1 else y.view(*leading, y.shape[1])

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        for old, new in PACKED_NAMES.items():
            if prefix + old in state_dict and prefix + new not in state_dict:
                state_dict[prefix + new] = state_dict.pop(prefix + old)
        values, indices = (state_dict.get(prefix + name) for name in ("weight", "indices"))
        if isinstance(indices, Tensor) and not indices.is_meta and getattr(values, "shape", None) == self.weight.shape:
            try:
                Sparse24Weight(values, indices).check_indices(f"{prefix}indices")
            except ValueError as error:
                error_msgs.append(str(error))
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, activation={self.activation}"


def linear(module: nn.Module, x: Tensor, num_rows: Tensor | None = None) -> Tensor:
    """module(x), of rows (T, C); what `Sparse24Linear` makes of `num_rows` where the module is packed."""
    return module(x) if num_rows is None or not isinstance(module, Sparse24Linear) else module(x, num_rows=num_rows)


def residual_linear(module: nn.Module, x: Tensor, residual: Tensor, num_rows: Tensor | None = None) -> Tensor:
    """residual + module(x), as one kernel where the module is packed; `num_rows` as in `linear`."""
    return module(x, residual, num_rows) if isinstance(module, Sparse24Linear) else module(x) + residual


class Epilogue(NamedTuple):
    """What a Linear can take over, by module name: the activation on what it returns, and the LayerScale."""

    activation: str | None = None
    scale: str | None = None


@renamed(followers="epilogues")
def pack(
    model: nn.Module, names: Iterable[str] | None = None, *, epilogues: Mapping[str, Epilogue] | None = None
) -> dict[str, Epilogue]:
    """Puts a `Sparse24Linear` in the place of every Linear whose weight is 2:4 and fits the kernels.

    Weights are final from here on; `unpack` brings them back as plain Linears. Whatever pattern made them, weights are
    2:4 when there are at most 2 non-zeros in every aligned 4 columns (`Pattern.sparse24`).

    Args:
        names: of the Linears to pack; None takes all that can be. Those that cannot stay as they are: `explain_linears`
            says why.
        epilogues: name of a Linear -> what follows it, which is folded into the kernel where it is known. None takes
            what is known of a patched model.

    Returns:
        name -> what was folded into it, of every layer packed now.
    """
    if epilogues is None:
        handle = find_handle(model)
        epilogues = {} if handle is None else handle.epilogues
    chosen = None if names is None else set(names)
    packed = {}
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or (chosen is not None and name not in chosen):
            continue
        if (weight := _compressed(module)) is not None:
            packed[name] = _known(model, epilogues.get(name, Epilogue()))
            replace_linear(model, name, weight, packed[name])
    return packed


def explain_linears(model: nn.Module) -> dict[str, str]:
    """For every Linear of the model, by name: whether it is packed 2:4, could be, or why it cannot."""
    report = {}
    for name, module in model.named_modules():
        if isinstance(module, Sparse24Linear):
            report[name] = "2:4, runs sparse" if module.executes_sparse else "2:4, runs dense: faster, or all there is"
        elif isinstance(module, nn.Linear):
            report[name] = _misfit(module.weight) or "dense, but 2:4: pack makes it run sparse"
    return report


def replace_linear(model: nn.Module, name: str, weight: Sparse24Weight | None, epilogue: Epilogue) -> Sparse24Linear:
    """Puts a packed layer at `name`, and an Identity in the place of what it takes over; returns it.

    weight: None is left empty, to load a state into.
    """
    plain = cast(nn.Linear, model.get_submodule(name))
    weight = _empty(plain.weight.detach()) if weight is None else weight
    activation = None if epilogue.activation is None else ACTIVATIONS[type(model.get_submodule(epilogue.activation))]
    scale = None if epilogue.scale is None else next(model.get_submodule(epilogue.scale).parameters())
    layer = Sparse24Linear(weight, plain.bias, activation, scale).train(plain.training)
    for path in filter(None, epilogue):
        layer.folded.append((path, model.get_submodule(path)))
        _put(model, path, nn.Identity())
    _put(model, name, layer)
    return layer


def unpack(model: nn.Module) -> None:
    """Puts plain Linears, and what was folded into them, back where `pack` took them from."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, Sparse24Linear):
            continue
        with torch.device("meta"):
            plain = nn.Linear(module.in_features, module.out_features, bias=False)
        plain.weight = nn.Parameter(module.sparse_weight.to_dense())
        plain.register_parameter("bias", module.bias)
        _put(model, name, plain.train(module.training))
        for path, folded in module.folded:
            if module.scale is not None and list(folded.parameters()):
                (parameter,) = [n for n, _ in folded.named_parameters()]
                setattr(folded, parameter, module.scale)  # which may have been moved, or trained, since
            _put(model, path, folded)


def epilogues_of(model: nn.Module) -> dict[str, Epilogue]:
    """For every packed layer, by name: what it has taken over."""
    return {name: _taken_over(layer) for name, layer in model.named_modules() if isinstance(layer, Sparse24Linear)}


def _taken_over(layer: Sparse24Linear) -> Epilogue:
    paths = [path for path, _ in layer.folded]
    activation = paths.pop(0) if layer.activation is not None else None
    return Epilogue(activation, paths.pop() if layer.scale is not None else None)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def _misfit(weight: Tensor) -> str | None:
    out_features, in_features = weight.shape
    if not supports_shape(out_features, in_features):
        return f"dense: {out_features} x {in_features} must be multiples of 8 and 16"
    return None if is_pattern(weight, "2:4") else "dense: has more than 2 non-zeros in an aligned 4"


def _compressed(module: nn.Linear) -> Sparse24Weight | None:
    out_features, in_features = module.weight.shape
    if not supports_shape(out_features, in_features):
        return None
    try:
        return sparse24_compress(module.weight)
    except ValueError:  # not 2:4
        return None


def _empty(weight: Tensor) -> Sparse24Weight:
    rows, columns = weight.shape
    return Sparse24Weight(weight.new_empty(rows, columns // 2), weight.new_empty(rows, columns // 8, dtype=torch.uint8))


def _known(model: nn.Module, epilogue: Epilogue) -> Epilogue:
    """The part of it that the kernel can take over."""
    activation, scale = epilogue
    if activation is not None and type(model.get_submodule(activation)) not in ACTIVATIONS:
        activation, scale = None, None  # a scale comes after the activation
    if scale is not None and isinstance(model.get_submodule(scale), nn.Identity):
        scale = None
    return Epilogue(activation, scale)
