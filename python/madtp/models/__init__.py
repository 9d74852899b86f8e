"""Packed forwards of the model families: one small file per family, registered in `FAMILIES`."""

from madtp.models.blip import BLIP_VQA

FAMILIES = (BLIP_VQA,)

__all__ = ["FAMILIES"]
