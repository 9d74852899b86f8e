"""MADTP++ for Hugging Face vision-language models: token pruning guided by alignment, and 2:4 weights, trained jointly."""

from madtp.accounting import profile
from madtp.config import CompressionConfig
from madtp.patching import ModelError, from_pretrained, patch

__all__ = ["CompressionConfig", "ModelError", "from_pretrained", "patch", "profile"]
