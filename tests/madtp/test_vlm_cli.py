# SPDX-License-Identifier: Apache-2.0
"""The command madtp on a decoder that reads images: compressed, judged, and refused where something is missing."""

import json
import sys

import pytest
import torch
from PIL import Image
from vlm_conversations import example

from madtp import cli

CONFIG = """
hwp_schedule: one_shot
keep:
  projector: 0.5
  prefill: {"2": {amount: 0.25, rule: fastv}}
"""


@pytest.fixture
def madtp(monkeypatch, capsys):
    """Runs the command; returns its exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["madtp", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code or 0, *capsys.readouterr()

    return run


def test_a_decoder_is_compressed_and_judged(madtp, tmp_path):
    dense, out = tmp_path / "dense", tmp_path / "out"
    torch.manual_seed(0)
    example.make_model(width=32).save_pretrained(dense)
    example.make_processor().save_pretrained(dense)
    train, test = (example.write_conversations(tmp_path, name, 4) for name in ("train", "test"))
    (tmp_path / "config.yaml").write_text(CONFIG)
    data = ("--task", "vlm", "--data", train, "--test", test, "--images", tmp_path / "images")
    asked = (*data, "--config", tmp_path / "config.yaml", "--macs", 0.5, "--out", out)
    code, shown, err = madtp("compress", dense, *asked, "--dry-run")
    assert code == 0 and "decoder" in shown and not out.exists(), err
    code, shown, err = madtp("compress", dense, *asked, "--steps", 0)
    assert code == 0 and "accuracy, 4 samples" in shown and "loss, 4 samples" in shown, err
    report = json.loads((out / "report.json").read_text())
    assert report["config"]["keep"] == {
        "projector": 0.5,
        "prefill": {"2": {"amount": 0.25, "mass": None, "rule": "fastv"}},
    }
    assert (out / "report.html").is_file()
    for folder in (dense, out / "model"):
        code, shown, err = madtp("evaluate", folder, "--data", test, "--images", tmp_path / "images")
        assert code == 0 and "accuracy " in shown and " % on 4 samples" in shown and "loss 2." in shown, err
        code, shown, err = madtp("profile", folder, "--data", test, "--images", tmp_path / "images")
        assert code == 0 and "projector" in shown and "per sample, on 4 test samples" in shown, err
    drawn, picture = tmp_path / "drawn.png", tmp_path / "images" / "test0.png"
    shown_data = ("--rows", 2, "--data", test, "--images", tmp_path / "images")
    for asked in (shown_data, ("--image", picture, "--text", "what is on the left ?")):
        code, shown, err = madtp("visualize", out / "model", *asked, "--out", drawn)
        assert code == 0 and shown == f"{drawn}\n", err
        with Image.open(drawn) as image:
            assert len(image.convert("RGB").getcolors(1 << 20)) > 100
        drawn.unlink()
    for arguments, message in (
        (("evaluate", dense), "tokenizer must know the words of mosaics, got none for color"),
        (("evaluate", dense, "--data", "no.json", "--images", tmp_path), "conversations not found at no.json: run `hf"),
        (("visualize", out / "model", "--image", picture, "--out", drawn), "text must be given with an image for"),
        (
            ("compress", dense, *data, "--out", out, "--config", tmp_path / "config.yaml", "--macs", 0.9),
            "macs_reduction must be at most",
        ),
        (("allocate", dense, *data, "--out", tmp_path / "plan.yaml"), "model must have towers that prune"),
    ):
        code, shown, err = madtp(*arguments)
        assert code == 2 and err.startswith(f"error: {message}") and err.count("\n") == 1
