# SPDX-License-Identifier: Apache-2.0
import torch

import madtp_kernels as mk
from op_examples import gather_merge
from op_examples.common import ROWS, SELECTION, random64

DERIVED = gather_merge.DERIVED


def arguments(sizes):
    return {**gather_merge.arguments(sizes), "weight": torch.rand(sizes.channels), "eps": 1e-6}


def gather_rmsnorm(x, merge_weight, weight, backend):
    selection = SELECTION._replace(merge_weight=merge_weight)
    return sum(mk.gather_merge_rmsnorm(x, selection, weight, backend=backend))


CALLS = {gather_rmsnorm: lambda: (random64(ROWS, 8), SELECTION.merge_weight, random64(8))}
