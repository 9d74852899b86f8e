# SPDX-License-Identifier: Apache-2.0
"""The table of a report, in the terminal and in Markdown."""

import copy
import io
import json
import re
import shutil
import subprocess

import pytest
from PIL import Image
from rich.console import Console

from madtp.reporting import page as report_page
from madtp.reporting import report

DENSE = {
    "samples": 9673,
    "metrics": {"accuracy": 0.9876},
    "dense_gmacs": 0.0814,
    "counted_gmacs": 0.0814,
    "executed_gmacs": 0.0814,
    "counted_gbops": 83.4,
    "params": 1_854_496,
    "nonzero_params": 1_854_368,
    "bytes": 7_441_512,
    "weight_bytes": 7_417_984,
    "ms_per_sample": 2.0,
    "tokens_per_layer": {"vision": [65.0, 65.0], "text": [9.0]},
    "ms_per_layer": {"vision": [0.5, 0.5], "text": [0.2]},
}
COMPRESSED = DENSE | {
    "metrics": {"accuracy": 0.9801},
    "counted_gmacs": 0.0407,
    "counted_gbops": 2.61,
    "nonzero_params": 927_184,
    "weight_bytes": 1_854_496,
    "ms_per_sample": 1.5,
    "tokens_per_layer": {"vision": [52.0, 32.5], "text": [8.1]},
    "ms_per_layer": {"vision": [0.45, 0.2], "text": [0.25]},
}
REPORT = {
    "dense": DENSE,
    "compressed": COMPRESSED,
    "plan": {
        "macs_reduction": 0.5,
        "latency_reduction": None,
        "targets_gmacs": {"vision": 0.03, "text": 0.001},
        "temperatures": {"vision": 1.5, "text": 0.25},
        "sparse_modules": ["a", "b"],
        "quantized_modules": {"a": "int8_24", "b": "int8_24", "c": "int8"},
        "dense_modules": {"d": "excluded"},
        "magnitude_kept": 0.75,
    },
    "training": [
        {
            "step": step,
            "loss": 3 / step,
            "loss_task": 1 / step,
            "loss_kd": 2 / step,
            "tau_vision": 1.0,
            "macs_vision": 3e7,
        }
        for step in (10, 20, 30)
    ],
    "config": {"seed": 3, "pattern": "2:4", "weight_dtype": "int8"},
    "versions": {"torch": "2.13.0"},
}


def test_rows_compare():
    rows = {row[0]: row[1:] for section in report.rows(REPORT) for row in section}
    assert rows["accuracy, 9,673 samples"] == ("98.76 %", "98.01 %", "-0.75 points")
    assert rows["GMACs, dense"] == ("0.0814", "0.0814", "+0.0 %")
    assert rows["GMACs, counted"] == ("0.0814", "0.0407", "-50.0 %")
    assert rows["GBOPs, counted"] == ("83.4", "2.61", "-96.9 %")
    assert rows["bytes of weights"] == ("7,417,984", "1,854,496", "-75.0 %")
    assert rows["non-zero parameters"][2] == "-50.0 %"
    assert rows["ms per sample"] == ("2", "1.5", "-25.0 %")
    assert rows["tokens, vision layer 2"] == ("65.0", "32.5", "-50.0 %")
    assert rows["tokens, text layer 1"] == ("9.0", "8.1", "-10.0 %")


def test_the_dense_run_that_was_timed_is_named():
    first = report.rows(REPORT)[0]
    assert [row[0] for row in first] == ["ms per sample", "accuracy, 9,673 samples", "bytes on disk"]
    known = REPORT | {"dense": DENSE | {"fastest_run": "SDPA", "ms_by_run": {"as loaded": 3.0, "SDPA": 2.0}}}
    assert report.rows(known)[0][1] == ("the dense model runs", "SDPA", "", "")


def test_the_table_fits_a_terminal_of_80_columns():
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report.table(REPORT))
    text = console.export_text()
    assert "…" not in text and "tokens, vision layer 2" in text and "-0.75 points" in text


def test_files(tmp_path):
    Image.new("RGB", (20, 10), "red").save(tmp_path / "tokens.png")
    report.write(REPORT, tmp_path, command="madtp demo --seed 3", picture="tokens.png")
    assert json.loads((tmp_path / "report.json").read_text()) == REPORT
    text = (tmp_path / "report.md").read_text()
    assert "| GMACs, counted | 0.0814 | 0.0407 | -50.0 % |" in text
    assert "| vision layer 2 | 0.5 | 0.2 | -60.0 % |" in text and "| text layer 1 | 0.2 | 0.25 | +25.0 % |" in text
    parts = ("`madtp demo --seed 3`", "seed: 3", "torch 2.13.0", "(tokens.png)", "50.00 % fewer")
    for part in (*parts, "in 2 linears", "int8 in 3 linears"):
        assert part in text
    assert "![" not in report.markdown(REPORT, command="madtp demo")
    timed = REPORT | {"plan": REPORT["plan"] | {"latency_reduction": 0.3}}
    assert "asked for: 30.00 % less time per sample, planned as 50.00 % fewer" in report.markdown(timed, command="")


def test_branches_must_agree():
    other = copy.deepcopy(REPORT)
    other["compressed"]["tokens_per_layer"]["vision"].append(3.0)
    with pytest.raises(ValueError):
        report.rows(other)


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def test_the_page_holds_all_it_shows(tmp_path):
    Image.new("RGB", (20, 10), "red").save(tmp_path / "tokens.png")
    text = report_page.page(REPORT, command="madtp demo --name '<b>'", picture=tmp_path / "tokens.png")
    for part in (
        "-50.0 %",
        "madtp demo --name &#39;&lt;b&gt;&#39;",
        "2 linears are 2:4",
        "3 linears have int8 weights",
        "data:image/png;base64,",
        "Seed 3",
    ):
        assert part in text
    assert text.count("<svg") == 3 and "Time of each layer" in text and "ms per sample" in text
    links = re.findall(r"(?:src|href)=\"([^\"]*)", text)
    assert links and all(link.startswith(("data:", "#")) for link in links), "nothing is fetched"
    short = report_page.page(REPORT | {"training": []}, command="madtp demo")
    assert short.count("<svg") == 2 and "<img" not in short and "Training" not in short


@pytest.mark.skipif(BROWSER is None, reason="needs chromium or chrome")
def test_a_browser_shows_the_page_without_complaint(tmp_path):
    Image.new("RGB", (20, 10), "red").save(tmp_path / "tokens.png")
    report.write(REPORT, tmp_path, command="madtp demo", picture="tokens.png")
    flags = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path}/user",
    )
    shown = subprocess.run(
        [BROWSER, *flags, f"--user-data-dir={tmp_path}/user", "--dump-dom", (tmp_path / "report.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in shown.stderr, "an error or a warning of the page"
    assert "-50.0 %" in shown.stdout and shown.stdout.count("<svg") == 2
