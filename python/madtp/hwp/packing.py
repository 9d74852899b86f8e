# SPDX-License-Identifier: Apache-2.0
"""Linear layers that run 2:4, in int8 or fp8, or both: `pack` puts them in place of plain ones, `unpack` back."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from madtp.choices import WEIGHT_DTYPES
from madtp.hwp.folding import ACTIVATIONS, Epilogue, Folded, check_epilogues, find_foldings, known_epilogues, scale_of
from madtp.hwp.modules import ModuleTree, Place, require_linears, shared_reason, write_unsupported_reason
from madtp.hwp.packed_linear import PackedLinear
from madtp.hwp.quantized_linear import QuantizedLinear
from madtp.hwp.sparse24_linear import Sparse24Linear
from madtp.hwp.takeover import (
    own_names,
    replaced_forward_reason,
    swap,
    take_over,
)
from madtp.hwp.weight_grid import SCALE
from madtp_kernels import QuantizedWeight, Sparse24Weight, quantize, sparse24_compress
from madtp_kernels.checks import require
from madtp_kernels.nm_patterns import is_pattern
from madtp_kernels.quantized.weight import SCHEMES, SPARSE, grid_of_scheme, is_sparse
from madtp_kernels.reference.quantized import MAX_IN_FEATURES
from madtp_kernels.renamed import renamed
from madtp_kernels.sparse24.weight import DTYPES, supports_shape


@renamed(followers="epilogues")
def pack(
    model: nn.Module,
    names: Iterable[str] | None = None,
    *,
    epilogues: Mapping[str, Epilogue] | None = None,
    dtype: str | None = None,
) -> dict[str, Epilogue]:
    """Puts a packed layer in the place of every Linear whose weight is 2:4 and fits the kernels.

    Weights are final from here on; `unpack` brings them back as plain Linears. Whatever pattern made them, weights are
    2:4 when there are at most 2 non-zeros in every aligned 4 columns (`Pattern.sparse24`).

    With a dtype, "int8" or "fp8", weights are rounded as well, by `quantize`, and inputs are rounded row by row at
    every call. A Linear of a 2:4 weight gets the scheme "int8_24", or "fp8_24", and so does a layer that was packed 2:4
    before. Any other Linear gets the scheme "int8", or "fp8", all of its weights in that, but only where `names` has
    it: a model loses accuracy by it, so no Linear is rounded that was neither pruned nor asked for. The scales are
    those that a Linear has as its `weight_scale`, (N,) floating point, such as a one-shot quantisation leaves, else the
    largest magnitude of each row / 127, or / 448.

    Hooks with their handles, attributes, flags, more parameters and buffers, and the hooks of `accelerate` move to the
    packed layer, and back. A Linear that has several names is packed at all of them, as one layer. Other models that
    hold the same Linear keep it as it is; but where they hold the module around it, it is packed for them as well.

    Args:
        names: of the Linears to pack; None takes all that can be. Those that cannot stay as they are:
            `explain_linears`, with the same dtype, says why.
        epilogues: name of a Linear -> what follows it, which is folded into the kernel where it is known, and where
            nothing else sees it: no forward or backward hook on the Linear, none at all on what follows, and no Linear
            in front of it that is not packed. None takes what is known of a patched model.
        dtype: of the weights: None, as they are, or "int8" or "fp8".

    Returns:
        name -> what was folded into it, of every layer packed now.

    Raises:
        ValueError: names has one that is no Linear, or epilogues one that is no module; dtype is another; a
            weight_scale is of another shape or device, not positive and finite, or cuts a row at less than half of its
            largest magnitude, as one for another dtype does. After this and any other error the
            model is as it was.
    """
    _check_dtype(dtype)
    tree = ModuleTree(model)
    if epilogues is None:
        epilogues = known_epilogues(model, tree)
    else:
        check_epilogues(epilogues, tree)
    named = tree.modules if names is None else require_linears("names", names, tree, PackedLinear)
    weights: dict[nn.Module, Weight] = {}
    for name, module in named.items():
        if module not in weights and (weight := _new_weight(name, module, tree, dtype, names is not None)) is not None:
            weights[module] = weight
    plains = [module for module in weights if isinstance(module, nn.Linear)]
    stand_ins: dict[Place, Folded] = {}
    modules: list[tuple[Place, nn.Module]] = []
    for plain, (activation, scale, paths) in find_foldings(plains, epilogues, tree).items():
        layer = _packed(plain, weights[plain], activation, scale)
        for path in paths:
            place = tree.place(path)
            folded = stand_ins.setdefault(place, Folded(tree[path]))
            layer.folded.append(folded)
            modules.append((place, folded))
        modules += [(place, layer) for place in tree.places(plain)]
    for module, weight in weights.items():
        if isinstance(module, Sparse24Linear):
            layer = _converted(module, weight)
            modules += [(place, layer) for place in tree.places(module)]
    swap(modules)
    new = {id(module) for _, module in modules}
    return {name: epilogue for name, epilogue in epilogues_of(model).items() if id(model.get_submodule(name)) in new}


def explain_linears(model: nn.Module, *, dtype: str | None = None) -> dict[str, str]:
    """For every Linear of the model, by name: how it is packed (2:4, int8, fp8, both), or whether `pack` could.

    Args:
        dtype: as in `pack`. None: whether it could go 2:4; else: whether it could be rounded, where it is named.

    Raises:
        ValueError: dtype is another.
    """
    _check_dtype(dtype)
    tree, verdicts = ModuleTree(model), dict[int, str]()
    for module in tree.modules.values():
        if id(module) in verdicts:
            continue
        if isinstance(module, PackedLinear):
            sparse = "runs sparse" if module.executes_sparse else "runs dense: faster, or all there is"
            verdict = f"{module.form}, {sparse if module.sparse else f'runs on {module.choice.backend}'}"
            if dtype is not None and isinstance(module, Sparse24Linear) and (why := _staying_reason(module, tree)):
                verdict += f"; not {dtype}: {why}"
            verdicts[id(module)] = verdict
        elif isinstance(module, nn.Linear):
            verdicts[id(module)] = _dense_verdict(module, tree, dtype)
    return {name: verdicts[id(module)] for name, module in tree.modules.items() if id(module) in verdicts}


def replace_linear(model: nn.Module, name: str, scheme: str, epilogue: Epilogue) -> PackedLinear:
    """Puts an empty packed layer at `name` and all other names of that Linear, with what it is to take over.

    Where that is done already, under another of its names, what is at the epilogue of this name goes as well.

    Args:
        scheme: "sparse24", or one of `QuantizedWeight`.

    Returns:
        the layer, to load a state into.

    Raises:
        ValueError: the epilogue is nothing that a kernel knows, or there is no such scheme. KeyError: a name is none of
            the model.
    """
    tree = ModuleTree(model)
    layer, modules = tree[name], list[tuple[Place, nn.Module]]()
    if not isinstance(layer, PackedLinear):
        plain: Any = layer
        activation, scale = (None if path is None else tree[path] for path in epilogue)
        kernel = None if activation is None else ACTIVATIONS.get(type(activation))
        require(activation is None or kernel is not None, f"activation of {name}", "one that folds", repr(activation))
        vector = None if scale is None else scale_of(scale, plain)
        require(scale is None or vector is not None, f"scale of {name}", "a LayerScale of its outputs", repr(scale))
        layer = _packed(plain, _empty(plain.weight.detach(), scheme), kernel, vector)
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
    layers = {id(m): (name, m) for name, m in reversed(tree.modules.items()) if isinstance(m, PackedLinear)}
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


def refuse_quantized(model: nn.Module) -> None:
    """Raises ValueError for a model with int8 or fp8 layers, whose weights do not train."""
    named = ((name, module) for name, module in model.named_modules() if isinstance(module, QuantizedLinear))
    name, layer = next(named, ("", None))
    if layer is not None:
        raise ValueError(
            f"model must have no {layer.form} weights, which do not train, got {name!r}: model.madtp_handle.remove(), "
            "or madtp.hwp.unpack(model) where it is not patched, makes floating point of them"
        )


def schemes_of(model: nn.Module) -> dict[str, str]:
    """For every packed layer, by name: "sparse24", or the scheme of its `QuantizedWeight`."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: layer.scheme for name, layer in modules if isinstance(layer, PackedLinear)}


