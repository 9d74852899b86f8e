# SPDX-License-Identifier: Apache-2.0
"""Linear layers that run 2:4: `pack` puts them in place of masked ones, `unpack` takes them out again."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from madtp.hooks import is_watched
from madtp.hwp.folding import ACTIVATIONS, Epilogue, Folded, check_epilogues, find_foldings, known_epilogues, scale_of
from madtp.hwp.modules import ModuleTree, Place, require_linears, shared_reason, write_unsupported_reason
from madtp.hwp.takeover import (
    own_names,
    replaced_forward_reason,
    swap,
    take_over,
)
from madtp.migration import PACKED_NAMES
from madtp_kernels import Sparse24Weight, explain, sparse24_compress, sparse24_linear
from madtp_kernels.checks import require
from madtp_kernels.dispatch import Choice, is_auto
from madtp_kernels.nm_patterns import is_pattern
from madtp_kernels.ops.dense import onednn_linear
from madtp_kernels.reference.sparse24 import ACTIVATIONS as REFERENCES
from madtp_kernels.renamed import renamed
from madtp_kernels.sparse24.weight import DTYPES, supports_shape


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
        self.folded: list[Folded] = []  # what stands where something was that is a part of this now
        self.weight_attributes: tuple[bool, dict[str, Any]] = True, {}  # requires_grad and the like of the dense weight
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
        return self.choice.backend not in ("reference", "dense", "onednn")

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
                y = Sparse24Linear.forward(self, input, None, num_rows, epilogue=epilogue)
                if residual.shape != y.shape:
                    require(False, "residual", f"of shape {tuple(y.shape)} like the output", residual)
                return y + residual
            if len(leading) != 1:
                if residual.shape[:-1] != leading:
                    require(False, "residual", f"of shape {(*leading, self.out_features)} like the output", residual)
                residual = residual.flatten(0, -2) if leading else residual[None]
        y = sparse24_linear(
            input if len(leading) == 1 else input.flatten(0, -2) if leading else input[None],
            self.sparse_weight,
            self.bias,
            activation=self.activation if epilogue else None,
            residual=residual,
            scale=self.scale if epilogue else None,
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

    def finish(self, y: Tensor) -> Tensor:
        """The activation and the scale, of what `forward` returns without its epilogue."""
        y = y if self.activation is None else REFERENCES[self.activation](y)
        return y if self.scale is None else y * self.scale

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, activation={self.activation}"


def linear(module: nn.Module, x: Tensor, num_rows: Tensor | None = None) -> Tensor:
    """module(x), of rows (T, C); what `Sparse24Linear` makes of `num_rows` where the module is packed.

    A Linear that nothing was put on runs on oneDNN where that is faster and has no gradient.

    Hooks on the module see the product and the bias alone, as they did when it was plain: what it has taken over comes
    after it then.
    """
    if not isinstance(module, Sparse24Linear):
        y = _on_onednn(module, x)
        return module(x) if y is None else y
    if is_watched(module):
        took_over = module.activation is not None or module.scale is not None
        return module.finish(module(x, epilogue=False)) if took_over else module(x)
    return module(x, num_rows=num_rows)


def residual_linear(module: nn.Module, x: Tensor, residual: Tensor, num_rows: Tensor | None = None) -> Tensor:
    """residual + module(x), as one kernel where the module is packed or runs on oneDNN; the rest as in `linear`.

    Hooks on the module see a call of it alone, as they did when it was plain: the sum is apart then.
    """
    if isinstance(module, Sparse24Linear):
        return linear(module, x, num_rows) + residual if is_watched(module) else module(x, residual, num_rows)
    y = _on_onednn(module, x, residual=residual)
    return module(x) + residual if y is None else y


def activated_linear(module: nn.Module, activation: nn.Module, x: Tensor, num_rows: Tensor | None = None) -> Tensor:
    """activation(module(x)), as one kernel where the module runs on oneDNN; the rest as in `linear`."""
    kernel = kernel_of(activation)
    y = None if kernel is None else _on_onednn(module, x, kernel)
    return linear(activation, linear(module, x, num_rows), num_rows) if y is None else y


def kernel_of(activation: nn.Module) -> str | None:
    """What kernels call an activation that only its caller sees; None where they have none for it."""
    name = ACTIVATIONS.get(type(activation))
    return None if name is None or is_watched(activation) else name


def _on_onednn(
    module: nn.Module, x: Tensor, activation: str | None = None, residual: Tensor | None = None
) -> Tensor | None:
    """activation(module(x)) + residual, where oneDNN is the fastest and nobody else sees the call; None elsewhere."""
    if torch.compiler.is_compiling() or type(module) is not nn.Linear or is_watched(module):
        return None
    return onednn_linear(x, module.weight, module.bias, activation, residual)


def dense_choice(module: nn.Linear, rows: int, activation: str | None, with_residual: bool) -> Choice | None:
    """What an inference runs a Linear on that is not packed, and why; None where it is called as a module."""
    called = type(module) is not nn.Linear or is_watched(module)
    if called or not module.weight.is_cpu or not is_auto(None):
        return None
    x = module.weight.new_empty(1).expand(rows, module.in_features)
    residual = module.weight.new_empty(1).expand(rows, module.out_features) if with_residual else None
    with torch.no_grad():
        return explain("dense_linear", x, module.weight, module.bias, activation=activation, residual=residual)


@renamed(followers="epilogues")
def pack(
    model: nn.Module, names: Iterable[str] | None = None, *, epilogues: Mapping[str, Epilogue] | None = None
) -> dict[str, Epilogue]:
    """Puts a `Sparse24Linear` in the place of every Linear whose weight is 2:4 and fits the kernels.

    Weights are final from here on; `unpack` brings them back as plain Linears. Whatever pattern made them, weights are
    2:4 when there are at most 2 non-zeros in every aligned 4 columns (`Pattern.sparse24`).

    Hooks with their handles, attributes, flags, more parameters and buffers, and the hooks of `accelerate` move to the
    packed layer, and back. A Linear that has several names is packed at all of them, as one layer. Other models that
    hold the same Linear keep it as it is; but where they hold the module around it, it is packed for them as well.

    Args:
        names: of the Linears to pack; None takes all that can be. Those that cannot stay as they are: `explain_linears`
            says why.
        epilogues: name of a Linear -> what follows it, which is folded into the kernel where it is known, and where
            nothing else sees it: no forward or backward hook on the Linear, none at all on what follows, and no Linear
            in front of it that is not packed. None takes what is known of a patched model.

    Returns:
        name -> what was folded into it, of every layer packed now.

    Raises:
        ValueError: names has one that is no Linear, or epilogues one that is no module. After this and any other error
            the model is as it was.
    """
    tree = ModuleTree(model)
    if epilogues is None:
        epilogues = known_epilogues(model, tree)
    else:
        check_epilogues(epilogues, tree)
    named = tree.linears() if names is None else require_linears("names", names, tree, Sparse24Linear)
    weights = {
        module: sparse24_compress(module.weight)
        for module in named.values()
        if isinstance(module, nn.Linear) and _dense_reason(module, tree) is None
    }
    stand_ins: dict[Place, Folded] = {}
    modules: list[tuple[Place, nn.Module]] = []
    for plain, (activation, scale, paths) in find_foldings(weights, epilogues, tree).items():
        layer = _packed(plain, weights[plain], activation, scale)
        for path in paths:
            place = tree.place(path)
            folded = stand_ins.setdefault(place, Folded(tree[path]))
            layer.folded.append(folded)
            modules.append((place, folded))
        modules += [(place, layer) for place in tree.places(plain)]
    swap(modules)
    new = {id(module) for _, module in modules}
    return {name: epilogue for name, epilogue in epilogues_of(model).items() if id(model.get_submodule(name)) in new}


def explain_linears(model: nn.Module) -> dict[str, str]:
    """For every Linear of the model, by name: whether it is packed 2:4, could be, or why it cannot."""
    tree, verdicts = ModuleTree(model), dict[int, str]()
    for module in tree.modules.values():
        if id(module) in verdicts:
            continue
        if isinstance(module, Sparse24Linear):
            runs = "2:4, runs sparse" if module.executes_sparse else "2:4, runs dense: faster, or all there is"
            verdicts[id(module)] = runs
        elif isinstance(module, nn.Linear):
            verdicts[id(module)] = _dense_reason(module, tree) or "dense, but 2:4: pack makes it run sparse"
    return {name: verdicts[id(module)] for name, module in tree.modules.items() if id(module) in verdicts}


def replace_linear(model: nn.Module, name: str, weight: Sparse24Weight | None, epilogue: Epilogue) -> Sparse24Linear:
    """Puts a packed layer at `name` and all other names of that Linear, with what it is to take over; returns it.

    Where that is done already, under another of its names, what is at the epilogue of this name goes as well.

    weight: None is left empty, to load a state into.

    Raises:
        ValueError: the epilogue is nothing that a kernel knows. KeyError: a name is none of the model.
    """
    tree = ModuleTree(model)
    layer, modules = tree[name], list[tuple[Place, nn.Module]]()
    if not isinstance(layer, Sparse24Linear):
        plain: Any = layer
        activation, scale = (None if path is None else tree[path] for path in epilogue)
        kernel = None if activation is None else ACTIVATIONS.get(type(activation))
        require(activation is None or kernel is not None, f"activation of {name}", "one that folds", repr(activation))
        vector = None if scale is None else scale_of(scale, plain)
        require(scale is None or vector is not None, f"scale of {name}", "a LayerScale of its outputs", repr(scale))
        weight = _empty(plain.weight.detach()) if weight is None else weight
        layer = _packed(plain, weight, kernel, vector)
        modules += [(place, layer) for place in tree.places(plain)]
    folded = [(tree.place(path), Folded(tree[path])) for path in epilogue if path and type(tree[path]) is not Folded]
    swap([*modules, *folded])
    layer.folded += [stand_in for _, stand_in in folded]
    return layer


def unpack(model: nn.Module) -> None:
    """Puts plain Linears, and what was folded into them, back where `pack` took them from.

    Raises:
        ValueError: something that was folded is not in this model, but in one around it. After this and any other error
            the model is as it was.
    """
    tree = ModuleTree(model)
    layers = {id(m): (name, m) for name, m in reversed(tree.modules.items()) if isinstance(m, Sparse24Linear)}
    modules: list[tuple[Place, nn.Module]] = []
    for name, layer in layers.values():
        require(layer is not model, "model", "what holds the packed layers", "one of them")
        for folded in layer.folded:
            rule = f"the one that was packed, with the {folded.extra_repr()} that {name} has taken over"
            require(bool(tree.names(folded)), "model", rule, "a part of it")
            modules += [(place, _unfolded(folded, layer)) for place in tree.places(folded)]
        plain = _plain(layer)
        modules += [(place, plain) for place in tree.places(layer)]
    swap(modules)


def epilogues_of(model: nn.Module) -> dict[str, Epilogue]:
    """For every packed layer, by name: what it has taken over."""
    tree = ModuleTree(model)
    found = {}
    for name, layer in tree.modules.items():
        if isinstance(layer, Sparse24Linear):
            scales = [folded for folded in layer.folded if any(True for _ in folded.kept[0].parameters())]
            others = [folded for folded in layer.folded if folded not in scales]
            found[name] = Epilogue(_nearest(name, others, tree), _nearest(name, scales, tree))
    return found


def _nearest(name: str, modules: Iterable[nn.Module], tree: ModuleTree) -> str | None:
    """Of the names of the modules, that with most in common with `name`: a layer of several names has several."""
    names = [path for module in modules for path in tree.names(module)]
    return max(names, key=lambda path: len(os.path.commonprefix((path, name))), default=None)


_OF_LINEAR = own_names(nn.Linear(0, 0, device="meta"))  # which draws no random numbers


def _packed(
    plain: nn.Linear, weight: Sparse24Weight, activation: str | None, scale: nn.Parameter | None
) -> Sparse24Linear:
    bias: Any = plain.bias
    layer = Sparse24Linear(weight, bias, activation, scale)
    layer.weight_attributes = plain.weight.requires_grad, dict(vars(plain.weight))
    take_over(plain, layer, _OF_LINEAR)
    return layer


def _plain(layer: Sparse24Linear) -> nn.Linear:
    with torch.device("meta"):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
    requires_grad, attributes = layer.weight_attributes
    with torch.inference_mode(False):  # whose tensors could not be trained later
        plain.weight = nn.Parameter(layer.sparse_weight.to_dense(), requires_grad)
    vars(plain.weight).update(attributes)
    plain.register_parameter("bias", layer.bias)
    take_over(layer, plain, own_names(Sparse24Linear(layer.sparse_weight)))
    return plain


def _unfolded(folded: Folded, layer: Sparse24Linear) -> nn.Module:
    (kept,) = folded.kept
    for name, _ in list(kept.named_parameters()):
        setattr(kept, name, layer.scale)  # which may have been moved, or trained, since
    take_over(folded, kept, own_names(folded))
    return kept


def _dense_reason(module: nn.Linear, tree: ModuleTree) -> str | None:
    """Why a Linear stays dense, or None."""
    reason = _unsupported_reason(module, tree) or _misfit(module.weight)
    return None if reason is None else f"dense: {reason}"


def _unsupported_reason(module: nn.Linear, tree: ModuleTree) -> str | None:
    """Why another module could not take the place of this one and be all that it was."""
    for parameter in ("weight", "bias"):
        if reason := write_unsupported_reason(module, parameter):
            return reason
    if type(module) is not nn.Linear:
        return f"a {type(module).__name__} is more than a Linear"
    if any(not attribute for _, attribute in tree.places(module)):
        return "it is the whole model, nothing holds it"
    if any(attribute == "_orig_mod" for _, attribute in tree.places(module)):
        return "it is compiled"
    weight: Any = module.weight
    if weight._backward_hooks or weight._post_accumulate_grad_hooks:
        return "weight has hooks on its gradient"
    taken = sorted((own_names(module) - _OF_LINEAR) & _RESERVED)
    if taken:
        return f"{taken[0]} is an attribute of it that a packed layer has too"
    return replaced_forward_reason(module) or shared_reason(module, "weight", tree)


def _misfit(weight: Tensor) -> str | None:
    out_features, in_features = weight.shape
    if not supports_shape(out_features, in_features):
        return f"{out_features} x {in_features} must be multiples of 8 and 16"
    if weight.is_meta or weight.dtype not in DTYPES:
        return f"weight is {'on the meta device' if weight.is_meta else weight.dtype}"
    if not is_pattern(weight, "2:4"):
        return "has more than 2 non-zeros in an aligned 4"
    return "weight has NaN" if weight.isnan().any() else None


def _empty(weight: Tensor) -> Sparse24Weight:
    rows, columns = weight.shape
    return Sparse24Weight(weight.new_empty(rows, columns // 2), weight.new_empty(rows, columns // 8, dtype=torch.uint8))


_RESERVED = frozenset(dir(Sparse24Linear)) - frozenset(dir(nn.Linear)) | {
    "activation",
    "folded",
    "scale",
    "indices",
}
