# SPDX-License-Identifier: Apache-2.0
"""Which tokens of an image stay, by `Keep(rule=)` or `CompressionConfig(selection=)`: rules on one interface.

A rule takes `Candidates`, of one token at least, and how many of each image are to stay, and returns which: (T,) bool,
or `Kept` where rows change too. In a tower a sequence takes the place of an image. Equations and sources are in
docs/method.md. To add one, write its function and its row in `RULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from madtp_kernels.ragged import segment_sum, sequence_ids

EPSILON = 1e-8  # below which a gain, or a range of relevances, counts as none


class Candidates(NamedTuple):
    """The tokens that a rule chooses from, ragged: a sequence is an image.

    Args:
        features: (T, D).
        lengths: tokens of each of the B images.
        importance: (T,), >= 0; None where the seam has no statistics of attention.
        text: (M, D), of the instruction, in the space of the features; None where the rule does not ask for it.
        text_lengths: rows of each text.
        text_of: for each image, the number of the text it is asked with.
        logits: (T, K), the alignment of MAG; None where a rule has none.
    """

    features: Tensor
    lengths: Sequence[int]
    importance: Tensor | None = None
    text: Tensor | None = None
    text_lengths: Sequence[int] = ()
    text_of: Sequence[int] = ()
    logits: Tensor | None = None

    @property
    def cu_seqlens(self) -> Tensor:
        """(B + 1,) int32, on the device of the features."""
        return _ends(self.lengths, self.features.device)

    def counts_of(self, which: Tensor) -> list[int]:
        """How many tokens of each image are of `which` (T,) bool; one host read."""
        return [int(count) for count in segment_sum(which.float(), self.cu_seqlens).tolist()]


class Kept(NamedTuple):
    """What a rule keeps.

    Args:
        keep: (T,) bool.
        features: the rows left, in order, where they are others than those of the candidates; else None.
    """

    keep: Tensor
    features: Tensor | None


Rule = Callable[[Candidates, Any], Tensor | Kept]


def largest(candidates: Candidates, counts: Sequence[int]) -> Tensor:
    """Those of the largest importance, of equal ones the first: dominant tokens of VisionZip, EViT, FastV.

    Of which attention it is, the seam knows by the rule's name.
    """
    return _best(_importance(candidates), candidates, counts)


def random(candidates: Candidates, counts: Sequence[int], seed: int | None = 0) -> Tensor:
    """Drawn at random, for each image anew from the seed: who else is in the batch does not matter.

    `functools.partial(random, seed=1)` is a rule with other draws; seed None goes on with those of torch, so that
    every call has its own.
    """

    def draw(length: int) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return torch.rand(length, generator=generator)

    draws = [draw(length) for length in candidates.lengths]
    return _best(torch.cat(draws).to(candidates.features.device), candidates, counts)


def uniform(candidates: Candidates, counts: Sequence[int]) -> Tensor:
    """Evenly spaced in reading order."""
    begin, chosen = 0, []
    for length, count in zip(candidates.lengths, counts, strict=True):
        chosen.append(begin + _evenly(length, count, candidates.features.device))
        begin += length
    return _mask(torch.cat(chosen), begin)


def text(candidates: Candidates, counts: Sequence[int]) -> Tensor:
    """Those most like the instruction, by the mean cosine with its tokens."""
    return _best(relevance(candidates), candidates, counts)


def divprune(candidates: Candidates, counts: Sequence[int]) -> Tensor:
    """A max-min diverse set (DivPrune): always the token whose nearest chosen one is farthest."""
    cosine, real = _gram([_unit(part) for part in candidates.features.detach().split(list(candidates.lengths))])
    distance = 1 - cosine
    nobody = ~real[:, :, None] | torch.eye(real.shape[1], dtype=torch.bool, device=real.device)
    nearest = distance.masked_fill(nobody, torch.inf).amin(1)  # of each token the nearest other one

    def update(nearest: Tensor, step: int, best: Tensor) -> Tensor:
        to_best = distance[torch.arange(len(best), device=best.device), best]
        return to_best if step == 0 else torch.minimum(nearest, to_best)

    return _greedy(nearest, real, counts, update)


def cdpruner(candidates: Candidates, counts: Sequence[int]) -> Tensor:
    """Diverse tokens like the instruction (CDPruner): the greedy mode of a conditional determinantal process."""
    return _determinantal(candidates, relevance(candidates), counts)


def cdpruner_negative(candidates: Candidates, counts: Sequence[int]) -> Tensor:
    """`cdpruner` with the sign of its published code, where tokens *unlike* the instruction weigh more."""
    return _determinantal(candidates, -relevance(candidates), counts)


def tome(candidates: Candidates, counts: Sequence[int]) -> Kept:
    """Similar tokens are averaged (ToMe), in as many bipartite rounds as it takes; by the features, as keys."""
    keep, rows, begin = [], [], 0
    for part, count in zip(candidates.features.split(list(candidates.lengths)), counts, strict=True):
        left, merged = _merged(part, count)
        keep.append(begin + left)
        rows.append(merged)
        begin += len(part)
    return Kept(_mask(torch.cat(keep), begin), torch.cat(rows))


def visionzip(candidates: Candidates, counts: Sequence[int], context: float = 10 / 64) -> Kept:
    """VisionZip: the most important tokens as they are, and a share `context` of what is kept for the rest, evenly
    spaced ones of them that each add the mean of those most like it; by the features, as keys."""
    numbers = [round(context * count) for count in counts]
    dominant = _best(_importance(candidates), candidates, [n - c for n, c in zip(counts, numbers, strict=True)])
    keep, rows, lengths = [], [], list(candidates.lengths)
    parts = zip(candidates.features.split(lengths), dominant.split(lengths), counts, numbers, strict=True)
    for part, first, count, number in parts:
        rest = rows_of(~first, len(part) - count + number)
        target = rest[_evenly(len(rest), number, part.device)]
        stay = first | _mask(target, len(part))
        merged = part
        if number:
            others = rows_of(~stay, len(part) - count)
            y = _unit(part.detach())
            nearest = target[(y[others] @ y[target].T).argmax(1)]
            wide = _wide(part)
            size = wide.new_zeros(len(part)).index_add(0, nearest, wide.new_ones(len(others))).clamp_min(1)
            merged = (wide + torch.zeros_like(wide).index_add(0, nearest, wide[others]) / size[:, None]).to(part)
        keep.append(stay)
        rows.append(merged[rows_of(stay, count)])
    return Kept(torch.cat(keep), torch.cat(rows))


def relevance(candidates: Candidates) -> Tensor:
    """(T,) float32 or float64: the mean cosine of each token with those of its text; 0 where the text is empty."""
    if candidates.text is None:
        raise ValueError("rule must have the text of the instruction, got none")
    texts = candidates.text.detach().split(list(candidates.text_lengths))
    means = [_unit(part).sum(0) / max(len(part), 1) for part in texts]
    parts = candidates.features.detach().split(list(candidates.lengths))
    cosines = [_unit(part) @ means[which] for part, which in zip(parts, candidates.text_of, strict=True)]
    return torch.cat(cosines)


def _importance(candidates: Candidates) -> Tensor:
    if candidates.importance is None:
        raise ValueError("rule must have the importance of attention, got none: the seam has no statistics")
    return candidates.importance.detach()


def _no_products(tokens: int, count: int) -> int:
    return 0


def _all_products(tokens: int, count: int) -> int:
    return tokens**2


def _products_of_tome(tokens: int, count: int) -> int:
    """Of the even ones with the odd ones, round after round."""
    products = 0
    while tokens > count:
        even, odd = (tokens + 1) // 2, tokens // 2
        products, tokens = products + even * odd, tokens - min(tokens - count, even)
    return products


class RuleEntry(NamedTuple):
    """A rule.

    Args:
        merges: whether it returns other rows than it got.
        ranks: what it ranks the tokens by, (T,); None where it is no number of each. A temperature needs one.
        products: (tokens of an image, how many stay) -> products of two rows that matrix products make there; fewer
            than there are tokens are not counted.
    """

    choose: Rule
    needs_importance: bool = False
    needs_text: bool = False
    merges: bool = False
    ranks: Callable[[Candidates], Tensor] | None = None
    products: Callable[[int, int], int] = _no_products


LARGEST = RuleEntry(largest, needs_importance=True, ranks=_importance)  # of the importance that a seam gives
RULES = {
    "received": LARGEST,
    "cls": LARGEST,
    "fastv": LARGEST,
    "random": RuleEntry(random),
    "uniform": RuleEntry(uniform),
    "text": RuleEntry(text, needs_text=True, ranks=relevance),
    "divprune": RuleEntry(divprune, products=_all_products),
    "cdpruner": RuleEntry(cdpruner, needs_text=True, products=_all_products),
    "cdpruner_negative": RuleEntry(cdpruner_negative, needs_text=True, products=_all_products),
    "tome": RuleEntry(tome, merges=True, products=_products_of_tome),
    "visionzip": RuleEntry(visionzip, needs_importance=True, merges=True),
}


def name_of(rule: str | Rule) -> str:
    """To be read: of a function its own."""
    return rule if isinstance(rule, str) else getattr(rule, "__name__", type(rule).__name__)


def checked(given: Any, candidates: Candidates, name: str, counts: Sequence[int] | None = None) -> Kept:
    """What a user's rule of that name returned.

    Args:
        counts: how many it has to keep of each image; None: at least one.

    Raises:
        ValueError: it is not what a rule returns, or keeps another number.
    """
    kept = given if isinstance(given, Kept) else Kept(given, None)
    keep, tokens = kept.keep, len(candidates.features)
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool:
        what = keep.dtype if isinstance(keep, Tensor) else type(keep).__name__
        raise ValueError(f"rule {name} must return a bool tensor, or a Kept, got {what}")
    if keep.shape != (tokens,):
        raise ValueError(f"rule {name} must return one bool a token, ({tokens},), got {tuple(keep.shape)}")
    left = candidates.counts_of(keep)
    for number, (length, count) in enumerate(zip(candidates.lengths, left, strict=True)):
        expected = counts[number] if counts is not None else None
        if count != expected if expected is not None else count < min(1, length):
            words = "at least 1 token" if expected is None else f"{expected} tokens"
            raise ValueError(f"rule {name} must keep {words} of image {number}, got {count}")
    features, entered = kept.features, candidates.features
    if features is None:
        return kept
    if not isinstance(features, Tensor) or features.shape != (sum(left), entered.shape[1]):
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"rule {name} must return features ({sum(left)}, {entered.shape[1]}), got {got}")
    if features.dtype != entered.dtype:
        raise ValueError(f"rule {name} must return features of {entered.dtype}, got {features.dtype}")
    return kept


def fewest_with_mass(candidates: Candidates, mass: float) -> list[int]:
    """Of each image the fewest tokens whose importances sum up to the share `mass`: at least one; all where the sum is
    not positive."""
    counts = []
    for part in _importance(candidates).double().split(list(candidates.lengths)):
        total = part.sum()
        share = part.sort(descending=True).values.cumsum(0) / total
        enough = int((share < mass - 1e-12).sum()) + 1 if total > 0 else len(part)
        counts.append(min(enough, len(part)))
    return counts


def _determinantal(candidates: Candidates, relevance: Tensor, counts: Sequence[int]) -> Tensor:
    """Greedy MAP of det L over subsets, L = diag(r) cos diag(r), r the relevance of each image scaled to [0, 1]; gains
    by an incremental Cholesky row a step."""
    rows = []
    lengths = list(candidates.lengths)
    for part, r in zip(candidates.features.detach().split(lengths), relevance.split(lengths), strict=True):
        low, high = (r.amin(), r.amax()) if len(r) else (r.sum(), r.sum())
        rows.append(_unit(part) * ((r - low + EPSILON) / (high - low + EPSILON))[:, None])
    kernel, real = _gram(rows)
    sequences = torch.arange(len(lengths), device=kernel.device)
    cholesky = kernel.new_zeros(max(counts), *real.shape)  # (steps, B, N)

    def update(gain: Tensor, step: int, best: Tensor) -> Tensor:
        before = cholesky[:step]
        known = (before * before[:, sequences, best][:, :, None]).sum(0)
        pivot = gain[sequences, best][:, None]
        row = (kernel[sequences, best] - known) / pivot.clamp_min(EPSILON).sqrt()
        cholesky[step] = torch.where(pivot > EPSILON, row, 0)  # rounding over rounding would grow without bounds
        return gain - cholesky[step] ** 2

    return _greedy(kernel.diagonal(dim1=1, dim2=2), real, counts, update)


def _greedy(
    score: Tensor, real: Tensor, counts: Sequence[int], update: Callable[[Tensor, int, Tensor], Tensor]
) -> Tensor:
    """Takes the token of the largest score, again and again, in all images at once.

    Args:
        score: (B, N), padded; ties go to the lowest index.
        real: (B, N) bool: what is no padding.
        counts: how many to take of each image.
        update: (score, step, best (B,)) -> the scores after these were taken.

    Returns:
        (T,) bool, ragged.
    """
    chosen = torch.zeros_like(real)
    limit = torch.tensor(list(counts), device=real.device)
    sequences = torch.arange(len(real), device=real.device)
    for step in range(max(counts)):
        best = score.masked_fill(chosen | ~real, -torch.inf).argmax(1)
        chosen[sequences, best] |= step < limit
        score = update(score, step, best)
    return chosen[real]


def _merged(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(n, D) -> the `count` tokens left (their places ascending) and their rows, means of what went into them."""
    left = torch.arange(len(x), device=x.device)
    total = _wide(x)
    size = total.new_ones(len(x))
    while len(left) > count:
        y = _unit((total / size[:, None]).detach())
        even, odd = (torch.arange(first, len(left), 2, device=x.device) for first in (0, 1))
        score, target = (y[even] @ y[odd].T).max(1)
        goes = score.sort(descending=True, stable=True).indices[: min(len(left) - count, len(even))]
        to = odd[target[goes]]
        total, size = total.index_add(0, to, total[even[goes]]), size.index_add(0, to, size[even[goes]])
        stay = rows_of(~_mask(even[goes], len(left)), len(left) - len(goes))
        left, total, size = left[stay], total[stay], size[stay]
    return left, (total / size[:, None]).to(x)


