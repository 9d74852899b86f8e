# SPDX-License-Identifier: Apache-2.0
"""Decoders that read images, compressed: losses on the rows that student and teacher share, budgets over the seams."""

import copy
import dataclasses
import shutil

import pytest
import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback
from vlm_conversations import conversations, example
from vlm_families import IMAGE, make_vlm

import madtp
from madtp.data.conversations import IGNORED
from madtp.profiling.macs import profile_batches
from madtp.tasks.batches import sample_batches
from madtp.tasks.vlm import VlmTask
from madtp.training.controller import branch_targets
from madtp.training.trainer import last_checkpoint

UNIFORM = madtp.Keep(0.5, rule="uniform")
FIXED = madtp.CompressionConfig(
    macs_reduction=0.5,
    keep={"projector": UNIFORM, "prefill": {1: 0.25}},
    hwp_schedule="one_shot",
    controller_interval=3,
)
STEERED = dataclasses.replace(
    FIXED,
    macs_reduction=0.6,
    keep={"vision": madtp.Keep(temperature=1.0), "prefill": {2: madtp.Keep(temperature=1.0, rule="fastv")}},
)
TRAINING = {"max_steps": 6, "per_device_train_batch_size": 4, "save_strategy": "no", "disable_tqdm": True}
TRAINING |= {"logging_steps": 1, "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Questions of two lengths, so that a batch has padding."""

    def longer(records):
        for record in records[::2]:
            record["conversations"][0]["value"] = "<image>\nwhat is what is on the left ?"
        return records

    return conversations(tmp_path_factory.mktemp("data"), records=longer)


@pytest.fixture
def task(data):
    return VlmTask(data.processor)


def dense():
    torch.manual_seed(0)
    return example.make_model(width=32).eval()


def patched(config, model=None):
    model = dense() if model is None else model
    return model, madtp.patch(model, config)


KEEPS = {
    "projector": {"projector": UNIFORM},
    "vision": {"vision": madtp.Keep(0.5, rule="uniform")},
    "prefill": {"prefill": {1: UNIFORM}},
    "both": {"projector": UNIFORM, "prefill": {1: UNIFORM, 2: madtp.Keep(3, rule="uniform")}},
    "all": {"vision": 0.5, "projector": 0.5, "prefill": {2: 0.25}},
}


@pytest.mark.parametrize("keep", KEEPS.values(), ids=KEEPS)
def test_padding_changes_neither_logits_nor_features(data, task, keep):
    model, handle = patched(dataclasses.replace(FIXED, keep=keep))
    items = [data[i] for i in range(3)]
    with torch.no_grad():
        alone = []
        for item in items:
            batch = task.collate([item])
            logits, _ = task.logits(model(**batch), handle.as_left(batch))
            alone.append((logits, handle.summary_features))
        batch = task.collate(items)
        assert not batch["attention_mask"].all()
        logits, _ = task.logits(model(**batch), handle.as_left(batch))
        together = handle.summary_features
    torch.testing.assert_close(logits, torch.cat([part for part, _ in alone]), rtol=1e-4, atol=1e-5)
    for branch in ("vision", "text"):
        for layer, rows in enumerate(together[branch]):
            each = torch.cat([features[branch][layer] for _, features in alone])
            torch.testing.assert_close(rows, each, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keep", KEEPS.values(), ids=KEEPS)
def test_student_and_teacher_share_rows(data, task, keep):
    config = dataclasses.replace(FIXED, keep=keep)
    (student, ours), (teacher, theirs) = patched(config), patched(config)
    batch = task.collate([data[i] for i in range(3)])
    words = int((batch["attention_mask"].bool() & (batch["input_ids"] != data.image_id)).sum())
    answers = int((batch["labels"] != IGNORED).sum())
    plain = dense()(**batch)
    with theirs.dense():
        taught = teacher(**batch)
        logits, _ = task.logits(taught, batch)
        assert torch.equal(taught.logits, plain.logits) and torch.equal(taught.loss, plain.loss)
        features = theirs.summary_features
    said, _ = task.logits(student(**batch), ours.as_left(batch))
    assert said.shape == logits.shape == (answers, len(example.WORDS)) and not torch.equal(said, logits)
    layers = 3 if "prefill" not in keep or len(keep) > 1 else 2  # those behind the first pruning
    for branch, rows in (("text", words), ("vision", 3)):
        assert [tuple(x.shape) for x in features[branch]] == [(rows, 32)] * layers
        assert [x.shape for x in ours.summary_features[branch]] == [x.shape for x in features[branch]]
        assert not torch.equal(ours.summary_features[branch][-1], features[branch][-1])
    summary = sum(x.sum() for x in (*ours.summary_features["text"], *ours.summary_features["vision"]))
    summary.backward()
    assert student.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
    assert not any(x.requires_grad for x in ours.summary_features["text"]), "no graph is kept"


def test_a_prompt_without_images_has_no_features_and_all_its_labels(data, task):
    model, handle = patched(dataclasses.replace(FIXED, keep=KEEPS["both"]))
    model(**task.collate([data[0]]))
    assert handle.summary_features["text"]
    words = torch.tensor([[2, 7, 8, 14]])
    batch = {"input_ids": words, "labels": words}
    logits, _ = task.logits(model(**batch), handle.as_left(batch))
    assert handle.summary_features == {} and logits.shape[0] == 3
    with torch.no_grad():
        torch.testing.assert_close(logits, dense()(**batch).logits[0, :3])


def test_all_tokens_make_the_features_of_the_teacher(data, task):
    _, ours = patched(dataclasses.replace(FIXED, keep={"projector": 1.0, "prefill": {1: 1.0}}))
    batch = task.collate([data[0], data[1]])
    with torch.no_grad():
        ours.model(**batch)
        student = ours.summary_features
        with ours.dense():
            ours.model(**batch)
        hidden = dense()(**batch, output_hidden_states=True).hidden_states
    for branch, features in ours.summary_features.items():
        assert all(torch.equal(*pair) for pair in zip(student[branch], features, strict=True))
    is_text = batch["attention_mask"].bool() & (batch["input_ids"] != data.image_id)
    torch.testing.assert_close(student["text"][0], hidden[1][is_text])
    means = torch.stack(
        [rows[ids == data.image_id].mean(0) for rows, ids in zip(hidden[1], batch["input_ids"], strict=True)]
    )
    torch.testing.assert_close(student["vision"][0], means)


def test_checkpointing_leaves_the_same_features_and_gradients(data, task):
    batch, found = task.collate([data[0], data[1]]), []
    for on in (False, True):
        model, handle = patched(dataclasses.replace(FIXED, keep=KEEPS["all"]))
        model.train()
        if on:
            model.gradient_checkpointing_enable()
        model(**batch)
        loss = sum(x.square().sum() for features in handle.summary_features.values() for x in features)
        loss.backward()
        found.append((loss.detach(), model.model.multi_modal_projector.linear_1.weight.grad))
    torch.testing.assert_close(found[0], found[1])


def test_fixed_amounts_train_and_come_to_what_they_come_to(tmp_path, data, task):
    model = dense()
    before = copy.deepcopy(model.state_dict())
    result = madtp.compress(model, task, data, data, FIXED, output_dir=tmp_path, training=TRAINING)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert type(model).__name__ == "LlavaForConditionalGeneration" and not hasattr(model, "madtp_handle")
    losses = [entry["loss_task"] for entry in result.report["training"]]
    assert losses[-1] < 0.9 * losses[0]
    assert {"loss_kd", "loss_text", "loss_vision"} <= result.report["training"][0].keys()
    compressed, plan = result.report["compressed"], result.report["plan"]
    assert compressed["counted_gmacs"] <= 0.5 * compressed["dense_gmacs"] and plan["temperatures"] == {}
    assert compressed["executed_gmacs"] == pytest.approx(compressed["counted_gmacs"])
    assert compressed["metrics"].keys() == {"accuracy", "loss"} == result.report["dense"]["metrics"].keys()
    assert plan["packed_modules"] == sorted(plan["sparse_modules"]) and "lm_head" in plan["dense_modules"]
    assert compressed["tokens_per_layer"] == {"projector": [32.0], "prefill": [8.0]}
    assert result.report["dense"]["tokens_per_layer"] == {"projector": [64.0], "prefill": [64.0]}
    assert result.report["config"]["keep"] == FIXED.to_dict()["keep"]
    again = madtp.from_pretrained(result.path)
    assert again.madtp_handle.keep == result.model.madtp_handle.keep and again.madtp_handle.keep["projector"] == UNIFORM
    items = [data[0], data[1]]
    assert task.predictions(again, items) == task.predictions(result.model, items)
    assert (result.path / "processor_config.json").exists()


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_temperatures_are_steered_to_the_budget_and_a_resumed_run_ends_alike(tmp_path, data, task):
    training = {**TRAINING, "save_strategy": "steps", "save_steps": 3}
    whole = madtp.compress(dense(), task, data, None, STEERED, output_dir=tmp_path / "whole", training=training)
    assert whole.report["plan"]["temperatures"] == whole.model.madtp_handle.temperatures
    assert whole.report["plan"]["targets_gmacs"].keys() == {"vision", "prefill"}
    found = profile_batches(whole.model, sample_batches(task, data, 8)).total
    assert found.counted_macs == pytest.approx(0.4 * found.dense_macs, rel=0.03)
    with pytest.raises(KeyboardInterrupt):
        madtp.compress(
            dense(), task, data, None, STEERED, output_dir=tmp_path / "cut", training=training, callbacks=[Stop()]
        )
    assert last_checkpoint(tmp_path / "cut" / "checkpoints").name == "checkpoint-3"
    resumed = madtp.compress(
        dense(), task, data, None, STEERED, output_dir=tmp_path / "cut", training=training, resume=True
    )
    weights = whole.model.state_dict()
    assert resumed.model.madtp_handle.temperatures == whole.model.madtp_handle.temperatures
    assert all(torch.equal(value, weights[name]) for name, value in resumed.model.state_dict().items())
    other = dataclasses.replace(STEERED, keep={"vision": madtp.Keep(temperature=1.0)})
    with pytest.raises(ValueError, match="config must be that of the checkpoint .*, got another keep"):
        madtp.compress(dense(), task, data, None, other, output_dir=tmp_path / "cut", training=training, resume=True)
    shutil.rmtree(tmp_path / "cut")


def test_masks_and_int8_in_one_shot(tmp_path, data, task):
    config = dataclasses.replace(FIXED, weight_dtype="int8", hwp_score="second_order", keep={"vision": 0.5})
    result = madtp.compress(dense(), task, data, None, config, output_dir=tmp_path, training={"max_steps": 0})
    schemes = set(result.report["plan"]["quantized_modules"].values())
    assert schemes == {"int8_24"}
    layers = result.report["plan"]["sparse_modules"]
    assert "model.vision_tower.encoder.layers.2.mlp.fc1" not in layers, "that layer does not run"
    assert any("layers.2.mlp.up_proj" in name for name in layers)
    with torch.no_grad():
        loss = result.model(**task.collate([data[0]])).loss
    assert torch.isfinite(loss)


def test_budgets_are_split_by_the_seams_and_add_up(data, task):
    keep = {"vision": madtp.Keep(temperature=0.0), "projector": madtp.Keep(temperature=0.0, rule="text")}
    keep["prefill"] = {1: 0.5, 2: madtp.Keep(temperature=0.0, rule="fastv")}
    model, handle = patched(dataclasses.replace(FIXED, keep=keep))
    batches = sample_batches(task, data, 2)
    found = profile_batches(model, batches, branches=handle.spending)
    usual = profile_batches(model, batches)
    assert sum(part.counted_macs for part in found.branches.values()) == pytest.approx(usual.total.counted_macs)
    tower, projector = usual.branches["vision"].counted_macs, usual.branches["projector"].counted_macs
    assert (
        found.branches["vision"].counted_macs == pytest.approx(tower + projector)
        and found.branches["other"].counted_macs == 0
    )
    last = usual.modules["model.language_model.layers.2"].counted_macs + usual.modules["lm_head"].counted_macs
    assert found.branches["prefill"].counted_macs == pytest.approx(last)
    targets = branch_targets(found, 0.5, list(handle.temperatures))
    assert sum(targets.values()) == pytest.approx(0.5 * found.total.dense_macs)


REFUSED = {
    "an amount": ({"macs_reduction": 0.9}, "macs_reduction must be at most 0.*, which the amounts of keep"),
    "latency": ({"macs_reduction": None, "latency_reduction": 0.5}, "latency_reduction must be None for a decoder"),
    "selection": ({"selection": "random"}, "selection must be 'instance' .* for a decoder that reads images, got 'ran"),
    "score": ({"hwp_score": "token_weighted"}, "hwp_score must be another for a decoder .* got 'token_weighted'"),
    "seam": ({"keep": {"tower": 0.5}}, "keep must be a dict with some of the seams .* got tower"),
    "layer": ({"keep": {"prefill": {9: 0.5}}}, "keep of 'prefill' must be behind layers 1 to 2 of this model, got 9"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_decoder_has_not_is_refused_before_anything_is_trained(tmp_path, data, task, name):
    changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        madtp.compress(
            dense(), task, data, data, dataclasses.replace(FIXED, **changes), output_dir=tmp_path, training=TRAINING
        )
    assert not (tmp_path / "model").exists() and not (tmp_path / "checkpoints").exists()


def test_a_plan_and_towers_with_keep_are_refused(tmp_path, data, task, blip):
    plan = madtp.Plan(0.5, {"vision": 0.5}, ())
    with pytest.raises(ValueError, match=r"plan must be None \(keep of the config .* for a decoder .* got 'a plan'"):
        madtp.compress(dense(), task, data, None, FIXED, output_dir=tmp_path, plan=plan)
    with pytest.raises(
        ValueError, match="config must have no keep for a model whose towers prune, got some for a Blip"
    ):
        madtp.patch(blip, FIXED)
    with pytest.raises(ValueError, match="model must have towers that prune.*seam_pareto"):
        madtp.allocate(dense(), task, data, FIXED)


class QwenItems(Dataset):
    """Random images of two sizes and random words, as a processor would give them; the answer is the word asked."""

    def __len__(self):
        return 6

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        grid = torch.tensor([[1, 4, 4 + 4 * (i % 2)]])
        images = torch.full((int(grid.prod()) // 4,), IMAGE)
        word = torch.randint(20, 90, (1,), generator=generator)
        ids = torch.cat([torch.tensor([5]), images, torch.tensor([6]), word, torch.tensor([30]), word])
        labels = ids.clone()
        labels[:-1] = IGNORED
        pixels = torch.randn(int(grid.prod()), 3 * 2 * 4 * 4, generator=generator)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == IMAGE).long(),
            "labels": labels,
            "pixel_values": pixels,
            "image_grid_thw": grid,
            "answer": str(int(word)),
            "answer_begin": len(ids) - 1,
        }


class Numbers:
    """A processor whose words are their numbers."""

    pad_token_id, eos_token_id = 0, None

    @property
    def tokenizer(self):
        return self

    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(map(str, row)) for row in rows]

    def save_pretrained(self, directory):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Qwen2-VL", "Qwen2.5-VL"])
def test_qwen_is_compressed(tmp_path, name):
    model, data = make_vlm(name).float(), QwenItems()
    keep = {"vision": madtp.Keep(temperature=1.0), "projector": 0.75}
    config = dataclasses.replace(FIXED, macs_reduction=0.6, keep=keep, guard_tolerance=None)
    training = TRAINING | {"max_steps": 4}
    result = madtp.compress(model, VlmTask(Numbers()), data, data, config, output_dir=tmp_path, training=training)
    losses = [entry["loss"] for entry in result.report["training"]]
    assert losses[-1] < losses[0]
    compressed = result.report["compressed"]
    assert compressed["counted_gmacs"] == pytest.approx(0.4 * compressed["dense_gmacs"], rel=0.1)
    assert 0 <= compressed["metrics"]["accuracy"] <= 1
    again = madtp.from_pretrained(result.path)
    task, items = VlmTask(Numbers()), [data[0], data[1]]
    assert task.predictions(again, items) == task.predictions(result.model, items)


def test_a_decoder_trains_by_adapters_that_are_merged(tmp_path, data, task):
    pytest.importorskip("peft")
    exclude = ("*.layers.*.self_attn",)
    config = dataclasses.replace(FIXED, macs_reduction=0.4, sparse_exclude=exclude, lora_rank=4, guard_tolerance=None)
    training = {**TRAINING, "save_strategy": "steps", "save_steps": 3, "max_steps": 4}
    model = dense()
    whole = madtp.compress(model, task, data, None, config, output_dir=tmp_path / "whole", training=training)
    assert whole.report["training"][-1]["loss_task"] < whole.report["training"][0]["loss_task"]
    weights, before = whole.model.state_dict(), model.state_dict()
    assert not any("lora" in name or "base_layer" in name for name in weights)
    changed = {name for name in weights.keys() & before.keys() if not torch.equal(weights[name], before[name])}
    layer = "model.language_model.layers.0"
    assert f"{layer}.self_attn.q_proj.weight" in changed and f"{layer}.input_layernorm.weight" not in changed
    difference = weights[f"{layer}.self_attn.q_proj.weight"] - before[f"{layer}.self_attn.q_proj.weight"]
    assert torch.linalg.matrix_rank(difference, rtol=1e-4) == 4
    assert "model.language_model.embed_tokens.weight" not in changed and "lm_head.weight" not in changed
    assert f"{layer}.mlp.up_proj" in whole.report["plan"]["packed_modules"], "those that go 2:4 train as ever"
    assert "model.multi_modal_projector.linear_1.bias" in changed
    found = profile_batches(whole.model, sample_batches(task, data, 8)).total
    miss = found.counted_macs / (0.6 * found.dense_macs) - 1
    assert whole.report["plan"]["calibration_miss"] == pytest.approx(miss), "adapters are not counted"
    shutil.rmtree(tmp_path / "whole" / "checkpoints" / "checkpoint-4")
    resumed = madtp.compress(
        model, task, data, None, config, output_dir=tmp_path / "whole", training=training, resume=True
    )
    assert all(torch.equal(value, weights[name]) for name, value in resumed.model.state_dict().items())


def test_adapters_where_there_is_no_place_for_them_are_refused(tmp_path, data, task, blip):
    config = dataclasses.replace(FIXED, lora_rank=4)
    with pytest.raises(ValueError, match="lora_rank must be None where all Linears of the decoder go 2:4"):
        madtp.compress(dense(), task, data, None, config, output_dir=tmp_path, training=TRAINING)
    with pytest.raises(ValueError, match="lora_rank must be None for a BlipForQuestionAnswering, it is of decoders"):
        madtp.compress(blip, task, data, None, config, output_dir=tmp_path, training=TRAINING)
    with pytest.raises(ValueError, match="lora_rank must be an integer of at least 1 or None, got 0"):
        dataclasses.replace(FIXED, lora_rank=0)
