# SPDX-License-Identifier: Apache-2.0
import functools

import torch

import madtp_kernels as mk
from op_examples import sparse24_linear
from op_examples.common import random64, weight24


def arguments(sizes):
    of_weight, weight = ("values_t", "indices_t", "layout_t"), mk.quantize(weight24(sizes))
    shared = {name: value for name, value in sparse24_linear.arguments(sizes).items() if name not in of_weight}
    return {**shared, "values": weight.values, "indices": weight.indices, "weight_scale": weight.scale}


@functools.cache
def weight(scheme):
    return mk.quantize(torch.randn(16, 32, generator=torch.Generator().manual_seed(0)), scheme)


def run(scheme, x, bias, residual, scale, backend):
    rest = {"activation": "gelu", "residual": residual.float(), "scale": scale.float(), "backend": backend}
    return mk.quantized_linear(x.float(), weight(scheme), bias.float(), **rest).to(x.dtype)


def quantized(x, bias, residual, scale, backend):
    return run("int8", x, bias, residual, scale, backend)


def quantized_fp8(x, bias, residual, scale, backend):
    return run("fp8", x, bias, residual, scale, "reference")  # which is all that a CPU has


def inputs():
    return random64(6, 32), random64(16), random64(6, 16), random64(16)


CALLS = {quantized: inputs, quantized_fp8: inputs}
ROUNDED = {quantized, quantized_fp8}
