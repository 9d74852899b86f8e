# SPDX-License-Identifier: Apache-2.0
import torch

from op_examples import attention_rows


def arguments(sizes):
    return {"grad": torch.rand(sizes.rows), **attention_rows.arguments(sizes), "backend": "reference"}
