# SPDX-License-Identifier: Apache-2.0
"""Products with a dense weight on a CPU: torch's, and oneDNN's with the weight packed once.

`torch_product` and `onednn` each are one of the two, with the epilogue of a linear layer; `packed` keeps what a weight
was packed to; `tuning_cpu` says which is faster.
"""
