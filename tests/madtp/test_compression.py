# SPDX-License-Identifier: Apache-2.0
"""Joint training end to end on a tiny model: reaches its MAC target, saves, resumes, keeps what an interrupt left."""

import copy
import dataclasses
import json

import pytest
import torch
from tiny_models import tiny_batch, tiny_blip
from torch.utils.data import Dataset
from transformers import TrainerCallback

import madtp
from madtp.choices import MASKINGS
from madtp.profiling.macs import counted_macs
from madtp.profiling.timing import time_per_sample
from madtp.tasks.batches import sample_batches
from madtp.training.trainer import CONTROLLER_FILE, MadtpTrainer, last_checkpoint

CONFIG = madtp.CompressionConfig(
    macs_reduction=0.55, alignment_tokens=8, alignment_dim=32, controller_interval=2, hwp_schedule="gradual"
)


FC1 = "vision_model.encoder.layers.0.mlp.fc1"


class Questions(Dataset):
    """Random images; the question repeats the answer, so there is something to learn."""

    def __init__(self, count: int):
        generator = torch.Generator().manual_seed(3)
        self.pixels = torch.randn(count, 3, 16, 16, generator=generator)
        self.words = torch.randint(4, 20, (count, 7), generator=generator)

    def __len__(self):
        return len(self.words)

    def __getitem__(self, i):
        answer = self.words[i, 0]
        return {
            "pixel_values": self.pixels[i],
            "input_ids": self.words[i],
            "attention_mask": torch.ones(7, dtype=torch.long),
            "labels": torch.stack([torch.tensor(2), answer, torch.tensor(3)]),
        }


class Task:
    metric = "accuracy"

    @staticmethod
    def collate(items):
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}

    def loss(self, output, batch):
        return output.loss

    def logits(self, output, batch):
        return output.logits, None

    def evaluate(self, model, data, *, batch_size=16, progress=iter):
        right = 0
        with torch.no_grad():
            for batch in progress(torch.utils.data.DataLoader(data, batch_size, collate_fn=self.collate)):
                model(**batch)
                right += len(batch["labels"])
        return {"accuracy": right / len(data)}

    def save_processor(self, directory):
        (directory / "processor.txt").write_text("words")


@pytest.fixture(scope="module")
def data():
    return Questions(48)


@pytest.fixture(scope="module")
def few():
    """Enough for a run whose figures do not matter."""
    return Questions(16)


def test_compress_reaches_the_target_and_reports_what_was_saved(tmp_path, data):
    dense = tiny_blip()
    before = copy.deepcopy(dense.state_dict())
    training = {"max_steps": 12, "per_device_train_batch_size": 16, "disable_tqdm": True, "save_strategy": "no"}
    result = madtp.compress(dense, Task(), data, data, CONFIG, output_dir=tmp_path, training=training)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    report = json.loads(json.dumps(result.report))
    compressed = report["compressed"]
    assert report["dense"]["counted_gmacs"] == pytest.approx(report["dense"]["dense_gmacs"])
    assert compressed["counted_gmacs"] == pytest.approx(0.45 * compressed["dense_gmacs"], rel=0.03)
    assert compressed["executed_gmacs"] == pytest.approx(compressed["counted_gmacs"]), "2:4 layers run sparse"
    assert report["plan"]["packed_modules"] == sorted(report["plan"]["sparse_modules"])
    assert compressed["nonzero_params"] < 0.75 * report["dense"]["params"]
    runs = report["dense"]["ms_by_run"]
    assert runs.keys() == {"as loaded", "patched"} and min(runs, key=runs.get) == report["dense"]["fastest_run"]
    assert report["dense"]["ms_per_sample"] == min(runs.values()) > 0 and "ms_by_run" not in compressed
    tokens = compressed["tokens_per_layer"]["vision"]
    assert len(tokens) == 2 and 17 > tokens[0] > tokens[1] > 1
    assert report["plan"]["temperatures"] == result.model.madtp_handle.temperatures
    for name in report["plan"]["sparse_modules"]:
        weight = result.model.get_submodule(name).sparse_weight.to_dense()
        assert (weight.unflatten(-1, (-1, 4)).count_nonzero(-1) <= 2).all()
    assert not any("decoder" in name or "guide" in name for name in report["plan"]["sparse_modules"])
    assert (result.path / "processor.txt").exists()
    assert all(time > 0 for time in time_per_sample({"x": result.model}, sample_batches(Task(), data, 8)[0]).values())


