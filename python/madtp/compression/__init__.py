# SPDX-License-Identifier: Apache-2.0
"""`compress`: targets, joint training, calibration on the targets, saving, and the report of it.

The parts are elsewhere: plans in `madtp.budgets`, the trainer in `madtp.training`, figures in `madtp.profiling`.
"""

from madtp.compression.pipeline import Result, compress
from madtp.compression.report import versions
from madtp.compression.targets import Targets, predict_targets

__all__ = ["Result", "Targets", "compress", "predict_targets", "versions"]
