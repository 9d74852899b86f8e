# SPDX-License-Identifier: Apache-2.0
"""save_pretrained over an old model, killed at random moments or by two at once: one whole copy loads."""

import contextlib
import os
import random
import signal
import threading
import time

import pytest
import torch
from test_auto_classes import compressed, outputs
from tqdm import tqdm

import madtp

NAME = "ViTModel"


@pytest.fixture(scope="module")
def models():
    both = compressed(NAME), compressed(NAME, packed=False)
    for model in both:
        model.expected = outputs(NAME, model)
    return both


def whose(folder, models):
    """Which of the models a folder holds."""
    found = outputs(NAME, madtp.from_pretrained(folder))
    (which,) = (i for i, model in enumerate(models) if all(map(torch.equal, found, model.expected)))
    return which


def save_without_end(models, folder):
    """In a process of its own; options take turns, so that files come and go."""
    child = os.fork()
    if child:
        return child
    with contextlib.suppress(BaseException):
        tqdm.set_lock(threading.RLock())  # that of multiprocessing is shared with who was forked, and would stay locked
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        for i in range(10**9):
            models[i % 2].save_pretrained(folder, **({"max_shard_size": "20KB"} if i % 3 == 0 else {}))
    os._exit(1)


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)], ids=["few kills", "many kills"])
@pytest.mark.parametrize("subfolder", [False, True], ids=["exchanged", "in place"])
def test_a_whole_copy_loads_whenever_a_save_was_killed(subfolder, kills, models, tmp_path):
    folder = tmp_path / "model"
    models[0].save_pretrained(folder)
    (folder / "README.md").write_text("mine")
    if subfolder:
        (folder / "runs").mkdir()
    draw = random.Random(0)
    for _ in range(kills // 2 if kills < 10 else kills):
        child = save_without_end(models, folder)
        time.sleep(draw.uniform(0, 0.2))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        whose(folder, models)
        assert (folder / "README.md").read_text() == "mine" and (folder / "runs").exists() == subfolder
    models[1].save_pretrained(folder)
    assert whose(folder, models) == 1
    assert os.listdir(tmp_path) == ["model"] and not [name for name in os.listdir(folder) if name.startswith(".")]


def test_two_save_at_once(models, tmp_path):
    failed = []

    def save(model):
        try:
            for i in range(4):
                model.save_pretrained(tmp_path / "model", **({"max_shard_size": "20KB"} if i % 2 else {}))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=save, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    whose(tmp_path / "model", models)
    assert os.listdir(tmp_path) == ["model"]