def test_the_error_of_the_counted_macs_is_the_standard_error_of_their_mean(monkeypatch):
    model, data = tiny_blip(), Questions(40)
    madtp.patch(model, CONFIG)
    assert madtp.measure(model, Task(), data)["counted_gmacs_error"] == 0, "one batch says nothing of it"
    model.madtp_handle.set_temperature(0.5)
    monkeypatch.setattr("madtp.tasks.batches.BATCH_SIZE", 8)
    figures = madtp.measure(model, Task(), data)
    costs = [sum(counted_macs(model, [batch]).values()) / 1e9 for batch in sample_batches(Task(), data, 40)]
    assert len(set(costs)) > 1
    assert figures["counted_gmacs"] == pytest.approx(torch.tensor(costs).mean().item())
    assert figures["counted_gmacs_error"] == pytest.approx(torch.tensor(costs).std().item() / 5**0.5)


@pytest.mark.parametrize(
    "score", [pytest.param("activation", marks=pytest.mark.slow), "token_weighted", "second_order", "admm"]
)
def test_weights_are_chosen_by_every_score_on_permuted_channels(tmp_path, few, score):
    config = dataclasses.replace(CONFIG, hwp_score=score, hwp_permute=True, hwp_schedule="one_shot")
    result = madtp.compress(tiny_blip(), Task(), few, None, config, output_dir=tmp_path, training=BRIEF)
    plan = result.report["plan"]
    assert plan["packed_modules"] == sorted(plan["sparse_modules"])
    assert len(plan["permutations"]) == 4
    assert all(kept["after"] >= kept["before"] > 0.5 for kept in plan["permutations"].values())


@pytest.mark.parametrize(
    "fields",
    [{"hwp_masking": "reweighted"}, {"hwp_masking": "s_ste", "hwp_score": "second_order", "hwp_schedule": "one_shot"}],
)
def test_weights_end_2_4_by_every_masking(tmp_path, few, fields):
    config = dataclasses.replace(CONFIG, **fields)
    result = madtp.compress(tiny_blip(), Task(), few, None, config, output_dir=tmp_path, training=BRIEF)
    plan = result.report["plan"]
    assert plan["packed_modules"] == sorted(plan["sparse_modules"]) and 0.5 < plan["magnitude_kept"] <= 1


@pytest.mark.parametrize("score", ["second_order", "admm"])
def test_reconstructed_weights_are_chosen_once(score):
    with pytest.raises(ValueError, match=f'hwp_schedule must be "one_shot" with hwp_score "{score}"'):
        dataclasses.replace(CONFIG, hwp_score=score)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"hwp_masking": "soft"}, "hwp_masking must be None or reweighted or s_ste, got 'soft'"),
        ({"hwp_masking": "s_ste", "hwp_score": "activation"}, "hwp_masking must be None with hwp_score 'activation'"),
        (
            {"hwp_masking": "reweighted", "hwp_schedule": "one_shot"},
            'hwp_masking must be None without hwp_schedule "gradual" and hwp_score "magnitude", got \'reweighted\'',
        ),
    ],
)
def test_maskings_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **fields)


BRIEF = {"max_steps": 2, "per_device_train_batch_size": 8, "disable_tqdm": True, "save_strategy": "no"}


def never(*arguments, **kwargs):
    raise AssertionError("must be refused before training")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"macs_reduction": 0.99}, "macs_reduction must be below 0.853"),
        ({"macs_reduction": 0.8}, "macs_reduction must be at most about 0.56, which temperature_max 1000 reaches"),
        ({"params_reduction": 0.5}, r"params_reduction must be at most 0\.\d+, the share 2:4 zeroes in the 28 modules"),
    ],
)
def test_targets_out_of_reach_are_refused_before_training(tmp_path, data, monkeypatch, fields, message):
    monkeypatch.setattr(MadtpTrainer, "train", never)
    config = dataclasses.replace(CONFIG, **fields)
    with pytest.raises(ValueError, match=message):
        madtp.compress(tiny_blip(), Task(), data, data, config, output_dir=tmp_path, training=BRIEF)


def test_an_output_that_cannot_be_written_is_refused_before_training(tmp_path, data, monkeypatch):
    monkeypatch.setattr(MadtpTrainer, "train", never)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="output_dir must be a directory to write to"):
        madtp.compress(tiny_blip(), Task(), data, data, CONFIG, output_dir=tmp_path / "file", training=BRIEF)


