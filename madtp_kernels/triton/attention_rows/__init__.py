# SPDX-License-Identifier: Apache-2.0
"""`attention_rows` in Triton: `forward` has the kernels and their launcher."""
