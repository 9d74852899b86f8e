# SPDX-License-Identifier: Apache-2.0
"""MADTP++ for Hugging Face vision-language models: tokens pruned by alignment and 2:4 weights, trained jointly.

Here are the public names, each loaded from its room when it is first used; how anything works is in the rooms.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING

from madtp.import_hook import when_imported
from madtp.lazy import attach

if TYPE_CHECKING:
    from madtp.budgets.allocate import allocate as allocate
    from madtp.budgets.allocate import pareto as pareto
    from madtp.budgets.plan import Plan as Plan
    from madtp.budgets.seam_pareto import seam_pareto as seam_pareto
    from madtp.compression import Result as Result
    from madtp.compression import compress as compress
    from madtp.config import CompressionConfig as CompressionConfig
    from madtp.dtp.keep import Keep as Keep
    from madtp.embedding import Embedded as Embedded
    from madtp.embedding import embed as embed
    from madtp.exporting import export as export
    from madtp.patching.compressed_tensors import load_compressed_tensors as load_compressed_tensors
    from madtp.patching.handle import patch as patch
    from madtp.patching.pretrained import from_pretrained as from_pretrained
    from madtp.patching.state import ModelError as ModelError
    from madtp.profiling.figures import measure as measure
    from madtp.profiling.macs import profile as profile
    from madtp.profiling.prompt_cost import prompt_cost as prompt_cost
    from madtp.training.trainer import MadtpTrainer as MadtpTrainer
    from madtp.width.prune import prune_width as prune_width
    from madtp_kernels import __version__ as __version__

_API = {
    "CompressionConfig": "madtp.config",
    "Embedded": "madtp.embedding",
    "Keep": "madtp.dtp.keep",
    "MadtpTrainer": "madtp.training.trainer",
    "ModelError": "madtp.patching.state",
    "Plan": "madtp.budgets.plan",
    "Result": "madtp.compression",
    "allocate": "madtp.budgets.allocate",
    "compress": "madtp.compression",
    "embed": "madtp.embedding",
    "export": "madtp.exporting",
    "from_pretrained": "madtp.patching.pretrained",
    "load_compressed_tensors": "madtp.patching.compressed_tensors",
    "measure": "madtp.profiling.figures",
    "pareto": "madtp.budgets.allocate",
    "patch": "madtp.patching.handle",
    "profile": "madtp.profiling.macs",
    "prompt_cost": "madtp.profiling.prompt_cost",
    "prune_width": "madtp.width.prune",
    "seam_pareto": "madtp.budgets.seam_pareto",
}
_ROOMS = (
    "budgets",
    "data",
    "dtp",
    "embedding",
    "hwp",
    "models",
    "patching",
    "profiling",
    "reporting",
    "tasks",
    "training",
    "width",
)

__all__ = list(_API)
__getattr__, __dir__ = attach(
    __name__, _API | {"__version__": "madtp_kernels"} | {room: f"madtp.{room}" for room in _ROOMS}
)


def _register() -> None:
    """Tells transformers of the attention "madtp", and of the method "madtp" that loads what we saved, patched."""
    parts = {'the attention "madtp"': "madtp.models.attention_interface", "its loader": "madtp.patching.quantizer"}
    for what, module in parts.items():
        try:
            import_module(module)
        except ImportError as error:  # of the import of transformers that called this, which is none of our business
            warnings.warn(f"transformers does not get {what}: {error}", stacklevel=2)


when_imported("transformers.modeling_utils", _register)
