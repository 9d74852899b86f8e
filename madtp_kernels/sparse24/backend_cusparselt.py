"""Backend `cusparselt` of 2:4 linear layers: NVIDIA's library, as torch calls it, then the epilogue in torch.

Its sparse operand comes first, so the product is (W x^T)^T, written as rows. It takes features by 16 and rows by
8: what is missing is filled with zeros, and cut off again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from madtp_kernels.native.common import aligned
from madtp_kernels.reference.sparse24 import sparse24_to_dense
from madtp_kernels.sparse24.backend_dense import with_epilogue

FEATURES, ROWS = 16, 8  # come in multiples of these


class Algorithm(NamedTuple):
    """Which kernel of the library runs, and how it splits the channels."""

    alg_id: int = 0
    split_k: int = 1
    split_k_mode: int = -1


DEFAULT = Algorithm()


def pack(values: Tensor, indices: Tensor) -> Tensor:
    """values (N, C/2), indices (N, C/8) -> (N to the next 16, C 9/16 or more) dtype of values, as the library reads."""
    dense = F.pad(sparse24_to_dense(values, indices), (0, 0, 0, -values.shape[0] % FEATURES))
    return torch._cslt_compress(dense) if dense.numel() else dense.new_empty(least_layout(*dense.shape))


def least_layout(features: int, channels: int) -> tuple[int, int]:
    """The shape of what `pack` returns, whose rows are longer where the library fills up what it keeps."""
    return features + -features % FEATURES, channels * 9 // 16


def sparse24_linear(
    x: Tensor,  # (T, C) bfloat16 or float16, as values
    values: Tensor,  # (N, C/2)
    indices: Tensor,  # (N, C/8)
    layout: Tensor | None,  # from pack
    bias: Tensor | None,  # (N,)
    activation: str,
    residual: Tensor | None,  # (T, N)
    scale: Tensor | None,  # (N,)
    total: Tensor | None,  # one int32
    algorithm: Algorithm = DEFAULT,
) -> Tensor:  # (T, N)
    """As the reference, but that the product is rounded before what follows the bias."""
    rows, features = x.shape[0], values.shape[0]
    if 0 in (rows, features, x.shape[1]):

        def product(bias: Tensor | None) -> Tensor:
            return x.new_zeros(rows, features) if bias is None else bias.expand(rows, features)

    else:
        packed = pack(values, indices) if layout is None else layout
        x_t = _padded_rows(x).t()

        def product(bias: Tensor | None) -> Tensor:
            arguments = {"transpose_result": True, **algorithm._asdict()}
            out = torch._cslt_sparse_mm(packed, x_t, bias=_padded_bias(bias), **arguments)
            return out[:rows, :features].contiguous()

    return with_epilogue(product, x, values.dtype, bias, activation, residual, scale, total)


def search(x: Tensor, layout: Tensor, bias: Tensor | None) -> Algorithm:
    """The algorithm that the library finds fastest for x (T, C) on a GPU, by trying them: milliseconds."""
    with torch.cuda.device(x.device):
        x_t, vector = _padded_rows(x).t(), _padded_bias(bias)
        found = torch._C._cusparselt.mm_search(layout, x_t, vector, None, None, True)
    return Algorithm(*found[:3])


def _padded_rows(x: Tensor) -> Tensor:
    missing = -x.shape[0] % ROWS
    return aligned(F.pad(x, (0, 0, 0, missing)) if missing else x)


def _padded_bias(bias: Tensor | None) -> Tensor | None:
    if bias is None:
        return None
    missing = -bias.shape[0] % FEATURES
    return aligned(F.pad(bias, (0, missing)) if missing else bias)
