# SPDX-License-Identifier: Apache-2.0
"""The Trainer of transformers, its checkpoints and its evaluation, with patched classifiers."""

import pytest
import torch
import transformers as hf
from families import BERT, CONFIG, IMAGE, pixels, randomised

import madtp

BUILD = {
    "ViT": lambda: hf.ViTForImageClassification(hf.ViTConfig(**IMAGE, num_labels=2)),
    "BERT": lambda: hf.BertForSequenceClassification(hf.BertConfig(**BERT, num_labels=2)),
    "DINOv2": lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**IMAGE, num_labels=2)),
    "BERT, tokens": lambda: hf.BertForTokenClassification(hf.BertConfig(**BERT, num_labels=2)),
}


def samples(name):
    labels = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])
    if not name.startswith("BERT"):
        return [{"pixel_values": image, "labels": label} for image, label in zip(pixels(8), labels, strict=True)]
    ids = torch.randint(4, 37, (8, 9), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(9) < torch.tensor([9, 6, 3, 9, 5, 9, 2, 7])[:, None]).long()
    labels = labels[:, None].expand(8, 9).masked_fill(mask == 0, -100) if "tokens" in name else labels
    columns = {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": mask, "labels": labels}
    return [{key: value[i] for key, value in columns.items()} for i in range(8)]


def patched(name, temperature):
    torch.manual_seed(0)
    model = randomised(BUILD[name]())
    madtp.patch(model, CONFIG).set_temperature(temperature)
    return model


def trainer(name, model, folder, **options):
    arguments = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "save_steps": 1} | options
    arguments |= {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "use_cpu": True}
    arguments |= {"report_to": [], "disable_tqdm": True, "logging_steps": 1, "seed": 0}
    data = samples(name)
    return hf.Trainer(model, hf.TrainingArguments(folder, **arguments), train_dataset=data, eval_dataset=data)


def trains_evaluates_and_resumes(name, temperature, folder):
    model = patched(name, temperature)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    run = trainer(name, model, folder)
    result = run.train()
    assert result.global_step == 2 and torch.isfinite(torch.tensor(result.training_loss))
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.madtp_handle.temperatures == dict.fromkeys(model.madtp_handle.pruning, temperature)
    evaluated, predicted = run.evaluate(), run.predict(samples(name))
    assert predicted.metrics["test_loss"] == pytest.approx(evaluated["eval_loss"])
    assert predicted.predictions.shape[0] == 8 and predicted.predictions.shape[-1] == 2

    best = run.state.best_model_checkpoint  # which is the model now
    loaded = madtp.from_pretrained(best)
    assert loaded.madtp_handle.temperatures == model.madtp_handle.temperatures
    weights = loaded.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())

    again = patched(name, temperature)
    resumed = trainer(name, again, folder, max_steps=3)
    assert resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-2").global_step == 3
    assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry] == [1, 2, 3]
    assert again.madtp_handle.temperatures == model.madtp_handle.temperatures


def test_trainer_runs_a_patched_classifier(tmp_path):
    trains_evaluates_and_resumes("BERT", 2.0, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 2.0])
@pytest.mark.parametrize("name", BUILD)
def test_trainer_runs_every_patched_classifier(name, temperature, tmp_path):
    trains_evaluates_and_resumes(name, temperature, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILD)
def test_at_temperature_0_the_trainer_trains_as_unpatched(name, tmp_path):
    torch.manual_seed(0)
    plain = randomised(BUILD[name]())
    plainly = {
        "optim": "sgd",
        "learning_rate": 0.1,
    }  # Adam steps as far for rounding
    expected = trainer(name, plain, tmp_path / "plain", **plainly).train()
    model = patched(name, 0.0)
    result = trainer(name, model, tmp_path / "patched", **plainly).train()
    assert result.training_loss == pytest.approx(expected.training_loss, rel=1e-4)
    weights = model.state_dict()
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(weights[key], value, rtol=1e-3, atol=1e-4)
