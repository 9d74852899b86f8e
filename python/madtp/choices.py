# SPDX-License-Identifier: Apache-2.0
"""What options can be and are by default, for those who must not wait for torch: `madtp --help` reads only this."""

ALLOCATIONS = (
    "joint",
    "uniform",
    "tokens",
    "weights",
    "width",
    "width_weights",
)  # of a budget, see `madtp.budgets.allocate`
REDUCTIONS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # of MACs, for which `pareto` makes plans
WEIGHT_DTYPES = ("int8", "fp8")  # of packed weights, beside that of the model
TASKS = ("vqa", "retrieval", "nlvr", "captioning", "vlm")  # the rows of `madtp.tasks.registry`
CORRECTIONS = ("second_order", "admm")  # of weights that are pruned in one shot, see `madtp.hwp.prune_one_shot`
MASKINGS = ("reweighted", "s_ste")  # in training, beside SR-STE, see `madtp.hwp.WeightPruner`
DATA = ("easy-vqa", "emoji", "mosaics")  # the data sets with a name there
DEMO_STEPS = 300
DEMO_REDUCTION = 0.6
DEMO_PICTURE = "tokens.png"
DEMO_SHARE = 0.25  # of the tokens of an image, in the demo of decoders
VECTORS = ("projected", "pooled")  # of an image, see `madtp.embedding.encoder`
VECTOR_DTYPES = ("float32", "float16")  # in which vectors are written
BROKEN = ("skip", "refuse")  # what to do with an image that cannot be read
