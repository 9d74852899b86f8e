# SPDX-License-Identifier: Apache-2.0
"""N:M patterns, and which hardware runs which."""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

from torch import Tensor

from madtp_kernels.bounded_file import one_line

MAX_M = 1 << 14  # of a pattern: what it puts into a group is found by going through its groups


class Pattern(NamedTuple):
    """At most n non-zeros in every m consecutive weights along the input dimension; in text, "2:4"."""

    n: int
    m: int

    @classmethod
    def parse(cls, text: str | Pattern) -> Pattern:
        n, _, m = str(text).partition(":")
        if not (n.isdecimal() and m.isdecimal() and 1 <= int(n) <= int(m)):
            raise ValueError(f'pattern must be "n:m" with 1 <= n <= m, got {one_line(repr(text))}')
        if int(m) > MAX_M:
            raise ValueError(f"pattern must have an m of at most {MAX_M}, got {text!r}")
        return cls(int(n), int(m))

    def runs_as(self, other: Pattern) -> bool:
        """Whether every weight of this pattern is one of the other too."""
        return self.max_in(other.m) <= other.n

    def max_in(self, size: int) -> int:
        """The most non-zeros this pattern can put in one aligned group of `size`.

        Such a group overlaps one or more groups of m, and each can put min(n, overlap) non-zeros there: in fours, 2:8
        puts at most 2, 4:8 up to 4, and 2:6 up to 4 (2 from either side of columns 4 to 7).
        """
        starts = range(0, math.lcm(size, self.m), size)
        overlaps = (Counter(i // self.m for i in range(start, start + size)).values() for start in starts)
        return max(sum(min(self.n, overlap) for overlap in group) for group in overlaps)

    @property
    def sparse24(self) -> bool:
        """Whether every weight of this pattern is a 2:4 weight: 1:2, 1:4, 2:8, 2:16 are, 4:8, 4:16 and 2:6 are not."""
        return self.runs_as(Pattern(2, 4))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


class Unit(NamedTuple):
    """What multiplies sparse weights faster than dense ones."""

    name: str
    dtypes: str
    runs: Pattern


# NVIDIA: PTX ISA, mma.sp, "sparse matrix storage". AMD: CDNA 3 ISA, V_SMFMAC.
UNITS = (
    Unit("NVIDIA Sparse Tensor Cores, sm_80 and newer", "float16, bfloat16, int8; fp8 from sm_89", Pattern(2, 4)),
    Unit("NVIDIA Sparse Tensor Cores, sm_80 and newer", "float32 as TF32", Pattern(1, 2)),
    Unit("AMD Matrix Cores, CDNA 3 and newer", "float16, bfloat16, int8, fp8", Pattern(2, 4)),
    Unit("any CPU, by the kernels of madtp_kernels", "float32; bfloat16 and float16 too, rarely faster", Pattern(2, 4)),
)
COMMON = (
    Pattern(1, 2),
    Pattern(1, 4),
    Pattern(2, 4),
    Pattern(1, 8),
    Pattern(2, 8),
    Pattern(4, 8),
    Pattern(2, 16),
    Pattern(4, 16),
    Pattern(8, 16),
)


class PatternReport(NamedTuple):
    """Where a pattern runs; `str()` is a sentence for each unit."""

    pattern: Pattern
    runs: tuple[Unit, ...]
    rejected: dict[Unit, str]  # why the others cannot

    def __str__(self) -> str:
        how = {unit: f"as {unit.runs}" for unit in self.runs}
        how |= {unit: f"dense, {why}" for unit, why in self.rejected.items()}
        return "\n".join(f"{unit.name} ({unit.dtypes}): {self.pattern} runs {text}" for unit, text in how.items())


def explain_pattern(pattern: Pattern | str) -> PatternReport:
    """Says which hardware runs an N:M pattern, and why the rest does not.

    >>> print(madtp_kernels.explain_pattern("4:8"))
    """
    pattern = Pattern.parse(pattern)
    rejected = {
        unit: f"as it can put {pattern.max_in(unit.runs.m)} non-zeros in an aligned group of {unit.runs.m}, "
        f"of which {unit.runs.n} may be"
        for unit in UNITS
        if not pattern.runs_as(unit.runs)
    }
    return PatternReport(pattern, tuple(unit for unit in UNITS if unit not in rejected), rejected)


def is_pattern(weight: Tensor, pattern: Pattern | str) -> bool:
    """Whether weight (N, C) has at most n non-zeros in every m along C (-0.0 is zero); False if m does not divide C."""
    n, m = Pattern.parse(pattern)
    if weight.shape[-1] % m:
        return False
    return bool((weight.detach().unflatten(-1, (-1, m)).count_nonzero(-1) <= n).all())
