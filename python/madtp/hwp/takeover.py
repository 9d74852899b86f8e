# SPDX-License-Identifier: Apache-2.0
"""A module takes another's place, with all that a user or a library has put on the one before.

Hooks are shared and not copied, so that `remove()` of their handles still works. All of `nn.Module` that is private
here is what torch.nn.Module's own state consists of; torch has no public way to move it.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn
from torch.nn.modules.module import _WrappedHook

from madtp.hooks import is_of_class
from madtp.hwp.modules import Place

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_HOLDERS = ("_parameters", "_buffers", "_modules")
_OUTPUT_HOOKS = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


def own_names(module: nn.Module) -> frozenset[str]:
    """What a module has of its class: attributes, parameters, buffers and children; hooks and flags are no part."""
    held = (name for holder in _HOLDERS for name in getattr(module, holder))
    return frozenset((*(vars(module).keys() - _OF_EVERY_MODULE), *held))


def take_over(source: nn.Module, target: nn.Module, own: Collection[str]) -> None:
    """Gives target all that source has, but for `own`, the names of what source has of its class.

    Target keeps what it has of its own. Both work on: the source is not changed, unless `swap` follows.
    """
    for name, value in list(vars(source).items()):
        if name in _HOLDERS:
            held = getattr(target, name)
            held.update({key: part for key, part in value.items() if key not in own and key not in held})
        elif name == "_non_persistent_buffers_set":
            target._non_persistent_buffers_set |= value - frozenset(own)
        elif name == "forward" and is_of_class(value, source):
            continue  # what accelerate leaves when its hook is removed
        elif name not in own:
            vars(target)[name] = _rebound(value, source, target)


def swap(modules: Iterable[tuple[Place, nn.Module]]) -> None:
    """Puts every module at its place, or none of them where that fails."""
    done: list[tuple[Place, nn.Module, nn.Module]] = []
    try:
        for place, module in modules:
            children: Any = place.parent._modules
            before = children[place.attribute]
            done.append((place, before, module))
            children[place.attribute] = module
            _rebind_hooks(before, module)
    except BaseException:
        for place, before, module in reversed(done):
            place.parent._modules[place.attribute] = before
            _rebind_hooks(module, before)
        raise


def watches_output(module: nn.Module) -> bool:
    """Whether something put on the module sees, or changes, what it returns or the gradient of that."""
    return any(getattr(module, hooks) for hooks in _OUTPUT_HOOKS) or _forward_of(module) is not None


def is_bare(module: nn.Module) -> bool:
    """Whether nothing was put on the module that a call of it, or its state dict, would show."""
    hooks = (name for name in _OF_EVERY_MODULE if name.endswith("_hooks"))
    return not any(getattr(module, name) for name in hooks) and _forward_of(module) is None


def replaced_forward_reason(module: nn.Module) -> str | None:
    """Why a module that takes this one's place could not run what runs in a call of this one."""
    forward = _forward_of(module)
    if forward is not None and _rebound(forward, module, nn.Identity()) is forward:
        return "its forward was replaced"
    return "it is compiled" if module._compiled_call_impl is not None else None


def _forward_of(module: nn.Module) -> Any:
    """What runs in place of the forward of the module's class, or None."""
    forward = vars(module).get("forward")
    return None if is_of_class(forward, module) else forward


def _rebound(value: Any, source: nn.Module, target: nn.Module) -> Any:
    """The value, of target where it was of source: a bound method, or a partial, as a forward of `accelerate` is."""
    if isinstance(value, types.MethodType) and value.__self__ is source:
        ours = getattr(type(target), value.__name__, None) if is_of_class(value, source, value.__name__) else None
        return types.MethodType(ours or value.__func__, target)
    if isinstance(value, functools.partial) and any(part is source for part in value.args):
        partial = functools.partial(value.func, *(target if part is source else part for part in value.args))
        partial.keywords.update(value.keywords)
        vars(partial).update({name: _rebound(part, source, target) for name, part in vars(value).items()})
        return partial
    return value


def _rebind_hooks(source: nn.Module, target: nn.Module) -> None:
    """Hooks of state dicts know their module: it is the target now."""
    for hooks in (target._load_state_dict_pre_hooks, target._state_dict_hooks, target._state_dict_pre_hooks):
        for hook in hooks.values():
            if isinstance(hook, _WrappedHook) and hook.with_module and hook.module() is source:
                hook.module = weakref.ref(target)
