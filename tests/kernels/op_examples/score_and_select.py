# SPDX-License-Identifier: Apache-2.0
import madtp_kernels as mk
from op_examples import token_importance
from op_examples.common import CU_SEQLENS, LOGITS, STATS


def arguments(sizes):
    return {**token_importance.arguments(sizes), "temperature": 5.0}


def score(summary_attention, received_attention, logits, backend):
    stats = mk.AttentionStats(summary_attention, received_attention)
    importance, selection = mk.score_and_select(stats, logits, CU_SEQLENS, 5.0, capacity="upper_bound", backend=backend)
    return importance + selection.merge_weight


CALLS = {score: lambda: (*STATS, LOGITS)}
