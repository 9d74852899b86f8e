# SPDX-License-Identifier: Apache-2.0
"""Which models are known, and how any of them runs on ragged batches: `registry` has a row for each class.

What a branch does to its tokens is in `dtp`; the controls of a model are in `patching`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from madtp.lazy import attach

if TYPE_CHECKING:
    from madtp.models.blip_nlvr import BlipForNLVR as BlipForNLVR
    from madtp.models.blip_original import from_original as from_original
    from madtp.models.encoder import CrossAttention as CrossAttention
    from madtp.models.encoder import Encoder as Encoder
    from madtp.models.family import Family as Family
    from madtp.models.norms import norm_readers as norm_readers
    from madtp.models.registry import FAMILIES as FAMILIES
    from madtp.models.registry import family_of as family_of
    from madtp.models.tower import Tower as Tower

_API = {
    "FAMILIES": "madtp.models.registry",
    "BlipForNLVR": "madtp.models.blip_nlvr",
    "CrossAttention": "madtp.models.encoder",
    "Encoder": "madtp.models.encoder",
    "Family": "madtp.models.family",
    "Tower": "madtp.models.tower",
    "family_of": "madtp.models.registry",
    "from_original": "madtp.models.blip_original",
    "norm_readers": "madtp.models.norms",
}

__all__ = list(_API)
# Lazy because transformers registers `attention_interface` in the midst of loading the classes of `registry`.
__getattr__, __dir__ = attach(__name__, _API)
