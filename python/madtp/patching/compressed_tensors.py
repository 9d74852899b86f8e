# SPDX-License-Identifier: Apache-2.0
"""Models that llm-compressor saved 2:4 in the bitmasks of compressed-tensors, which it reads up to its version 0.14.

The format is that of compressed-tensors 0.12: https://github.com/neuralmagic/compressed-tensors
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from madtp.building import check_counts, elements_of, no_larger_than
from madtp.files.reading import require_files, tensor_shapes
from madtp.hwp.weight_grid import SCALE
from madtp.models.versions import check_transformers
from madtp.patching.names import CONFIG_FILE
from madtp.patching.pretrained import model_class, model_dtype
from madtp.patching.state import ModelError, read_json
from madtp_kernels.bounded_file import one_line
from madtp_kernels.checks import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "compressed-tensors"
BITMASK_24, BITMASK, DENSE = "sparse-24-bitmask", "sparse-bitmask", "dense"
ROUNDED = ("int-quantized", "float-quantized", "naive-quantized")  # one number of 8 bits for each weight
PARTS = ("compressed", "bitmask", "shape", "row_offsets")
# Of activations and of the cache, which run here as they are, or are rounded by every row's own scale.
UNUSED = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "k_scale", "v_scale", "q_scale")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)
WEIGHT, ZERO_POINT = "weight", "weight_zero_point"


def load_compressed_tensors(directory: str | os.PathLike, *, dtype: str | torch.dtype | None = None) -> PreTrainedModel:
    """Loads a model that compressed-tensors saved in the format "sparse-24-bitmask", "sparse-bitmask" or "dense".

    `madtp.hwp.pack(model)` then makes its 2:4 Linears run sparse. Those saved in int8 or fp8 have their scales as
    `weight_scale`, by which `hwp.pack(model, dtype="int8")`, or "fp8", finds the same numbers again; an int8 of -128
    becomes -127. Scales of activations are not used.

    Args:
        directory: a folder with config.json and the files of safetensors.
        dtype: None or "auto" is the one that config.json names.

    Returns:
        the model of the class that config.json names, of transformers, in eval mode.

    Raises:
        ModelError: the directory lacks something, is damaged, or of another format. ValueError: dtype is none.
            RuntimeError: transformers is too old.
    """
    check_transformers()
    dtype, folder = model_dtype(dtype), Path(directory)
    try:
        require_files(folder)
        values = read_json(folder, CONFIG_FILE)
        sparsity = _check_format(values)
        check_counts(values)
        kind = model_class(folder, decoder=True)
        held = tensor_shapes(_files(folder))
        with no_larger_than(len(held), elements_of(held)):
            config = kind.config_class.from_pretrained(folder)
            for field in ("quantization_config", "compression_config"):
                vars(config).pop(field, None)
            wanted: torch.dtype = dtype if isinstance(dtype, torch.dtype) else config.dtype or torch.float32
            state, scales = _read(_files(folder), sparsity, wanted)
            model, loaded = kind.from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype=wanted,
                ignore_mismatched_sizes=True,  # which the lines below name
                output_loading_info=True,
            )
        mismatched = {name for name, *_ in loaded["mismatched_keys"]}
        wrong = sorted({*loaded["missing_keys"], *loaded["unexpected_keys"], *mismatched})
        require(not wrong, "weights", f"those of {CONFIG_FILE}", f"{len(wrong)} that are not (first: {wrong[:1]})")
        _keep_scales(model, scales)
        if model.can_generate() and (folder / "generation_config.json").exists():
            model.generation_config = type(model.generation_config).from_pretrained(folder)
    except ModelError:
        raise
    except Exception as error:  # every reader (json, safetensors, transformers) has its own kind
        reason = one_line((str(error).strip() or type(error).__name__).splitlines()[0])
        raise ModelError(f"{directory} cannot be read as a model of {METHOD} ({reason})") from error
    return model.eval()


def _check_format(values: Any) -> str:
    """The format of the sparse weights that a config.json says. Raises ValueError for what is not read here."""
    found = values.get("quantization_config") or values.get("compression_config") if isinstance(values, dict) else None
    ok = isinstance(found, dict) and found.get("quant_method", METHOD) == METHOD
    require(ok, CONFIG_FILE, f"with a quantization_config of {METHOD}", "none")
    assert isinstance(found, dict)
    require(not found.get("transform_config"), "transform_config", "empty", found.get("transform_config"))
    rounded = found.get("format") or DENSE
    require(rounded in (DENSE, *ROUNDED), "format", f"one of {', '.join((DENSE, *ROUNDED))}", one_line(rounded, 80))
    sparsity = found.get("sparsity_config") or {}
    require(isinstance(sparsity, dict), "sparsity_config", "a mapping", sparsity)
    named = sparsity.get("format") or DENSE
    known = BITMASK_24, BITMASK, DENSE
    require(named in known, "format of sparsity_config", f"one of {', '.join(known)}", one_line(named, 80))
    return str(named)


def _files(folder: Path) -> list[Path]:
    """The files of weights, of the index where there is one."""
    index = "model.safetensors.index.json"
    if not os.path.lexists(folder / index):
        return [folder / "model.safetensors"]
    names = sorted({*read_json(folder, index)["weight_map"].values()})
    ok = all(isinstance(name, str) and name == Path(name).name and name.endswith(".safetensors") for name in names)
    require(ok, f"weight_map of {index}", "of files of safetensors in the same folder", one_line(names, 80))
    return [folder / name for name in names]


def _read(files: list[Path], sparsity: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Name -> dense tensor, and name of a Linear -> scales (N,), of those whose weights are of 8 bits.

    Raises:
        ValueError: a part of a weight is missing, or breaks its rule.
    """
    from safetensors import safe_open

    where = {name: file for file in files for name in tensor_shapes([file])}
    opened = {file: safe_open(file, "pt") for file in files}
    modules = _modules(where, sparsity)
    state, scales = dict[str, Tensor](), dict[str, Tensor]()
    used = {name for names in modules.values() for name in names.values()}
    for name in where:
        if name not in used and name.rpartition(".")[2] not in UNUSED:
            state[name] = opened[where[name]].get_tensor(name)
    for module, names in modules.items():
        parts = {part: opened[where[name]].get_tensor(name) for part, name in names.items()}
        weight = parts[WEIGHT] if WEIGHT in parts else _dense(module, parts, sparsity)
        scale = parts.get(SCALE)
        if weight.dtype in EIGHT_BITS:
            require(scale is not None, f"{module}.{SCALE}", "there, for a weight of 8 bits", "nothing")
            scales[module] = scale = _scale(module, scale, weight.shape[0])
            _check_rounded(module, weight, parts.get(ZERO_POINT))
            weight = weight.float() * scale[:, None]
        else:
            require(weight.dtype in FLOATS, f"{module}.{WEIGHT}", "of floating point, int8 or float8_e4m3fn", weight)
            require(scale is None, f"{module}.{SCALE}", "absent, as the weight is not of 8 bits", "one")
        state[f"{module}.{WEIGHT}"] = weight.to(dtype)
    return state, scales


