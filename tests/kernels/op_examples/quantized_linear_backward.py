# SPDX-License-Identifier: Apache-2.0
import torch

from op_examples import quantized_linear


def arguments(sizes):
    return {"grad": torch.rand(sizes.rows, sizes.features[0]), **quantized_linear.arguments(sizes)}
