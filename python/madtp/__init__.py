"""MADTP++ for Hugging Face vision-language models: tokens pruned by alignment and 2:4 weights, trained jointly."""

from madtp.budgets.allocate import allocate, pareto
from madtp.budgets.plan import Plan
from madtp.compression import Result, compress
from madtp.config import CompressionConfig
from madtp.measure.figures import measure
from madtp.measure.macs import profile
from madtp.models import attention_interface as attention_interface  # registers "madtp" with transformers
from madtp.patching.handle import patch
from madtp.patching.pretrained import from_pretrained
from madtp.patching.state import ModelError
from madtp.training.trainer import MadtpTrainer

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
