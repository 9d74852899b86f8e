# SPDX-License-Identifier: Apache-2.0
"""Towers: whole Hugging Face encoders, from pixels or token ids to features, that run on ragged batches."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput, can_return_tuple, logging

from madtp.dtp.branch import Branch
from madtp.dtp.ragged import RaggedBatch, RepeatedSequences
from madtp.models.arguments import Arguments, described, real_tokens
from madtp.models.encoder import Encoder, encode

logger = logging.get_logger(__name__)


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
    # How many of them each sequence has, 0 or 1, where summary_position always says the same; None: it may differ.
    summary_tokens: int | None = None


class RaggedTower(nn.Module):
    """Mixed into the class of a tower that `madtp.patch` takes over; `madtp_spec` and `madtp_branch` come with it.

    What leaves is padded as Hugging Face expects it: every token that is left stands where it was, and zeros where one
    was pruned or was padding. Merged tokens have no place there.
    """

    madtp_spec: Tower
    madtp_branch: Branch
    madtp_arguments: ClassVar[Arguments]  # of the Hugging Face forward
    config: Any  # of Hugging Face

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        source: Any = cls.__mro__[cls.__mro__.index(RaggedTower) + 1]
        if source is nn.Module:  # a tower of no Hugging Face class yet
            return
        own = source.forward is not nn.Module.forward  # an encoder of one's own may have none
        cls.madtp_arguments = Arguments.of(source.forward if own else _without_forward)

        def forward(self, *args, **kwargs):
            return self._forward(*args, **kwargs)

        forward.__doc__ = RaggedTower._forward.__doc__
        # Trainers, pipelines and exporters ask it which inputs there are.
        forward.__signature__ = cls.madtp_arguments.signature  # type: ignore[attr-defined]
        cls.forward = forward

    @can_return_tuple
    def _forward(self, *args, **kwargs) -> ModelOutput:
        """As in Hugging Face: last_hidden_state (B, N, C), pooler_output (B, C) and, if asked for, hidden_states: what
        enters the first block and what leaves each, (B, N, C).

        What its class ignores is ignored here. Attention maps are never made: where the attention of the model has
        none either, as "sdpa", `output_attentions` gives none, and elsewhere it is refused.

        Raises:
            ValueError: an argument is of another kind or shape, or asks for what a patched tower does not do.
            TypeError: Hugging Face has no such argument.
        """
        given = self.madtp_arguments.bound(type(self).__name__, args, kwargs)
        inputs = self.madtp_spec.inputs
        if inputs not in self.madtp_arguments.names:  # an encoder of one's own has a name of its own for them
            given = {inputs if name == self.madtp_arguments.names[0] else name: given[name] for name in given}
        states = given.pop("output_hidden_states", getattr(self.config, "output_hidden_states", False))
        maps = given.pop("output_attentions", getattr(self.config, "output_attentions", False))
        nothing: dict[str, Any] = self._no_maps() if maps else {}
        self._refuse(given)
        if torch.jit.is_tracing() and self.madtp_branch.prunes:
            raise RuntimeError(
                f"temperature must be 0 under torch.jit.trace, which fixes how many tokens are left, "
                f"got {self.madtp_branch.temperature:g}; torch.export.export does not"
            )
        mask = given.pop("attention_mask", None)
        if self.madtp_arguments.takes_any and "attention_mask" not in self.madtp_arguments.names:
            mask = None  # ignored
        keys = self._keys(given)
        source, hidden = self._embedded(given)
        mask = real_tokens(mask, hidden.shape[0], hidden.shape[1], self.madtp_spec.encoder.causal)
        record: list[RaggedBatch] | None = [] if states else None
        batch = self._encode(source, hidden, mask, keys, record)
        last_hidden_state = batch.to_positions()
        last_hidden_state.madtp_ragged = _Ragged(batch, _version(last_hidden_state))  # type: ignore[attr-defined]
        return self.madtp_arguments.output(
            last_hidden_state=last_hidden_state,
            pooler_output=self.madtp_spec.pool(self, batch),
            hidden_states=None if record is None else self._padded(record, states, last_hidden_state),
            **nothing,
        )

    def _refuse(self, given: dict[str, Any]) -> None:
        """Raises ValueError for what Hugging Face would use and a patched tower cannot."""
        kind, causal = type(self).__name__, self.madtp_spec.encoder.causal
        if given.get("is_causal", causal) not in (None, causal):
            raise ValueError(f"is_causal must be None or {causal} in a patched {kind}, got {given['is_causal']}")
        for name in ("past_key_values", "is_decoder"):
            value = given.get(name)
            if name in self.madtp_arguments.names and value is not None and value is not False:
                raise ValueError(f"{name} must be unset: a patched {kind} is an encoder, got {described(value)}")
        unnamed = [name for name in given if name not in self.madtp_arguments.names and given[name] is not None]
        if unnamed and self.madtp_arguments.takes_any:
            path = self.madtp_spec.encoder.blocks.rpartition(".")[0]
            inside = _names_of(type(attrgetter(path)(self))) if path else ()
            for name in unnamed:
                if name in inside:
                    raise ValueError(f"{name} must be unset: {kind} has no such argument, and its blocks would get it")

    def _no_maps(self) -> dict[str, tuple[()]]:
        """The attention maps that there are none of. Raises ValueError where Hugging Face has some."""
        attention = self.config._attn_implementation
        if attention != "sdpa" and "flash" not in (attention or ""):
            raise ValueError(
                f"output_attentions must be unset: a patched {type(self).__name__} makes no attention maps; "
                "handle.remove() brings the model back that does"
            )
        logger.warning_once(f"`{attention}` attention has no maps: `output_attentions=True` gives none.")
        names = {field.name for field in fields(self.madtp_arguments.output)}  # type: ignore[arg-type]
        return {name: () for name in ("attentions", "cross_attentions") if name in names}

    def _keys(self, given: dict[str, Any]) -> Any:
        """Of what is given, what cross-attention reads."""
        return None

    def _embedded(self, given: dict[str, Any]) -> tuple[Any, Tensor]:
        """What is encoded, and its embeddings (B, N, C)."""
        raise NotImplementedError

    def _options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What the embeddings take beside the inputs: all that Hugging Face names and nothing else has used."""
        names = self.madtp_arguments.names
        return {
            name: value for name, value in given.items() if name in names and value is not None and value is not False
        }

    def _encode(
        self, inputs: Any, hidden: Tensor, mask: Tensor | None, keys: Any, record: list[RaggedBatch] | None
    ) -> RaggedBatch:
        """Embeddings (B, N, C) -> the ragged batch that leaves, final LayerNorm included.

        Args:
            mask: (B, N) with non-zero at real tokens.
            keys: what cross-attention reads, in towers that have it.
            record: gets the tokens that enter the first block and those that leave each.
        """
        spec = self.madtp_spec
        if spec.pre_norm is not None:
            hidden = attrgetter(spec.pre_norm)(self)(hidden)
        position = None
        if spec.summary_position is not None:
            position = spec.summary_position(self, inputs, mask)
        batch = RaggedBatch.from_padded(hidden, mask, position, self.madtp_branch.fixed(self), spec.summary_tokens)
        batch = encode(self, spec.encoder, batch, self.madtp_branch, keys, record)
        if spec.final_norm is None:
            return batch
        return batch.with_x(attrgetter(spec.final_norm)(self)(batch.x))

    def _padded(self, record: list[RaggedBatch], chosen: Any, last: Tensor) -> tuple[Tensor | None, ...]:
        """The hidden states as Hugging Face has them: all, or those of some indices, and None for the others."""
        count = len(record)
        indices: Any = range(count) if chosen is True else [chosen] if isinstance(chosen, int) else chosen
        wanted = {i % count for i in indices if -count <= i < count}
        states = [state.to_positions() if i in wanted else None for i, state in enumerate(record)]
        if getattr(self.config, "tie_last_hidden_states", False) and states[-1] is not None:
            states[-1] = last
        return tuple(states)


