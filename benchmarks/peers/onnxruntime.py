# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime, in float32 and dynamic int8."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.peers.packages import package, quiet

PACKAGES = ("torch", "transformers", "onnx", "onnxscript")
INT8_PACKAGES = (*PACKAGES, "onnxruntime")


def write(model: nn.Module, x: Tensor, path: Path) -> None:
    """model: x (..., ) -> a tensor; sizes are fixed at those of x."""
    package("onnxscript")
    with quiet():
        torch.onnx.export(model, (x,), path, input_names=["x"], output_names=["y"], dynamo=True, verbose=False)


def write_int8(source: Path, path: Path) -> None:
    """Rounds the weights of the products in the model at `source`; what they multiply is rounded at each call."""
    quantization = package("onnxruntime.quantization")
    with quiet():
        quantization.quantize_dynamic(
            source,
            path,
            weight_type=quantization.QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm"],
            use_external_data_format=True,
            extra_options={"MatMulConstBOnly": True},
        )


def load(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    runtime = package("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that spin after a call would slow whoever is next in turn.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x})[0]
