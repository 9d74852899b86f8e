# SPDX-License-Identifier: Apache-2.0
"""Kernels that compress vision-language transformers: ragged token pruning, attention with statistics, 2:4 sparsity.

Importing never fails for a missing capability: a call that needs one raises and says what is missing (see `explain`).
"""

from madtp_kernels._version import __version__
from madtp_kernels.decompositions import decompositions
from madtp_kernels.dispatch import explain
from madtp_kernels.nm_masks import nm_mask, transposable_mask
from madtp_kernels.nm_patterns import Pattern, explain_pattern
from madtp_kernels.ops.attention import AttentionStats, varlen_attention
from madtp_kernels.ops.attention_rows import attention_rows
from madtp_kernels.ops.dense import dense_linear
from madtp_kernels.ops.prune import Pruned, prune_tokens, score_and_select
from madtp_kernels.ops.quantized import quantized_linear
from madtp_kernels.ops.sparse24 import sparse24_linear
from madtp_kernels.ops.sparse24_prune import sparse24_prune
from madtp_kernels.ops.tokens import (
    Selection,
    gather_merge,
    gather_merge_layernorm,
    gather_merge_rmsnorm,
    select_tokens,
    token_importance,
)
from madtp_kernels.quantized.files import load_quantized, save_quantized
from madtp_kernels.quantized.weight import QuantizedWeight, quantize
from madtp_kernels.sparse24.files import load_sparse24, save_sparse24
from madtp_kernels.sparse24.weight import Sparse24Weight, sparse24_compress

__all__ = [
    "AttentionStats",
    "Pattern",
    "Pruned",
    "QuantizedWeight",
    "Selection",
    "Sparse24Weight",
    "__version__",
    "attention_rows",
    "decompositions",
    "dense_linear",
    "explain",
    "explain_pattern",
    "gather_merge",
    "gather_merge_layernorm",
    "gather_merge_rmsnorm",
    "load_quantized",
    "load_sparse24",
    "nm_mask",
    "prune_tokens",
    "quantize",
    "quantized_linear",
    "save_quantized",
    "save_sparse24",
    "score_and_select",
    "select_tokens",
    "sparse24_compress",
    "sparse24_linear",
    "sparse24_prune",
    "token_importance",
    "transposable_mask",
    "varlen_attention",
]
