# SPDX-License-Identifier: Apache-2.0
"""Weights in integers: their stored form, which no hardware owns, and how a weight is rounded to it.

Not here: the public op (`madtp_kernels.ops.quantized`), its meaning (`reference.quantized`), our kernels
(`native.quantized`), and files, which `sparse24.files` writes for all kinds of weights.
"""
