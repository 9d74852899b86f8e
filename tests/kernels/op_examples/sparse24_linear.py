# SPDX-License-Identifier: Apache-2.0
import functools

import torch

import madtp_kernels as mk
from op_examples.common import random64, weight24


def arguments(sizes):
    (out_features, in_features), weight = sizes.features, weight24(sizes)
    return {
        "x": torch.rand(sizes.rows, in_features),
        "values": weight.values,
        "indices": weight.indices,
        **dict.fromkeys(("layout", "values_t", "indices_t", "layout_t")),
        "bias": torch.rand(out_features),
        "activation": "gelu",
        "residual": torch.rand(sizes.rows, out_features),
        "scale": torch.rand(out_features),
        "num_rows": torch.tensor(sizes.rows - 1, dtype=torch.int32),
        "backend": "cpu",
    }


@functools.cache
def weight():
    dense = torch.randn(16, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return mk.sparse24_prune(dense)


def linear(x, bias, residual, scale, backend):
    rest = {"activation": "gelu", "residual": residual, "scale": scale, "backend": backend}
    return mk.sparse24_linear(x, weight().to(x.dtype), bias, **rest)


CALLS = {linear: lambda: (random64(6, 32), random64(16), random64(6, 16), random64(16))}
