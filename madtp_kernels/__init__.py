"""Kernels that compress vision-language transformers: ragged token pruning, attention with statistics, 2:4 sparsity.

Importing never fails for a missing capability: a call that needs one raises and says what is missing (see `explain`).
"""

from madtp_kernels.dispatch import explain
from madtp_kernels.ops.attention import AttentionStats, varlen_attention
from madtp_kernels.ops.masks import nm_mask
from madtp_kernels.ops.sparse24 import sparse24_linear
from madtp_kernels.ops.tokens import Selection, gather_merge, gather_merge_layernorm, select_tokens, token_importance

__version__ = "0.1.0"

__all__ = [
    "AttentionStats",
    "Selection",
    "explain",
    "gather_merge",
    "gather_merge_layernorm",
    "nm_mask",
    "select_tokens",
    "sparse24_linear",
    "token_importance",
    "varlen_attention",
]
