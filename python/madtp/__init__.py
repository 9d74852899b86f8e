"""MADTP++ for Hugging Face vision-language models: tokens pruned by alignment and 2:4 weights, trained jointly."""

from madtp import attention_interface as attention_interface  # registers "madtp" with transformers
from madtp.accounting import profile
from madtp.budget import Plan, allocate, pareto
from madtp.compression import Result, compress, measure
from madtp.config import CompressionConfig
from madtp.patching import ModelError, from_pretrained, patch
from madtp.trainer import MadtpTrainer

__all__ = [
    "CompressionConfig",
    "MadtpTrainer",
    "ModelError",
    "Plan",
    "Result",
    "allocate",
    "compress",
    "from_pretrained",
    "measure",
    "pareto",
    "patch",
    "profile",
]
