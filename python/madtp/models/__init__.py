"""Which models are known, and how any of them runs on ragged batches: `registry` has a row for each class.

What a branch does to its tokens is in `dtp`; the controls of a model are in `patching`.
"""

from madtp.models.blip_nlvr import BlipForNLVR
from madtp.models.blip_original import from_original
from madtp.models.encoder import CrossAttention, Encoder
from madtp.models.family import Family
from madtp.models.registry import FAMILIES, family_of
from madtp.models.tower import Tower

__all__ = ["FAMILIES", "BlipForNLVR", "CrossAttention", "Encoder", "Family", "Tower", "family_of", "from_original"]
