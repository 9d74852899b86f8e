# SPDX-License-Identifier: Apache-2.0
"""Towers: whole Hugging Face encoders, from pixels or token ids to features, that run on ragged batches."""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from operator import attrgetter
from types import MethodType
from typing import Any, cast

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from madtp.dtp.branch import Branch
from madtp.dtp.ragged import RaggedBatch
from madtp.models.encoder import Encoder, encode


@dataclass(frozen=True)
class Tower:
    """A Hugging Face encoder with embeddings before its blocks and a pooled feature after them.

    Paths are dotted attributes of the tower.
    """

    encoder: Encoder
    inputs: str  # the argument it encodes: "pixel_values" or "input_ids"
    pool: Callable[[nn.Module, RaggedBatch], Tensor | None]  # (tower, its last features) -> (B, C)
    embeddings: str = "embeddings"
    pre_norm: str | None = None  # the LayerNorm between embeddings and blocks
    final_norm: str | None = None  # the LayerNorm of the features that leave
    # (tower, inputs, attention_mask) -> (B,) the position of each summary token, -1: none; None: all are the first
    summary_position: Callable[[nn.Module, Tensor, Tensor | None], Tensor] | None = None


class RaggedTower(nn.Module):
    """Mixed into the class of a tower that `madtp.patch` takes over; `madtp_spec` and `madtp_branch` come with it.

    What leaves is padded as Hugging Face expects it: every token that is left stands where it was, and zeros where one
    was pruned or was padding. Merged tokens have no place there.
    """

    madtp_spec: Tower
    madtp_branch: Branch
    config: Any  # of Hugging Face

    def encode(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None = None,
        keys: Any = None,
        record: list[RaggedBatch] | None = None,
        **options,
    ) -> RaggedBatch:
        """pixel_values (B, 3, H, W) or input_ids (B, N) -> the ragged batch that leaves, final LayerNorm included.

        Args:
            attention_mask: (B, N) with non-zero at real tokens.
            keys: what cross-attention reads, in towers that have it.
            record: gets the tokens that enter the first block and those that leave each.
            options: of the embeddings, such as interpolate_pos_encoding or position_ids.
        """
        spec = self.madtp_spec
        ndim = 4 if spec.inputs == "pixel_values" else 2
        if not isinstance(inputs, Tensor) or inputs.ndim != ndim:
            shape = "(B, 3, H, W)" if ndim == 4 else "(B, N)"
            got = tuple(inputs.shape) if isinstance(inputs, Tensor) else inputs
            raise ValueError(f"{spec.inputs} must be a tensor of shape {shape}, got {got}")
        given = {name: value for name, value in options.items() if value is not None and value is not False}
        hidden = attrgetter(spec.embeddings)(self)(inputs, **given)
        if spec.pre_norm is not None:
            hidden = attrgetter(spec.pre_norm)(self)(hidden)
        position = None
        if spec.summary_position is not None:
            position = spec.summary_position(self, inputs, attention_mask)
        batch = RaggedBatch.from_padded(hidden, attention_mask, position, self.madtp_branch.fixed(self))
        batch = encode(self, spec.encoder, batch, self.madtp_branch, keys, record)
        if spec.final_norm is None:
            return batch
        return batch.with_x(attrgetter(spec.final_norm)(self)(batch.x))

    def _run(self, inputs, output_hidden_states, kwargs, attention_mask=None, **options) -> BaseModelOutputWithPooling:
        for name, value in kwargs.items():
            if name not in _IGNORED and value is not None and value is not False:
                raise ValueError(f"{name} must be unset: a patched {type(self).__name__} has no such thing")
        if output_hidden_states is None:
            output_hidden_states = getattr(self.config, "output_hidden_states", False)
        record: list[RaggedBatch] | None = [] if output_hidden_states else None
        batch = self.encode(inputs, attention_mask, record=record, **options)
        last_hidden_state = batch.to_positions()
        last_hidden_state.madtp_ragged = batch  # type: ignore[attr-defined]  # for those who can read it
        return BaseModelOutputWithPooling(
            last_hidden_state=last_hidden_state,
            pooler_output=self.madtp_spec.pool(self, batch),
            hidden_states=None if record is None else tuple(state.to_positions() for state in record),
        )


