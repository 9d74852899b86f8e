# SPDX-License-Identifier: Apache-2.0
"""2:4 weights and what runs their linear layers.

`weight` is the form that no hardware owns, `files` keeps it on disk, `formats` converts it from and to those of others.
`backend_dense`, `backend_onednn` and `backend_cusparselt` run a layer through torch, oneDNN and NVIDIA's library;
`tuning_cpu` and `tuning_cuda` say which backend is faster where, from what was measured.

Not here: the public op (`madtp_kernels.ops.sparse24`), its meaning (`reference.sparse24`), our kernels
(`native.sparse24`), and the command that measures a GPU (`madtp_kernels.tune`).
"""
