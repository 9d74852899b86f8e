# SPDX-License-Identifier: Apache-2.0
"""A small picture as SVG: boxes, texts and arrows in colours that follow the light or the dark of the reader."""

from __future__ import annotations

from html import escape

STYLE = """
.ink { fill: #24292f } .faint { fill: #6e7781 } .paper { fill: #ffffff }
.accent { fill: #3b82c4 } .soft { fill: #d5e6f6 } .warm { fill: #dd8433 } .none { fill: none }
.edge { stroke: #57606a; stroke-width: 1.2; fill: none } .mark { stroke: #c0392b; stroke-width: 2; fill: none }
.gone { fill: none; stroke: #8c959f; stroke-width: 1; stroke-dasharray: 3 2 }
text { font: 13px system-ui, sans-serif; text-anchor: middle }
text.start { text-anchor: start } text.end { text-anchor: end }
text.small { font-size: 11px } text.strong { font-weight: 600 }
@media (prefers-color-scheme: dark) {
.ink { fill: #e6edf3 } .faint { fill: #9198a1 } .paper { fill: #0d1117 }
.accent { fill: #4f9ee3 } .soft { fill: #26435f } .warm { fill: #e79549 }
.edge { stroke: #9198a1 } .mark { stroke: #ff7b72 } .gone { stroke: #6e7681 }
}
"""


def number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


class Picture:
    """Parts are added in the order in which they are drawn; y goes down."""

    def __init__(self, width: int, height: int, title: str):
        self.size, self.title, self.parts = (width, height), title, []

    def box(self, x: float, y: float, width: float, height: float, kind: str = "soft", radius: float = 2) -> None:
        """kind: a colour, with `edge` for an outline; `gone` for what is not there any more."""
        place = f'x="{number(x)}" y="{number(y)}" width="{number(width)}" height="{number(height)}"'
        self.parts.append(f'<rect class="{kind}" {place} rx="{number(radius)}"/>')

    def text(self, x: float, y: float, words: str, kind: str = "ink") -> None:
        self.parts.append(f'<text class="{kind}" x="{number(x)}" y="{number(y)}">{escape(words)}</text>')

    def line(self, *points: tuple[float, float], kind: str = "edge", arrow: bool = False) -> None:
        listed = " ".join(f"{number(x)},{number(y)}" for x, y in points)
        end = ' marker-end="url(#tip)"' if arrow else ""
        self.parts.append(f'<polyline class="{kind}" points="{listed}"{end}/>')

    def label(self, x: float, y: float, width: float, height: float, *lines: str, kind: str = "soft") -> None:
        """A box with a few lines of text in its middle."""
        self.box(x, y, width, height, kind, radius=5)
        top = y + height / 2 - 8 * (len(lines) - 1) + 4.5
        for i, words in enumerate(lines):
            self.text(x + width / 2, top + 16 * i, words, "ink" if i == 0 else "ink small")

    def svg(self) -> str:
        width, height = self.size
        tip = (
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<path class="faint" d="M0,0 L8,4 L0,8 z"/></marker></defs>'
        )
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">'
        licence = "<!-- SPDX-License-Identifier: Apache-2.0; drawn by website/pictures.py -->"
        body = [head, licence, f"<title>{escape(self.title)}</title>", f"<style>{STYLE}</style>", tip, *self.parts]
        return "\n".join([*body, "</svg>"]) + "\n"
