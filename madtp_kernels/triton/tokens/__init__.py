# SPDX-License-Identifier: Apache-2.0
"""Token pruning in Triton: `scores` has the kernels of importance and selection, made of the device functions of
`sequence`, `layout` lays a selection out, and `gather_merge` has the gathers and their backward.

The constants that all backends share are in `madtp_kernels.selection`, and attention is in `triton.attention`.
"""
