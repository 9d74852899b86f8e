"""HWP, hardware-aware weight pruning: which weights of the Linear layers go, and when.

Scores from calibration data (`collect_inputs`), masks in one shot (`prune_one_shot`) or grown in training
(`WeightPruner`), channels reordered first so that the masks take less (`permute_mlps`), and in the end layers that
run on the sparse kernels (`pack`).
"""

from madtp.hwp.calibration import InputStatistics, collect_inputs
from madtp.hwp.modules import LinearSparsity, SparseModules, matches, select_modules, sparsity
from madtp.hwp.one_shot import OneShotReport, prune_one_shot
from madtp.hwp.packing import Follower, Sparse24Linear, explain_linears, linear, pack, residual_linear, unpack
from madtp.hwp.permutation import Permutation, fold_permutation, mlp_pairs, permute_mlps, search_permutation
from madtp.hwp.pruner import WeightPruner, bake
from madtp.hwp.scores import activation_score, reconstruct
from madtp_kernels.nm_patterns import Pattern, explain_pattern, is_pattern

__all__ = [
    "Follower",
    "InputStatistics",
    "LinearSparsity",
    "OneShotReport",
    "Pattern",
    "Permutation",
    "Sparse24Linear",
    "SparseModules",
    "WeightPruner",
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
