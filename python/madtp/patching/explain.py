# SPDX-License-Identifier: Apache-2.0
"""What runs in a patched model: a table with the backend of every op and Linear of its towers, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from madtp.dtp.branch import Branch
from madtp.hwp.dense_linear import dense_choice, kernel_of
from madtp.hwp.packed_linear import PackedLinear
from madtp.hwp.packing import explain_linears
from madtp.models.encoder import CrossAttention, Encoder, head_dim_of
from madtp.models.tower import RaggedTower
from madtp.width import WidthPart, width_parts
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
    narrow = {part.name: part for part in width_parts(handle.model) if part.width < part.full}
    lines = [Line("branch", "layers", "part", "runs", "why")]
    for name, branch in handle.pruning.items():
        path, tower = handle.family.path(name), handle.tower(name)
        spec = tower.madtp_spec.encoder
        blocks = attrgetter(spec.blocks)(tower)
        prefix = f"{path}.{spec.blocks}" if path else spec.blocks
        rows = _rows(branch, len(blocks))
        layers = [
            [
                *_ops(tower, spec, branch, block),
                *_widths(f"{prefix}.{i}", narrow),
                *_linears(block, spec, f"{prefix}.{i}", verdicts, *rows[i : i + 2]),
            ]
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


def _ops(tower: RaggedTower, spec: Encoder, branch: Branch, block: nn.Module) -> Iterator[tuple[str, str, str]]:
    """(part, runs, why) of what a block runs beside its Linears. Nothing is computed: shapes and dtypes decide."""
    weight, config = next(tower.parameters()), tower.config
    entered = branch.last.entered
    tokens = 1 if entered is None else entered.origin.numel()
    x = weight.new_empty(1).expand(tokens, config.hidden_size)
    out: Any = attrgetter(spec.out)(block)
    q = weight.new_empty(1).expand(tokens, out.in_features).unflatten(1, (-1, head_dim_of(config)))
    number = torch.empty(1, device=x.device).expand(tokens)
    ends = torch.empty(2, dtype=torch.int32, device=x.device)
    calls: dict[str, tuple[Any, ...]] = {"varlen_attention": (q, q, q, ends)}
    if branch.prunes:
        calls["score_and_select"] = (AttentionStats(number, number), x, ends, branch.temperature)
        selection = Selection(number.bool(), ends, ends, number.int(), number)
        if spec.post_norm:
            calls["gather_merge"] = (x, selection)
        else:
            norm = attrgetter(spec.norm2)(block)
            calls["gather_merge_layernorm"] = (x, selection, norm.weight, norm.bias)
    for op, arguments in calls.items():
        options = {"max_seqlen_q": tokens, "return_stats": branch.prunes} if op == "varlen_attention" else {}
        choice = explain(op, *arguments, **options)
        yield op, choice.backend, choice.reason
    if not branch.prunes:
        yield "pruning", "nothing", "temperature 0"


def _widths(prefix: str, narrow: Mapping[str, WidthPart]) -> Iterator[tuple[str, str, str]]:
    """(part, runs, why) of the heads and channels of a block, where some were removed."""
    for name, part in narrow.items():
        if name.startswith(f"{prefix}."):
            yield (
                f"{part.kind} into {name.removeprefix(f'{prefix}.')}",
                f"{part.width} of {part.full}",
                "others removed",
            )


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
    calls = _calls(block, spec, entered, left)
    for name, module in block.named_modules():
        verdict = verdicts.get(f"{prefix}.{name}")
        if isinstance(module, PackedLinear):
            choice = module.choice
            yield name, " + ".join((f"{module.form} on {choice.backend}", *module.fused)), choice.reason
        elif verdict is not None and isinstance(module, nn.Linear):
            if name in calls:
                runs, why = _dense(module, calls[name])
            else:
                runs, why = "dense", "" if spec.cross is None else "; the rows of its calls are not kept"
            yield name, runs, verdict.removeprefix("dense: ").removeprefix("dense, ") + why


class _Call(NamedTuple):
    """How a block calls one of its Linears, as far as that decides what it runs on."""

    rows: int
    activation: str | None = None  # what follows it, where a kernel knows it
    residual: bool = False


def _calls(block: nn.Module, spec: Encoder, entered: int, left: int) -> dict[str, _Call]:
    """name of a Linear -> its call in `encoder.block`. Not of those that others call, nor of those that read keys."""

    def ends(path: str, scale: str | None, rows: int) -> None:
        found[path] = _Call(rows, residual=scale is None or isinstance(attrgetter(scale)(block), nn.Identity))

    found = {path: _Call(entered) for path in spec.qkv}
    ends(spec.out, spec.scale1, entered)
    if len(spec.mlp) == 3:
        first, activation, last = spec.mlp
        found[first] = _Call(left, kernel_of(attrgetter(activation)(block)))
        ends(last, spec.scale2, left)
    if isinstance(spec.cross, CrossAttention):
        found[spec.cross.query] = _Call(left)
        ends(spec.cross.out, None, left)
    return found


def _dense(module: nn.Linear, call: _Call) -> tuple[str, str]:
    """What a Linear that is not packed runs on, with what follows it, and why."""
    choice = dense_choice(module, *call)
    if choice is not None and choice.backend == "dense" and call.activation is not None:  # then they run apart
        call = call._replace(activation=None)
        choice = dense_choice(module, *call)
    if choice is None:
        return "dense", ""
    if choice.backend != "onednn":
        return "dense", f"; {choice.reason}; not onednn: {choice.rejected['onednn']}"
    fused = (call.activation, "residual" if call.residual else None)
    return " + ".join(("dense on onednn", *filter(None, fused))), f"; {choice.reason}"


def _grouped(layers: Sequence[list[tuple[str, str, str]]]) -> Iterator[tuple[str, str, str, str]]:
    """Consecutive layers that run the same share their lines, which begin with the layers they are of."""
    first = 0
    for i in range(1, len(layers) + 1):
        if i == len(layers) or layers[i] != layers[first]:
            span = str(first) if i - first == 1 else f"{first}-{i - 1}"
            yield from ((span, *part) for part in layers[first])
            first = i
