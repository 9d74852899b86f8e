# SPDX-License-Identifier: Apache-2.0
"""Models as files for other runtimes: `torch.export`, AOTInductor, ONNX."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from madtp.dtp.keep_rules import name_of
from madtp.handles import find_handle
from madtp.patching.handle import Handle
from madtp.patching.vlm_handle import VlmHandle
from madtp_kernels import decompositions
from madtp_kernels.atomic_file import atomic_file
from madtp_kernels.checks import require

MAX_ONNX_BYTES = 2**31 - 2**24  # of weights: a file is one message of protobuf, of below 2 GiB
ONNX_PACKAGES = ("onnx", "onnxscript")


def export(
    model: nn.Module, inputs: Mapping[str, Tensor], path: str | os.PathLike[str], *, format: str = "torch"
) -> Path:
    """Writes a model, as it is set now, for a runtime that has no Hugging Face class: inference at fixed sizes.

    What is written takes the inputs by their names and returns a dict of the tensors in the output of the model, by
    their names there, with a dot for a part of a part (`vision_model_output.pooler_output`).

    Args:
        model: patched, packed, both or neither; in eval mode, on a CPU.
        inputs: keyword arguments of its forward: sizes and dtypes are fixed at theirs, values are not.
        path: of the file, which is written whole or not at all.
        format: "torch": a `.pt2` of `torch.export`, for `torch.export.load`.
            "aoti": a `.pt2` that AOTInductor compiles for this CPU with a C++ compiler, for
            `torch._inductor.aoti_load_package`. Both call the ops of madtp_kernels, which has to be imported first.
            "onnx": an `.onnx` of plain ops, for ONNX Runtime and OpenVINO; weights that are 2:4 or int8 are in it as
            they are packed, and the runtime multiplies by dense ones. It needs onnx and onnxscript (the extra
            `[export]`), and float32.

    Returns:
        the path.

    Raises:
        ValueError: an argument breaks a rule, or the model is one that no program of fixed sizes can be.
        RuntimeError: there is no C++ compiler, or a selection keeps a count of texts with a mask.
        ImportError: a package is missing. OSError: the file cannot be written.
    """
    require(isinstance(format, str) and format in _WRITERS, "format", f"one of {', '.join(_WRITERS)}", repr(format))
    suffix, write = _WRITERS[format]
    path = Path(path)
    require(path.suffix == suffix, "path", f"a file name that ends in {suffix} with format {format}", str(path))
    _check_inputs(inputs)
    _check_model(model)
    if format == "onnx":
        _check_onnx(model)
    if format == "aoti":
        _check_compiler()
    with torch.no_grad():
        program = torch.export.export(_Named(model), (), dict(inputs))
        with atomic_file(path) as file:
            write(program, file)
    return path


class _Named(nn.Module):
    """A model that returns its tensors in a dict: programs of other runtimes know no class of Hugging Face."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        return dict(_tensors(self.model(**inputs), ""))


def _tensors(output: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of an output, with where it is."""
    if isinstance(output, Tensor):
        yield name or "output", output
        return
    parts = output if isinstance(output, Mapping) else {}
    if isinstance(output, tuple | list):
        parts = {str(number): part for number, part in enumerate(output)}
    for key, part in parts.items():
        yield from _tensors(part, f"{name}.{key}" if name else key)


def _write_torch(program: Any, file: Path) -> None:
    program.example_inputs = None  # somebody's image
    torch.export.save(program, file)


def _write_aoti(program: Any, file: Path) -> None:
    inductor: Any = import_module("torch._inductor")
    inductor.aoti_compile_and_package(program, package_path=str(file))


def _write_onnx(program: Any, file: Path) -> None:
    plain = _quietly(program.run_decompositions, decompositions())
    inputs = list(plain.call_spec.in_spec.children()[1].context)
    outputs = list(plain.call_spec.out_spec.context)
    options = {"input_names": inputs, "output_names": outputs, "dynamo": True, "verbose": False}
    exported = _quietly(torch.onnx.export, plain, **options)
    exported.save(file, external_data=False)


def _quietly(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """A call without what exporters say of themselves below an error: nodes not folded, packages not used."""
    loggers = [logging.getLogger(name) for name in ("onnx_ir", "onnxscript", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call(*arguments, **options)
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


_WRITERS: dict[str, tuple[str, Callable[[Any, Path], None]]] = {
    "torch": (".pt2", _write_torch),
    "aoti": (".pt2", _write_aoti),
    "onnx": (".onnx", _write_onnx),
}


def _check_inputs(inputs: Any) -> None:
    rule = "a mapping from names to tensors on a CPU, of at least one"
    require(isinstance(inputs, Mapping) and bool(inputs), "inputs", rule, type(inputs).__name__)
    for name, value in inputs.items():
        require(isinstance(name, str), "inputs", rule, f"the name {name!r}")
        ok = isinstance(value, Tensor) and value.device.type == "cpu"
        require(ok, "inputs", rule, f"{name} {value.device if isinstance(value, Tensor) else type(value).__name__}")


def _check_model(model: Any) -> None:
    require(isinstance(model, nn.Module), "model", "a module", type(model).__name__)
    # The parts that `patch` adds to a model in eval mode have none of their own.
    training = [name for name, module in model.named_modules() if module.training and "madtp_" not in name]
    got = f"training mode in {(training or [''])[0] or 'the whole of it'}"
    require(not training, "model", "in eval mode to be exported (model.eval())", got)
    tensors = [*model.parameters(), *model.buffers()]
    where = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), None)
    require(where is None, "model", "on a CPU to be exported (model.cpu())", str(where))
    for module in model.modules():
        handle: Any = find_handle(module)
        if isinstance(handle, VlmHandle):
            rule = "without the seams of a decoder to be exported (model.madtp_handle.remove())"
            seams = ", ".join(handle.seams)
            require(False, "model", rule, f"the seams {seams}: a prompt is shortened by what is read of it in a run")
        if isinstance(handle, Handle):
            for branch in handle.pruning.values():
                _check_selection(branch)


def _check_selection(branch: Any) -> None:
    fixed = not branch.prunes or not (callable(branch.selection) or branch.selection == "batch_max")
    rule = "one whose counts are not read in a run to be exported, such as instance or received"
    require(fixed, f"selection of {branch.name}", rule, name_of(branch.selection))


def _check_onnx(model: nn.Module) -> None:
    for package in ONNX_PACKAGES:
        if find_spec(package) is None:
            raise ImportError(
                f"{package} is needed for format onnx: pip install -e .[export] (or {' '.join(ONNX_PACKAGES)})",
                name=package,
            )
    parameters = [*model.parameters(), *model.buffers()]
    other = next(
        (tensor.dtype for tensor in parameters if tensor.is_floating_point() and tensor.dtype != torch.float32), None
    )
    rule = "of float32 with format onnx (model.float(), and hwp.unpack of fp8 layers)"
    require(other is None, "model", rule, str(other))
    size = sum(tensor.nbytes for tensor in parameters)
    require(
        size <= MAX_ONNX_BYTES, "model", f"of at most {MAX_ONNX_BYTES} bytes of weights with format onnx", str(size)
    )


def _check_compiler() -> None:
    builder: Any = import_module("torch._inductor.cpp_builder")
    errors: Any = import_module("torch._inductor.exc")
    try:
        builder.get_cpp_compiler()
    except errors.InvalidCxxCompiler as error:
        raise RuntimeError("format aoti needs a C++ compiler, and none was found: install g++, or set CXX") from error