def _modules(names: Mapping[str, Any], sparsity: str) -> dict[str, dict[str, str]]:
    """Name of a module with a bitmask or a scale -> its parts -> their names in the files.

    A bitmask of a bare parameter, as the first versions wrote one (`name.weight.bitmask`), is the module's.
    """
    found = dict[str, dict[str, str]]()
    for name in names:
        module, _, part = name.rpartition(".")
        if part in PARTS and (part != "shape" or f"{module}.bitmask" in names or f"{module}.compressed" in names):
            found.setdefault(module.removesuffix(f".{WEIGHT}"), {})[part] = name
        elif part in (SCALE, ZERO_POINT):
            found.setdefault(module, {})[part] = name
    for module, parts in found.items():
        sparse = not {*parts}.isdisjoint(PARTS)
        if sparse:
            rule = f"{BITMASK_24} or {BITMASK}, as {module} is saved"
            require(sparsity != DENSE, "format of sparsity_config", rule, DENSE)
            needed = PARTS if sparsity == BITMASK else PARTS[:3]
            missing = [part for part in needed if part not in parts]
            require(not missing, module, f"saved as {', '.join(needed)}", f"no {', '.join(missing)}")
            require(f"{module}.{WEIGHT}" not in names, module, f"saved once, as {sparsity}", f"a {WEIGHT} too")
        else:
            require(f"{module}.{WEIGHT}" in names, module, f"saved with a {WEIGHT}", f"only {', '.join(parts)}")
            parts[WEIGHT] = f"{module}.{WEIGHT}"
    return found