def test_a_failing_save_keeps_the_model_that_was_there(tmp_path, few, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "precious").touch()

    def fail(self, directory):
        raise OSError("disk full")

    monkeypatch.setattr(Task, "save_processor", fail)
    with pytest.raises(OSError, match="disk full"):
        madtp.compress(tiny_blip(), Task(), few, few, CONFIG, output_dir=tmp_path, training=BRIEF)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["precious"]
    assert not (tmp_path / "model.partial").exists()


@pytest.mark.slow
def test_a_new_run_does_not_go_on_from_an_old_one(tmp_path, data):
    old = tmp_path / "checkpoints" / "checkpoint-900"
    old.mkdir(parents=True)
    (old / CONTROLLER_FILE).write_text("{}")
    training = BRIEF | {"save_strategy": "steps", "save_steps": 1}
    first = madtp.compress(tiny_blip(), Task(), data, data, CONFIG, output_dir=tmp_path, training=training)
    assert last_checkpoint(tmp_path / "checkpoints").name == "checkpoint-2"
    other = dataclasses.replace(CONFIG, macs_reduction=0.5, kd_weight=2.0)
    with pytest.raises(
        ValueError, match="config must be that of .*checkpoint-2, got another kd_weight, macs_reduction"
    ):
        madtp.compress(tiny_blip(), Task(), data, data, other, output_dir=tmp_path, training=training, resume=True)
    result = madtp.compress(
        tiny_blip(), Task(), data, data, CONFIG, output_dir=tmp_path, training=training, resume=True
    )
    assert last_checkpoint(tmp_path / "checkpoints").name == "checkpoint-2", "nothing left to train"
    assert same_bits(result.model, first.model) and result.report["training"] == first.report["training"]


def test_samples_are_spread_over_the_data(data, monkeypatch):
    monkeypatch.setattr("madtp.tasks.batches.BATCH_SIZE", 4)
    batches = sample_batches(Task(), data, 7)
    assert [len(batch["labels"]) for batch in batches] == [4, 3]
    assert torch.equal(batches[1]["input_ids"][-1], data.words[41])
    assert sum(len(batch["labels"]) for batch in sample_batches(Task(), data, 100)) == 48

    class Shared(Task):
        @staticmethod
        def collate(items):
            batch = Task.collate(items)
            batch["pixel_values"], batch["image_index"] = batch["pixel_values"][:1], torch.zeros(len(items)).long()
            return batch

    assert [len(batch["pixel_values"]) for batch in sample_batches(Shared(), data, 7)] == [4, 3]


def make_trainer(
    tmp_path, data, steps, config=CONFIG, sparse_modules=(FC1,), eval_dataset=None, find_start=True, **training
):
    """find_start: without, the first temperatures are those of the config: to seek them takes as long as the steps."""
    from madtp.compression.pipeline import _training_arguments
    from madtp.training.controller import branch_targets

    student, teacher = tiny_blip(), tiny_blip()
    handle = madtp.patch(student, config)
    madtp.patch(teacher, config)
    probe = tiny_batch()
    targets = branch_targets(madtp.profile(student, probe), 0.3, tuple(handle.pruning))
    arguments = {"max_steps": steps, "save_strategy": "steps", "save_steps": 4, "per_device_train_batch_size": 8}
    args = _training_arguments(tmp_path, config, arguments | {"disable_tqdm": True} | training)
    trainer = MadtpTrainer(
        student,
        teacher,
        Task(),
        config,
        targets=targets,
        probe=[probe],
        sparse_modules=list(sparse_modules),
        args=args,
        train_dataset=data,
        eval_dataset=eval_dataset,
        data_collator=Task.collate,
    )
    if not find_start:
        trainer.find_start = lambda: None
    return trainer


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            raise KeyboardInterrupt


