# SPDX-License-Identifier: Apache-2.0
import torch

import madtp_kernels as mk
from op_examples import gather_merge
from op_examples.common import ROWS, SELECTION, random64

DERIVED = gather_merge.DERIVED


def arguments(sizes):
    norm = {"weight": torch.rand(sizes.channels), "bias": torch.rand(sizes.channels), "eps": 1e-5}
    return {**gather_merge.arguments(sizes), **norm}


def gather_layernorm(x, merge_weight, weight, bias, backend):
    selection = SELECTION._replace(merge_weight=merge_weight)
    return sum(mk.gather_merge_layernorm(x, selection, weight, bias, backend=backend))


CALLS = {gather_layernorm: lambda: (random64(ROWS, 8), SELECTION.merge_weight, random64(8), random64(8))}
