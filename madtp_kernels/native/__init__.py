# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels of `madtp_kernels._C`, CPU and CUDA, as functions of tensors with the arguments of the reference.
Here tensors become addresses, sizes and strides, and outputs are allocated, which the kernels write in full.

Neither argument checks (`ops`, `csrc/`) nor the choice of a backend (`dispatch`) belongs here.
"""
