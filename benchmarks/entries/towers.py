# SPDX-License-Identifier: Apache-2.0
"""Vision towers of one image, end to end, beside the runtimes that users deploy them on.

Weights and images are random, as in `models`. `--set batch=4` and `--set layers=6` measure other sizes of all towers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.entries.models import (
    BLIP_BASE,
    EAGER,
    SDPA,
    Mode,
    ModelInputs,
    check_mode,
    dense_flops,
    model_inputs,
    ours,
    weight_bytes,
)
from benchmarks.entry import Entry, Thunk, Unavailable
from benchmarks.peers import onnxruntime, openvino, torchao
from benchmarks.peers.exports import exported

CASES = [
    {"model": "BLIP vision", **BLIP_BASE, "batch": 1},
    {"model": "CLIP vision", "pixels": 336, "patch": 14, "width": 1024, "layers": 24, "batch": 1},
    {
        **{"model": "SigLIP vision", "pixels": 384, "patch": 14, "width": 1152, "mlp": 4304, "heads": 16},
        **{"layers": 27, "batch": 1},
    },
]
MODES = {
    "madtp dense": Mode(False, 0.0),
    "madtp 2:4": Mode(True, 0.0),
    "madtp int8": Mode(False, 0.0, int8=True),
    "madtp 2:4 int8": Mode(True, 0.0, int8=True),
    "madtp tokens, -50 % MACs": Mode(False, 0.5),
    "madtp tokens and 2:4 int8, -70 % MACs": Mode(True, 0.7, int8=True),
    "madtp tokens and 2:4, -70 % MACs, bfloat16": Mode(True, 0.7, bfloat16=True),
    "madtp int8 and bfloat16": Mode(False, 0.0, int8=True, bfloat16=True),
    "madtp 2:4 int8 and bfloat16": Mode(True, 0.0, int8=True, bfloat16=True),
    "madtp tokens and 2:4 int8, -70 % MACs, bfloat16": Mode(True, 0.7, int8=True, bfloat16=True),
    "madtp 2:4 int8, -50 % MACs by tokens, bfloat16": Mode(True, 0.5, int8=True, bfloat16=True, by_tokens=True),
}
CALIBRATION_IMAGES = 4
ERROR = {"bfloat16": 6e-2, "int8": 2.5e-1}  # relative, of the output, by what is in the provider's name
FLOAT32_ERROR = 1e-4  # other runtimes order sums, and take exponentials, in their own way


class PooledOutput(nn.Module):
    """A tower from one tensor to another, as exporters want it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, C)
        return self.model(pixel_values=pixel_values).pooler_output


def images(i: ModelInputs) -> Tensor:  # (B, 3, H, W) float32
    return i.tensors["pixel_values"]


def on_cpu(prepare: Callable[[ModelInputs], Thunk]) -> Callable[[ModelInputs], Thunk]:
    def checked(i: ModelInputs) -> Thunk:
        if images(i).device.type != "cpu":
            raise Unavailable("these runtimes are compared on CPUs")
        return prepare(i)

    return checked


def best_attention(i: ModelInputs) -> nn.Module:
    """The model with torch's fused attention where it has that."""
    return i.models.sdpa if i.models.plain._supports_sdpa else i.models.plain


def hugging_face(attention: str, dtype: torch.dtype) -> Callable[[ModelInputs], Thunk]:
    def prepare(i: ModelInputs) -> Thunk:
        x = images(i).to(dtype)
        model = i.models.sdpa if attention == "sdpa" else i.models.plain
        model = model if dtype is i.models.dtype else copy.deepcopy(model).to(dtype)
        return lambda: i.models.run(model, {"pixel_values": x})

    return prepare


def compiled(dtype: torch.dtype, int8: bool = False) -> Callable[[ModelInputs], Thunk]:
    def prepare(i: ModelInputs) -> Thunk:
        x = images(i).to(dtype)
        model = copy.deepcopy(best_attention(i)).to(dtype)
        model = torch.compile(torchao.quantize_linears(model) if int8 else model)

        def run() -> Tensor:
            return i.models.run(model, {"pixel_values": x})

        run()  # compiles
        return run

    return prepare


def warmed(prepare: Callable[[ModelInputs], Thunk]) -> Callable[[ModelInputs], Thunk]:
    """The first call packs weights and measures backends, once for all that follow, as that of `compiled` compiles."""

    def run_once(i: ModelInputs) -> Thunk:
        run = prepare(i)
        run()
        return run

    return run_once


