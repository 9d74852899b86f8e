# SPDX-License-Identifier: Apache-2.0
"""measure(): the figures of one model; compare(): those of two, side by side."""

from __future__ import annotations

import copy
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import stdev
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from madtp.handles import find_handle
from madtp.inference import leading_size
from madtp.models.registry import family_of
from madtp.patching import patch
from madtp.patching.vlm_handle import VlmHandle
from madtp.profiling.macs import count_parameters, disk_bytes, mean_profile, profile, weight_bytes
from madtp.profiling.timing import TIMING_BATCH, time_per_layer, time_per_sample
from madtp.progress import Progress
from madtp.tasks.batches import require_samples, sample_batches, sample_count
from madtp.tasks.task import Task

ACCOUNT_SAMPLES = 1024  # of the evaluation data, for the reported MACs


def measure(
    model: nn.Module,
    task: Task,
    data: Dataset,
    *,
    path: Path | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict[str, float | dict]:
    """The figures of one model on all of `data`, but for the time, which only a comparison gives.

    GMACs are per sample, averaged over `ACCOUNT_SAMPLES` spread over the data; for a plain Hugging Face model they are
    those of the packed dense model, without padding. counted_gmacs_error is the standard error of that mean, from the
    spread between the batches of `madtp.tasks.batches`: samples keep different numbers of tokens. counted_gbops
    are bit operations, 10^9 of them. `bytes` is the size of the weights file, `weight_bytes` what the model holds.

    Args:
        path: the directory the model was loaded from; None saves it to a temporary one to weigh it.
        progress: wraps the batches of the evaluation, for a bar.
    """
    require_samples(data=data)
    watch = _TokenCount(model)
    metrics = task.evaluate(model, data, progress=lambda batches: watch(progress(batches)))
    counted = model
    if find_handle(model) is None and family_of(model) is not None:
        counted = copy.deepcopy(model)
        patch(counted)
    batches = sample_batches(task, data, ACCOUNT_SAMPLES, _device(model))
    profiles = [profile(counted, batch) for batch in batches]
    total = mean_profile(profiles, [leading_size(batch) for batch in batches]).total
    params, nonzero_params = count_parameters(model)
    return {
        "samples": sample_count(data),
        "metrics": metrics,
        "dense_gmacs": total.dense_macs / 1e9,
        "counted_gmacs": total.counted_macs / 1e9,
        "counted_gmacs_error": _standard_error([each.total.counted_macs for each in profiles]) / 1e9,
        "executed_gmacs": total.executed_macs / 1e9,
        "counted_gbops": total.bit_operations / 1e9,
        "params": params,
        "nonzero_params": nonzero_params,
        "bytes": disk_bytes(path / "model.safetensors") if path else _saved_bytes(model),
        "weight_bytes": weight_bytes(model),
        "tokens_per_layer": watch.means() or getattr(find_handle(counted), "tokens_per_layer", {}),
        **watch.per_image(),
    }


def compare(
    dense: nn.Module, compressed: nn.Module, task: Task, data: Dataset, path: Path, bars: Progress
) -> dict[str, dict]:
    """Figures of both, by name; `compressed` was loaded from path.

    The time of the dense model is that of the fastest of `dense_runs`, which `fastest_run` names.
    """
    figures: dict[str, dict[str, Any]] = {
        name: measure(model, task, data, path=where, progress=partial(bars, title=f"evaluating {name}"))
        for name, model, where in (("dense", dense, None), ("compressed", compressed, path))
    }
    if (
        whole := figures["compressed"].get("tokens_per_image")
    ) is not None:  # of a decoder, which has them at all seams
        left: Any = figures["compressed"]["tokens_per_layer"]
        figures["dense"]["tokens_per_layer"] = {seam: [whole] * len(layers) for seam, layers in left.items()}
    with bars.status("timing"):
        batch = sample_batches(task, data, TIMING_BATCH, _device(dense))[0]
        runs = dense_runs(dense)
        times = time_per_sample(runs | {"compressed": compressed}, batch)
        fastest = min(runs, key=times.__getitem__)
        layers = time_per_layer(dense, compressed, batch)
    figures["dense"] |= {"fastest_run": fastest, "ms_by_run": {name: times[name] for name in runs}}
    times["dense"] = times[fastest]
    for name, by_branch in zip(figures, layers, strict=True):
        figures[name] |= {"ms_per_sample": times[name], "ms_per_layer": by_branch}
    return figures


def dense_runs(dense: nn.Module) -> dict[str, nn.Module]:
    """A dense model, by how it is run: as it was loaded, with torch's fused attention where it has that and does not
    use it, and patched with nothing pruned, where Linears take the fastest product there is.

    `torch.compile` is not among them: it compiles for longer than all of the others are timed.
    """
    runs = {"as loaded": dense}
    if getattr(dense, "_supports_sdpa", False) and getattr(dense.config, "_attn_implementation", None) == "eager":
        runs["SDPA"] = copy.deepcopy(dense)
        runs["SDPA"].set_attn_implementation("sdpa")  # type: ignore[operator]
    if family_of(dense) is not None:
        runs["patched"] = copy.deepcopy(dense)
        patch(runs["patched"])
    return runs


class _TokenCount:
    """Averages the tokens after each layer over the batches of an evaluation, of a patched model; of a decoder that
    reads images those of an image at each seam."""

    def __init__(self, model: nn.Module):
        self.handle = find_handle(model)
        self.tokens: defaultdict[str, list] = defaultdict(list)  # branch -> per batch, (B,) x layers totals
        self.sequences: defaultdict[str, int] = defaultdict(int)
        self.had: list[int] = []  # of each image, tokens where nothing is pruned

    def __call__(self, batches: Iterable) -> Iterator:
        for batch in batches:
            yield batch
            if self.handle is not None:
                for name, branch in self.handle.pruning.items():
                    layers = branch.last.layers
                    self.sequences[name] += layers[0].num_sequences
                    self.tokens[name].append([layer.origin.numel() for layer in layers])
            if isinstance(self.handle, VlmHandle):
                had, left = self.handle.token_counts()
                self.had += had
                for name, counts in left.items():
                    self.sequences[name] += len(had)
                    self.tokens[name].append([sum(layer) for layer in counts])

    def per_image(self) -> dict[str, float]:
        """The mean number of tokens of an image, of a decoder that has seen some."""
        return {"tokens_per_image": sum(self.had) / len(self.had)} if self.had else {}

    def means(self) -> dict[str, list[float]]:
        return {
            name: [sum(layer) / self.sequences[name] for layer in zip(*rows, strict=True)]
            for name, rows in self.tokens.items()
        }


def _standard_error(values: Sequence[float]) -> float:
    """Of the mean of all; 0 for a single one, which says nothing of it."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _saved_bytes(model: nn.Module) -> int:
    with tempfile.TemporaryDirectory() as folder:
        cast(PreTrainedModel, model).save_pretrained(folder)
        return disk_bytes(Path(folder) / "model.safetensors")
