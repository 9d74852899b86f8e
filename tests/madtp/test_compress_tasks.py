# SPDX-License-Identifier: Apache-2.0
"""compress() on the tasks that are not VQA: each trains, reaches its target and reports its own metric."""

import pytest
import torch
from families import CASES, clip_text, pixels, randomised, text
from torch.utils.data import Dataset

import madtp
from madtp.tasks.nlvr import NlvrTask
from madtp.tasks.retrieval import RetrievalTask

CONFIG = madtp.CompressionConfig(macs_reduction=0.5, alignment_tokens=8, alignment_dim=32, controller_interval=2)
TRAINING = {"max_steps": 6, "per_device_train_batch_size": 8, "disable_tqdm": True, "save_strategy": "no"}


class Items(Dataset):
    """24 items: the four texts of the family tests, random images, what a task wants besides."""

    def __init__(self, words, images, **extra):
        self.words, self.images, self.extra = words, images, extra

    def __len__(self):
        return 24

    def __getitem__(self, i):
        item = {name: value[i % 4] for name, value in self.words.items()} | {"pixel_values": self.images[i]}
        return item | {name: value(i) for name, value in self.extra.items()}


class Nothing:
    """A tokenizer of which only the saving is used."""

    def save_pretrained(self, directory):
        pass


@pytest.mark.parametrize("task", [RetrievalTask(Nothing()), NlvrTask(Nothing())], ids=lambda task: type(task).__name__)
def test_a_task_is_compressed(tmp_path, task):
    if isinstance(task, RetrievalTask):
        data = Items(clip_text(), pixels(24), concept=int, image=int)
        model = randomised(CASES["CLIPModel"].build())
    else:
        data = Items(text(), pixels(24, 2), labels=lambda i: torch.tensor(i % 2))
        model = randomised(CASES["BlipForNLVR"].build())
    result = madtp.compress(model, task, data, data, CONFIG, output_dir=tmp_path, training=TRAINING)
    dense, compressed = result.report["dense"], result.report["compressed"]
    assert result.report["metric"] == task.metric and task.metric in compressed["metrics"]
    assert 0 <= compressed["metrics"][task.metric] <= 1
    assert compressed["counted_gmacs"] == pytest.approx(0.5 * dense["dense_gmacs"], rel=0.05)
    assert result.report["plan"]["packed_modules"]
