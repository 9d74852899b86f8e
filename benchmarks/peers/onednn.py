# SPDX-License-Identifier: Apache-2.0
"""oneDNN's dense product with the weight packed once, by the ops that torch's compiler uses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.entry import Unavailable


def linear(
    weight: Tensor,  # (N, C) float32 or bfloat16
    bias: Tensor,  # (N,) the same
) -> Callable[[Tensor], Tensor]:
    """x (T, C) of the same dtype -> (T, N). Raises `Unavailable` where torch or the CPU does not have it."""
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        product = torch.ops.mkldnn._linear_pointwise.default
        product(weight[:1], packed, bias, "none", [], "")
    except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:  # the ops are private
        raise Unavailable(f"torch {torch.__version__}: {str(error).strip().splitlines()[0]}") from None
    return lambda x: product(x, packed, bias, "none", [], "")
