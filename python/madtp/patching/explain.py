"""What runs in a patched model: a table with the backend of every op and Linear of its towers, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import nn

from madtp.dtp.branch import Branch
from madtp.hwp import Sparse24Linear, explain_linears
from madtp.models.encoder import Encoder
from madtp_kernels import AttentionStats, Selection, explain


class Row(NamedTuple):
    branch: str
    layers: str
    part: str
    runs: str
    why: str


def table(model: nn.Module) -> str:
    """The table of `Handle.explain`."""
    handle, verdicts = model.madtp_handle, explain_linears(model)
    rows = [Row("branch", "layers", "part", "runs", "why")]
    for name, branch in handle.pruning.items():
        path = handle.family.path(name)
        tower = model.get_submodule(path)
        spec = tower.madtp_spec.encoder
        blocks = attrgetter(spec.blocks)(tower)
        prefix = f"{path}.{spec.blocks}" if path else spec.blocks
        ops = list(_ops(tower, spec, branch))
        layers = [ops + list(_linears(block, f"{prefix}.{i}", verdicts)) for i, block in enumerate(blocks)]
        rows += [Row(name, *row) for row in _grouped(layers)]
        tokens = handle.tokens_per_layer[name]
        if tokens:
            before = [branch.entered.tokens() / max(branch.entered.batch, 1), *tokens[:-1]]
            counts = enumerate(zip(before, tokens, strict=True))
            rows += [Row(name, str(i), "tokens", f"{first:.1f} -> {last:.1f}", "") for i, (first, last) in counts]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _ops(tower: nn.Module, spec: Encoder, branch: Branch) -> Iterator[tuple[str, str, str]]:
    """(part, runs, why) of what every block runs beside its Linears. Nothing is computed: shapes and dtypes decide."""
    weight, config = next(tower.parameters()), tower.config
    rows = 1 if branch.entered is None else branch.entered.origin.numel()
    x = weight.new_empty(1).expand(rows, config.hidden_size)
    q = x.unflatten(1, (config.num_attention_heads, -1))
    number = torch.empty(1, device=x.device).expand(rows)
    ends = torch.empty(2, dtype=torch.int32, device=x.device)
    calls = {"varlen_attention": (q, q, q, ends)}
    if branch.prunes:
        calls["score_and_select"] = (AttentionStats(number, number), x, ends, branch.temperature)
        selection = Selection(number.bool(), ends, ends, number.int(), number)
        if spec.post_norm:
            calls["gather_merge"] = (x, selection)
        else:
            norm = attrgetter(spec.norm2)(attrgetter(spec.blocks)(tower)[0])
            calls["gather_merge_layernorm"] = (x, selection, norm.weight, norm.bias)
    for op, arguments in calls.items():
        options = {"max_seqlen_q": rows, "return_stats": branch.prunes} if op == "varlen_attention" else {}
        choice = explain(op, *arguments, **options)
        yield op, choice.backend, choice.reason
    if not branch.prunes:
        yield "pruning", "nothing", "temperature 0"


def _linears(block: nn.Module, prefix: str, verdicts: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """(part, runs, why) of every Linear of a block."""
    for name, module in block.named_modules():
        verdict = verdicts.get(f"{prefix}.{name}")
        if isinstance(module, Sparse24Linear):
            choice = module.choice
            yield name, " + ".join((f"2:4 on {choice.backend}", *module.fused)), choice.reason
        elif verdict is not None:
            yield name, "dense", verdict.removeprefix("dense: ").removeprefix("dense, ")


def _grouped(layers: Sequence[list[tuple[str, str, str]]]) -> Iterator[tuple[str, str, str, str]]:
    """Consecutive layers that run the same share their rows, which begin with the layers they are of."""
    first = 0
    for i in range(1, len(layers) + 1):
        if i == len(layers) or layers[i] != layers[first]:
            span = str(first) if i - first == 1 else f"{first}-{i - 1}"
            yield from ((span, *row) for row in layers[first])
            first = i
