# SPDX-License-Identifier: Apache-2.0
"""What is mixed into a decoder's layers, and into the attention of those that rank: nothing of it knows a family.

Attention of transformers calls a registered function with queries and keys as they are attended, behind rotary and
norms, whatever the decoder. The attention that ranks asks for one that looks on and calls what the model is set to.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from madtp.models.prefill_seam import PrefillSeam

NAME = "madtp_watched"
IMPLEMENTATIONS = ("sdpa", "eager", "madtp")  # whose masks are known
EAGER = "eager_attention_forward"  # what the module of a decoder calls its own


class PrefillLayer(nn.Module):
    """Mixed into a decoder layer: outside of gradient checkpointing, which would prune anew."""

    madtp_prefill: PrefillSeam
    madtp_window: int | None  # columns that its tokens see back, itself included
    self_attn: Any

    def __call__(self, hidden_states: Tensor, *args, **kwargs):
        here = self.madtp_prefill.here
        if (run := here.run) is not None:
            layer, cache = self.self_attn.layer_idx, kwargs.get("past_key_values")
            form = self.self_attn.config._attn_implementation
            held = cache.layers[layer] if cache is not None and layer < len(cache.layers) else None  # some grow
            hidden_states = run.enter(layer, hidden_states, kwargs, held, form, self.madtp_window)
            here.watched = layer if run.watches(layer) else None
        try:
            return super().__call__(hidden_states, *args, **kwargs)
        finally:
            here.watched = None


class WatchedAttention(nn.Module):
    """Mixed into the attention of the layers that rank."""

    madtp_prefill: PrefillSeam
    layer_idx: int

    @property
    def config(self) -> Any:
        config = vars(self)["config"]
        return Watched(config, NAME) if self.madtp_prefill.here.watched == self.layer_idx else config

    @config.setter
    def config(self, config: Any) -> None:
        vars(self)["config"] = config


class Watched:
    """A config as it is, with another attention."""

    def __init__(self, config: Any, attention: str):
        self.config, self._attn_implementation = config, attention

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name)


def eager_attention(attention: nn.Module) -> Any:
    """The function of a decoder's own module; None where it has none of that name."""
    modules = (sys.modules.get(kind.__module__) for kind in type(attention).__mro__)
    return next((vars(module)[EAGER] for module in modules if module is not None and EAGER in vars(module)), None)


def watched_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention that the model is set to, whose queries and keys the seam sees."""
    here, config = module.madtp_prefill.here, vars(module)["config"]
    if here.run is not None:
        if attention_mask is None and not getattr(module, "is_causal", True):
            raise ValueError(
                "inputs must say who sees whom where keep prunes inside a decoder that is not causal, got no mask: "
                "pass token_type_ids, as the processor gives them"
            )
        scaling = kwargs.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        caps = config._attn_implementation in ("eager", "madtp")  # no other computes it
        softcap = kwargs.get("softcap") if caps else None
        here.run.observe(module.layer_idx, query, key, attention_mask, scaling, softcap)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager_attention(module))
    return attend(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(NAME, watched_attention)
