"""HWP, hardware-aware weight pruning: which weights of the Linear layers go, and when.

Scores from calibration data (`collect_inputs`), masks in one shot (`prune_one_shot`) or grown in training
(`WeightPruner`), and channels reordered first so that the masks take less (`permute_mlps`).
"""

from madtp.hwp.calibration import InputStatistics, collect_inputs
from madtp.hwp.modules import LinearSparsity, SparseModules, matches, select_modules, sparsity
from madtp.hwp.one_shot import OneShotReport, prune_one_shot
from madtp.hwp.permutation import Permutation, fold_permutation, mlp_pairs, permute_mlps, search_permutation
from madtp.hwp.pruner import WeightPruner, bake
from madtp.hwp.scores import activation_score, reconstruct
from madtp_kernels.nm_patterns import Pattern, explain_pattern, is_pattern

__all__ = [
    "InputStatistics",
    "LinearSparsity",
    "OneShotReport",
    "Pattern",
    "Permutation",
    "SparseModules",
    "WeightPruner",
    "activation_score",
    "bake",
    "collect_inputs",
    "explain_pattern",
    "fold_permutation",
    "is_pattern",
    "matches",
    "mlp_pairs",
    "permute_mlps",
    "prune_one_shot",
    "reconstruct",
    "search_permutation",
    "select_modules",
    "sparsity",
]
