# SPDX-License-Identifier: Apache-2.0
"""How a Hugging Face model gets its controls (`patch`, `Handle`), and how a patched one is saved, loaded and explained.

What the controls do is in `mag`, `dtp` and `hwp`; what is known of model classes is in `models`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from madtp.lazy import attach

if TYPE_CHECKING:
    from madtp.patching.compressed_tensors import load_compressed_tensors as load_compressed_tensors
    from madtp.patching.handle import Handle as Handle
    from madtp.patching.handle import patch as patch
    from madtp.patching.pretrained import from_pretrained as from_pretrained
    from madtp.patching.state import ModelError as ModelError

_API = {
    "Handle": "madtp.patching.handle",
    "ModelError": "madtp.patching.state",
    "from_pretrained": "madtp.patching.pretrained",
    "load_compressed_tensors": "madtp.patching.compressed_tensors",
    "patch": "madtp.patching.handle",
}

__all__ = list(_API)
# Lazy because transformers registers `quantizer` in the midst of its own import.
__getattr__, __dir__ = attach(__name__, _API)