@torch.compiler.assume_constant_result
def _names_of(kind: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)


def _without_forward(self, inputs, **kwargs):
    """What a tower takes whose class has no forward."""


class RaggedVisionTower(RaggedTower):
    """A tower that encodes images."""

    def _embedded(self, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        pixels = _checked(given.pop("pixel_values", None), "pixel_values", "(B, 3, H, W)", 4)
        embeddings = attrgetter(self.madtp_spec.embeddings)(self)
        weight = next(embeddings.parameters())
        return pixels, embeddings(pixels.to(weight.dtype), **self._options(given))


class RaggedTextTower(RaggedTower):
    """A tower that encodes texts: token ids or, where Hugging Face takes them, embeddings of words or of tokens."""

    def _keys(self, given: dict[str, Any]) -> Any:
        keys, mask = given.pop("encoder_hidden_states", None), given.pop("encoder_attention_mask", None)
        given.pop("use_cache", None)  # an encoder has none
        given.pop("is_decoder", None)
        given.pop("past_key_values", None)
        if keys is None or self.madtp_spec.encoder.cross is None:  # without layers to read it Hugging Face ignores it
            return None
        if isinstance(keys, tuple):
            return tuple(self._read(part, mask) for part in keys)
        return self._read(keys, mask)

    def _read(self, keys: Any, mask: Any) -> RepeatedSequences:
        """encoder_hidden_states (B, M, C) as keys; of a patched tower those that are left."""
        if isinstance(keys, RepeatedSequences):
            return keys
        if not isinstance(keys, Tensor) or keys.ndim != 3:
            raise ValueError(f"encoder_hidden_states must be a tensor of shape (B, M, C), got {described(keys)}")
        left = ragged_of(keys)
        if left is None:
            left = RaggedBatch.from_padded(
                keys, real_tokens(mask, keys.shape[0], keys.shape[1], causal=False), None, self.madtp_branch.fixed(self)
            )
        return left.in_order()

    def _embedded(self, given: dict[str, Any]) -> tuple[Tensor | None, Tensor]:
        names = self.madtp_arguments.names
        ready = given.pop("encoder_embeds", None) if "encoder_embeds" in names else None
        ids = given.pop("input_ids", None)
        words = given.pop("inputs_embeds", None) if "inputs_embeds" in names else None
        if ready is not None:
            return None, _checked(ready, "encoder_embeds", "(B, N, C)", 3)
        embeddings = attrgetter(self.madtp_spec.embeddings)(self)
        if words is None:
            ids = _checked(ids, "input_ids", "(B, N)", 2)
            return ids, embeddings(ids, **self._options(given))
        if ids is not None:
            raise ValueError("inputs_embeds must be unset where input_ids are given, got both")
        words = _checked(words, "inputs_embeds", "(B, N, C)", 3)
        return None, embeddings(inputs_embeds=words, **self._options(given))


def _checked(value: Any, name: str, shape: str, ndim: int) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim != ndim:
        got = tuple(value.shape) if isinstance(value, Tensor) else described(value)
        raise ValueError(f"{name} must be a tensor of shape {shape}, got {got}")
    return value


class _Ragged:
    """What the last_hidden_state of a patched tower carries for those who read ragged batches.

    It does not go where the tensor is saved or copied to: pickled, it is an empty mapping, which torch.load takes.
    """

    def __init__(self, batch: RaggedBatch, version: int):
        self.batch, self.version = batch, version

    def __reduce__(self):
        return OrderedDict, ()


def _version(features: Tensor) -> int:
    """How often a tensor was written to, where that is counted."""
    counted = not (torch.compiler.is_compiling() or features.is_inference())
    return features._version if counted else 0


def ragged_of(features: Any) -> RaggedBatch | None:
    """The ragged batch whose padded form is the last_hidden_state of a patched tower; None for any other.

    Raises:
        RuntimeError: somebody has written to it since.
    """
    ragged = getattr(features, "madtp_ragged", None)
    if not isinstance(ragged, _Ragged):
        return None
    if ragged.version != _version(features):
        raise RuntimeError("last_hidden_state must be what the patched tower returned, got one written to since")
    return ragged.batch


def tokens_left(features: Tensor) -> RaggedBatch:
    """`ragged_of`, of what a patched tower must have returned. Raises RuntimeError where it is a copy of that."""
    batch = ragged_of(features)
    if batch is None:
        raise RuntimeError("last_hidden_state must be the tensor that the patched tower returned, got a copy of it")
    return batch


FORWARDS = {"pixel_values": RaggedVisionTower, "input_ids": RaggedTextTower}  # by what a tower encodes


def ragged(tower: nn.Module) -> RaggedTower:
    """The tower of a patched model, as what it is: Hugging Face declares its class."""
    return cast(RaggedTower, tower)
