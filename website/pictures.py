# SPDX-License-Identifier: Apache-2.0
"""Draws docs/pictures/: python -m website.pictures. What has numbers computes them by the rule that it shows."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from website.svg import Picture

FOLDER = Path(__file__).parents[1] / "docs" / "pictures"
CELL = 22

# A sequence of eight tokens: what each of the three scores says, before they are normalised.
SUMMARY = (0.9, 0.2, 1.4, 1.1, 0.6, 0.1, 0.7, 0.5)
RECEIVED = (0.9, 0.2, 1.2, 1.5, 0.7, 0.2, 0.9, 0.6)
LOGITS = (  # of three alignment tokens
    (0.2, 0.1, 1.6, 0.8, 0.1, 0.2, 0.4, 0.1),
    (0.1, 0.0, 0.3, 0.2, 0.2, 0.5, 0.2, 0.1),
    (0.0, 0.1, 0.5, 0.3, 0.1, 0.2, 1.3, 0.1),
)
ALIGNMENT = tuple(max(column) for column in zip(*LOGITS, strict=True))


def shares(scores: tuple[float, ...]) -> list[float]:
    return [score / sum(scores) for score in scores]


def importance() -> list[float]:
    return [sum(parts) / 3 for parts in zip(shares(SUMMARY), shares(RECEIVED), shares(ALIGNMENT), strict=True)]


def threshold(temperature: float) -> float:
    """min over k of Σ_j softmax_j(A[:,k] / τ) S_j."""
    softmax = (shares(tuple(math.exp(logit / temperature) for logit in row)) for row in LOGITS)
    return min(sum(weight * score for weight, score in zip(row, importance(), strict=True)) for row in softmax)


def tokens() -> Picture:
    picture = Picture(640, 150, "An image is cut into patches; each patch becomes a token, a row of numbers")
    for row in range(4):
        for column in range(4):
            inside = 1 <= row <= 2 and 1 <= column <= 2
            picture.box(20 + 25 * column, 20 + 25 * row, 24, 24, "warm" if inside else "soft")
    picture.text(70, 138, "image in patches", "faint small")
    picture.line((132, 70), (172, 70), arrow=True)
    picture.box(184, 58, CELL, CELL, "accent")
    for i in range(16):
        inside = i // 4 in (1, 2) and i % 4 in (1, 2)
        picture.box(184 + 25 * (i + 1), 58, CELL, CELL, "warm" if inside else "soft")
    picture.text(195, 48, "CLS", "faint small")
    picture.text(410, 48, "a token for each patch, in order", "faint small")
    picture.text(410, 104, "N tokens of C numbers: the matrix that every block of the tower works on", "faint small")
    return picture


def ragged() -> Picture:
    lengths, picture = (4, 7, 3), Picture(640, 190, "Padded sequences, and the same sequences one after another")
    longest = max(lengths)
    picture.text(20, 22, "padded: every sequence as long as the longest", "faint small start")
    for row, length in enumerate(lengths):
        for i in range(longest):
            kind = ("accent", "warm", "soft")[row] if i < length else "gone"
            picture.box(20 + 25 * i, 32 + 25 * row, CELL, CELL, kind)
    picture.text(20, 132, "ragged: rows one after another", "faint small start")
    x, ends = 20.0, [0]
    for row, length in enumerate(lengths):
        for _ in range(length):
            picture.box(x, 142, CELL, CELL, ("accent", "warm", "soft")[row])
            x += 25
        ends.append(ends[-1] + length)
    for end in ends:
        picture.line((18.5 + 25 * end, 138), (18.5 + 25 * end, 170))
        picture.text(18.5 + 25 * end, 184, str(end), "small ink")
    picture.text(400, 160, f"cu_seqlens = [{', '.join(map(str, ends))}]", "ink start")
    return picture


def scores() -> Picture:
    picture = Picture(640, 190, "Three scores of each token, and their mean, the importance")
    rows = (("summary attention", SUMMARY), ("received attention", RECEIVED), ("alignment", ALIGNMENT))
    for block, (name, values) in enumerate([*rows, ("importance", tuple(importance()))]):
        left, kind = 20 + 155 * block, "accent" if block == 3 else "soft"
        for i, share in enumerate(shares(values)):
            picture.box(left + 16 * i, 150 - 420 * share, 13, 420 * share, kind)
        picture.line((left - 3, 150), (left + 128, 150))
        picture.text(left + 62, 172, name, "faint small")
        if block < 3:
            picture.text(left + 143, 110, "+" if block < 2 else "=")
    return picture


def thresholds() -> Picture:
    picture = Picture(640, 200, "The temperature moves the threshold; tokens above it stay")
    for block, temperature in enumerate((0.02, 0.15, 1000.0)):
        left, limit = 20 + 210 * block, threshold(temperature)
        kept = [share > limit for share in importance()]
        for i, (share, stays) in enumerate(zip(importance(), kept, strict=True)):
            picture.box(left + 22 * i, 150 - 420 * share, 18, 420 * share, "accent" if stays else "gone")
        picture.line((left - 3, 150), (left + 178, 150))
        picture.line((left - 3, 150 - 420 * limit), (left + 178, 150 - 420 * limit), kind="mark")
        picture.text(left + 88, 172, f"τ = {temperature:g}", "ink small")
        picture.text(left + 88, 190, f"{sum(kept)} of 8 stay", "faint small")
    return picture


def merging() -> Picture:
    picture = Picture(640, 150, "Kept rows are copied in order; the others become one weighted mean at the end")
    kept = [share > threshold(1000.0) for share in importance()]
    picture.text(20, 24, "before", "faint small start")
    picture.box(20, 32, CELL, CELL, "accent")
    for i, stays in enumerate(kept):
        picture.box(45 + 25 * i, 32, CELL, CELL, "soft" if stays else "gone")
    picture.text(20, 142, "after", "faint small start")
    picture.box(20, 106, CELL, CELL, "accent")
    picture.line((31, 56), (31, 104), arrow=True)
    out, merged = 45.0, 45 + 25.0 * sum(kept)
    for i, stays in enumerate(kept):
        x = 56 + 25 * i
        if stays:
            picture.box(out, 106, CELL, CELL, "soft")
            picture.line((x, 56), (out + 11, 104), arrow=True)
            out += 25
        else:
            picture.line((x, 56), (merged + 11, 104), kind="gone")
    picture.box(merged, 106, CELL, CELL, "warm")
    picture.text(330, 48, "summary token, tokens that stay, tokens that go", "faint small start")
    picture.text(330, 122, "the last row: Σ S x / Σ S over those that go", "faint small start")
    return picture


def sparse24() -> Picture:
    values = (0.1, -1.2, 0.3, 0.8, 0.9, 0.2, -0.7, 0.4)
    kept = [i for group in (0, 4) for i in sorted(sorted(range(group, group + 4), key=lambda i: -abs(values[i]))[:2])]
    picture = Picture(640, 140, "Of every four weights the two largest stay; two bits say which")
    for i, value in enumerate(values):
        x = 20 + 44 * i + 12 * (i // 4)
        picture.box(x, 30, 40, 26, "accent" if i in kept else "gone")
        picture.text(x + 20, 47, f"{value:g}", "ink small")
    picture.text(20, 20, "a row of the weight", "faint small start")
    picture.text(20, 132, "as it is kept: half of the values", "faint small start")
    for place, i in enumerate(kept):
        picture.box(20 + 44 * place, 90, 40, 26, "accent")
        picture.text(40 + 44 * place, 107, f"{values[i]:g}", "ink small")
        picture.box(260 + 34 * place, 90, 30, 26, "soft")
        picture.text(275 + 34 * place, 107, f"{i % 4:02b}", "ink small")
    picture.text(260, 132, "and the column of each in its four, two bits", "faint small start")
    picture.line((110, 60), (110, 86), arrow=True)
    return picture


def width() -> Picture:
    gone = (2, 5)  # of eight hidden channels
    picture = Picture(640, 170, "Hidden channels of an MLP that go take a row of one weight and a column of the next")
    for i in range(8):
        kind = "gone" if i in gone else "accent"
        picture.box(40, 20 + 14 * i, 84, 12, kind)
        picture.box(200, 20 + 14 * i, 26, 12, "gone" if i in gone else "warm")
        picture.box(300 + 14 * i, 36, 12, 84, kind)
    picture.line((128, 76), (194, 76), arrow=True)
    picture.line((230, 76), (294, 76), arrow=True)
    picture.line((420, 76), (462, 76), arrow=True)
    picture.text(82, 152, "first Linear: rows", "faint small")
    picture.text(213, 152, "channels", "faint small")
    picture.text(356, 152, "second Linear: columns", "faint small")
    for i in range(8 - len(gone)):
        picture.box(474, 34 + 14 * i, 60, 12, "accent")
        picture.box(548 + 14 * i, 36, 12, 84, "accent")
    picture.text(552, 152, "what is left", "faint small")
    return picture


def int8() -> Picture:
    row = (0.51, -1.27, 0.33, 0.06)
    scale = max(map(abs, row)) / 127
    picture = Picture(640, 130, "A row as integers from -127 to 127 and one scale")
    for i, value in enumerate(row):
        picture.box(20 + 64 * i, 30, 60, 26, "soft")
        picture.text(50 + 64 * i, 47, f"{value:g}", "ink small")
        picture.box(350 + 54 * i, 30, 50, 26, "accent")
        picture.text(375 + 54 * i, 47, f"{round(value / scale):d}", "ink small")
    picture.line((284, 43), (342, 43), arrow=True)
    picture.text(148, 78, "a row in float32, 32 bits each", "faint small")
    picture.text(456, 78, f"8 bits each, times the scale {scale:g}", "faint small")
    picture.text(20, 112, "The product of two such rows is a sum of integers, which is exact.", "ink small start")
    return picture


def budgets() -> Picture:
    picture = Picture(640, 170, "One budget of multiply-adds, spent on tokens and on weights")
    tokens_kept, half_weights = 0.7, 0.6  # the share of the MACs left by tokens; of these the share in 2:4 layers
    counted = tokens_kept * (1 - half_weights / 2)
    bars = (("dense", 1.0, "soft"), ("fewer tokens", tokens_kept, "accent"), ("and 2:4 weights", counted, "warm"))
    for i, (name, share, kind) in enumerate(bars):
        picture.box(150, 24 + 36 * i, 440 * share, 26, kind)
        picture.text(140, 42 + 36 * i, name, "ink small end")
        picture.text(158 + 440 * share, 42 + 36 * i, f"{share:.0%}", "ink small start")
    picture.line((150 + 440 * counted, 16), (150 + 440 * counted, 134), kind="mark")
    picture.text(150 + 440 * counted, 152, "the budget: counted MACs that may be spent", "faint small")
    return picture


def seams() -> Picture:
    picture = Picture(640, 170, "The three seams of a decoder at which image tokens go")
    boxes = (
        *((20, "vision tower", "L layers"), (180, "projector", "to the decoder's width")),
        *((340, "decoder", "its first layers"), (500, "decoder", "the layers behind")),
    )
    for x, name, what in boxes:
        picture.label(x, 40, 130, 44, name, what)
    for x, seam in ((150, "vision"), (310, "projector"), (470, "prefill")):
        picture.line((x, 62), (x + 28, 62), arrow=True)
        picture.line((x + 14, 100), (x + 14, 72), kind="mark")
        picture.text(x + 14, 116, seam, "strong ink small")
    picture.text(164, 134, "patches go,", "faint small")
    picture.text(164, 150, "layer by layer", "faint small")
    picture.text(324, 134, "tokens go before", "faint small")
    picture.text(324, 150, "the prompt enters", "faint small")
    picture.text(484, 134, "by what the question", "faint small")
    picture.text(484, 150, "attends to", "faint small")
    picture.text(20, 24, "image", "faint small start")
    picture.text(630, 24, "answer", "faint small end")
    return picture


def overview() -> Picture:
    picture = Picture(760, 190, "A pruned block: attention with statistics, the prune step, 2:4 linear layers")
    picture.label(10, 20, 160, 48, "ragged towers", "of a Hugging Face model")
    picture.label(200, 20, 160, 48, "varlen_attention", "output + statistics")
    picture.label(390, 20, 170, 48, "prune_tokens", "importance, threshold, gather")
    picture.label(590, 20, 160, 48, "sparse24_linear", "2:4 weight and epilogue")
    picture.label(390, 120, 170, 48, "MAG", "alignment q Eᵀ")
    picture.label(10, 120, 160, 48, "madtp.compress", "training, controller, masks", kind="warm")
    for x in (170, 360, 560):
        picture.line((x, 44), (x + 28, 44), arrow=True)
    picture.line((475, 120), (475, 70), arrow=True)
    picture.line((90, 120), (90, 70), arrow=True)
    picture.line((670, 68), (670, 96), (130, 96), (130, 70), arrow=True)
    picture.text(320, 112, "fewer tokens, next layer", "faint small")
    return picture


def architecture() -> Picture:
    picture = Picture(760, 400, "madtp on top of madtp_kernels on top of the backends")
    for y, height, name in ((10, 150, "madtp (python/madtp)"), (175, 120, "madtp_kernels"), (310, 80, "backends")):
        picture.box(5, y, 750, height, "none edge", radius=8)
        picture.text(16, y + 18, name, "strong small start ink")
    picture.label(20, 40, 150, 44, "Hugging Face model", "")
    picture.label(225, 40, 170, 44, "ragged towers", "models, dtp/ragged.py")
    picture.label(450, 40, 140, 44, "mag.py", "q Eᵀ")
    picture.label(225, 105, 250, 44, "dtp/branch.py, step.py", "a Branch per tower, a step per forward")
    picture.label(490, 105, 130, 44, "hwp", "N:M masks")
    picture.label(20, 105, 160, 44, "compression, training,", "budgets: plan, loss, masks", kind="warm")
    picture.line((170, 62), (223, 62), arrow=True)
    picture.text(196, 55, "patch()", "faint small")
    picture.line((395, 62), (448, 62), arrow=True)
    picture.line((310, 84), (310, 103), arrow=True)
    picture.line((180, 118), (200, 118), (200, 76), (223, 76), arrow=True)
    picture.label(20, 210, 150, 56, "varlen_attention", "output + statistics")
    picture.label(205, 210, 190, 56, "score_and_select", "importance, selection")
    picture.label(425, 210, 150, 56, "gather_merge", "alone or with the norm")
    picture.label(605, 210, 140, 56, "sparse24_linear", "2:4 and epilogue")
    picture.line((170, 238), (203, 238), arrow=True)
    picture.line((395, 238), (423, 238), arrow=True)
    picture.line((300, 149), (300, 208), arrow=True)
    picture.line((555, 84), (555, 96), (640, 96), (640, 165), (340, 165), (340, 208), arrow=True)
    picture.line((555, 149), (555, 190), (675, 190), (675, 208), arrow=True)
    for x, name, what in (
        (20, "reference", "plain PyTorch"),
        (205, "csrc/cpu", "baseline, AVX2, AVX-512, NEON"),
        (425, "triton", "GPUs, the interpreter"),
        (605, "csrc/cuda", "sm_80, sm_90a"),
    ):
        picture.label(x, 336, 140 if x != 205 else 190, 44, name, what)
    picture.line((380, 295), (380, 308), arrow=True)
    picture.text(400, 306, "dispatch.py", "faint small start")
    return picture


PICTURES: dict[str, Callable[[], Picture]] = {
    draw.__name__: draw
    for draw in (
        *(tokens, ragged, scores, thresholds, merging, width, sparse24),
        *(int8, budgets, seams, overview, architecture),
    )
}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")
