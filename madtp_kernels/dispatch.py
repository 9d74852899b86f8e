# SPDX-License-Identifier: Apache-2.0
"""Which backend runs an op, and why.

Every op has a `reference`; `cpu` (C++), `triton` and `cuda` (C++) are faster where they can run. `auto` takes the first
that can, in the order below, or what an op has measured to be faster. A linear layer can also run `dense`, in torch, or
`onednn`, the library that torch brings for CPUs, with its weight packed; a 2:4 weight also `cusparselt`, NVIDIA's
library for 2:4 as torch calls it. Of an int8 weight `dense` is our own kernel of dense int8 weights on a CPU.
`MADTP_BACKEND` sets the default of the process, `backend=` that of one call.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from madtp_kernels._version import __version__

if TYPE_CHECKING:
    from madtp_kernels import _C

BACKENDS = ("reference", "dense", "onednn", "cpu", "triton", "cuda", "cusparselt")
AUTO_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "dense", "reference")}
OWN_KERNELS = ("90a",)  # architectures with kernels of their own; all others run those of sm_80
FAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Choice:
    """The backend of one call: `str()` is a sentence, `rejected` says why each other backend does not run."""

    op: str
    backend: str
    reason: str
    rejected: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        others = "".join(f"\n  not {name}: {why}" for name, why in self.rejected.items())
        return f"{self.op}: {self.backend} ({self.reason}){others}"


@dataclass
class OpRecord:
    """What is known of an op."""

    # backend -> function with the arguments of the reference
    implementations: dict[str, Callable[..., Any]] = field(default_factory=dict)
    # backend -> function of (layout or None, values, indices): the layout to run with; ValueError for a wrong one
    layout_checks: dict[str, Callable[..., Tensor | None]] = field(default_factory=dict)
    # device type -> backends in the order in which auto takes them
    auto_order: dict[str, tuple[str, ...]] = field(default_factory=lambda: AUTO_ORDER)
    # (backend, shape of the op's first tensor, dtype) -> why that backend cannot run it, or None
    limits: Callable[[str, tuple[int, ...], torch.dtype], str | None] | None = None
    # (backend, scheme of the weight, device) -> why that backend cannot multiply by it there, or None
    scheme_limits: Callable[[str, str, torch.device], str | None] | None = None
    # (the arguments of a call) -> the dtype that backends are chosen by, for `explain`; None: of the first tensor
    dtype: Callable[..., torch.dtype] | None = None
    # (choice of auto, the arguments of a call) -> the choice after what was measured, for `explain`
    tuned: Callable[..., Choice] | None = None
    # the user-facing function, whose arguments `explain` binds
    public: Callable[..., Any] | None = None


_records: dict[str, OpRecord] = {}


def record(op: str) -> OpRecord:
    """The record of `op`, which is made when something first registers for it."""
    if op not in _records:
        _records[op] = OpRecord()
    return _records[op]


def register(
    op: str,
    *,
    limits: Callable[[str, tuple[int, ...], torch.dtype], str | None] | None = None,
    dtype: Callable[..., torch.dtype] | None = None,
    tuned: Callable[..., Choice] | None = None,
    layout_checks: dict[str, Callable[..., Tensor | None]] | None = None,
    auto_order: dict[str, tuple[str, ...]] = AUTO_ORDER,
    scheme_limits: Callable[[str, str, torch.device], str | None] | None = None,
    **backends: Callable[..., Any],
) -> None:
    """Makes `backends` (name -> function with the arguments of the reference) the implementations of `op`.

    The other arguments are those of `OpRecord`.
    """
    unknown = set(backends) - set(BACKENDS)
    if unknown or "reference" not in backends:
        raise ValueError(f"{op} needs a reference and backends among {BACKENDS}, got {tuple(backends)}")
    entry = record(op)
    entry.implementations, entry.layout_checks = backends, layout_checks or {}
    entry.limits, entry.dtype, entry.tuned, entry.auto_order = limits, dtype, tuned, auto_order
    entry.scheme_limits = scheme_limits


def triton_launcher(module: str, name: str) -> Callable[..., Any]:
    """Function `name` of madtp_kernels.triton.`module`, which is imported, and triton with it, when it is called."""

    def launch(*args: Any) -> Any:
        return getattr(importlib.import_module(f"madtp_kernels.triton.{module}"), name)(*args)

    return launch


def public(function: Function) -> Function:
    """Marks the user-facing function of an op, so that `explain` can bind its arguments."""
    record(function.__name__).public = function
    return function


def implementation(
    op: str,
    backend: str | None,
    dtype: torch.dtype,
    device: torch.device,
    shape: tuple[int, ...] = (),
    scheme: str | None = None,
) -> Callable[..., Any]:
    """The function that runs `op` on tensors of this dtype and device; raises when the requested backend cannot."""
    name = backend_name(op, backend, dtype, device, shape, scheme)
    run = _records[op].implementations[name]
    if name == "reference" and torch.is_autocast_enabled(device.type):
        return functools.partial(_without_autocast, device.type, run)
    return run


def _without_autocast(device_type: str, run: Callable[..., Any], *args: Any) -> Any:
    """run(*args), whose float32 products autocast would round."""
    with torch.autocast(device_type, enabled=False):
        return run(*args)


def backend_name(
    op: str,
    backend: str | None,
    dtype: torch.dtype,
    device: torch.device,
    shape: tuple[int, ...] = (),
    scheme: str | None = None,
) -> str:
    """`choose(...).backend`, found without the reasons: it runs at every call."""
    requested = _request(backend)[0]
    for name in _auto_order(op, device) if requested == "auto" else (requested,):
        if name in BACKENDS and unsupported_reason(op, name, dtype, device, shape, scheme) is None:
            return name
    return choose(op, backend, dtype, device, shape, scheme).backend


def choose(
    op: str,
    backend: str | None,
    dtype: torch.dtype,
    device: torch.device,
    shape: tuple[int, ...] = (),
    scheme: str | None = None,
) -> Choice:
    """Picks the backend of one call. Raises ValueError for an unknown name, RuntimeError when it cannot run here.

    shape: of the op's first tensor, for ops whose backends are limited by it.
    scheme: of the weight, for ops whose backends are limited by that.
    """
    requested, origin = _request(backend)
    if requested not in (*BACKENDS, "auto"):
        raise ValueError(f"{origin} must be one of auto, {', '.join(BACKENDS)}, got {requested!r}")
    order = _auto_order(op, device)
    reasons = {name: why for name in BACKENDS if (why := unsupported_reason(op, name, dtype, device, shape, scheme))}
    best = next(name for name in order if name not in reasons)
    if requested == "auto":
        rejected = {name: reasons.get(name, f"{best} comes first on {device.type}") for name in BACKENDS}
        rejected.pop(best)
        weights = "" if scheme is None else f" with {scheme} weights"
        return Choice(op, best, f"first of {', '.join(order)} that runs {dtype}{weights} on {device.type}", rejected)
    if requested in reasons:
        raise RuntimeError(
            f"{op} cannot run on backend {requested!r} (from {origin}): {reasons[requested]}; auto would run {best!r}"
        )
    return Choice(op, requested, f"asked for by {origin}", {n: w for n, w in reasons.items() if n != requested})


def explain(op: str, *args: Any, **kwargs: Any) -> Choice:
    """Says which backend `op(*args, **kwargs)` would run on and why, without running it.

    >>> print(madtp_kernels.explain("gather_merge", x, selection))
    """
    known = {name: entry.public for name, entry in _records.items() if entry.public is not None}
    if op not in known:
        raise ValueError(f"op must be one of {', '.join(sorted(known))}, got {op!r}")
    entry = _records[op]
    bound = inspect.signature(known[op]).bind(*args, **kwargs).arguments
    first = next(iter(bound.values()))
    tensor = first if isinstance(first, torch.Tensor) else first[0]
    dtype = tensor.dtype if entry.dtype is None else entry.dtype(**bound)
    scheme = getattr(bound.get("weight"), "scheme", None)
    choice = choose(op, bound.get("backend"), dtype, tensor.device, tuple(tensor.shape), scheme)
    if choice.backend == "cuda" and tensor.device.type == "cuda":
        code = explain_code(tuple(_build_archs()), torch.cuda.get_device_capability(tensor.device))
        choice = replace(choice, reason=f"{choice.reason}; {code}")
    return entry.tuned(choice, **bound) if entry.tuned is not None and is_auto(bound.get("backend")) else choice


def as_argument(backend: str | None) -> str:
    """`backend` as the ops take it. Raises ValueError for what is no text."""
    if backend is not None and not isinstance(backend, str):
        raise ValueError(f"backend= must be one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    return backend or "auto"


def is_auto(backend: str | None) -> bool:
    """Whether neither the call nor the process asks for a backend."""
    return _request(backend)[0] == "auto"


def _auto_order(op: str, device: torch.device) -> tuple[str, ...]:
    return _records[op].auto_order.get(device.type, ("reference",))


def _request(backend: str | None) -> tuple[str, str]:
    """The backend that was asked for, and where."""
    if backend not in (None, "auto"):
        return backend, "backend="
    return os.environ.get("MADTP_BACKEND", "auto").strip().lower() or "auto", "MADTP_BACKEND"


def unsupported_reason(
    op: str,
    backend: str,
    dtype: torch.dtype,
    device: torch.device,
    shape: tuple[int, ...] = (),
    scheme: str | None = None,
) -> str | None:
    """Why `backend` cannot run this call, or None when it can."""
    entry = _records[op]
    if backend not in entry.implementations:
        return f"{op} has no {backend} implementation"
    if backend == "reference":
        return None
    if dtype not in FAST_DTYPES:
        return f"{dtype} runs on the reference only"
    why = _BACKEND_UNSUPPORTED_REASONS[backend](device)
    if why is None and entry.limits is not None:
        why = entry.limits(backend, shape, dtype)
    if why is None and entry.scheme_limits is not None and scheme is not None:
        why = entry.scheme_limits(backend, scheme, device)
    return why


def _cpu_unsupported_reason(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"the tensors are on {device.type}"
    return extension_unsupported_reason()


def _onednn_unsupported_reason(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"the tensors are on {device.type}"
    return None if torch.backends.mkldnn.is_available() else f"torch {torch.__version__} was built without oneDNN"


def _triton_unsupported_reason(device: torch.device) -> str | None:
    if device.type == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return _missing_triton() if interpreted else "the tensors are on cpu and TRITON_INTERPRET is not 1"
    if device.type != "cuda":
        return f"the tensors are on {device.type}"
    return (too_old_reason(device) if torch.version.hip is None else None) or _missing_triton()


def cuda_unsupported_reason(device: torch.device) -> str | None:
    """Why the CUDA kernels cannot run on `device`, or None when they can."""
    if device.type != "cuda":
        return f"the tensors are on {device.type}"
    if (why := extension_unsupported_reason()) is not None:
        return why
    if not hasattr(extension(), "cuda"):
        return "madtp_kernels._C was built without CUDA"
    if (why := too_old_reason(device)) is not None:
        return why
    archs, capability = tuple(_build_archs()), torch.cuda.get_device_capability(device)
    if (why := arch_unsupported_reason(archs, capability)) is not None:
        return why
    return driver_unsupported_reason(archs, capability, _build_cuda(), _driver_version())


def _cusparselt_unsupported_reason(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"the tensors are on {device.type}"
    if not torch.backends.cusparselt.is_available():
        return f"torch {torch.__version__} was built without cuSPARSELt"
    return too_old_reason(device)


def too_old_reason(device: torch.device, needed: tuple[int, int] = (8, 0)) -> str | None:
    """Why a GPU is of no architecture from `needed` on, or None when it is."""
    capability = torch.cuda.get_device_capability(device)
    return (
        None if capability >= needed else f"needs compute capability {needed[0]}.{needed[1]} or newer, got {capability}"
    )


def arch_unsupported_reason(archs: tuple[str, ...], capability: tuple[int, int]) -> str | None:
    """Why code for `archs` (80: that and newer; 90a: that alone; 100f: its family) cannot run, or None when it can."""
    for arch in archs:
        major, minor = divmod(int(arch.rstrip("af")), 10)
        newer = (major, minor) <= capability
        if arch[-1] == "a" and (major, minor) == capability:
            return None
        if arch[-1] != "a" and newer and (arch[-1] != "f" or major == capability[0]):
            return None
    number = f"{capability[0]}{capability[1]}"
    return f"madtp_kernels._C was built with MADTP_CUDA_ARCHS={';'.join(archs)}, none of which runs on sm_{number}"


def code_that_runs(archs: tuple[str, ...], capability: tuple[int, int]) -> tuple[str, bool]:
    """What a GPU runs of code for `archs`, one of which it runs: the architecture, and whether from PTX, which the
    driver compiles: machine code is for the GPUs of its major number, and PTX goes along with that for all newer ones.
    """
    runnable = [arch for arch in archs if arch_unsupported_reason((arch,), capability) is None]
    own = [arch for arch in runnable if not arch.isdecimal() or int(arch) // 10 == capability[0]]
    # Of one number that for the architecture alone ("a") comes first, then that for its family ("f").
    best = max(own or runnable, key=lambda arch: (int(arch.rstrip("af")), {"a": 2, "f": 1}.get(arch[-1], 0)))
    return best, not own


def running_arch(device: torch.device) -> str:
    """That of the code of madtp_kernels._C that a GPU runs, which runs some of it: 80, 90a."""
    return code_that_runs(tuple(_build_archs()), torch.cuda.get_device_capability(device))[0]


def explain_code(archs: tuple[str, ...], capability: tuple[int, int]) -> str:
    """Which of our kernels a GPU runs, and how they come to it."""
    arch, is_ptx = code_that_runs(archs, capability)
    kernels = next((own for own in OWN_KERNELS if own == arch), "80")
    how = f"PTX for sm_{arch}, which the driver compiles at its first use" if is_ptx else f"code for sm_{arch}"
    return f"on sm_{capability[0]}{capability[1]} the kernels of sm_{kernels} run, as {how}"


@functools.cache
def driver_unsupported_reason(
    archs: tuple[str, ...],
    capability: tuple[int, int],
    built: tuple[int, int] | None,
    driver: tuple[int, int] | None,
) -> str | None:
    """Why a driver does not run code for `archs`, one of which the GPU runs, or None when it does; versions of CUDA.

    It runs machine code of its own major version and older ones, and compiles PTX of its own version and older ones.
    """
    if driver is None or built is None:
        return None
    arch, is_ptx = code_that_runs(archs, capability)
    if driver[0] < built[0] or (is_ptx and driver < built):
        ours = f"PTX for sm_{arch}" if is_ptx else "code"
        return (
            f"the NVIDIA driver is for CUDA {driver[0]}.{driver[1]}, and madtp_kernels._C has {ours} of CUDA "
            f"{built[0]}.{built[1]}: update the driver, or build with an older nvcc"
        )
    return None


@functools.cache
def _build_archs() -> list[str]:
    return extension().build_info()["cuda_archs"]


@functools.cache
def _build_cuda() -> tuple[int, int] | None:
    """The version of CUDA that the extension was built with."""
    version = extension().build_info()["cuda"]
    return None if version is None else (int(version.split(".")[0]), int(version.split(".")[1]))


@functools.cache
def _driver_version() -> tuple[int, int] | None:
    """The version of CUDA that the driver is for, None where torch does not say."""
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    if ask is None:
        return None
    major, rest = divmod(ask(), 1000)
    return major, rest // 10


_BACKEND_UNSUPPORTED_REASONS = {
    "dense": lambda device: None,
    "onednn": _onednn_unsupported_reason,
    "cpu": _cpu_unsupported_reason,
    "triton": _triton_unsupported_reason,
    "cuda": cuda_unsupported_reason,
    "cusparselt": _cusparselt_unsupported_reason,
}


@functools.cache
def _missing_triton() -> str | None:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return None


class Extension(Protocol):
    """The module madtp_kernels._C, whose stub says more. `cuda` is there where it was built with CUDA."""

    cpu: type[_C.cpu]
    cuda: type[_C.cuda]

    def build_info(self) -> _C.BuildInfo: ...


@functools.cache
def _load_extension() -> tuple[Extension | None, str | None]:
    # torch is imported above, so the C++ kernels share its OpenMP runtime.
    try:
        module = cast(Extension, importlib.import_module("madtp_kernels._C"))
    except ImportError as error:
        return None, f"the C++ extension madtp_kernels._C cannot be loaded ({error}); build it with: pip install -e ."
    built = module.build_info()["version"]
    if built != __version__:
        return (
            None,
            f"madtp_kernels._C is of version {built}, not {__version__}; rebuild it with: pip install -e .",
        )
    return module, None


def extension() -> Extension:
    """The compiled module madtp_kernels._C; raises RuntimeError with the reason when it cannot be used."""
    module, why = _load_extension()
    if module is None:
        raise RuntimeError(why)
    return module


def extension_unsupported_reason() -> str | None:
    """Why the C++ extension cannot be used, or None when it can."""
    return _load_extension()[1]
