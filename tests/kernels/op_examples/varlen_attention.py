# SPDX-License-Identifier: Apache-2.0
import torch

import madtp_kernels as mk
from op_examples.common import CU_SEQLENS, ROWS, random64


def arguments(sizes):
    return {
        **{name: torch.rand(sizes.rows, sizes.heads, sizes.head_dim) for name in ("q", "k", "v")},
        **{name: sizes.cu_seqlens for name in ("cu_seqlens_q", "cu_seqlens_k")},
        **{name: max(sizes.lengths, default=0) for name in ("max_seqlen_q", "max_seqlen_k")},
        "softmax_scale": 0.25,
        "causal": False,
        "window_left": -1,
        "window_right": -1,
        "softcap": 0.0,
        "alibi_slopes": None,
        "summary_index": sizes.summary_index,
        "return_stats": True,
        "backend": "cpu",
    }


def attention(q, k, v, backend):
    return mk.varlen_attention(q, k, v, CU_SEQLENS, max_seqlen_q=7, causal=True, backend=backend)


def attention_statistics(q, k, v, backend):
    out, stats = mk.varlen_attention(q, k, v, CU_SEQLENS, max_seqlen_q=7, return_stats=True, backend=backend)
    return out.sum((1, 2)) + stats.summary_attention + stats.received_attention


def attention_of_groups_in_a_window(q, k, v, backend):
    options = {"window_size": (3, 1), "softcap": 2.0, "alibi_slopes": torch.tensor([0.5, 0.25])}
    return mk.varlen_attention(q, k, v, CU_SEQLENS, max_seqlen_q=7, **options, backend=backend)


def qkv():
    return tuple(random64(ROWS, 2, 16) for _ in range(3))


def grouped_qkv():
    return random64(ROWS, 2, 16), random64(ROWS, 1, 16), random64(ROWS, 1, 16)


CALLS = {attention: qkv, attention_statistics: qkv, attention_of_groups_in_a_window: grouped_qkv}
