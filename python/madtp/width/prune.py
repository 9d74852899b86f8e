# SPDX-License-Identifier: Apache-2.0
"""prune_width(): heads and hidden channels go, chosen on calibration data; the Linears are smaller from then on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple, cast

from torch import nn

from madtp.handles import find_handle
from madtp.hwp.calibration import InputStatistics, collect_inputs, known_inputs
from madtp.inference import evaluating
from madtp.width.choice import SCORES, cut
from madtp.width.narrow import checked_widths, narrow, require_removable
from madtp.width.parts import WidthPart, tile, width_parts
from madtp_kernels.checks import require

AT_A_TIME = 4  # parts that are narrowed by what they meet once those before them are


class Narrowed(NamedTuple):
    """What was done to one part.

    error: what it does to the outputs of the Linear that reads the part, on the calibration data, the other inputs as
    they were: the sum of squares, over that of the outputs about their mean.
    """

    kind: str  # "heads" or "channels"
    before: int
    after: int
    error: float


def uniform_widths(model: nn.Module, share: float) -> dict[str, int]:
    """For every part of a model the width that leaves at least this share of what it had in full, rounded up to
    whole tiles (`tile`). Parts that this does not make narrower are not there.

    Raises:
        ValueError: the share is no number in (0, 1].
    """
    require(_is_share(share), "share", "a number in (0, 1]", share)
    rounded = {part: uniform_width(part, share) for part in width_parts(model)}
    return {part.name: width for part, width in rounded.items() if width < part.width}


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def uniform_width(part: WidthPart, share: float) -> int:
    """The width that leaves at least this share of what a part had in full, in whole tiles."""
    size = tile(part)
    return min(math.ceil(round(share * part.full / size, 6)) * size, part.full)


def prune_width(
    model: nn.Module,
    widths: Mapping[str, int] | float,
    batches: Iterable[Mapping[str, Any]],
    *,
    score: str = "second_order",
    correct: bool = True,
    damping: float = 0.01,
) -> dict[str, Narrowed]:
    """Removes attention heads and hidden channels of MLPs, in place: the Linears become smaller.

    Goes before 2:4 masks and integers, which then are of the smaller Linears. A patched model that is saved says its
    widths, and is loaded with them. `remove()` of its handle does not bring back what is gone.

    Source: docs/method.md, width.

    Args:
        model: of a known class, patched or not.
        widths: by part (`width_parts`), the number of heads or channels that stay; or one share for all parts,
            in (0, 1], rounded up to whole tiles (`uniform_widths`), of those that the batches reach.
        batches: keyword arguments of forwards, by which heads and channels are chosen, on the model's device.
        score: what goes first. "second_order": what the others can best make up for; "activation": the smallest norm
            of inputs times columns.
        correct: the Linears that read what is left are fitted to the outputs of before, by least squares.
        damping: share of the mean of a Gram matrix's diagonal that is added to it, above 0.

    Returns:
        by part, what was done; nothing of a part that stays as it was.

    Raises:
        ValueError: the model has no such parts, a width is none that a kernel runs or takes all, a Linear has hooks, is
            shared, computed, packed, rounded or 2:4 already, or another argument breaks a rule. The model is as it was,
            after any other error too.
    """
    with ExitStack() as undo:
        found = _narrow(model, widths, batches, undo, score=score, correct=correct, damping=damping)
        undo.pop_all()
    return found


@contextmanager
def narrowed(
    model: nn.Module, widths: Mapping[str, int], batches: Iterable[Mapping[str, Any]], **options: Any
) -> Iterator[dict[str, Narrowed]]:
    """A context in which `prune_width` has been done; what was comes back, to the bit."""
    with ExitStack() as undo:
        yield _narrow(model, widths, batches, undo, **options)


def _narrow(
    model: nn.Module,
    widths: Mapping[str, int] | float,
    batches: Iterable[Mapping[str, Any]],
    undo: ExitStack,
    *,
    score: str = "second_order",
    correct: bool = True,
    damping: float = 0.01,
    statistics: Mapping[str, InputStatistics] | None = None,
) -> dict[str, Narrowed]:
    """As `prune_width`.

    Args:
        undo: gets what brings back what was.
        statistics: of all parts, with Gram matrices; None collects them, some parts at a time, the former ones narrow.
    """
    require(score in SCORES, "score", f"one of {', '.join(SCORES)}", repr(score))
    require(isinstance(correct, bool), "correct", "true or false", correct)
    everywhere = not isinstance(widths, Mapping)
    if not isinstance(widths, Mapping):
        require(_is_share(widths), "widths", "numbers by part, or one share in (0, 1]", widths)
        widths = uniform_widths(model, widths)
    asked, batches = checked_widths(model, widths), list(batches)
    require_removable(list(asked), model)
    require(bool(batches) or not asked or statistics is not None, "batches", "at least one", "none")
    odd = next((batch for batch in batches if not isinstance(batch, Mapping)), {})
    require(
        isinstance(odd, Mapping), "batches", "keyword arguments of forwards, as mappings", f"a {type(odd).__name__}"
    )
    found, parts = dict[str, Narrowed](), list(asked)
    for start in range(0, len(parts), AT_A_TIME):
        group = parts[start : start + AT_A_TIME]
        met = part_inputs(model, group, batches) if statistics is None else statistics
        for part in group:
            if statistics is None and not met[part.name].weight_sum:
                require(everywhere, "batches", "such as reach all parts of widths", f"no input of {part.name!r}")
                continue
            after = cast(nn.Linear, model.get_submodule(part.name))
            known = known_inputs(part.name, met, gram=True)
            require(_is_finite(known), "batches", "such as give finite numbers", f"others at {part.name!r}")
            made = cut(
                after.weight, after.bias, known, part.size, asked[part], score=score, correct=correct, damping=damping
            )
            narrow(model, part, made, undo)
            found[part.name] = Narrowed(part.kind, part.width, asked[part], made.error)
    return found


def _is_finite(inputs: InputStatistics) -> bool:
    return inputs.gram is not None and bool(inputs.gram.isfinite().all())


def part_inputs(
    model: nn.Module, parts: Sequence[WidthPart], batches: Iterable[Mapping[str, Any]]
) -> dict[str, InputStatistics]:
    """What the Linears that read the parts meet, with Gram matrices."""
    handle = find_handle(model)
    names = [part.name for part in parts]
    with evaluating(model), nullcontext() if handle is None else handle.inference():
        with collect_inputs(model, names, gram=True) as statistics:
            for batch in batches:
                model(**batch)
    return statistics
