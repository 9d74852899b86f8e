# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels, a package per op family, and `aot`, which compiles all of them without a GPU: in each package
`launches` has the calls that it makes, on the tensors of `meta_arguments`.

A launcher takes the arguments of the reference and reads nothing on the host; checks, autograd and the choice of a
backend are not here but in `ops` and `dispatch`.
"""
