# SPDX-License-Identifier: Apache-2.0
"""DTP, dynamic token pruning: ragged batches, the pruning step of a branch, and the rules for which tokens stay.

What tokens are compared with is in `mag`; where in a model the step runs is in `models`.
"""

from madtp.dtp.branch import Branch
from madtp.dtp.ragged import RaggedBatch

__all__ = ["Branch", "RaggedBatch"]