@pytest.mark.parametrize("masking", [None, *(pytest.param(name, marks=pytest.mark.slow) for name in MASKINGS)])
def test_an_interrupted_training_resumes_where_it_would_have_been(tmp_path, data, masking):
    config = dataclasses.replace(CONFIG, hwp_masking=masking)
    whole = make_trainer(tmp_path / "whole", data, 8, config)
    whole.train()
    stopped = make_trainer(tmp_path / "stopped", data, 8, config)
    stopped.add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    checkpoint = last_checkpoint(tmp_path / "stopped" / "checkpoints")
    assert checkpoint.name == "checkpoint-4"
    broken = checkpoint.with_name("checkpoint-7")  # one that an interrupt cut short
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(b"half")
    assert last_checkpoint(tmp_path / "stopped" / "checkpoints") == checkpoint
    assert (checkpoint / CONTROLLER_FILE).exists()
    resumed = make_trainer(tmp_path / "stopped", data, 8, config)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.handle.temperatures == pytest.approx(whole.handle.temperatures)
    for (name, a), b in zip(resumed.model.state_dict().items(), whole.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_a_finished_training_that_is_resumed_makes_no_step(tmp_path, data):
    finished = make_trainer(tmp_path, data, 4, find_start=False)  # of 6 in an epoch
    finished.train()
    folder = tmp_path / "checkpoints"
    resumed = make_trainer(tmp_path, data, 4, find_start=False)
    resumed.train(resume_from_checkpoint=str(last_checkpoint(folder)))
    assert resumed.state.global_step == 4 and last_checkpoint(folder).name == "checkpoint-4"
    assert same_bits(resumed.model, finished.model)
    assert resumed.handle.temperatures == finished.handle.temperatures
    assert resumed.state.log_history[:-1] == finished.state.log_history[:-1]  # the last says how long it took
    longer = make_trainer(tmp_path, data, 5, find_start=False)
    longer.train(resume_from_checkpoint=str(last_checkpoint(folder)))
    assert longer.state.global_step == 5


def test_a_checkpoint_of_another_plan_is_refused(tmp_path, data, monkeypatch):
    make_trainer(tmp_path, data, 4, find_start=False).train()
    checkpoint = str(last_checkpoint(tmp_path / "checkpoints"))
    later = make_trainer(tmp_path, data, 5, find_start=False)
    later.handle.set_first_layer({"vision": 1})
    message = "plan must be that of the checkpoint .*, got another first_layers: {'vision': 1, 'text': 0}"
    with pytest.raises(ValueError, match=message):
        later.train(resume_from_checkpoint=checkpoint)
    narrow = make_trainer(tmp_path, data, 5, find_start=False)
    monkeypatch.setattr("madtp.training.trainer.widths_of", lambda model: {"vision_model.fc2": 48})
    with pytest.raises(ValueError, match="plan must be that of the checkpoint .*, got another widths: {'vision_model"):
        narrow.train(resume_from_checkpoint=checkpoint)


def same_bits(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_loss_is_the_sum_of_its_parts(tmp_path, data):
    trainer = make_trainer(tmp_path, data, 2)
    batch = Task.collate([data[i] for i in range(6)])
    loss = trainer.compute_loss(trainer.model.train(), batch)
    parts = {name: values[-1] for name, values in trainer._parts.items()}
    weights = {"task": 1.0, "align": 0.1, "vision": 1.0, "text": 10.0, "kd": 1.0}
    assert set(parts) == set(weights)
    torch.testing.assert_close(loss.detach(), sum(weights[name] * part for name, part in parts.items()))
    loss.backward()
    assert trainer.handle.alignment_tokens.grad.abs().sum() > 0
    assert all(p.grad is None for p in trainer.teacher.parameters())


def test_accumulated_steps_average_their_losses(tmp_path, data):
    plain = make_trainer(tmp_path, data, 1, find_start=False, logging_steps=1)
    plain.train()
    halves = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "logging_steps": 1}
    accumulated = make_trainer(tmp_path, data, 1, find_start=False, **halves)
    accumulated.train()
    losses = [trainer.state.log_history[0]["loss"] for trainer in (plain, accumulated)]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    epochs = {"max_steps": -1, "num_train_epochs": 3}
    assert make_trainer(tmp_path, data, 1, **halves | epochs)._total_steps() == 18
    assert make_trainer(tmp_path, data, 1, **halves | epochs | {"gradient_accumulation_steps": 5})._total_steps() == 9


@pytest.mark.parametrize("name", ["train_data", "eval_data"])
def test_empty_data_are_refused_before_anything_is_written(tmp_path, name):
    data = {"train_data": Questions(8), "eval_data": Questions(8)} | {name: Questions(0)}
    with pytest.raises(ValueError, match=f"{name} must hold samples, got none"):
        madtp.compress(tiny_blip(), Task(), config=CONFIG, output_dir=tmp_path / "out", **data)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="data must hold samples, got none"):
        madtp.measure(tiny_blip(), Task(), Questions(0))
