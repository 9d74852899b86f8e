# SPDX-License-Identifier: Apache-2.0
"""Random ragged batches for the kernel tests."""

import torch


def cu_seqlens_of(lengths) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)


def scores(lengths, alignment_tokens=7, dtype=torch.float32, logits_dtype=None, seed=0):
    """summary_attention, received_attention (non-negative) and mag_logits of a ragged batch."""
    generator = torch.Generator().manual_seed(seed)
    rows = sum(lengths)
    summary_attention = torch.rand(rows, generator=generator, dtype=torch.float64) / max(rows, 1)
    received_attention = torch.rand(rows, generator=generator, dtype=torch.float64)
    logits = torch.randn(rows, alignment_tokens, generator=generator, dtype=torch.float64) * 3
    return summary_attention.to(dtype), received_attention.to(dtype), logits.to(logits_dtype or dtype)


# Odd and prime lengths, an empty sequence, one-token sequences, and the two-token corner.
LENGTHS = [
    [1],
    [0],
    [2, 1, 0, 3],
    [63, 1, 0, 111, 5],
    [577, 64],
]
SUMMARIES = {
    "first": lambda lengths: None,
    "none": lambda lengths: torch.full((len(lengths),), -1, dtype=torch.int32),
    "last": lambda lengths: torch.tensor([n - 1 for n in lengths], dtype=torch.int32),
}