def epilogues_of(model: nn.Module) -> dict[str, Epilogue]:
    """For every packed layer, by name: what it has taken over."""
    tree = ModuleTree(model)
    found = {}
    for name, layer in tree.modules.items():
        if isinstance(layer, PackedLinear):
            scales = [folded for folded in layer.folded if any(True for _ in folded.kept[0].parameters())]
            others = [folded for folded in layer.folded if folded not in scales]
            found[name] = Epilogue(_nearest(name, others, tree), _nearest(name, scales, tree))
    return found


def _nearest(name: str, modules: Iterable[nn.Module], tree: ModuleTree) -> str | None:
    """Of the names of the modules, that with most in common with `name`: a layer of several names has several."""
    names = [path for module in modules for path in tree.names(module)]
    return max(names, key=lambda path: len(os.path.commonprefix((path, name))), default=None)


def _check_dtype(dtype: str | None) -> None:
    require(dtype is None or dtype in WEIGHT_DTYPES, "dtype", f"None or {' or '.join(WEIGHT_DTYPES)}", repr(dtype))


Weight = Sparse24Weight | QuantizedWeight
MIN_RANGE = 0.5  # of a row's largest magnitude that a scale leaves; one-shot quantisation leaves 0.7

_OF_LINEAR = own_names(nn.Linear(1, 1, device="meta"))  # which draws no random numbers


