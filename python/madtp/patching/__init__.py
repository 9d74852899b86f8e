# SPDX-License-Identifier: Apache-2.0
"""How a Hugging Face model gets its controls (`patch`, `Handle`), and how a patched one is saved, loaded and explained.

What the controls do is in `mag`, `dtp` and `hwp`; what is known of model classes is in `models`.
"""

from madtp.patching.handle import Handle, patch
from madtp.patching.pretrained import from_pretrained
from madtp.patching.state import ModelError

__all__ = ["Handle", "ModelError", "from_pretrained", "patch"]
