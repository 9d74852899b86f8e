# SPDX-License-Identifier: Apache-2.0
import torch

import madtp_kernels as mk
from op_examples.common import CU_SEQLENS, LOGITS, STATS


def arguments(sizes):
    return {
        "summary_attention": torch.rand(sizes.rows),
        "received_attention": torch.rand(sizes.rows),
        "mag_logits": torch.rand(sizes.rows, 3),
        "cu_seqlens": sizes.cu_seqlens,
        "summary_index": sizes.summary_index,
        "protected": torch.arange(sizes.rows) % 5 == 2,
        "backend": "cpu",
    }


def importance(summary_attention, received_attention, logits, backend):
    stats = mk.AttentionStats(summary_attention, received_attention)
    return mk.token_importance(stats, logits, CU_SEQLENS, backend=backend)


CALLS = {importance: lambda: (*STATS, LOGITS)}
