# SPDX-License-Identifier: Apache-2.0
import torch

from op_examples import varlen_attention

# Where the inputs of the forward change, what it left (out, lse) is not theirs any more.
DERIVED = frozenset(
    {
        *("out", "lse", "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "softmax_scale"),
        *("causal", "window_left", "window_right", "softcap", "alibi_slopes", "summary_index"),
    }
)


def arguments(sizes):
    forward = varlen_attention.arguments(sizes)
    out, _, _, lse = torch.ops.madtp.varlen_attention(**forward)
    return {
        "grad_out": torch.rand(out.shape),
        "grad_summary_attention": torch.rand(sizes.rows),
        "grad_received_attention": torch.rand(sizes.rows),
        "out": out,
        "lse": lse,
        **forward,
    }
