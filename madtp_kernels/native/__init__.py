"""The C++ kernels (madtp_kernels._C, CPU and CUDA) as functions of tensors, with the arguments of the reference.

The binding is torch-free: it takes addresses, sizes and strides. Outputs are allocated here, every element is written.
Which of them runs is not decided here but in `dispatch`.
"""
