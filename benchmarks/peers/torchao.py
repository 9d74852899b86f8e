# SPDX-License-Identifier: Apache-2.0
"""torchao's dynamic int8: weights per output feature, inputs per token."""

from __future__ import annotations

from torch import nn

from benchmarks.peers.packages import package, quiet


def quantize_linears(model: nn.Module) -> nn.Module:
    """The model itself, with every Linear in int8. Raises `Unavailable` without torchao."""
    quantization = package("torchao.quantization")
    with quiet():
        quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    return model
