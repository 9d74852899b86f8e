# SPDX-License-Identifier: Apache-2.0
"""2:4 weights from and to the formats of others: torch's semi-structured tensors, compressed-tensors' bitmask."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensor, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from madtp_kernels.checks import check_tensor, require
from madtp_kernels.nm_patterns import is_pattern
from madtp_kernels.sparse24.weight import DTYPES, Sparse24Weight, pack_positions, sparse24_compress


def to_torch_semi_structured(weight: Sparse24Weight) -> SparseSemiStructuredTensorCUTLASS:
    """As `torch.sparse.to_sparse_semi_structured` has it on its CUTLASS backend, on the device of weight.

    Raises:
        ValueError: torch has no such tensor: N must be a multiple of 32, C of 64 (32 in float32), the dtype float32,
            bfloat16 or float16, and a float32 weight 1:2, because TF32 Sparse Tensor Cores run nothing else.
    """
    limits = SparseSemiStructuredTensorCUTLASS._DTYPE_SHAPE_CONSTRAINTS
    require(weight.dtype in limits, "weight", "float32, bfloat16 or float16 for torch", repr(weight))
    rows, columns = limits[weight.dtype].sparse_min_rows, limits[weight.dtype].sparse_min_cols
    ok = weight.shape[0] % rows == 0 and weight.shape[1] % columns == 0 and weight.values.numel() > 0
    require(ok, "weight", f"(N, C) with N a multiple of {rows} and C of {columns} for torch", repr(weight))
    dense = weight.to_dense()
    if weight.dtype == torch.float32:
        require(is_pattern(dense, "1:2"), "weight", "1:2 in float32 for torch (its TF32 kernels)", "a 2:4 weight")
    packed, meta = sparse_semi_structured_from_dense_cutlass(dense)
    return SparseSemiStructuredTensorCUTLASS(weight.shape, packed, meta, None, None, None)


def from_torch_semi_structured(tensor: SparseSemiStructuredTensor) -> Sparse24Weight:
    """A torch semi-structured tensor of the CUTLASS backend -> the canonical form.

    Raises:
        ValueError: another kind. cuSPARSELt keeps its layout to itself: there, `sparse24_compress(tensor.to_dense())`.
    """
    ok = isinstance(tensor, SparseSemiStructuredTensorCUTLASS) and tensor.packed is not None and tensor.dtype in DTYPES
    rule = "a floating-point SparseSemiStructuredTensorCUTLASS (for cuSPARSELt compress its to_dense())"
    require(ok, "tensor", rule, f"a {type(tensor).__name__} of {getattr(tensor, 'dtype', None)}")
    assert tensor.packed is not None  # as was required
    # As integers: torch moves the halves of a float32 as float16, and those that are signalling NaN would change.
    dense = sparse_semi_structured_to_dense_cutlass(tensor.packed.view(torch.int16), tensor.meta)
    return sparse24_compress(dense.view(tensor.dtype))


def to_bitmask(weight: Sparse24Weight) -> dict[str, Tensor]:
    """The "sparse-24-bitmask" format, as compressed-tensors 0.12 has it; its names follow the module's.

    Returns:
        "shape" (2, 1) int64; "compressed" (N, C/2), the values; "bitmask" (N, C/8) uint8, bit c % 8 of byte c // 8 set
        where column c is kept.
    """
    rows, columns = weight.shape
    kept = (1 << weight.positions()).sum(-1)  # (N, C/4): 4 bits a group
    bitmask = (kept[:, 0::2] | kept[:, 1::2] << 4).to(torch.uint8)
    return {"shape": torch.tensor([[rows], [columns]]), "compressed": weight.values, "bitmask": bitmask}


def from_bitmask(shape: Tensor, compressed: Tensor, bitmask: Tensor) -> Sparse24Weight:
    """What `to_bitmask` gives -> the canonical form.

    Raises:
        ValueError: the shapes disagree, or a group does not have exactly 2 bits.
    """
    check_tensor("compressed", compressed, 2, DTYPES)
    rows, columns = compressed.shape[0], 2 * compressed.shape[1]
    require(shape.flatten().tolist() == [rows, columns], "shape", f"{[rows, columns]} like compressed", str(shape))
    check_tensor("bitmask", bitmask, 2, (torch.uint8,))
    require(bitmask.shape == (rows, columns // 8), "bitmask", f"(N, C/8) = {(rows, columns // 8)}", bitmask)
    bits = torch.arange(8, dtype=torch.uint8, device=bitmask.device)
    kept = ((bitmask[..., None] >> bits) & 1).bool().flatten(1)
    wrong = kept.unflatten(1, (-1, 4)).sum(-1) != 2
    if wrong.any():
        row, group = wrong.nonzero()[0].tolist()
        require(False, "bitmask", "of exactly 2 bits in every 4", f"another number at row {row}, group {group}")
    return Sparse24Weight(compressed + 0.0, pack_positions(kept))
