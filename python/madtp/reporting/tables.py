# SPDX-License-Identifier: Apache-2.0
"""Tables of numbers, for the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table


def number_table(columns: Sequence[str], sections: Iterable[Iterable[Sequence[str]]], **options) -> Table:
    """Rows in sections, the first column to the left, the others to the right.

    Args:
        options: of `rich.table.Table`, such as title.
    """
    table = Table(*columns, title_justify="left", **options)
    for column in table.columns[1:]:
        column.justify = "right"
    for section in sections:
        for row in section:
            table.add_row(*row)
        table.add_section()
    return table


def markdown_table(columns: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """The same in Markdown, without an end of line."""
    lines = [_line(columns), f"|---{'|---:' * (len(columns) - 1)}|", *map(_line, body)]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
