# SPDX-License-Identifier: Apache-2.0
"""Weights in integers.

`weight` is their form that no hardware owns, and how a weight is rounded to it; `files` keeps it on disk.

Not here: the public op (`madtp_kernels.ops.quantized`), its meaning (`reference.quantized`) and our kernels
(`native.quantized`).
"""