def _new_weight(name: str, module: nn.Module, tree: ModuleTree, dtype: str | None, dense: bool) -> Weight | None:
    """What the weight of a layer becomes, or None where the layer stays as it is; dense: even if it is not 2:4."""
    if isinstance(module, Sparse24Linear) and dtype is not None:
        stays = _staying_reason(module, tree)
        return None if stays else _quantized(name, module, module.sparse_weight, dtype + SPARSE)
    if not isinstance(module, nn.Linear):
        return None
    if dtype is None:
        return None if _dense_reason(module, tree, dtype) else sparse24_compress(module.weight)
    if _dense_reason(module, tree, dtype):
        return None
    if _misfit(module.weight) is None:
        return _quantized(name, module, module.weight, dtype + SPARSE)
    return _quantized(name, module, module.weight, dtype) if dense else None


def _quantized(name: str, module: nn.Module, weight: Tensor | Sparse24Weight, scheme: str) -> QuantizedWeight:
    scale = getattr(module, SCALE, None)
    try:
        found = quantize(weight, scheme, scale)
    except ValueError as error:  # of the scale: the weight was looked at before
        raise ValueError(f"{SCALE} of {name}: {error}") from error
    if scale is not None:
        _check_range(name, weight, found)
    return found


def _check_range(name: str, weight: Tensor | Sparse24Weight, found: QuantizedWeight) -> None:
    """Raises ValueError for scales that would cut most of a row off: those of fp8 are 0.28 of those of int8."""
    values = weight.values if isinstance(weight, Sparse24Weight) else weight.detach()
    if not values.numel():
        return
    kept = grid_of_scheme(found.scheme).largest * found.scale.double() / values.abs().amax(1).double()
    if (kept < MIN_RANGE).any():
        row = int((kept < MIN_RANGE).nonzero()[0])
        rule = f"such as leave {found.scheme} at least {MIN_RANGE} of the largest magnitude of each row"
        require(False, f"{SCALE} of {name}", rule, f"{kept[row]:.2g} of row {row}: are they those of another dtype?")


def _packed(plain: nn.Linear, weight: Weight, activation: str | None, scale: nn.Parameter | None) -> PackedLinear:
    bias: Any = plain.bias
    layer = _layer(weight, bias, activation, scale, plain)
    layer.weight_attributes = plain.weight.requires_grad, dict(vars(plain.weight))
    take_over(plain, layer, _OF_LINEAR | ({SCALE} if isinstance(layer, QuantizedLinear) else set()))
    return layer


def _converted(source: Sparse24Linear, weight: Weight) -> PackedLinear:
    """The layer with another weight, and all else that it has."""
    layer = _layer(weight, source.bias, source.activation, source.scale, source)
    layer.folded, layer.weight_attributes = list(source.folded), source.weight_attributes
    take_over(source, layer, _of_class(source) | {SCALE})
    return layer


def _layer(weight: Weight, bias: Any, activation: str | None, scale: Any, source: Any) -> PackedLinear:
    """A layer of its own; source: what the weight was of."""
    if isinstance(weight, Sparse24Weight):
        return Sparse24Linear(weight, bias, activation, scale)
    layer = QuantizedLinear(weight, bias, activation, scale, dense_dtype=source.weight.dtype)
    layer.keeps_scale = hasattr(source, SCALE)
    return layer


def _of_class(layer: PackedLinear) -> frozenset[str]:
    """The names of what a packed layer has of its class."""
    kind: Any = type(layer)
    return own_names(kind(layer.packed_weight))


def _plain(layer: PackedLinear) -> nn.Linear:
    with torch.device("meta"):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
    requires_grad, attributes = layer.weight_attributes
    with torch.inference_mode(False):  # whose tensors could not be trained later
        plain.weight = nn.Parameter(layer.packed_weight.to_dense().to(layer.dense_dtype), requires_grad)
    vars(plain.weight).update(attributes)
    plain.register_parameter("bias", layer.bias)
    take_over(layer, plain, _of_class(layer))
    if isinstance(layer, QuantizedLinear) and layer.keeps_scale:
        plain.register_buffer(SCALE, layer.weight_scale, persistent=False)
    return plain


def _unfolded(folded: Folded, layer: PackedLinear) -> nn.Module:
    (kept,) = folded.kept
    for name, _ in list(kept.named_parameters()):
        setattr(kept, name, layer.scale)  # which may have been moved, or trained, since
    take_over(folded, kept, own_names(folded))
    return kept


