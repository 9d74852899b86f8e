# SPDX-License-Identifier: Apache-2.0
"""OpenVINO, in float32, bfloat16 and, by NNCF, int8."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.peers.packages import package, quiet

PACKAGES = ("torch", "transformers", "openvino")
INT8_PACKAGES = (*PACKAGES, "nncf")


def write(model: nn.Module, x: Tensor, path: Path) -> None:
    """model: x (..., ) -> a tensor; sizes are fixed at those of x."""
    openvino = package("openvino")
    with quiet():
        converted = openvino.convert_model(model, example_input=x, input=[tuple(x.shape)])
        openvino.save_model(converted, path, compress_to_fp16=False)


def convert(model: nn.Module, x: Tensor) -> Any:
    """The same in memory, by way of `torch.export`, which decoders need."""
    with quiet(), torch.no_grad():
        return package("openvino").convert_model(torch.export.export(model.eval(), (x,)))


def write_int8(source: Path, samples: Sequence[Tensor], path: Path) -> None:
    """Rounds weights and inputs of the model at `source`, the ranges of inputs as these samples have them."""
    nncf, openvino = package("nncf"), package("openvino")
    arrays = [sample.numpy() for sample in samples]
    with quiet():
        model = nncf.quantize(
            openvino.Core().read_model(source),
            nncf.Dataset(arrays),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(arrays),
        )
        openvino.save_model(model, path, compress_to_fp16=False)


def load(model: Path | Any, precision: str) -> Callable[[np.ndarray], np.ndarray]:
    """model: a file's path, or what `convert` made; precision: f32 or bf16, of what is not int8."""
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = package("openvino").compile_model(model, "CPU", options)
    request = compiled.create_infer_request()
    return lambda x: request.infer([x], share_inputs=True)[0]
