# SPDX-License-Identifier: Apache-2.0
"""The anchors of headings, as GitHub makes them, so that one link works in both places."""

from __future__ import annotations

import re


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
