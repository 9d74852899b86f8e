"""The experiments at toy size, and that the documents say what the committed results say."""

import json
import sys

import pytest

from experiments import run, table, tasks
from experiments.results import Results

# All 24 drawn images are tested: the 4 of the first 24 questions keep other numbers of tokens than those of training.
TINY = tasks.Preset(3, 4, 1e-3, calibration=64, allocation_samples=4, test=144)


@pytest.fixture
def start(drawn, monkeypatch, tmp_path):
    """Runs `python -m experiments.run vqa` on drawn images; returns the file of results."""
    monkeypatch.setattr(tasks.EXPERIMENTS["vqa"], "presets", {"cpu": TINY})

    def start(*arguments):
        folders = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
        monkeypatch.setattr(sys, "argv", ["run", "vqa", *folders, *arguments])
        run.main()
        return json.loads((tmp_path / "results" / "cpu" / "vqa.json").read_text())

    return start


def test_rows_are_measured_once(start, capsys):
    arguments = ("--variants", "joint", "staged", "weights", "random", "--reductions", "0.5")
    results = start(*arguments)
    rows = {(row["variant"], row["reduction"]): row for row in results["rows"]}
    assert list(rows) == [("dense", 0.0), ("joint", 0.5), ("staged", 0.7), ("weights", 0.7), ("random", 0.7)]
    assert "flops_reduction must be at most" in rows["weights", 0.7]["unreachable"]
    assert rows["dense", 0.0]["counted_gmacs"] == rows["dense", 0.0]["dense_gmacs"] == rows["joint", 0.5]["dense_gmacs"]
    for key in (("joint", 0.5), ("staged", 0.7), ("random", 0.7)):
        row = rows[key]
        assert row["counted_gmacs"] / row["dense_gmacs"] == pytest.approx(1 - key[1], abs=0.08), key
        assert 0 <= row["metrics"]["accuracy"] <= 1 and row["nonzero_params"] < row["params"]
    other = rows["joint", 0.5]["batch_max"]
    assert other["counted_gmacs"] >= other["instance_gmacs"] and other["batch_size"] == run.BATCH
    capsys.readouterr()
    assert start(*arguments) == results and not capsys.readouterr().out

    text = table.document([results], "cpu", "plot.png")
    assert "| weights only | not reached |" in text and "| tokens, then weights |" in text
    assert f"{100 * rows['random', 0.7]['metrics']['accuracy']:.2f}" in text


def test_results_of_other_settings_are_refused(tmp_path):
    path = tmp_path / "task.json"
    Results(path, {"task": "vqa", "settings": 1}).add({"variant": "dense", "reduction": 0.0, "seed": 0})
    assert Results(path, {"task": "vqa", "settings": 1}).find("dense", 0.0, 0) is not None
    with pytest.raises(ValueError, match="are of another settings: move them away first"):
        Results(path, {"task": "vqa", "settings": 2})


def test_the_documents_say_what_the_results_say():
    results = table.load("cpu")
    assert results
    assert table.DOCUMENT.read_text() == table.document(results, "cpu", "experiments-cpu.png")
    readme = table.README.read_text()
    assert table.replaced(readme, table.section(results)) == readme
