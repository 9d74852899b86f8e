# SPDX-License-Identifier: Apache-2.0
"""HWP, hardware-aware weight pruning: scores of weights, N:M masks in one shot or grown in training, packed 2:4 layers.

The patterns themselves are in `madtp_kernels.nm_patterns`; how many Linears go is decided in `budgets`, and when in
`training`.
"""

from madtp.hwp.calibration import InputStatistics, collect_inputs
from madtp.hwp.modules import LinearSparsity, SparseModules, matches, select_modules, sparsity
from madtp.hwp.one_shot import OneShotReport, prune_one_shot
from madtp.hwp.packing import (
    Epilogue,
    Sparse24Linear,
    activated_linear,
    explain_linears,
    linear,
    pack,
    residual_linear,
    unpack,
)
from madtp.hwp.permutation import Permutation, fold_permutation, mlp_pairs, permute_mlps, search_permutation
from madtp.hwp.pruner import WeightPruner, bake
from madtp.hwp.scores import activation_score, reconstruct
from madtp_kernels.nm_patterns import Pattern, explain_pattern, is_pattern

__all__ = [
    "Epilogue",
    "InputStatistics",
    "LinearSparsity",
    "OneShotReport",
    "Pattern",
    "Permutation",
    "Sparse24Linear",
    "SparseModules",
    "WeightPruner",
    "activated_linear",
    "activation_score",
    "bake",
    "collect_inputs",
    "explain_linears",
    "explain_pattern",
    "fold_permutation",
    "is_pattern",
    "linear",
    "matches",
    "mlp_pairs",
    "pack",
    "permute_mlps",
    "prune_one_shot",
    "reconstruct",
    "residual_linear",
    "search_permutation",
    "select_modules",
    "sparsity",
    "unpack",
]
