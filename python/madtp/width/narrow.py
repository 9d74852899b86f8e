# SPDX-License-Identifier: Apache-2.0
"""Linears of fewer rows or columns, in place: modules stay the objects that they were, with new parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn

from madtp.hooks import is_watched
from madtp.hwp.modules import ModuleTree, shared_reason, write_unsupported_reason
from madtp.hwp.packed_linear import PackedLinear
from madtp.hwp.weight_grid import SCALE
from madtp.models.mixing import change_class, mixed
from madtp.models.narrow_attention import FULL_WIDTH_ONLY, NarrowAttention
from madtp.width.choice import Cut
from madtp.width.parts import FULL, WidthPart, width_parts
from madtp_kernels.checks import require
from madtp_kernels.nm_patterns import is_pattern
from madtp_kernels.sparse24.weight import supports_shape

HEAD_COUNTS = ("num_heads", "num_attention_heads")  # what classes of transformers call it


def checked_widths(model: nn.Module, widths: Mapping[str, int]) -> dict[WidthPart, int]:
    """By part what is to be left of it, in the order of the model; parts that stay as they are are left out.

    Raises:
        ValueError: the model has no parts, a name is none of them, or a width is not one of the part, or one whose
            Linears no kernel runs though it runs those of before.
    """
    parts, tree = {part.name: part for part in width_parts(model)}, ModuleTree(model)
    kind = f"a {type(model).__name__}"
    require(bool(parts), "model", "one of towers with heads or MLPs that are described", kind)
    for name, width in widths.items():
        _require_runs(_part(parts, name, width), width, tree)
    return {part: widths[name] for name, part in parts.items() if widths.get(name, part.width) < part.width}


def _part(parts: Mapping[str, WidthPart], name: str, width: object) -> WidthPart:
    """The part of that name. Raises ValueError where there is none, or that is no width of it."""
    rule = f"of Linears that read heads or hidden channels, such as {next(iter(parts), None)}"
    require(name in parts, "widths", rule, repr(name))
    part = parts[name]
    fits = type(width) is int and 1 <= width <= part.width
    require(fits, f"widths[{name!r}]", f"from 1 to its {part.width} {part.kind}", width)
    return part


def _require_runs(part: WidthPart, width: int, tree: ModuleTree) -> None:
    for name in (*part.before, part.name):
        module: Any = tree[name]
        rows, columns = module.out_features, module.in_features
        new = (rows, width * part.size) if name == part.name else (rows // part.width * width, columns)
        if supports_shape(rows, columns) and not supports_shape(*new):
            got = f"{width} {part.kind}, which make {name} {new[0]} x {new[1]}"
            raise ValueError(
                f"widths[{part.name!r}] must leave shapes that kernels run (multiples of 8 and 16), got {got}"
            )


def require_removable(parts: Sequence[WidthPart], model: nn.Module) -> None:
    """Raises ValueError where a Linear of the parts is more than one, or somebody else's too, or pruned already."""
    tree = ModuleTree(model)
    for part in parts:
        for name in (*part.before, part.name):
            reason = _unremovable_reason(tree[name], tree)
            require(reason is None, "widths", "of Linears that can become smaller", f"{name!r}: {reason}")


def _unremovable_reason(module: nn.Module, tree: ModuleTree) -> str | None:
    if isinstance(module, PackedLinear):
        return f"it is packed ({module.form}), and width goes first: madtp.hwp.unpack"
    if type(module) is not nn.Linear:
        return f"a {type(module).__name__} is more than a Linear"
    if SCALE in module._buffers:
        return "its weight is rounded already, and width goes first"
    for parameter in ("weight", "bias"):
        if reason := write_unsupported_reason(module, parameter) or shared_reason(module, parameter, tree):
            return reason
    if len(tree.places(module)) > 1:
        return f"it is {' and '.join(names[0] for names in tree.places(module).values())}"
    if is_watched(module):
        return "it has hooks, which may know its shape"
    weight: Any = module.weight
    if weight._backward_hooks or weight._post_accumulate_grad_hooks:
        return "its weight has hooks on its gradient"
    if weight.is_meta:
        return "its weight is on the meta device"
    if weight.any() and is_pattern(weight.detach(), "2:4"):
        return "its weight is 2:4 already, and width goes first"
    return None


def narrow(model: nn.Module, part: WidthPart, cut: Cut, undo: ExitStack) -> None:
    """Leaves of a part what the cut says; `undo` gets what brings back what was, to the bit."""
    for name in part.before:
        linear = cast(nn.Linear, model.get_submodule(name))
        bias = None if linear.bias is None else _rows(linear.bias, part, cut)
        _resize(linear, _rows(linear.weight, part, cut), bias, undo)
    after = cast(nn.Linear, model.get_submodule(part.name))
    _resize(after, cut.weight, cut.bias, undo)
    _set(after, FULL, part.full, undo)
    if part.kind == "heads":
        for path in dict.fromkeys(name.rpartition(".")[0] for name in part.before):
            _set_heads(model.get_submodule(path), part, len(cut.kept), undo)


def restore_widths(model: nn.Module, widths: Mapping[str, int]) -> None:
    """Makes an empty model as narrow as one that was saved, for weights to be loaded into.

    Raises:
        ValueError: a name is none of its parts, or a width not one of the part.
    """
    parts = {part.name: part for part in width_parts(model)}
    for name, width in widths.items():
        part, linear = _part(parts, name, width), cast(nn.Linear, model.get_submodule(name))
        kept = torch.arange(width, device=linear.weight.device)
        narrow(model, part, Cut(kept, linear.weight[:, : width * part.size], linear.bias, 0.0), ExitStack())


def _rows(parameter: Tensor, part: WidthPart, cut: Cut) -> Tensor:
    """The rows of the units that are kept; query, key and value in one have those of each."""
    groups = parameter.detach().unflatten(0, (-1, part.width, part.size))
    return groups[:, cut.kept].flatten(0, 2)


def _resize(linear: nn.Linear, weight: Tensor, bias: Tensor | None, undo: ExitStack) -> None:
    for name, value in (("weight", weight), ("bias", bias)):
        before = linear._parameters.get(name)
        if before is None or value is None:
            continue
        with torch.inference_mode(False):  # whose tensors could not be trained later
            new = nn.Parameter(value.detach().clone(), before.requires_grad)
        vars(new).update(vars(before))
        undo.callback(linear._parameters.__setitem__, name, before)
        linear._parameters[name] = new
    _set(linear, "out_features", weight.shape[0], undo)
    _set(linear, "in_features", weight.shape[1], undo)


def _set_heads(module: Any, part: WidthPart, heads: int, undo: ExitStack) -> None:
    """What the module around the Linears of a head says of their number."""
    for name in HEAD_COUNTS:
        if vars(module).get(name) == part.width:
            _set(module, name, heads, undo)
    if vars(module).get("all_head_size") == part.width * part.size:
        _set(module, "all_head_size", heads * part.size, undo)
    kind: Any = type(module)
    if isinstance(module, FULL_WIDTH_ONLY) and not issubclass(kind, NarrowAttention):
        undo.callback(change_class, module, kind)
        change_class(module, mixed(kind, NarrowAttention))


def _set(module: nn.Module, name: str, value: int, undo: ExitStack) -> None:
    if name in vars(module):
        undo.callback(setattr, module, name, vars(module)[name])
    else:
        undo.callback(delattr, module, name)
    setattr(module, name, value)
