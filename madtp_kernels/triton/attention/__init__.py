# SPDX-License-Identifier: Apache-2.0
"""`varlen_attention` in Triton: `forward` and `backward` launch, `statistics`, `argmax` and `gradients` are their
kernels for the importance statistics, the head maximum and dQ, dK, dV, and `tiles` is what they share.

What becomes of the statistics, scores and selection, is in `triton.tokens`.
"""
