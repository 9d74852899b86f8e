# SPDX-License-Identifier: Apache-2.0
"""What only the Triton kernels of `attention_rows` can do wrong; test_attention_rows.py runs them on good input."""

import pytest
import torch
from triton_cases import DEVICE, MARKS, wild_integers, with_slow

pytest.importorskip("triton")
from madtp_kernels.triton.attention_rows.forward import attention_rows

pytestmark = MARKS


@pytest.mark.parametrize("seed", with_slow(range(2), range(2, 8)))
def test_no_value_makes_a_kernel_write_out_of_bounds(seed):
    """On a GPU values are not checked: the guards of the outputs see a write past the end, the process a wild read."""
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(10, 2, 8, device=DEVICE), torch.randn(40, 1, 8, device=DEVICE)
    ends_q, ends_k, position = (wild_integers(n, generator) for n in (4, 4, 10))
    assert attention_rows(q, k, ends_q, ends_k, position, 0.3).shape == (40,)


def test_rows_past_the_last_sequence_are_zero():
    q, k = torch.randn(3, 2, 8, device=DEVICE), torch.randn(20, 2, 8, device=DEVICE)
    ends_q, ends_k = (torch.tensor(ends, dtype=torch.int32, device=DEVICE) for ends in ([0, 2], [0, 12]))
    got = attention_rows(q, k, ends_q, ends_k, None, 0.3)
    assert not got[12:].any() and got[:12].sum().item() == pytest.approx(1)


@pytest.mark.parametrize("dim", [72, 256])
def test_a_scale_of_zero_gives_every_key_that_is_seen_the_same(dim):
    q, k = torch.randn(3, 2, dim, device=DEVICE), torch.randn(8, 1, dim, device=DEVICE)
    ends_q, ends_k = (torch.tensor(ends, dtype=torch.int32, device=DEVICE) for ends in ([0, 2, 2, 3], [0, 4, 7, 8]))
    position = torch.tensor([1, 9, -1], dtype=torch.int32, device=DEVICE)  # of the last row, one that sees nothing
    got = attention_rows(q, k, ends_q, ends_k, position, 0.0)
    assert got.tolist() == [0.375, 0.375, 0.125, 0.125, 0, 0, 0, 0]
    got = attention_rows(q, k, ends_q, ends_k, None, 0.0)
    assert got.tolist() == [0.25] * 4 + [0] * 3 + [1]
