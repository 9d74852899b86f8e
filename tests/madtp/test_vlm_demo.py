# SPDX-License-Identifier: Apache-2.0
"""madtp demo --vlm: the LLaVA that ships, asked with all image tokens and with some."""

import json
import sys

import pytest
import torch
from PIL import Image

from madtp import cli, vlm_demo
from madtp.data.mosaics import Mosaics, kind_of
from madtp.tasks.small_vlms import SHIPPED, load_small_vlm
from madtp.tasks.vlm import VlmTask


def test_the_model_that_ships_answers():
    model, processor = load_small_vlm()
    parameters = sum(p.numel() for p in model.parameters())
    assert 1.5e6 < parameters < 5e6 and next(model.parameters()).dtype == torch.float32
    assert sum(path.stat().st_size for path in SHIPPED.parent.glob("mosaics*/*")) < 8e6
    data, task = Mosaics("test", processor, limit=120), VlmTask(processor)
    items = [item for item in map(data.__getitem__, range(len(data))) if kind_of(item["question"]) == "color"]
    right = [said == wanted for said, wanted in task.predictions(model, items)]
    assert sum(right) > 0.5 * len(right) > 5  # an eighth by chance


def test_the_demo_compares_and_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vlm_demo, "ROUNDS", 1)
    monkeypatch.setattr(
        sys, "argv", ["madtp", "demo", "--vlm", "--limit", "8", "--keep", "0.125", "--out", str(tmp_path)]
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    shown = capsys.readouterr().out
    assert not stop.value.code and "report.md, report.json and tokens.png are in" in shown
    report = json.loads((tmp_path / "report.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["dense", *vlm_demo.keeps(0.125)]
    assert [row["tokens"] for row in rows.values()] == [64, *[8] * 6, 8]
    for row in rows.values():
        assert 0 <= row["accuracy"] <= 1 and row["ms_first_token"] > 0
    assert report["records"] == 8 and [each["question"] for each in report["questions"]]
    text = (tmp_path / "report.md").read_text()
    assert "| decoder, by the question | " in text and "](tokens.png)" in text
    with Image.open(tmp_path / "tokens.png") as image:
        assert image.width > 1000


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--vlm", "--macs", "0.5"], "macs must be left out with --vlm, which trains nothing, got 0.5"),
        (["--keep", "0.5"], "keep must come with --vlm, got 0.5 without"),
        (["--vlm", "--keep", "2"], "amount must be a share, a float in (0, 1], or a count, an int >= 1, got 2.0"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["madtp", "demo", *arguments, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and capsys.readouterr().err == f"error: {message}\n"
    assert not (tmp_path / "out").exists()
