# SPDX-License-Identifier: Apache-2.0
import torch

import madtp_kernels as mk
from op_examples.common import OF_A_SELECTION, ROWS, SELECTION, random64, selection

DERIVED = OF_A_SELECTION


def arguments(sizes):
    return {"x": torch.rand(sizes.rows, sizes.channels), **selection(sizes), "backend": "cpu"}


def gather(x, merge_weight, backend):
    return mk.gather_merge(x, SELECTION._replace(merge_weight=merge_weight), backend=backend)


CALLS = {gather: lambda: (random64(ROWS, 8), SELECTION.merge_weight)}
