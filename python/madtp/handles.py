# SPDX-License-Identifier: Apache-2.0
"""The controls of a patched model, found from any layer: what `madtp.patch` keeps as `model.madtp_handle`.

`torch.nn.Module` says of an attribute only that it is a tensor or a module; these say which type it has. `Handle`
itself lives in `patching`, at the top of what asks for it, so it is imported for its type alone. The `VlmHandle` of a
decoder has of it what all models need: `branches`, none of which prunes, `dense()`, `inference()` and `save`, and what
the training asks for: `temperatures`, `spending`, `summary_features`, `as_left`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from madtp.patching.handle import Handle


def find_handle(model: nn.Module) -> Handle | None:
    """The handle of a patched model; None for any other."""
    return getattr(model, "madtp_handle", None)


def handle_of(model: nn.Module) -> Handle:
    """The handle of a patched model.

    Raises:
        ValueError: the model is not patched.
    """
    handle = find_handle(model)
    if handle is None:
        raise ValueError(f"model must be patched (madtp.patch), got a plain {type(model).__name__}")
    return handle
