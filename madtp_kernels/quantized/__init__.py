# SPDX-License-Identifier: Apache-2.0
"""Weights of 8 bits, int8 and fp8.

`weight` is their form that no hardware owns, and how a weight is rounded to it; `files` keeps it on disk.
`backend_dense` runs a 2:4 one as a dense one, on a GPU by `torch_product`; `tuning_cpu` says where that is faster.

Not here: the public op (`madtp_kernels.ops.quantized`), its meaning (`reference.quantized`) and our kernels
(`native.quantized`).
"""
