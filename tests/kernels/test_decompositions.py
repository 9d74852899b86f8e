# SPDX-License-Identifier: Apache-2.0
"""The ops in plain PyTorch: what the reference computes, and a layout that nothing is read for."""

import pytest
import torch
from op_examples import good_call
from op_examples.common import Sizes
from ragged_cases import LENGTHS, SUMMARIES, cu_seqlens_of, scores

import madtp_kernels as mk
from madtp_kernels.selection import layout, layout_on_device

TABLE = mk.decompositions()
OURS = sorted((op for op in TABLE if op.namespace == "madtp"), key=str)


@pytest.mark.parametrize("lengths", [(5, 7), (4,), (3, 0, 6)], ids=str)
@pytest.mark.parametrize("op", OURS, ids=lambda op: op._schema.name)
def test_a_decomposition_is_the_reference(op, lengths):
    torch.manual_seed(0)
    arguments = good_call(op._schema.name.removeprefix("madtp::"), Sizes(lengths=lengths)) | {"backend": "reference"}
    expected, got = op(**arguments), TABLE[op](*arguments.values())
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 0.004, 0.3, 5.0])
@pytest.mark.parametrize("summary", SUMMARIES.values(), ids=list(SUMMARIES))
@pytest.mark.parametrize("lengths", [lengths for lengths in LENGTHS if sum(lengths)], ids=str)
def test_a_selection_is_that_of_the_reference(lengths, summary, temperature):
    *stats, logits = scores(lengths, dtype=torch.float64)
    stats[0][: lengths[0] // 9] = torch.inf  # a sequence that is broken keeps everything
    arguments = *stats, logits, cu_seqlens_of(lengths), temperature, summary(lengths), "reference"
    op = torch.ops.madtp.score_and_select.default
    for got, expected in zip(TABLE[op](*arguments), op(*arguments), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_the_layout_needs_no_host(lengths):
    generator = torch.Generator().manual_seed(0)
    for share in (0.0, 0.5, 1.0):
        keep = torch.rand(sum(lengths), generator=generator) < share
        importance = torch.rand(sum(lengths), generator=generator, dtype=torch.float64).masked_fill(keep, torch.nan)
        for weights in (importance, torch.zeros_like(importance)):
            arguments = keep, weights, cu_seqlens_of(lengths)
            for got, expected in zip(layout_on_device(*arguments), layout(*arguments), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_the_one_reduction_that_is_used():
    with pytest.raises(NotImplementedError, match="reduce must be sum, got max"):
        TABLE[torch.ops.aten.segment_reduce.default](torch.ones(2), "max", offsets=torch.tensor([0, 2]))
