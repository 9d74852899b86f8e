# SPDX-License-Identifier: Apache-2.0
"""What users run instead of our kernels and towers on a CPU, a file for each library; `pip install -e .[peers]`.

Each takes the threads that torch has (`OMP_NUM_THREADS`, `torch.set_num_threads`).
"""
