# SPDX-License-Identifier: Apache-2.0
"""Families by what a test finds of them: its cases, and the table of docs/models.md that says what ran."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from families import CASES

DOCS = Path(__file__).parents[2] / "docs" / "models.md"


# Families that have, between them, every tower, every way of pooling and every class with a forward of ours.
VARIED = (
    "BlipForQuestionAnswering",
    "BlipForNLVR",
    "CLIPModel",
    "SiglipModel",
    "VisionTextDualEncoderModel (DINOv2, BERT)",
    "Blip2ForImageTextRetrieval",
    "ViTForImageClassification",
    "Dinov2Model (SwiGLU)",
    "BertForTokenClassification",
)


class Column(NamedTuple):
    """What is tested of every family, why one has no such thing, and the families that are no slow test (None: all)."""

    check: Callable[..., None]
    why_not: Callable[[str], str | None] = lambda family: None
    quick: tuple[str, ...] | None = None


def cases(columns: Mapping[str, Column]) -> list[Any]:
    """Of a test that takes the name of a family and that of a column."""
    found = []
    for family in CASES:
        for words, column in columns.items():
            slow = column.quick is not None and family not in column.quick
            found.append(pytest.param(family, words, marks=[pytest.mark.slow] * slow))
    return found


def run(column: Column, family: str, folder: Path) -> None:
    if reason := column.why_not(family):
        pytest.skip(reason)
    column.check(family, folder) if column.check.__code__.co_argcount == 2 else column.check(family)


def table(columns: Mapping[str, Column]) -> str:
    rows = [["model", *columns], ["---"] * (1 + len(columns))]
    rows += [[family, *(column.why_not(family) or "yes" for column in columns.values())] for family in CASES]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
