# SPDX-License-Identifier: Apache-2.0
"""Every example runs, at a small size, and says what it promises."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_vlms import save_tiny

ROOT = Path(__file__).parents[2]
BRIEF = {  # arguments, and something it prints
    "own_encoder": ((), "temperature 10.0: "),
    "pack_weights": ((), "loaded, it computes the same: True"),
}
FETCHED = {
    "vqa": (("--samples", "16"), "what is the red shape? triangle"),
    "nlvr": (("--samples", "16"), "pruned: accuracy 0."),
    "captioning": (("--samples", "16", "--beams", "2"), "pruned: bleu4 "),
    "retrieval": (("--samples", "16", "--fit", "32"), "is found as"),
}


def run(name, *arguments):
    environment = os.environ | {"MADTP_TUNE": "off", "PYTHONPATH": os.pathsep.join((str(ROOT / "python"), str(ROOT)))}
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture
def run_here(monkeypatch, capsys):
    """`run` in this process, which has torch loaded."""

    def run(name, *arguments):
        monkeypatch.syspath_prepend(ROOT / "examples")
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", BRIEF)
def test_runs(run_here, name):
    arguments, promised = BRIEF[name]
    assert promised in run_here(name, *arguments)


@pytest.mark.parametrize("name", ["llava", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
def test_decoders_answer_with_fewer_image_tokens(run_here, name, tmp_path):
    if name == "qwen2_5_vl":
        pytest.importorskip("torchvision", reason="its processor of videos needs it")
    save_tiny(name, tmp_path)
    out = run_here(name, "--model", tmp_path, "--keep", 9, "--new-tokens", 3)
    assert "image tokens left: 9" in out and "dense: " in out and "pruned: " in out


@pytest.mark.slow
def test_a_run_is_killed_and_goes_on(run_here, tmp_path):
    few = ("--images", 40, "--compared", 8, "--size", 32, "--width", 64, "--layers", 2)
    printed = run_here("bulk_embedding", "--out", str(tmp_path), *map(str, few))
    assert "40 vectors, 40 names, 0 missing, 0 twice" in printed and "pruned and packed to dense: " in printed


@pytest.mark.slow
def test_a_decoder_is_made_trained_and_compressed(run_here, tmp_path):
    out = run_here("compress_vlm", "--out", tmp_path, "--samples", 16, "--dense-steps", 4, "--steps", 2)
    assert "| accuracy, 4 samples |" in out and "| tokens, projector layer 1 | 64.0 |" in out
    assert (tmp_path / "model" / "madtp.json").is_file() and (tmp_path / "report.md").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", FETCHED)
def test_runs_on_fetched_data(name):
    arguments, promised = FETCHED[name]
    out = run(name, *arguments)
    assert promised in out and "tokens after each layer" in out


@pytest.mark.slow
def test_a_model_is_trained_pruned_and_compressed(tmp_path):
    dense, compressed = tmp_path / "dense", tmp_path / "compressed"
    assert "2 steps" in run("train_emoji", "--task", "captioning", "--out", dense, "--steps", 2)
    assert "pruned: " in run("captioning", "--model", dense, "--samples", 8, "--beams", 2)
    shown = run(
        "compress_emoji", "--task", "captioning", "--model", dense, "--out", compressed, "--steps", 8, "--limit", 64
    )
    assert str(compressed / "report.md") in shown and (compressed / "model" / "madtp.json").is_file()
    assert (compressed / "model" / "preprocessor_config.json").is_file()


def test_a_bad_rate_is_one_line():
    command = [sys.executable, str(ROOT / "examples" / "vqa.py"), "--keep-rate", "1.5", "--samples", "4"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT / "python"), str(ROOT)))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(
        "error: keep_rate must be a number in (0, 1]"
    )
