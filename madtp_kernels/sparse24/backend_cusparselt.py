# SPDX-License-Identifier: Apache-2.0
"""Backend `cusparselt` of 2:4 linear layers: NVIDIA's library, as torch calls it, then the epilogue in torch.

Its sparse operand comes first, so the product is (W x^T)^T, written as rows. It takes features by 16 and rows by
8: what is missing is filled with zeros, and cut off again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from madtp_kernels.checks import require
from madtp_kernels.dense.torch_product import with_epilogue
from madtp_kernels.native.common import aligned
from madtp_kernels.reference.sparse24 import sparse24_to_dense, valid_rows

FEATURE_MULTIPLE, ROW_MULTIPLE = 16, 8  # what the library takes


class Algorithm(NamedTuple):
    """Which kernel of the library runs, and how it splits the input features."""

    alg_id: int = 0
    split_k: int = 1
    split_k_mode: int = -1


DEFAULT = Algorithm()


def pack(values: Tensor, indices: Tensor) -> Tensor:
    """values (N, C/2), indices (N, C/8) -> (N to the next 16, C 9/16 or more) dtype of values, as the library reads."""
    dense = F.pad(sparse24_to_dense(values, indices), (0, 0, 0, -values.shape[0] % FEATURE_MULTIPLE))
    return torch._cslt_compress(dense) if dense.numel() else dense.new_empty(min_layout_shape(*dense.shape))


def min_layout_shape(out_features: int, in_features: int) -> tuple[int, int]:
    """The shape of what `pack` returns, whose rows are longer where the library fills up what it keeps."""
    return out_features + -out_features % FEATURE_MULTIPLE, in_features * 9 // 16


def check_layout(layout: Tensor | None, values: Tensor, indices: Tensor) -> Tensor | None:
    """`layout`, if it is None or may be what `pack` returned. Raises ValueError for another."""
    if layout is None:
        return None
    rows, columns = min_layout_shape(values.shape[0], 2 * values.shape[1])
    ok = layout.dtype == values.dtype and layout.is_contiguous() and layout.dim() == 2
    ok = ok and layout.shape[0] == rows and layout.shape[1] >= columns
    rule = f"contiguous {values.dtype} of shape ({rows}, {columns} or more), from cuSPARSELt"
    require(ok, "layout", rule, layout)
    return layout


def sparse24_linear(
    x: Tensor,  # (T, C) bfloat16 or float16, as values
    values: Tensor,  # (N, C/2)
    indices: Tensor,  # (N, C/8)
    layout: Tensor | None,  # from pack
    bias: Tensor | None,  # (N,)
    activation: str,
    residual: Tensor | None,  # (T, N)
    scale: Tensor | None,  # (N,)
    num_rows: Tensor | None,  # one int32
    algorithm: Algorithm = DEFAULT,
) -> Tensor:  # (T, N)
    """As the reference, but that the product is rounded before what follows the bias."""
    rows, out_features = x.shape[0], values.shape[0]
    if 0 in (rows, out_features, x.shape[1]):

        def product(bias: Tensor | None) -> Tensor:
            return x.new_zeros(rows, out_features) if bias is None else bias.expand(rows, out_features)

    else:
        packed = pack(values, indices) if layout is None else layout
        x_t = _padded_rows(x).t()

        def product(bias: Tensor | None) -> Tensor:
            arguments = {"transpose_result": True, **algorithm._asdict()}
            out = torch._cslt_sparse_mm(packed, x_t, bias=_padded_bias(bias), **arguments)
            return out[:rows, :out_features].contiguous()

    out = with_epilogue(product, x, values.dtype, bias, activation, residual, scale)
    return out if num_rows is None else torch.where(valid_rows(x, num_rows), out, 0)


def search(x: Tensor, layout: Tensor, bias: Tensor | None) -> Algorithm:
    """The algorithm that the library finds fastest for x (T, C) on a GPU, by trying them: milliseconds."""
    with torch.cuda.device(x.device):
        x_t, vector = _padded_rows(x).t(), _padded_bias(bias)
        library: Any = torch._C._cusparselt  # whose functions torch does not declare
        found = library.mm_search(layout, x_t, vector, None, None, True)
    return Algorithm(*found[:3])


def _padded_rows(x: Tensor) -> Tensor:
    missing = -x.shape[0] % ROW_MULTIPLE
    return aligned(F.pad(x, (0, 0, 0, missing)) if missing else x)


def _padded_bias(bias: Tensor | None) -> Tensor | None:
    if bias is None:
        return None
    missing = -bias.shape[0] % FEATURE_MULTIPLE
    return aligned(F.pad(bias, (0, missing)) if missing else bias)