def torchao_int8(i: ModelInputs) -> Thunk:
    x = images(i)
    model = torchao.quantize_linears(copy.deepcopy(best_attention(i)))
    return lambda: i.models.run(model, {"pixel_values": x})


def export_of(i: ModelInputs, kind: str, packages: Sequence[str], write: Callable[[Path], None]) -> Path:
    """The cached folder of an export of this model, for batches of this size."""
    about = {"case": i.models.case, "batch": len(images(i)), "checksum": i.models.checksum}
    return exported(kind, about, packages, write)


def openvino_model(i: ModelInputs, int8: bool = False) -> Path:
    def write(folder: Path) -> None:
        openvino.write(PooledOutput(best_attention(i)), images(i), folder / "model.xml")

    def write_int8(folder: Path) -> None:
        generator, x = torch.Generator().manual_seed(1000), images(i)
        samples = [torch.randn(x.shape, generator=generator) for _ in range(CALIBRATION_IMAGES)]
        openvino.write_int8(openvino_model(i), samples, folder / "model.xml")

    if int8:
        return export_of(i, "openvino-int8", openvino.INT8_PACKAGES, write_int8) / "model.xml"
    return export_of(i, "openvino", openvino.PACKAGES, write) / "model.xml"


def onnx_model(i: ModelInputs, int8: bool = False) -> Path:
    def write(folder: Path) -> None:
        onnxruntime.write(PooledOutput(best_attention(i)), images(i), folder / "model.onnx")

    def write_int8(folder: Path) -> None:
        onnxruntime.write_int8(onnx_model(i), folder / "model.onnx")

    if int8:
        return export_of(i, "onnx-int8", onnxruntime.INT8_PACKAGES, write_int8) / "model.onnx"
    return export_of(i, "onnx", onnxruntime.PACKAGES, write) / "model.onnx"


def on_openvino(precision: str, int8: bool = False) -> Callable[[ModelInputs], Thunk]:
    def prepare(i: ModelInputs) -> Thunk:
        x, run = images(i).numpy(), openvino.load(openvino_model(i, int8), precision)
        return lambda: run(x)

    return prepare


def on_onnxruntime(int8: bool = False) -> Callable[[ModelInputs], Thunk]:
    def prepare(i: ModelInputs) -> Thunk:
        x, run = images(i).numpy(), onnxruntime.load(onnx_model(i, int8))
        return lambda: run(x)

    return prepare


def check(i: ModelInputs, result: Tensor | np.ndarray, provider: str) -> None:
    """Of a peer: what Hugging Face computes, as closely as its numbers allow. Of ours: as in `models`."""
    result = result if isinstance(result, Tensor) else torch.from_numpy(result)
    tolerance = max(FLOAT32_ERROR, *(error for name, error in ERROR.items() if name in provider), 0)
    check_mode(i, result, MODES.get(provider, Mode(False, 0.0)), tolerance)


PEERS = {
    EAGER: hugging_face("eager", torch.float32),
    SDPA: hugging_face("sdpa", torch.float32),
    f"{EAGER}, bfloat16": hugging_face("eager", torch.bfloat16),
    f"{SDPA}, bfloat16": hugging_face("sdpa", torch.bfloat16),
    "torch.compile": compiled(torch.float32),
    "torch.compile, bfloat16": compiled(torch.bfloat16),
    "torchao int8": torchao_int8,
    "torchao int8, torch.compile": compiled(torch.float32, int8=True),
    "ONNX Runtime": on_onnxruntime(),
    "ONNX Runtime int8": on_onnxruntime(int8=True),
    "OpenVINO": on_openvino("f32"),
    "OpenVINO bfloat16": on_openvino("bf16"),
    "OpenVINO int8": on_openvino("f32", int8=True),
    "OpenVINO int8 and bfloat16": on_openvino("bf16", int8=True),
}
OURS = {name: warmed(ours(mode)) for name, mode in MODES.items()}

ENTRIES = (
    Entry(
        name="towers",
        summary="vision towers beside the runtimes that users deploy them on, float32 where nothing else is said",
        cases=CASES,
        inputs=model_inputs,
        providers={name: on_cpu(prepare) for name, prepare in (PEERS | OURS).items()},
        baseline=EAGER,
        gate=check,
        bytes=weight_bytes,
        flops=dense_flops,
        sets=1,
        rounds=5,
        seconds=5,
        packages=("transformers", "openvino", "nncf", "onnxruntime", "onnxscript", "torchao"),
        memory=False,
    ),
)
