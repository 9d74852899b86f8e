# SPDX-License-Identifier: Apache-2.0
"""Magnitude or score pruning of a dense weight straight into the 2:4 form: in C++ in one read."""

from __future__ import annotations

import torch
from torch import Tensor

from madtp_kernels import dispatch
from madtp_kernels.checks import check_device, check_tensor, require
from madtp_kernels.native import sparse24 as native
from madtp_kernels.nm_masks import checked_scores, nm_mask
from madtp_kernels.sparse24.weight import Sparse24Weight, check_dense, sparse24_compress


@dispatch.public
def sparse24_prune(weight: Tensor, *, score: Tensor | None = None, backend: str | None = None) -> Sparse24Weight:
    """Keeps the 2 entries with the largest score of every aligned 4 columns, in the canonical 2:4 form.

    Args:
        weight: (N, C) float32, bfloat16, float16 or float64, no NaN; N a multiple of 8, C of 16; any strides.
        score: (N, C) float32 or the dtype of weight, no NaN; None scores by magnitude.
        backend: auto, reference, cpu or cuda, where a weight that lies transposed (`w.T`) is read as it lies.

    Returns:
        What `sparse24_compress` makes of `weight.masked_fill(~nm_mask(weight, 2, 4, score=score), 0)`, bit by bit, on
        every backend: equal scores keep the lowest column. On the device of weight, detached.

    Raises:
        ValueError: an argument breaks a rule. RuntimeError: the backend cannot run here. On a GPU the check for NaN
            reads one value on the host.
    """
    check_dense(weight)
    if score is not None:
        check_tensor("score", score, 2, tuple(dict.fromkeys((weight.dtype, torch.float32))))
        require(score.shape == weight.shape, "score", f"of shape {tuple(weight.shape)} like weight", score)
        check_device(weight.device, score=score)
        score = score.detach()
    run = dispatch.implementation("sparse24_prune", dispatch.as_argument(backend), weight.dtype, weight.device)
    with torch.inference_mode(False):  # whose tensors do not count what is written to them
        return Sparse24Weight(*run(weight.detach(), score))


def _reference(weight: Tensor, score: Tensor | None) -> tuple[Tensor, Tensor]:
    """-> values (N, C/2), indices (N, C/8)."""
    pruned = sparse24_compress(weight.masked_fill(~nm_mask(weight, 2, 4, score=score), 0))
    return pruned.values, pruned.indices


def _native(weight: Tensor, score: Tensor | None) -> tuple[Tensor, Tensor]:
    try:
        return native.sparse24_prune(weight, score)
    except RuntimeError:
        checked_scores(weight, score)  # names the tensor with the NaN, which the kernel finds as it reads
        raise


dispatch.register("sparse24_prune", reference=_reference, cpu=_native, cuda=_native)
