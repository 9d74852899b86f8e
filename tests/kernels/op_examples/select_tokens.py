# SPDX-License-Identifier: Apache-2.0
import torch

import madtp_kernels as mk
from op_examples.common import CU_SEQLENS, LOGITS, STATS


def arguments(sizes):
    return {
        "importance": torch.rand(sizes.rows),
        "mag_logits": torch.rand(sizes.rows, 3),
        "cu_seqlens": sizes.cu_seqlens,
        "temperature": 5.0,
        "summary_index": sizes.summary_index,
        "protected": torch.arange(sizes.rows) % 5 == 2,
        "backend": "cpu",
    }


def selection(importance, backend):
    logits = LOGITS.to(importance.dtype)
    return mk.select_tokens(importance, logits, CU_SEQLENS, 5.0, capacity="upper_bound", backend=backend).merge_weight


CALLS = {selection: lambda: (mk.token_importance(STATS, LOGITS, CU_SEQLENS),)}
