# SPDX-License-Identifier: Apache-2.0
"""Argument checks: each failure names the argument, the rule and what came, before anything runs.

A public function checks of what type its arguments are, which the schema of its op would say less clearly. The op
itself checks the rest, so that a call of torch.ops.madtp is as safe: metadata (dtype, shape, device) and numbers, which
its fake checks too, and values of CPU tensors: reading them from a GPU would stall it, and kernels are safe whatever
the values are.

Rules that name a size are put into words only when they are broken: torch.compile and a strict torch.export would take
a size that is written into a text for a constant.
"""

import itertools
import math
import numbers
import reprlib

import torch
from torch import Tensor

MAX_ROWS = 2**31 - 1  # rows are addressed by int32
MAX_FLOAT32 = torch.finfo(torch.float32).max

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def describe(value: object) -> str:
    """One line on what came, however large it is."""
    if isinstance(value, Tensor):
        layout = "" if value.layout is torch.strided else f" of layout {str(value.layout).removeprefix('torch.')}"
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} on {value.device}{layout}"
    return f"{type(value).__name__} {' '.join(_short.repr(value).split())}"


def require(condition: bool, name: str, rule: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{name} must be {rule}, got {got if isinstance(got, str) else describe(got)}")


def check_tensor(name: str, value: object, ndim: int, dtypes: tuple[torch.dtype, ...]) -> None:
    if not (
        isinstance(value, Tensor) and value.ndim == ndim and value.dtype in dtypes and value.layout is torch.strided
    ):
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        require(False, name, f"a {ndim}-dimensional tensor of {allowed}", value)


def check_types(**values: object) -> None:
    """Tensors, all of them."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            require(False, name, "a tensor", value)


def check_optional_types(**values: object) -> None:
    """Tensors or None."""
    for name, value in values.items():
        if value is not None and not isinstance(value, Tensor):
            require(False, name, "a tensor or None", value)


def check_shape(name: str, value: Tensor, shape: tuple[int, ...], of: str) -> None:
    if tuple(value.shape) != shape:
        require(False, name, f"of shape {shape} like {of}", value)


def check_flag(name: str, value: object) -> None:
    require(isinstance(value, bool), name, "True or False", value)


def check_count(name: str, value: object) -> None:
    """A number of rows, of any integer type; under torch.jit.trace, where sizes are tensors, one of these."""
    ok = isinstance(value, int | torch.SymInt) or isinstance(value, numbers.Integral)
    ok = ok or (isinstance(value, torch.Tensor) and torch.jit.is_tracing())
    require(ok and not isinstance(value, bool), name, "an integer", value)


def check_not_recorded(device: torch.device, what: str, instead: str) -> None:
    """Raises RuntimeError while a CUDA graph is captured, before the capture is lost to what it cannot hold."""
    if device.type == "cuda" and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{what}, which a CUDA graph cannot record: {instead}")


def check_number(name: str, value: object) -> None:
    """What float() takes, but no text and no tensor."""
    ok = isinstance(value, int | float | torch.SymFloat | torch.SymInt) or isinstance(value, numbers.Real)
    require(ok and not isinstance(value, bool), name, "a number", value)


def check_finite(name: str, value: float) -> None:
    require(-MAX_FLOAT32 <= value <= MAX_FLOAT32, name, "a finite number of float32", value)


def check_temperature(temperature: float) -> None:
    require(0 <= temperature < math.inf, "temperature", "a finite number >= 0", temperature)


def check_rows(name: str, value: Tensor, rows: int, of: str) -> None:
    if value.shape[0] != rows:
        require(False, name, f"of {rows} rows like {of}", value)


def check_device(device: torch.device, **tensors: Tensor | None) -> None:
    for name, value in tensors.items():
        if value is not None:
            require(value.device == device, name, f"on {device}", value)


def check_cu_seqlens(name: str, value: object) -> None:
    ok = isinstance(value, Tensor) and value.ndim == 1 and value.dtype == torch.int32 and value.numel() >= 1
    require(ok, name, "int32 of shape (B+1,)", value)


def check_row_count(name: str, rows: int | torch.SymInt) -> None:
    """A number that is still a symbol passes: it would become a bound of the program; the op checks when that runs."""
    if isinstance(rows, int) and rows > MAX_ROWS:
        require(False, name, f"at most {MAX_ROWS} rows (they are addressed by int32)", f"{rows} rows")


def check_gradient(grad: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    """Of the output, of this shape, that an op gives for x."""
    check_tensor("grad", grad, len(shape), (x.dtype,))
    check_shape("grad", grad, shape, "the output for x")
    check_device(x.device, grad=grad)


def check_ragged(rows: int, cu_seqlens: Tensor, summary_index: Tensor | None, rows_of: str) -> None:
    """The metadata that every op on a ragged batch shares."""
    check_row_count(rows_of, rows)
    check_cu_seqlens("cu_seqlens", cu_seqlens)
    if summary_index is not None:
        check_tensor("summary_index", summary_index, 1, (torch.int32,))
        check_rows("summary_index", summary_index, cu_seqlens.numel() - 1, "cu_seqlens has sequences")


def check_cu_seqlens_values(name: str, cu_seqlens: Tensor, rows: int, *, at_most: bool = False) -> list[int]:
    """0 first, never decreasing, the row count (or `at_most` it) last; returns the lengths of the sequences.

    CPU tensors only; others pass, with no lengths. Lists, not tensors: an op on a few numbers costs more than they do.
    """
    if cu_seqlens.device.type != "cpu":
        return []
    values = cu_seqlens.tolist()
    require(values[0] == 0, name, "0 at its first entry", f"{values[0]}")
    lengths = [end - begin for begin, end in itertools.pairwise(values)]
    if min(lengths, default=0) < 0:
        at = next(i for i, length in enumerate(lengths) if length < 0)
        require(False, name, "non-decreasing", f"{values[at]} then {values[at + 1]} at entry {at + 1}")
    if at_most:
        require(values[-1] <= rows, name, f"at most the row count {rows} at its last entry", f"{values[-1]}")
    else:
        require(values[-1] == rows, name, f"the row count {rows} at its last entry", f"{values[-1]}")
    return lengths


def check_summary_index_values(summary_index: Tensor | None, lengths: list[int]) -> None:
    """-1, or a row inside its sequence. CPU tensors only; others pass."""
    if summary_index is None or summary_index.device.type != "cpu":
        return
    for sequence, (index, length) in enumerate(zip(summary_index.tolist(), lengths, strict=True)):
        if not -1 <= index < max(length, 1):
            rule = f"-1 or a row of its sequence (sequence {sequence} has {length} rows)"
            require(False, "summary_index", rule, f"{index}")