def _dense(name: str, parts: Mapping[str, Tensor], sparsity: str) -> Tensor:
    """(N, C) of what a bitmask holds: bit c % 8 of byte c // 8 of row n is set where W[n, c] is kept.

    Args:
        parts: "shape" N, C; "bitmask" (N, ceil(C/8)) uint8; "compressed", the kept values in the order of rows: (N,
            C/2), or of "sparse-bitmask" (K,), whose rows begin at "row_offsets" (N,).
    """
    shape, bitmask, values = parts["shape"], parts["bitmask"], parts["compressed"]
    ok = shape.numel() == 2 and shape.dtype in (torch.int64, torch.int32)
    require(ok, f"{name}.shape", "two integers", shape)
    rows, columns = shape.flatten().tolist()
    # Before anything of this size is made: the file has the bits.
    ok = bitmask.dtype == torch.uint8 and columns >= 0 and tuple(bitmask.shape) == (rows, -(-columns // 8))
    require(ok, f"{name}.bitmask", f"uint8 (N, ceil(C/8)) of the shape {[rows, columns]}", bitmask)
    ok = values.dtype in (*FLOATS, *EIGHT_BITS)
    require(ok, f"{name}.compressed", "of floating point, int8 or float8_e4m3fn", values)
    bits = torch.arange(8, dtype=torch.uint8)
    kept = ((bitmask[..., None] >> bits) & 1).bool().flatten(1)
    require(not kept[:, columns:].any(), f"{name}.bitmask", f"0 beyond column {columns}", "a bit")
    kept = kept[:, :columns]
    if sparsity == BITMASK_24:
        ok = columns % 4 == 0 and tuple(values.shape) == (rows, columns // 2)
        require(ok, f"{name}.compressed", f"(N, C/2) of the shape {[rows, columns]}, C a multiple of 4", values)
        wrong = kept.unflatten(1, (-1, 4)).sum(-1) != 2
        if wrong.any():
            row, group = wrong.nonzero()[0].tolist()
            got = f"another number at row {row}, group {group}"
            require(False, f"{name}.bitmask", "of exactly 2 bits in every 4", got)
    else:
        counts = kept.sum(1)
        ok = tuple(values.shape) == (int(counts.sum()),)
        require(ok, f"{name}.compressed", f"({int(counts.sum())},), as many as the bitmask has bits", values)
        ok = parts["row_offsets"].tolist() == (counts.cumsum(0) - counts).tolist()
        require(ok, f"{name}.row_offsets", "where the rows of the bitmask begin", "others")
    if values.dtype not in EIGHT_BITS:
        return values.new_zeros(rows, columns).masked_scatter_(kept, values)
    dense = torch.zeros(rows, columns, dtype=torch.int8)  # torch scatters no fp8
    return dense.masked_scatter_(kept, values.view(torch.int8)).view(values.dtype)


def _scale(name: str, scale: Tensor | None, rows: int) -> Tensor:
    """(N,) float32, of one for the tensor or one for each row."""
    assert scale is not None
    ok = scale.dtype in FLOATS and (scale.numel() == 1 or tuple(scale.shape) in ((rows,), (rows, 1)))
    require(ok, f"{name}.{SCALE}", f"of floating point, one for all or for each of {rows} rows", scale)
    scale = scale.flatten().float().expand(rows).contiguous()
    require(bool((scale.isfinite() & (scale > 0)).all()), f"{name}.{SCALE}", "positive and finite", "another")
    return scale


def _check_rounded(name: str, weight: Tensor, zero_point: Tensor | None) -> None:
    require(weight.ndim == 2, f"{name}.{WEIGHT}", "of two dimensions", weight)
    ok = weight.dtype == torch.int8 or not weight.float().isnan().any()
    require(bool(ok), f"{name}.{WEIGHT}", "without NaN", "one")
    ok = zero_point is None or not zero_point.float().any()
    require(bool(ok), f"{name}.{ZERO_POINT}", "0: weights with another have no kernel", "others")


def _keep_scales(model: PreTrainedModel, scales: Mapping[str, Tensor]) -> None:
    """Puts the scales where `hwp.pack` looks for them."""
    modules = dict[str, nn.Module](model.named_modules())
    for name, scale in scales.items():
        module = next((modules[candidate] for candidate in _names(model, name) if candidate in modules), None)
        require(module is not None, f"{name}.{SCALE}", "of a module of the model", "a name that transformers changes")
        assert module is not None
        module.register_buffer(SCALE, scale, persistent=False)


def _names(model: PreTrainedModel, name: str) -> Iterator[str]:
    """Of a module in a file of a model without a head, or of one with a head on it."""
    prefix = f"{model.base_model_prefix}."
    yield from (name, name.removeprefix(prefix), prefix + name)
