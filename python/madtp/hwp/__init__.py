# SPDX-License-Identifier: Apache-2.0
"""HWP, hardware-aware weight pruning: scores of weights, N:M masks in one shot or grown in training, packed layers.

The patterns themselves are in `madtp_kernels.nm_patterns`; how many Linears go is decided in `budgets`, and when in
`training`.
"""

from madtp.hwp.admm import reconstruct_admm, reconstruct_admm_rounded
from madtp.hwp.calibration import InputStatistics, collect_inputs
from madtp.hwp.fake_quantization import FakeQuantizer
from madtp.hwp.modules import LinearSparsity, SparseModules, matches, select_modules, sparsity
from madtp.hwp.one_shot import OneShotReport, prune_one_shot
from madtp.hwp.packed_linear import PackedLinear, activated_linear, linear, residual_linear
from madtp.hwp.packing import Epilogue, explain_linears, pack, unpack
from madtp.hwp.permutation import Permutation, fold_permutation, mlp_pairs, permute_mlps, search_permutation
from madtp.hwp.pruner import WeightPruner, bake
from madtp.hwp.quantized_linear import QuantizedLinear
from madtp.hwp.rounding import reconstruct_rounded, round_weight
from madtp.hwp.rounding_sensitivity import rounding_sensitivity, select_rounded
from madtp.hwp.scores import activation_score, reconstruct
from madtp.hwp.smoothing import NormReaders, Smoothing, smooth
from madtp.hwp.sparse24_linear import Sparse24Linear
from madtp.hwp.weight_grid import GridWeight
from madtp_kernels.nm_patterns import Pattern, explain_pattern, is_pattern

__all__ = [
    "Epilogue",
    "FakeQuantizer",
    "GridWeight",
    "InputStatistics",
    "LinearSparsity",
    "NormReaders",
    "OneShotReport",
    "PackedLinear",
    "Pattern",
    "Permutation",
    "QuantizedLinear",
    "Smoothing",
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
    "reconstruct_admm",
    "reconstruct_admm_rounded",
    "reconstruct_rounded",
    "residual_linear",
    "round_weight",
    "search_permutation",
    "select_rounded",
    "select_modules",
    "rounding_sensitivity",
    "smooth",
    "sparsity",
    "unpack",
]
