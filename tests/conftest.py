"""Set before anything imports triton: without a GPU its kernels run in the interpreter."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["MADTP_TUNE"] = "off"  # no test measures, or reads what this machine has measured