def _dense_verdict(module: nn.Linear, tree: ModuleTree, dtype: str | None) -> str:
    if reason := _dense_reason(module, tree, dtype):
        return f"dense: {reason}"
    return "dense, but 2:4: pack makes it run sparse" if dtype is None else f"dense, but pack makes it {dtype}"


def _dense_reason(module: nn.Linear, tree: ModuleTree, dtype: str | None) -> str | None:
    """Why a Linear stays dense when weights of this dtype are packed, or None."""
    reason = _unsupported_reason(module, tree)
    return reason or (_misfit(module.weight) if dtype is None else _rounding_reason(module))


def _unsupported_reason(module: nn.Linear, tree: ModuleTree) -> str | None:
    """Why another module could not take the place of this one and be all that it was."""
    for parameter in ("weight", "bias"):
        if reason := write_unsupported_reason(module, parameter):
            return reason
    if type(module) is not nn.Linear:
        return f"a {type(module).__name__} is more than a Linear"
    if held := _held_reason(module, tree):
        return held
    weight: Any = module.weight
    if weight._backward_hooks or weight._post_accumulate_grad_hooks:
        return "weight has hooks on its gradient"
    taken = sorted((own_names(module) - _OF_LINEAR) & _RESERVED)
    if taken:
        return f"{taken[0]} is an attribute of it that a packed layer has too"
    return replaced_forward_reason(module) or shared_reason(module, "weight", tree)


def _staying_reason(module: Sparse24Linear, tree: ModuleTree) -> str | None:
    """Why a layer that is packed 2:4 cannot be rounded, or None."""
    return _held_reason(module, tree) or _rounding_reason(module)


def _held_reason(module: nn.Module, tree: ModuleTree) -> str | None:
    """Why nothing could take the place of a module where it is."""
    if any(not attribute for _, attribute in tree.places(module)):
        return "it is the whole model, nothing holds it"
    if any(attribute == "_orig_mod" for _, attribute in tree.places(module)):
        return "it is compiled"
    return None


def _rounding_reason(module: nn.Linear | Sparse24Linear) -> str | None:
    """Why the weight of a layer cannot be rounded, or its scales not to where they belong, or None."""
    weight = module.weight
    if reason := _dtype_reason(weight):
        return reason
    if module.in_features > MAX_IN_FEATURES:
        return f"in_features {module.in_features} is above {MAX_IN_FEATURES}"
    if not isinstance(getattr(module, SCALE, None), Tensor | None):
        return f"{SCALE} is an attribute of it already"
    return None if weight.isfinite().all() else "weight has a NaN or an infinity"


def _misfit(weight: Tensor) -> str | None:
    """Why a weight cannot go 2:4, or None."""
    out_features, in_features = weight.shape
    if not supports_shape(out_features, in_features):
        return f"{out_features} x {in_features} must be multiples of 8 and 16"
    if reason := _dtype_reason(weight):
        return reason
    if weight.isnan().any():  # before the pattern, in which a NaN is a non-zero
        return "weight has NaN"
    return None if is_pattern(weight, "2:4") else "has more than 2 non-zeros in an aligned 4"


def _dtype_reason(weight: Tensor) -> str | None:
    known = not weight.is_meta and weight.dtype in DTYPES
    return None if known else f"weight is {'on the meta device' if weight.is_meta else weight.dtype}"


def check_scheme(scheme: object) -> None:
    """Raises ValueError for what is no form of a packed weight."""
    known = "sparse24", *SCHEMES
    require(isinstance(scheme, str) and scheme in known, "scheme", f"one of {', '.join(known)}", repr(scheme))


def _empty(weight: Tensor, scheme: str) -> Weight:
    """One of the shape of a dense weight."""
    check_scheme(scheme)
    rows, columns = weight.shape
    sparse = scheme == "sparse24" or is_sparse(scheme)
    indices = weight.new_empty(rows, columns // 8, dtype=torch.uint8) if sparse else None
    dtype = weight.dtype if scheme == "sparse24" else grid_of_scheme(scheme).dtype
    values = weight.new_empty(rows, columns // 2 if sparse else columns, dtype=dtype)
    if indices is not None and scheme == "sparse24":
        return Sparse24Weight(values, indices)
    return QuantizedWeight(values, weight.new_empty(rows, dtype=torch.float32), indices)


_RESERVED = (frozenset(dir(Sparse24Linear)) | frozenset(dir(QuantizedLinear))) - frozenset(dir(nn.Linear)) | {
    "activation",
    "dense_dtype",
    "folded",
    "indices",
    "keeps_scale",
    "scale",
    "scheme",
    "weight_indices",
}
