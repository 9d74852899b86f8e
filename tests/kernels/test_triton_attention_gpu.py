# SPDX-License-Identifier: Apache-2.0
"""Attention with statistics on a GPU: both 16-bit types, the lengths of real images, and several blocks of queries."""

import pytest
import torch
from test_triton_attention import Case, OptionsCase, equal

pytest.importorskip("triton")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DTYPES = [torch.bfloat16, torch.float16]
LENGTHS = {  # what is seen of an image, and a batch of text and images
    "197": [197],
    "577": [577, 577],
    "2308": [2308],
    "ragged": [577, 1, 0, 197, 63, 64, 65, 1025],
}


def summaries(lengths):
    """The first token of one sequence, the last of the next, none of the third."""
    return [(0, length - 1, -1)[i % 3] if length else -1 for i, length in enumerate(lengths)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_lengths_of_images(lengths, dtype):
    case = Case(LENGTHS[lengths], heads=3, dim=64, dtype=dtype, index=summaries(LENGTHS[lengths]))
    case.check()
    assert equal(case.run(), case.run()), "two calls have the same bits"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stats", [False, True], ids=["plain", "statistics"])
def test_causal_over_several_blocks(dtype, stats):
    lengths = [577, 131, 2]
    Case(lengths, heads=2, dim=64, dtype=dtype, causal=True, stats=stats, index=summaries(lengths)).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [80, 128])
def test_other_heads_over_several_blocks(dtype, dim):
    Case([197, 130], heads=2, dim=dim, dtype=dtype, index=[0, 129]).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["window", "softcap", "grouped"])
def test_options_over_several_blocks(dtype, name):
    options = {
        "window": {"causal": True, "window_size": (128, -1)},
        "softcap": {"softcap": 20.0},
        "grouped": {"causal": True},
    }[name]
    OptionsCase(options, [300, 197], [577, 197], heads=4, key_heads=2, dim=64, dtype=dtype).check()


def test_a_sequence_has_the_same_bits_alone():
    lengths = [577, 197]
    case = Case(lengths, heads=2, dim=64, dtype=torch.bfloat16, index=[0, 0])
    together = case.run()
    alone = Case([197], heads=2, dim=64, dtype=torch.bfloat16, index=[0])
    alone.qkv, alone.grads = case.qkv[577:], [grad[577:] for grad in case.grads]
    for position, (got, expected) in enumerate(zip(alone.run(), together, strict=True)):
        assert torch.equal(got, expected[:, 577:] if position == 3 else expected[577:])
