# SPDX-License-Identifier: Apache-2.0
"""A task of a model that reads no text: no tokenizer is loaded, saved or asked for."""

import json

import families
import pytest
import torch
import transformers as hf
from PIL import Image
from torch.utils.data import default_collate

from madtp.data.annotations import Annotations, is_text
from madtp.patching.handle import patch
from madtp.reporting.visualize import picture
from madtp.tasks.processors import Processed
from madtp.tasks.registry import TASKS, TaskEntry, _image_size, load, load_judged

KIND = "ViTForImageClassification"


class Labels(Annotations):
    fields = {"image": is_text, "label": lambda value: isinstance(value, int)}

    def __getitem__(self, index):
        record = self.records[index]
        return {"pixel_values": self._image(record["image"]), "labels": torch.tensor(record["label"])}


class Classification(Processed):
    metric = "accuracy"

    def collate(self, items):
        return default_collate(items)

    def predictions(self, model, items):
        batch = self.collate(items)
        said = model(**batch).logits.argmax(-1)
        return [(str(a), str(b)) for a, b in zip(said.tolist(), batch["labels"].tolist(), strict=True)]


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A folder with a dense model, a compressed one, images and their labels; the task is in `TASKS`."""
    entry = TaskEntry(
        models=(hf.ViTForImageClassification,),
        make=lambda tokenizer, images, data: Classification(tokenizer, images),
        data={},
        annotations=Labels,
        reads_text=False,
    )
    monkeypatch.setitem(TASKS, "classification", entry)
    model = families.CASES[KIND].build()
    model.save_pretrained(tmp_path / "dense")
    patch(model, families.CONFIG).set_temperature(1.0)
    model.save_pretrained(tmp_path / "compressed")
    side = model.config.image_size
    for name in ("dense", "compressed"):
        hf.BlipImageProcessor(size={"height": side, "width": side}).save_pretrained(tmp_path / name)
    Image.effect_noise((side, side), 60).convert("RGB").save(tmp_path / "noise.png")
    (tmp_path / "test.json").write_text(json.dumps([{"image": "noise.png", "label": label} for label in (0, 1)]))
    return tmp_path


def test_from_the_folder_to_the_picture(folder):
    file = folder / "test.json"
    loaded = load("classification", folder / "dense", str(file), test=file, images=folder)
    assert loaded.task.tokenizer is None and len(loaded.train) == 2
    assert _image_size(loaded.model, None) == loaded.model.config.image_size
    loaded.task.save_processor(folder / "saved")
    assert [path.name for path in (folder / "saved").iterdir()] == ["preprocessor_config.json"]
    judged = load_judged(folder / "compressed", "classification", str(file), images=folder)
    assert picture(judged.model, judged.task, judged.data, folder / "tokens.png", rows=2).is_file()
