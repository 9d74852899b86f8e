# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.gpu_steps STEP ... --out DIR: what the steps of benchmarks.gpu_first run, a process for each.

What is measured goes to a file of JSON lines in DIR as soon as it is known: a process that is ended leaves what it had.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.gpu_first import ROOT, TREES, read_json, write_json

DEVICE = "cuda"
SAMPLES = 7  # of a time that others are held to
SCREENING = 3  # of one that is one of many
TOLERANCE = 0.02  # of the largest result


class Lines:
    """A file of JSON lines, each on the disk before the next is begun."""

    def __init__(self, path: Path):
        self._file = path.open("w")

    def add(self, **line: object) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        print(line, flush=True)


# --- without torch


def machine(out: Path) -> int:
    """Writes what there is as it is found out: a broken driver may end this process."""
    facts: dict[str, object] = {"no_gpu": "the step machine ended before it had asked torch for a CUDA device"}

    def know(**more: object) -> None:
        facts.update(more)
        write_json(out / "machine.json", facts)

    know(python=platform.python_version(), system=platform.platform(), cores=os.cpu_count())
    know(nvidia_smi=said("nvidia-smi"), nvcc=said("nvcc", "--version"), ncu=said("ncu", "--version"))
    know(commit=said("git", "-C", str(ROOT), "rev-parse", "HEAD"))
    try:
        import torch
    except ImportError as error:
        know(no_gpu=f"torch cannot be imported ({error})")
        return 0
    know(torch=torch.__version__, cuda=torch.version.cuda)
    for package in ("triton", "transformers", "pytest", "numpy"):
        know(**{package: package_version(package)})
    know(cusparselt=torch.backends.cusparselt.is_available() and torch.backends.cusparselt.version())
    if torch.version.cuda is None:
        know(no_gpu=f"torch {torch.__version__} was built without CUDA")
        return 0
    try:
        torch.cuda.init()
    except RuntimeError as error:  # no device, or a driver that is too old, which the text says
        know(no_gpu=str(error).strip().split("\n")[0])
        return 0
    properties = torch.cuda.get_device_properties(0)
    know(
        gpu=properties.name,
        capability=[properties.major, properties.minor],
        multiprocessors=properties.multi_processor_count,
        memory=properties.total_memory,
        l2_bytes=getattr(properties, "L2_cache_size", None),
    )
    x = torch.ones(1 << 20, device=DEVICE)
    assert x.sum().item() == 1 << 20  # the driver works
    facts.pop("no_gpu")
    know()
    return 0


