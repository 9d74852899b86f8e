# SPDX-License-Identifier: Apache-2.0
"""A report as one HTML page that needs nothing else: pictures and curves are inside of it."""

from __future__ import annotations

import base64
import io
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from madtp.reporting.rows import COLUMNS, rows

LOSSES = ("loss", "loss_task", "loss_kd", "loss_align", "loss_vision", "loss_text")


def page(report: dict, *, command: str, picture: Path | None = None) -> str:
    """The page of a report of `madtp.compress`.

    Args:
        command: that made the report.
        picture: a PNG of the kept tokens.
    """
    return _template().render(
        columns=COLUMNS,
        sections=rows(report),
        tokens=_layers(report, "tokens_per_layer", "tokens"),
        times=_layers(report, "ms_per_layer", "ms per sample"),
        curves=_curves(report["training"]),
        picture=None if picture is None else base64.b64encode(picture.read_bytes()).decode(),
        plan=report["plan"],
        config=report["config"],
        versions=report["versions"],
        command=command,
    )


@cache
def _template():
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("report.html.j2")


def _layers(report: dict, figure_name: str, label: str) -> Markup:
    """A figure of every branch, dense and compressed, against the layer."""
    branches = report["compressed"][figure_name]
    figure = Figure(figsize=(4.6 * max(len(branches), 1), 2.6), layout="constrained")
    panels = figure.subplots(1, max(len(branches), 1), squeeze=False)[0]
    for axes, (branch, after) in zip(panels, branches.items(), strict=False):
        layers = range(1, len(after) + 1)
        axes.plot(layers, report["dense"][figure_name][branch], color="#b9bec9", marker="o", label="dense")
        axes.plot(layers, after, color="#1f6feb", marker="o", label="compressed")
        axes.set(title=branch, xlabel="layer", ylabel=label, ylim=(0, None), xticks=list(layers))
        axes.legend(frameon=False)
    return _svg(figure)


def _curves(history: list[dict]) -> Markup | None:
    """The parts of the loss, the temperatures and the MACs observed, against the step."""
    if len(history) < 2:
        return None
    groups = {
        "loss": [name for name in LOSSES if name in history[-1]],
        "temperature": [name for name in history[-1] if name.startswith("tau_")],
        "MACs observed": [name for name in history[-1] if name.startswith("macs_")],
    }
    figure = Figure(figsize=(13.8, 3.2), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, 3), groups.items(), strict=True):
        axes.set(title=title, xlabel="step")
        for name in names:
            points = [(entry["step"], entry[name]) for entry in history if entry.get(name, 0) > 0]
            if points:  # a branch that is not pruned has a temperature of 0
                axes.plot(*zip(*points, strict=True), label=name.partition("_")[2] or name)
        if axes.lines:
            axes.set_yscale("log")
            axes.legend(frameon=False, fontsize=8)
    return _svg(figure)


def _svg(figure: Figure) -> Markup:
    FigureCanvasSVG(figure)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    drawn = text.getvalue()
    return Markup(drawn[drawn.index("<svg") :])
