# SPDX-License-Identifier: Apache-2.0
import torch

from op_examples import gather_merge

DERIVED = gather_merge.DERIVED


def arguments(sizes):
    forward = gather_merge.arguments(sizes)
    return {"grad": torch.rand(forward["source"].numel(), sizes.channels), **forward}
