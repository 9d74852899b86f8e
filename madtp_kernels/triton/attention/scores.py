# SPDX-License-Identifier: Apache-2.0
"""What becomes of q_i k_j before the softmax: scale, soft cap and ALiBi, to base 2.

A score is scale q_i k_j, or with a soft cap scale tanh(inner q_i k_j), where scale has the cap and `inner` the softmax
scale; less slope |position - key|. A kernel without either has no such argument (`bias` None).
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = math.log2(math.e)
TINY, HUGE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
# tanh(x) = x + x^3 (C_3 + C_5 x^2 + ...) up to NEAR, fitted to 2e-8; beyond that 1 - tanh is far from 1 and exact.
NEAR = tl.constexpr(0.5)
C_3, C_5 = tl.constexpr(-0.333331435918808), tl.constexpr(0.1332588493824005)
C_7, C_9 = tl.constexpr(-0.053045935928821564), tl.constexpr(0.017242496833205223)
_LOG2_E = tl.constexpr(LOG2_E)


class Bias(NamedTuple):
    """What is done to scores beside scaling: for the launcher, and in a kernel with a pointer."""

    inner: float | None  # softmax_scale / softcap
    slopes: Tensor | None  # (H,) or (B, H) fp32
    slopes_row: int  # elements from sequence to sequence, 0 where all have the same


@triton.jit
def tanh(b_x):
    """With one exponential, to 2e-7 of the result."""
    b_size = tl.abs(b_x)
    b_far = 1.0 - 2.0 / (1.0 + tl.exp2(b_size * (2 * _LOG2_E)))
    b_square = b_x * b_x
    b_near = b_x + b_x * (b_square * (C_3 + b_square * (C_5 + b_square * (C_7 + b_square * C_9))))
    return tl.where(b_size < NEAR, b_near, tl.where(b_x < 0, -b_far, b_far))


@triton.jit
def slope_of(bias, i_b, i_h):
    """ALiBi's slope of a head to base 2, or None."""
    slope = None
    if bias is not None:
        if bias.slopes is not None:
            slope = tl.load(bias.slopes + i_b * bias.slopes_row + i_h) * _LOG2_E
    return slope


@triton.jit
def capped(b_s, bias):
    """What `scale` is for: q_i k_j, or its tanh."""
    if bias is not None:
        if bias.inner is not None:
            b_s = tanh(b_s * bias.inner)
    return b_s


@triton.jit
def slant(b_s, slope, o_p, o_n):
    """b_s, of queries at positions o_p and keys o_n, less ALiBi."""
    if slope is not None:
        b_s -= slope * tl.abs(o_p - o_n).to(tl.float32)
    return b_s


@triton.jit
def uncapped(b_ds, b_s, bias):
    """The gradient of q_i k_j from that of the score, but for the scale; b_s is what `capped` gave."""
    if bias is not None:
        if bias.inner is not None:
            b_ds *= 1.0 - b_s * b_s
    return b_ds


@triton.jit
def load_lse(p_lse, o_rows, m_rows, other):
    """Log-sum-exp of rows, to base 2."""
    return tl.load(p_lse + o_rows, mask=m_rows, other=other) * _LOG2_E


# --- launchers


def scoring(softmax_scale: float, softcap: float, alibi_slopes: Tensor | None) -> dict[str, float | Bias | None]:
    """These arguments of a kernel.

    A masked score, -inf, stays one when it is scaled, and all others vanish at TINY: a scale of 0 would make it NaN.
    """
    inner = min(softmax_scale / softcap, HUGE) if softcap > 0 else None
    scale = min(max((softcap if softcap > 0 else softmax_scale) * LOG2_E, TINY), HUGE)
    if inner is None and alibi_slopes is None:
        return {"scale": scale, "bias": None}
    slopes_row = 0 if alibi_slopes is None or alibi_slopes.ndim == 1 else alibi_slopes.shape[1]
    slopes = None if alibi_slopes is None else alibi_slopes.contiguous()
    return {"scale": scale, "bias": Bias(inner, slopes, slopes_row)}
