# SPDX-License-Identifier: Apache-2.0
"""What a tower's forward takes and returns: as the Hugging Face class declares it, read off its signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_args

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

HIDDEN = -1e4  # what an additive mask has, at most, where nothing is seen: the softmax of it is 0

# What every patched tower takes, whatever its class declares.
_ALWAYS = {"attention_mask", "output_hidden_states", "output_attentions"}


@dataclass(frozen=True)
class Arguments:
    """Of a forward: what it names, in order, whether it takes other keywords too, and the class of its output."""

    signature: inspect.Signature
    names: tuple[str, ...]
    takes_any: bool
    output: type[ModelOutput]

    @classmethod
    def of(cls, forward: Callable[..., Any]) -> Arguments:
        """Of an unbound forward, whose first argument is the module."""
        signature = inspect.signature(forward)
        kinds = {parameter.name: parameter.kind for parameter in list(signature.parameters.values())[1:]}
        names = tuple(name for name, kind in kinds.items() if kind is inspect.Parameter.POSITIONAL_OR_KEYWORD)
        takes_any = inspect.Parameter.VAR_KEYWORD in kinds.values()
        return cls(signature, names, takes_any, _output_of(signature.return_annotation))

    def bound(self, kind: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Name -> value of what a call gave. Raises TypeError as the call of such a function does."""
        if len(args) > len(self.names):
            raise TypeError(f"{kind}.forward takes at most {len(self.names)} positional arguments, got {len(args)}")
        given = dict(zip(self.names, args, strict=False))
        for name, value in kwargs.items():
            if name in given:
                raise TypeError(f"{kind}.forward got multiple values for argument {name}")
            if not (self.takes_any or name in self.names or name in _ALWAYS):
                raise TypeError(f"{kind}.forward got an unexpected keyword argument {name}")
            given[name] = value
        return given


def _output_of(annotation: Any) -> type[ModelOutput]:
    """The output class that a forward is annotated with; where there is none of a tower, that of most."""
    for kind in (annotation, *get_args(annotation)):
        if is_dataclass(kind) and {field.name for field in fields(BaseModelOutputWithPooling)} <= {
            field.name for field in fields(kind)
        }:
            return kind  # type: ignore[return-value]  # a dataclass with the fields of one
    return BaseModelOutputWithPooling


def real_tokens(mask: Any, batch: int, length: int, causal: bool) -> Tensor | None:
    """An attention mask as Hugging Face takes it -> (B, N), non-zero at real tokens; None where all are.

    Args:
        mask: (B, N), non-zero at real tokens; or who sees whom, (B, N, N) or (B, 1, N, N), bool or additive, of which
            sizes but the last may be 1. That must come to which tokens are real: ragged attention knows no other mask.
            Its values are read on the host.
        causal: whether the tower's attention is, which such a mask has to say as well.

    Raises:
        ValueError: it is none of these.
    """

    def refused(rest: str) -> ValueError:  # in words only now, see `madtp_kernels.checks`
        return ValueError(f"attention_mask must be ({batch}, {length}) with non-zero at real tokens{rest}")

    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise refused(f", got {described(mask)}")
    if mask.ndim == 2:
        if mask.shape != (batch, length):
            raise refused(f", got {described(mask)}")
        return mask
    if mask.ndim == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    fits = mask.ndim == 3 and mask.shape[0] in (1, batch) and mask.shape[1] in (1, length) and mask.shape[2] == length
    if not fits or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise refused(
            f", or bool or additive of shape ({batch}, {length}, {length}) or ({batch}, 1, {length}, {length}), "
            f"got {described(mask)}"
        )
    if torch.compiler.is_compiling():
        raise refused(f" where it is compiled, got {described(mask)}")
    seen = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and not (seen | (mask <= HIDDEN)).all():
        raise refused(f", or additive with 0 and at most {HIDDEN:g} alone, got other values")
    seen = seen.expand(batch, length, length)
    real = seen.any(dim=1)  # as a key
    expected = real[:, None].expand(-1, length, -1)
    if causal:
        expected = expected.tril()
    if ((seen != expected) & real[:, :, None]).any():  # what padding sees has no reader
        order = "those up to it" if causal else "the same"
        raise refused(f", or such that every real token sees {order}, got another {described(mask)}")
    return real


def described(value: Any) -> str:
    """What came, for a message: bounded, whatever it holds."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    size = f" of {len(value)}" if isinstance(value, list | tuple | dict | set | str) else ""
    return f"{type(value).__name__}{size}"