def rows_of(which: Tensor, count: int) -> Tensor:
    """(count,) int64: where `which` (T,) bool is True, `count` times. Unlike `nonzero` it reads nothing on the host."""
    rows = torch.arange(len(which), device=which.device)
    return torch.where(which, rows, len(which)).sort().values[:count]


def _best(score: Tensor, candidates: Candidates, counts: Sequence[int]) -> Tensor:
    """(T,) bool: the `counts` tokens of each image with the largest scores, of equal ones the first."""
    tokens, cu_seqlens = len(score), candidates.cu_seqlens
    sequence = sequence_ids(cu_seqlens, tokens)
    order = score.sort(descending=True, stable=True).indices  # not `argsort`, which no decomposition reaches
    place = torch.arange(tokens, device=score.device)
    order = order[(sequence[order] * tokens + place).sort().indices]  # by image, the best first
    limit = torch.tensor(list(counts), device=score.device)
    keep = torch.zeros(tokens, dtype=torch.bool, device=score.device)
    keep[order] = place - cu_seqlens[sequence] < limit[sequence]
    return keep


def _evenly(tokens: int, count: int, device: torch.device) -> Tensor:
    """(count,) int64: the middles of so many equal parts."""
    return (2 * torch.arange(count, device=device) + 1) * tokens // (2 * max(count, 1))


def _gram(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(B, N, N) float64, products of the rows of each image, zero-padded, and (B, N) bool, what is no padding.

    Image by image, so that who else is in the batch does not change a bit.
    """
    longest = max(map(len, rows))
    padded = [F.pad((part @ part.T).double(), (0, longest - len(part)) * 2) for part in rows]
    lengths = torch.tensor([len(part) for part in rows], device=rows[0].device)
    return torch.stack(padded), torch.arange(longest, device=rows[0].device) < lengths[:, None]


def _unit(x: Tensor) -> Tensor:
    """Rows of length 1, float32 at least: products of 16-bit rows would tie where the tokens do not."""
    return F.normalize(_wide(x), dim=1)


def _wide(x: Tensor) -> Tensor:
    """float32 at least: a sum of many 16-bit rows stops growing."""
    return x if x.dtype == torch.float64 else x.float()


def _mask(index: Tensor, tokens: int) -> Tensor:
    return torch.zeros(tokens, dtype=torch.bool, device=index.device).index_fill(0, index, True)


def _ends(lengths: Sequence[int], device: torch.device) -> Tensor:
    return F.pad(torch.tensor(list(lengths), dtype=torch.int32), (1, 0)).cumsum(0, dtype=torch.int32).to(device)
