# SPDX-License-Identifier: Apache-2.0
"""Examples of every op: what `test_direct_calls` and `test_transforms` call. An op has a file of its name here, with

    arguments(sizes)  the arguments of a good call of torch.ops.madtp.<op>, by name
    DERIVED           if any: names of arguments that say again what others say, of which the reference reads one
    CALLS             of an op with a public function: {a function of tensors and backend= that calls it: what draws
                      such tensors, in float64}
    ROUNDED           if any: those of CALLS that round to integers, so that finite differences say nothing of them

`test_every_op_has_examples` fails for an op without a file here.
"""

import importlib
import pkgutil

import torch

from op_examples.common import Sizes

MODULES = {name: importlib.import_module(f"{__name__}.{name}") for _, name, _ in pkgutil.iter_modules(__path__)}
EXAMPLES = {name: module for name, module in MODULES.items() if name != "common"}


GOOD = Sizes()


def ops() -> list[str]:
    """The name of every op that is registered."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.removeprefix("madtp::") for name in names if name.startswith("madtp::"))


def good_call(op: str, sizes: Sizes = GOOD) -> dict:
    """The arguments of a good call of `op`, in the order of its schema."""
    good = EXAMPLES[op].arguments(sizes)
    names = [argument.name for argument in getattr(torch.ops.madtp, op).default._schema.arguments]
    assert good.keys() == set(names), f"{op} takes {', '.join(names)}"
    return {name: good[name] for name in names}


def derived(op: str) -> frozenset[str]:
    return getattr(EXAMPLES[op], "DERIVED", frozenset())


def differentiable_calls() -> dict:
    """The CALLS of all ops."""
    return {function: draw for module in EXAMPLES.values() for function, draw in getattr(module, "CALLS", {}).items()}


def rounded_calls() -> set:
    """The ROUNDED of all ops."""
    return set().union(*(getattr(module, "ROUNDED", ()) for module in EXAMPLES.values()))
