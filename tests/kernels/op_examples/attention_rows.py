# SPDX-License-Identifier: Apache-2.0
import torch

import madtp_kernels as mk
from op_examples.common import CU_SEQLENS, ROWS, cu_seqlens_of, random64

POSITION = torch.tensor([4, -1, 6, 2], dtype=torch.int32)


def arguments(sizes):
    """Two rows of every sequence, and two query heads of every key head."""
    rows = 2 * len(sizes.lengths)
    return {
        "q_rows": torch.rand(rows, 2 * sizes.heads, sizes.head_dim),
        "k": torch.rand(sizes.rows, sizes.heads, sizes.head_dim),
        "cu_seqlens_q": cu_seqlens_of([2] * len(sizes.lengths)),
        "cu_seqlens_k": sizes.cu_seqlens,
        "row_position": torch.arange(rows, dtype=torch.int32),
        "softmax_scale": 0.25,
        "backend": "cpu",
    }


def rows_attend(q_rows, k, backend):
    return mk.attention_rows(q_rows, k, cu_seqlens_of([2, 2]), CU_SEQLENS, POSITION, backend=backend)


CALLS = {rows_attend: lambda: (random64(4, 4, 8), random64(ROWS, 2, 8))}