def said(*command: str) -> str | None:
    """What a program prints, or None where it is not there or fails."""
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def package_version(name: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def archs(capability: Sequence[int]) -> str:
    """What to build for a GPU: what the library has of its own for it, which is quicker than all there is."""
    number = 10 * capability[0] + capability[1]
    return "90a" if number == 90 else str(number)


def build(out: Path, build: Path, machine: Path) -> int:
    """The extension in both forms, and the test of single instructions; the rest of a build answers nothing here."""
    import pybind11

    facts, tree = read_json(machine), build / "cmake"
    ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = [
        *("cmake", "-S", str(ROOT), "-B", str(tree), *ninja),
        *("-DMADTP_CUDA=ON", f"-DMADTP_CUDA_ARCHS={archs(facts['capability'])}"),
        *("-DMADTP_BUILD_PYTHON=ON", "-DMADTP_BUILD_TESTS=ON"),
        *("-DMADTP_HAS_AVX2=OFF", "-DMADTP_HAS_AVX512=OFF"),  # no question is about the CPU
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
    ]
    subprocess.run(configure, check=True)
    parallel = ["--parallel", str(os.cpu_count() or 1)]
    targets = ["--target", "gpu_instructions_test", "_C", "_C_bounded"]
    keep_going = ["--", "-k", "0"] if ninja else ["--", "-k"]
    try:
        return subprocess.run(["cmake", "--build", str(tree), *parallel, *targets, *keep_going]).returncode
    finally:  # what is there when the time is over, too
        for name, folder in zip(TREES, (tree, tree / "csrc" / "tests" / "gpu" / "bounded"), strict=True):
            for module in folder.glob("_C*.so"):
                shutil.copy(module, build / name / "madtp_kernels")


# --- 2:4 linear layers

VIT_B, VIT_L = 768, 1024
ROWS = (4616, 577, 18464, 64)  # 8 images of 577 tokens, 1, 32; a few rows of text


def layers(width: int) -> Iterator[dict]:
    """The Linears of a ViT block of this width."""
    yield {"in_features": width, "out_features": 4 * width, "epilogue": "gelu"}
    yield {"in_features": 4 * width, "out_features": width, "epilogue": "residual"}
    yield {"in_features": width, "out_features": 3 * width, "epilogue": "bias"}
    yield {"in_features": width, "out_features": width, "epilogue": "residual"}


def linear_cases() -> Iterator[dict]:
    for width, rows in itertools.product((VIT_B, VIT_L), ROWS):
        for layer in layers(width):
            yield {"tokens": rows, **layer, "dtype": "bfloat16"}


def listing(out: Path) -> int:
    """The kinds of configurations that this GPU runs: architecture, tile, cluster."""
    from madtp_kernels.native import sparse24 as native

    found: list[list[int]] = []
    for rows, out_features, in_features in ((577, 768, 768), (64, 768, 3072)):
        for config in native.sparse24_linear_configs(*arguments(rows, out_features, in_features)[0]):
            kind = [config.architecture, config.tile_tokens, config.tile_out_features, config.cluster]
            if kind not in found:
                found.append(kind)
    write_json(out / "configurations.json", found)
    print(found)
    return 0 if found else 1


def arguments(rows: int, out_features: int, in_features: int, activation: str = "none", full: bool = False):
    """Of `native.sparse24_linear_cuda`, on the GPU, and the exact result; `full` has bias, scale and residual."""
    import torch
    from torch.nn import functional as F

    import madtp_kernels as mk

    torch.manual_seed(rows)
    weight = torch.randn(out_features, in_features, device=DEVICE) * in_features**-0.5
    weight = (weight * mk.nm_mask(weight, 2, 4)).bfloat16()
    x = torch.randn(rows, in_features, device=DEVICE).bfloat16()
    sparse = mk.sparse24_compress(weight)
    bias, scale = torch.randn(2, out_features, device=DEVICE) if full else (None, None)
    residual = torch.randn(rows, out_features, device=DEVICE).bfloat16() if full else None
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    exact = F.gelu(exact) if activation == "gelu" else exact
    exact = exact if scale is None else exact * scale.double()
    exact = exact if residual is None else exact + residual.double()
    return (x, sparse.values, sparse.indices, None, bias, activation, residual, scale, None), exact


SHAPES = ((1, 8, 16), (65, 136, 144), (577, 768, 768), (130, 264, 3072), (4616, 3072, 768))


def configuration(out: Path, kind: Sequence[int]) -> int:
    """Every configuration of one kind on every shape; what is wrong says where, in a few lines."""
    import torch

    from madtp_kernels.native import sparse24 as native

    lines, wrong = Lines(out / "results.jsonl"), 0
    for (rows, out_features, in_features), (activation, full) in itertools.product(
        SHAPES, (("none", False), ("gelu", True))
    ):
        given, exact = arguments(rows, out_features, in_features, activation, full)
        for config in native.sparse24_linear_configs(*given):
            if [config.architecture, config.tile_tokens, config.tile_out_features, config.cluster] != list(kind):
                continue
            case = {"rows": rows, "out_features": out_features, "in_features": in_features, "activation": activation}
            print("running", case, config, flush=True)
            got = native.sparse24_linear_cuda(*given, config)
            torch.cuda.synchronize()
            error = ((got.double() - exact).abs().max() / exact.abs().max()).item()
            right = error <= TOLERANCE
            lines.add(**case, config=list(config), error=error, right=right)
            if not right:
                wrong += 1
                print_wrong(got.double(), exact)
    return 1 if wrong else 0


def print_wrong(got, exact, most: int = 5) -> None:
    """Which elements are wrong: how many, in which rows and columns, the first of them."""
    where = ~((got - exact).abs() <= TOLERANCE * exact.abs().max())
    rows, columns = where.any(1).nonzero().flatten().tolist(), where.any(0).nonzero().flatten().tolist()
    print(f"  wrong: {int(where.sum())} of {where.numel()}, in {len(rows)} rows from {rows[0]} to {rows[-1]}", end="")
    print(f" and {len(columns)} columns from {columns[0]} to {columns[-1]}")
    for row, column in where.nonzero()[:most].tolist():
        print(f"  at ({row}, {column}) {got[row, column].item():.5g}, not {exact[row, column].item():.5g}")


def microseconds(clock, function: Callable[[], object], samples: int) -> dict[str, float]:
    times = sorted(clock(function) for _ in range(samples))
    return {"us": statistics.median(times), "least_us": times[0], "most_us": times[-1]}


def timed(clock, prepare: Callable[[], Callable[[], object]], gate: Callable[[object], None] | None = None) -> dict:
    """Times of what `prepare` makes, or why there are none, whatever a library raises."""
    from benchmarks.entry import Unavailable

    try:
        function = prepare()
        result = function()
        if gate is not None:
            gate(result)
        return microseconds(clock, function, SAMPLES)
    except Unavailable as reason:
        return {"unavailable": str(reason)}
    except Exception as error:
        kind = "wrong" if isinstance(error, AssertionError) else "failed"
        return {kind: f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"}


def linear(out: Path) -> int:
    """Every configuration of every layer of ViT-B and ViT-L, beside dense products; what is wrong is not timed."""
    import torch

    from benchmarks.entries import sparse24 as entry
    from madtp_kernels import tune
    from madtp_kernels.native import sparse24 as native

    device = torch.device(DEVICE)
    clock, lines, wrong = tune.cuda_clock(device), Lines(out / "times.jsonl"), 0
    for case in linear_cases():
        inputs = entry.linear_inputs(case, device, seed=0)
        expected = entry.torch_linear(inputs)().float()
        tolerance = TOLERANCE * expected.abs().max()
        for name, prepare in (("torch dense", entry.torch_linear), ("cuBLASLt dense, fused", entry.cublaslt_fused)):
            lines.add(**case, provider=name, **timed(clock, functools.partial(prepare, inputs)))
        layout = native.sparse24_pack(inputs.weight.values, inputs.weight.indices)
        given = (inputs.x, inputs.weight.values, inputs.weight.indices, layout)
        given += (inputs.bias, inputs.activation or "none", inputs.residual, None, None)
        configs = native.sparse24_linear_configs(*given)
        for config in (None, *configs):  # None: what the model of the device chooses
            named = {"provider": "madtp cuda", "config": None if config is None else list(config)}
            function = functools.partial(native.sparse24_linear_cuda, *given, config)
            if not (function().float() - expected).abs().max() <= tolerance:
                lines.add(**case, **named, wrong=True)
                wrong += 1
                continue
            samples = SAMPLES if config is None else SCREENING
            lines.add(**case, **named, **microseconds(clock, function, samples))
    return 1 if wrong else 0


def cusparselt(out: Path) -> int:
    """The same layers on cuSPARSELt, with its own search, and as torch's semi-structured tensors."""
    import torch
    from torch.nn import functional as F
    from torch.sparse import to_sparse_semi_structured

    from benchmarks.entries import sparse24 as entry
    from madtp_kernels import tune

    def semi_structured(inputs: entry.LinearInputs) -> Callable[[], object]:
        weight = to_sparse_semi_structured(inputs.dense)

        def run():
            y = F.linear(inputs.x, weight, inputs.bias)
            y = y if inputs.activation is None else F.gelu(y)
            return y if inputs.residual is None else inputs.residual + y

        return run

    device = torch.device(DEVICE)
    clock, lines = tune.cuda_clock(device), Lines(out / "times.jsonl")
    for case in linear_cases():
        inputs = entry.linear_inputs(case, device, seed=0)
        for name, prepare in (("cuSPARSELt", entry.cusparselt_tuned), ("torch semi-structured", semi_structured)):
            lines.add(**case, provider=name, **timed(clock, functools.partial(prepare, inputs)))
    return 0


# --- attention

ATTENTION = (  # batch, tokens, heads: of ViT-B and ViT-L
    (8, 577, 12),
    (8, 577, 16),
    (32, 197, 12),
    (2, 2308, 12),
)


def attention(out: Path) -> int:
    """Forward and backward, with and without statistics, beside SDPA and FlexAttention; gated as the benchmarks are."""
    import torch

    from benchmarks.entries import attention as forward
    from benchmarks.entries import attention_backward as backward
    from madtp_kernels import tune

    device = torch.device(DEVICE)
    clock, lines, wrong = tune.cuda_clock(device), Lines(out / "times.jsonl"), 0
    ours = ("torch SDPA", "madtp triton", "madtp triton with statistics")
    directions = {"forward": forward.ENTRIES[0], "backward": backward.ENTRIES[0]}
    slow = ("torch FlexAttention",)  # to compile: what it has no time for is missing, and nothing else
    calls = itertools.product((ours, slow), ATTENTION, directions.items())
    for names, (batch, tokens, heads), (direction, entry) in calls:
        case = {"batch": batch, "tokens": tokens, "heads": heads, "head_dim": 64, "dtype": "bfloat16"}
        names = [name for name in names if name in entry.providers]
        inputs = entry.inputs(case, device, 0) if names else None
        for name in names:
            prepare, gate = functools.partial(entry.providers[name], inputs), functools.partial(entry.gate, inputs)
            found = timed(clock, prepare, lambda result, name=name, gate=gate: gate(result, name))
            lines.add(**case, direction=direction, provider=name, **found)
            wrong += name.startswith("madtp") and "us" not in found
    return 1 if wrong else 0


# --- a tower

TOWER = {  # CLIP ViT-L
    **{"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24},
    **{"image_size": 336, "patch_size": 14},
}


def tower(out: Path) -> int:
    """A CLIP ViT-L of 336 pixels, 8 images, as it is and compressed, each in one CUDA graph and without one."""
    import torch
    import transformers

    import madtp
    from madtp import hwp
    from madtp.models.registry import family_of

    config = transformers.CLIPVisionConfig(**TOWER)
    images = torch.randn(8, 3, config.image_size, config.image_size, device=DEVICE, dtype=torch.bfloat16)
    lines = Lines(out / "times.jsonl")

    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        with torch.device(DEVICE):  # a CPU would take seconds to draw so many weights
            return transformers.CLIPVisionModel(config).eval().requires_grad_(False).to(torch.bfloat16)

    def sdpa() -> torch.nn.Module:
        built = model()
        built.set_attn_implementation("sdpa")
        return built

    def patched(sparse: bool, temperature: float) -> torch.nn.Module:
        built = model()
        if sparse:
            dense = family_of(built).dense_modules
            hwp.prune_one_shot(built, "2:4", hwp.select_modules(built, "2:4", exclude=dense).selected)
        handle = madtp.patch(built, madtp.CompressionConfig(alignment_dim=768), capacity="upper_bound")
        handle.set_temperature(temperature)
        if sparse:
            hwp.pack(built)
        return built

    modes = {
        "Hugging Face SDPA": sdpa,
        "madtp dense": functools.partial(patched, False, 0.0),
        "madtp 2:4": functools.partial(patched, True, 0.0),
        "madtp tokens": functools.partial(patched, False, 1.0),
        "madtp tokens and 2:4": functools.partial(patched, True, 1.0),
    }
    failed = 0
    for name, make in modes.items():
        try:
            tower_times(lines, name, make(), images)
        except Exception as error:  # the other modes are asked all the same
            lines.add(provider=name, failed=f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")
            failed += 1
    return 1 if failed else 0


def tower_times(lines: Lines, name: str, model, images) -> None:
    """Milliseconds of a forward, queued by the host and replayed from a graph, whose result must be the same."""
    import torch

    with torch.inference_mode():

        def run():
            return model(pixel_values=images).pooler_output

        for _ in range(2):  # compiles
            expected = run().clone()
        lines.add(provider=name, graph=False, **milliseconds(run))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        captured.zero_()
        graph.replay()
        torch.cuda.synchronize()
        if not torch.equal(captured, expected):
            error = ((captured - expected).float().norm() / expected.float().norm()).item()
            raise RuntimeError(f"a replay of the graph differs from a call, by {error:.1e} of it")
        handle = getattr(model, "madtp_handle", None)
        kept = None if handle is None else handle.tokens_per_layer["vision"]
        lines.add(provider=name, graph=True, tokens=kept, **milliseconds(graph.replay))


def milliseconds(function: Callable[[], object], calls: int = 10, samples: int = 5) -> dict[str, float]:
    """Of one of many calls in a row."""
    import torch

    times = []
    for _ in range(samples):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / calls)
    return {"ms": statistics.median(times), "least_ms": min(times), "most_ms": max(times)}


def kernels(out: Path) -> int:
    """One call of each of the two kernels that matter most, for a profiler."""
    import torch

    import madtp_kernels as mk
    from benchmarks.entries import attention as forward
    from benchmarks.entries import sparse24 as entry

    device = torch.device(DEVICE)
    layer = {"tokens": 4616, "in_features": 768, "out_features": 3072, "epilogue": "gelu", "dtype": "bfloat16"}
    inputs = entry.linear_inputs(layer, device, seed=0)
    for activation in (None, "gelu"):
        mk.sparse24_linear(inputs.x, inputs.weight, inputs.bias, activation=activation, backend="cuda")
    case = {"batch": 8, "tokens": 577, "heads": 12, "head_dim": 64, "dtype": "bfloat16"}
    run = forward.ours("triton", return_stats=True)(forward.attention_inputs(case, device, 0))
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    return 0


def main(given: list[str] | None = None) -> int:
    steps = {step.__name__: step for step in (machine, listing, linear, cusparselt, attention, tower, kernels)}
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_steps", description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=[*steps, "build", "configuration"])
    parser.add_argument("kind", nargs="*", type=int, help="of a configuration: architecture, tokens, features, cluster")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--build", type=Path)
    parser.add_argument("--machine", type=Path)
    options = parser.parse_args(given)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.step == "build":
        return build(options.out, options.build, options.machine)
    if options.step == "configuration":
        return configuration(options.out, options.kind)
    return steps[options.step](options.out)


if __name__ == "__main__":
    sys.exit(main())
