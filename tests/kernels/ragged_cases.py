"""Random packed batches for the kernel tests."""

import torch


def cu_seqlens_of(lengths) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)


def scores(lengths, alignment_tokens=7, dtype=torch.float32, logits_dtype=None, seed=0):
    """summary, received (non-negative), mag_logits of a packed batch."""
    generator = torch.Generator().manual_seed(seed)
    rows = sum(lengths)
    summary = torch.rand(rows, generator=generator, dtype=torch.float64) / max(rows, 1)
    received = torch.rand(rows, generator=generator, dtype=torch.float64)
    logits = torch.randn(rows, alignment_tokens, generator=generator, dtype=torch.float64) * 3
    return summary.to(dtype), received.to(dtype), logits.to(logits_dtype or dtype)


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
