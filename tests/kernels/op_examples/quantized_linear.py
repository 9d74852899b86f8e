# SPDX-License-Identifier: Apache-2.0
import functools

import torch

import madtp_kernels as mk
from op_examples.common import random64, weight24


def arguments(sizes):
    (out_features, in_features), weight = sizes.features, mk.quantize(weight24(sizes))
    return {
        "x": torch.rand(sizes.rows, in_features),
        "values": weight.values,
        "indices": weight.indices,
        "weight_scale": weight.scale,
        "layout": None,
        "bias": torch.rand(out_features),
        "activation": "gelu",
        "residual": torch.rand(sizes.rows, out_features),
        "scale": torch.rand(out_features),
        "num_rows": torch.tensor(sizes.rows - 1, dtype=torch.int32),
        "backend": "cpu",
    }


@functools.cache
def weight():
    return mk.quantize(torch.randn(16, 32, generator=torch.Generator().manual_seed(0)), "int8")


def quantized(x, bias, residual, scale, backend):
    rest = {"activation": "gelu", "residual": residual.float(), "scale": scale.float(), "backend": backend}
    return mk.quantized_linear(x.float(), weight(), bias.float(), **rest).to(x.dtype)


CALLS = {quantized: lambda: (random64(6, 32), random64(16), random64(6, 16), random64(16))}
ROUNDED = {quantized}
