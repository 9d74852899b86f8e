"""Triton kernels and their launchers; a launcher takes the arguments of the reference and reads nothing on the host."""
