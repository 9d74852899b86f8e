"""BLIP-2 (Li et al., ICML 2023): its vision tower prunes; the Q-Former keeps its queries and reads what is left."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def qformer_masks(model: nn.Module) -> Callable[[], None]:
    """Lets the Q-Former read the packed image tokens, merged ones among them, with the mask they need.

    Hugging Face passes it the features of all positions and a mask of ones, from half a dozen places.
    """

    def hand_over(module, args, kwargs):
        packed = getattr(kwargs.get("encoder_hidden_states"), "madtp_packed", None)
        if packed is None:
            return None
        hidden, mask = packed.to_padded()
        return args, kwargs | {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}

    return model.qformer.register_forward_pre_hook(hand_over, with_kwargs=True).remove