_IGNORED = ("is_causal", "use_cache")  # what Hugging Face passes on whatever the encoder


class RaggedVisionTower(RaggedTower):
    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool | None = None,
        bool_masked_pos: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """last_hidden_state (B, N, C), pooler_output (B, C) and, if asked for, hidden_states: what enters the first
        block and what leaves each, (B, N, C)."""
        options = {"interpolate_pos_encoding": interpolate_pos_encoding, "bool_masked_pos": bool_masked_pos}
        return self._run(pixel_values, output_hidden_states, kwargs, **options)


class RaggedTextTower(RaggedTower):
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """last_hidden_state (B, N, C), pooler_output (B, C) and, if asked for, hidden_states: what enters the first
        block and what leaves each, (B, N, C)."""
        options = {"token_type_ids": token_type_ids, "position_ids": position_ids}
        return self._run(input_ids, output_hidden_states, kwargs, attention_mask, **options)


FORWARDS = {"pixel_values": RaggedVisionTower, "input_ids": RaggedTextTower}  # by what a tower encodes


def ragged(tower: nn.Module) -> RaggedTower:
    """A tower that `mix_in` made one, as what it is: Hugging Face declares its class, which lacks `encode`."""
    return cast(RaggedTower, tower)


class _MixedType(type):
    """The type of mixed classes: it says what they were mixed of, so that they can be pickled, and their objects."""

    madtp_parts: tuple[type, type]


copyreg.pickle(_MixedType, lambda kind: (mixed, kind.madtp_parts))


@functools.cache
def _type_of_mixed(source: type) -> type:
    """For classes with a type of their own, one that is of that type as well."""
    kind = type(source)
    if issubclass(_MixedType, kind):
        return _MixedType
    if issubclass(kind, _MixedType):
        return kind
    found = type(kind.__name__, (_MixedType, kind), {})
    copyreg.pickle(found, lambda kind: (mixed, kind.madtp_parts))
    return found


@functools.cache
def mixed(source: type[nn.Module], mixin: type) -> type[nn.Module]:
    """`source` with `mixin` ahead of it. It keeps its name, which a saved model gives as that of its class."""
    names = {"__doc__": source.__doc__, "__module__": __name__, "madtp_parts": (source, mixin)}
    kind = _type_of_mixed(source)(source.__name__, (mixin, source), names)
    if "forward" in vars(kind):  # Hugging Face wraps that of a block's subclasses in a checkpoint of its own
        del kind.forward
    return kind


def names_of(model: nn.Module, pattern: str) -> list[str]:
    """The modules whose names match a shell-style pattern."""
    return [name for name, _ in model.named_modules() if fnmatchcase(name, pattern)]


def check_forward(module: nn.Module, name: str) -> None:
    """Raises ValueError where a module's forward is none that `change_class` can take along."""
    own = vars(module).get("_old_forward", vars(module).get("forward"))  # accelerate keeps the one it wraps
    if own is not None and not _is_of_class(own, module):
        raise ValueError(
            f"{name or 'model'}.forward must be that of its class, got one set on the object: patch first, then wrap"
        )


def change_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Makes a module one of another class; what has bound its forward to the object, as accelerate does, gets the new
    one."""
    for name in ("forward", "_old_forward"):
        if name in vars(module) and _is_of_class(vars(module)[name], module):
            vars(module)[name] = MethodType(kind.forward, module)
    module.__class__ = kind


def _is_of_class(method: Any, module: nn.Module) -> bool:
    return getattr(method, "__self__", None) is module and method.__func__ is type(module).forward


@contextmanager
def mixed_in(model: nn.Module, mixins: Mapping[str, type]) -> Iterator[None]:
    """A context in which classes are mixed into those of the modules whose names match the patterns."""
    before: dict[nn.Module, type[nn.Module]] = {}
    try:
        for pattern, mixin in mixins.items():
            for module in map(model.get_submodule, names_of(model, pattern)):
                kind = before[module] = type(module)
                change_class(module, mixed(kind, mixin))
        yield
    finally:
        for module, kind in before.items():
            change_class(module, kind)
