# SPDX-License-Identifier: Apache-2.0
"""What runs in a patched model: a table with the backend of every op and Linear of its towers, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from madtp.dtp.branch import Branch
from madtp.hwp.packing import Sparse24Linear, dense_choice, explain_linears, kernel_of
from madtp.models.encoder import Encoder
from madtp.models.tower import RaggedTower
from madtp_kernels import AttentionStats, Selection, explain

if TYPE_CHECKING:
    from madtp.patching.handle import Handle


class Line(NamedTuple):
    branch: str
    layers: str
    part: str
    runs: str
    why: str


def table(handle: Handle) -> str:
    """The table of `Handle.explain`."""
    verdicts = explain_linears(handle.model)
    lines = [Line("branch", "layers", "part", "runs", "why")]
    for name, branch in handle.pruning.items():
        path, tower = handle.family.path(name), handle.tower(name)
        spec = tower.madtp_spec.encoder
        blocks = attrgetter(spec.blocks)(tower)
        prefix = f"{path}.{spec.blocks}" if path else spec.blocks
        ops = list(_ops(tower, spec, branch))
        rows = _rows(branch, len(blocks))
        layers = [
            ops + list(_linears(block, spec, f"{prefix}.{i}", verdicts, *rows[i : i + 2]))
            for i, block in enumerate(blocks)
        ]
        lines += [Line(name, *part) for part in _grouped(layers)]
        after = handle.tokens_per_layer[name]
        entered = branch.last.entered
        if after and entered is not None:
            before = [entered.count_rows() / max(entered.num_sequences, 1), *after[:-1]]
            counts = enumerate(zip(before, after, strict=True))
            lines += [Line(name, str(i), "tokens", f"{first:.1f} -> {last:.1f}", "") for i, (first, last) in counts]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _ops(tower: RaggedTower, spec: Encoder, branch: Branch) -> Iterator[tuple[str, str, str]]:
    """(part, runs, why) of what every block runs beside its Linears. Nothing is computed: shapes and dtypes decide."""
    weight, config = next(tower.parameters()), tower.config
    entered = branch.last.entered
    tokens = 1 if entered is None else entered.origin.numel()
    x = weight.new_empty(1).expand(tokens, config.hidden_size)
    q = x.unflatten(1, (config.num_attention_heads, -1))
    number = torch.empty(1, device=x.device).expand(tokens)
    ends = torch.empty(2, dtype=torch.int32, device=x.device)
    calls: dict[str, tuple[Any, ...]] = {"varlen_attention": (q, q, q, ends)}
    if branch.prunes:
        calls["score_and_select"] = (AttentionStats(number, number), x, ends, branch.temperature)
        selection = Selection(number.bool(), ends, ends, number.int(), number)
        if spec.post_norm:
            calls["gather_merge"] = (x, selection)
        else:
            norm = attrgetter(spec.norm2)(attrgetter(spec.blocks)(tower)[0])
            calls["gather_merge_layernorm"] = (x, selection, norm.weight, norm.bias)
    for op, arguments in calls.items():
        options = {"max_seqlen_q": tokens, "return_stats": branch.prunes} if op == "varlen_attention" else {}
        choice = explain(op, *arguments, **options)
        yield op, choice.backend, choice.reason
    if not branch.prunes:
        yield "pruning", "nothing", "temperature 0"


def _rows(branch: Branch, blocks: int) -> list[int]:
    """How many rows entered the first block in the last forward, and how many left each; before the first, one."""
    entered, layers = branch.last.entered, branch.last.layers
    if entered is None or len(layers) != blocks:
        return [1] * (blocks + 1)
    return [entered.origin.numel(), *(layer.count_rows() for layer in layers)]


def _linears(
    block: nn.Module, spec: Encoder, prefix: str, verdicts: dict[str, str], entered: int, left: int
) -> Iterator[tuple[str, str, str]]:
    """(part, runs, why) of every Linear of a block, which as many rows entered and left."""
    for name, module in block.named_modules():
        verdict = verdicts.get(f"{prefix}.{name}")
        if isinstance(module, Sparse24Linear):
            choice = module.choice
            yield name, " + ".join((f"2:4 on {choice.backend}", *module.fused)), choice.reason
        elif verdict is not None and isinstance(module, nn.Linear):
            rows = entered if name in (*spec.qkv, spec.out) else left
            runs, why = _dense(block, spec, name, module, rows)
            yield name, runs, verdict.removeprefix("dense: ").removeprefix("dense, ") + why


def _dense(block: nn.Module, spec: Encoder, name: str, module: nn.Linear, rows: int) -> tuple[str, str]:
    """What a Linear that is not packed runs on, with what follows it, and why."""
    ends = [path for path, scale in ((spec.out, spec.scale1), (spec.mlp[-1], spec.scale2)) if scale is None]
    activation = None
    if len(spec.mlp) == 3 and name == spec.mlp[0]:
        activation = kernel_of(attrgetter(spec.mlp[1])(block))
    choice = dense_choice(module, rows, activation, name in ends)
    if choice is not None and choice.backend == "dense" and activation is not None:  # then they run apart
        activation, choice = None, dense_choice(module, rows, None, False)
    if choice is None:
        return "dense", ""
    if choice.backend != "onednn":
        return "dense", f"; {choice.reason}; not onednn: {choice.rejected['onednn']}"
    fused = (activation, "residual" if name in ends else None)
    return " + ".join(("dense on onednn", *filter(None, fused))), f"; {choice.reason}"


def _grouped(layers: Sequence[list[tuple[str, str, str]]]) -> Iterator[tuple[str, str, str, str]]:
    """Consecutive layers that run the same share their lines, which begin with the layers they are of."""
    first = 0
    for i in range(1, len(layers) + 1):
        if i == len(layers) or layers[i] != layers[first]:
            span = str(first) if i - first == 1 else f"{first}-{i - 1}"
            yield from ((span, *part) for part in layers[first])
            first = i
