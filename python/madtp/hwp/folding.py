# SPDX-License-Identifier: Apache-2.0
"""What a packed layer may take over of the modules after it: an activation, a LayerScale."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple, cast

from torch import nn
from transformers import activations

from madtp.handles import find_handle
from madtp.hwp.modules import ModuleTree, Place
from madtp.hwp.takeover import is_bare, watches_output
from madtp_kernels.checks import require

ACTIVATIONS = {
    activations.GELUActivation: "gelu",
    activations.NewGELUActivation: "gelu_tanh",
    activations.GELUTanh: "gelu_tanh",
    activations.QuickGELUActivation: "quick_gelu",
    nn.ReLU: "relu",
}


class Epilogue(NamedTuple):
    """What a Linear can take over, by module name: the activation on what it returns, and the LayerScale."""

    activation: str | None = None
    scale: str | None = None


class Folded(nn.Identity):
    """Stands where a module was that a packed layer has taken over, and keeps it."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.kept = (module,)  # in a tuple, since an attribute would make it a part of the model
        self.train(module.training)

    def extra_repr(self) -> str:
        return type(self.kept[0]).__name__


def known_epilogues(model: nn.Module, tree: ModuleTree) -> dict[str, Epilogue]:
    """What is known of a patched model, by the names that modules have in this one, which may be around it."""
    handle = find_handle(model)
    if handle is None:
        return {}
    found: dict[str, Epilogue] = {}
    if not (names := tree.names(handle.model)):
        return found
    prefix = f"{names[0]}." if names[0] else ""
    for name, epilogue in handle.epilogues.items():
        activation, scale = (None if path is None else prefix + path for path in epilogue)
        found[prefix + name] = Epilogue(activation, scale)
    return found


def check_epilogues(epilogues: Mapping[str, Epilogue], tree: ModuleTree) -> None:
    for name, epilogue in epilogues.items():
        for path in (name, *epilogue):
            require(path is None or path in tree, "epilogues", "of modules of the model", f"{path!r} at {name!r}")


class Folding(NamedTuple):
    """What a Linear takes over: the name of the activation for the kernel, the scale, and the paths of both."""

    activation: str | None = None
    scale: nn.Parameter | None = None
    paths: tuple[str, ...] = ()


def find_foldings(
    plains: Iterable[nn.Linear], epilogues: Mapping[str, Epilogue], tree: ModuleTree
) -> dict[nn.Linear, Folding]:
    """What each of the Linears that are packed takes over, so that the model computes what it did.

    What follows other modules as well is taken over by all of them, or stays where it is.
    """
    followed: defaultdict[Place, set[nn.Module]] = defaultdict(set)  # where something follows -> what it follows
    for name, epilogue in epilogues.items():
        for path in filter(None, epilogue):
            followed[tree.place(path)].add(tree[name])
    found = {plain: _foldable(plain, epilogues, tree) for plain in plains}
    while True:
        taken = {plain: {tree.place(path) for path in folding.paths} for plain, folding in found.items()}
        torn = [
            plain
            for plain, places in taken.items()
            if any(place not in taken.get(cast(nn.Linear, other), ()) for place in places for other in followed[place])
        ]
        if not torn:
            return found
        found |= dict.fromkeys(torn, Folding())


def _foldable(plain: nn.Linear, epilogues: Mapping[str, Epilogue], tree: ModuleTree) -> Folding:
    """What the Linear could take over: the same at all places where it is."""
    each = [
        next((epilogues[name] for name in names if name in epilogues), Epilogue())
        for names in tree.places(plain).values()
    ]
    if watches_output(plain) or len({epilogue.activation is None for epilogue in each}) > 1:
        return Folding()
    acts = [epilogue.activation for epilogue in each if epilogue.activation is not None]
    kernels = {ACTIVATIONS.get(type(tree[path])) if is_bare(tree[path]) else None for path in acts}
    if None in kernels or len(kernels) > 1:
        return Folding()  # nor a scale, which comes after the activation
    scales = [epilogue.scale for epilogue in each if epilogue.scale is not None]
    vectors = [scale_of(tree[path], plain) for path in scales]
    if len(scales) < len(each) or any(vector is None or vector is not vectors[0] for vector in vectors):
        vectors, scales = [None], []
    return Folding(next(iter(kernels), None), vectors[0], tuple(dict.fromkeys((*acts, *scales))))


def scale_of(module: nn.Module, plain: nn.Linear) -> nn.Parameter | None:
    """The vector of a LayerScale that nothing else was put on."""
    parameters = list(module.parameters())
    alone = len(parameters) == 1 and not list(module.buffers()) and not list(module.children()) and is_bare(module)
    return parameters[0] if alone and parameters[0].shape == (plain.out_features,) else None
