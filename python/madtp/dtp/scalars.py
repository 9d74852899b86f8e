# SPDX-License-Identifier: Apache-2.0
"""Numbers that a user gives: those of Python and of numpy alike."""

from __future__ import annotations

import math
import numbers
from typing import Any


def is_number(value: Any) -> bool:
    """Whether it is a real number, and no bool, that a finite float can hold."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def is_share(value: Any) -> bool:
    """Whether it is a number in (0, 1] that is no integer: `1.0` is one, `1` is a count."""
    return is_number(value) and not isinstance(value, numbers.Integral) and 0 < value <= 1


def is_integer(value: Any) -> bool:
    """Whether it is an integer, and no bool."""
    return is_number(value) and isinstance(value, numbers.Integral)


def is_count(value: Any) -> bool:
    """Whether it is an integer of at least 1."""
    return is_integer(value) and int(value) >= 1
