# SPDX-License-Identifier: Apache-2.0
"""The rows of a report: what was measured of the dense and of the compressed model, and the change."""

from __future__ import annotations

COLUMNS = ("", "dense", "compressed", "change")


def rows(report: dict) -> list[list[tuple[str, str, str, str]]]:
    """The table as sections of rows (what, dense, compressed, change)."""
    dense, compressed = report["dense"], report["compressed"]

    def row(name: str, key: str, text) -> tuple[str, str, str, str]:
        before, after = dense[key], compressed[key]
        return name, text(before), text(after), change(before, after)

    fastest = dense.get("fastest_run")  # reports of earlier versions have none
    sections = [
        [
            row("ms per sample", "ms_per_sample", "{:.3g}".format),
            *([("the dense model runs", fastest, "", "")] if fastest else []),
            *(
                (
                    f"{name}, {compressed['samples']:,} samples",
                    metric(name, before),
                    metric(name, compressed["metrics"][name]),
                    _change_of(name, before, compressed["metrics"][name]),
                )
                for name, before in dense["metrics"].items()
            ),
            row("bytes on disk", "bytes", "{:,}".format),
        ],
        [row(f"GMACs, {kind}", f"{kind}_gmacs", "{:.4g}".format) for kind in ("dense", "counted", "executed")],
        [row("GBOPs, counted", "counted_gbops", "{:.4g}".format)],
        [
            row("parameters", "params", "{:,}".format),
            row("non-zero parameters", "nonzero_params", "{:,}".format),
            row("bytes of weights", "weight_bytes", "{:,}".format),
        ],
    ]
    for branch, layers in compressed["tokens_per_layer"].items():
        pairs = zip(dense["tokens_per_layer"][branch], layers, strict=True)
        sections.append(
            [
                (f"tokens, {branch} layer {number}", f"{before:.1f}", f"{after:.1f}", change(before, after))
                for number, (before, after) in enumerate(pairs, 1)
            ]
        )
    return sections


def layer_times(report: dict) -> list[tuple[str, str, str, str]]:
    """Rows of the time of every block, as those of `rows`."""
    dense, compressed = report["dense"]["ms_per_layer"], report["compressed"]["ms_per_layer"]
    return [
        (f"{branch} layer {number}", f"{before:.3g}", f"{after:.3g}", change(before, after))
        for branch, layers in compressed.items()
        for number, (before, after) in enumerate(zip(dense[branch], layers, strict=True), 1)
    ]


LOSS = "loss"  # the one metric that is no share


def metric(name: str, value: float) -> str:
    """A figure of an evaluation, to be read."""
    return f"{value:.4g}" if name == LOSS else percent(value)


def _change_of(name: str, before: float, after: float) -> str:
    return f"{after - before:+.4g}" if name == LOSS else f"{100 * (after - before):+.2f} points"


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def change(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.1f} %"
