# SPDX-License-Identifier: Apache-2.0
"""Set before anything imports triton: without a GPU its kernels run in the interpreter."""

import gc
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["MADTP_TUNE"] = "off"  # no test measures, or reads what this machine has measured


def pytest_collection_modifyitems(items):
    """What takes long comes first, so that no worker is left with it when the others have nothing to do."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_finish():
    """The millions of objects of torch and transformers are no garbage: looking at them again and again took a fifth of
    all time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()  # what libraries look for when they end


@pytest.fixture(autouse=True, scope="session")
def _without_waiting_for_the_disk():
    """No test ends with the power of the machine, and the hundreds that save models would wait for every file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True)
def _seeded():
    """A test draws the same numbers whatever ran before it."""
    torch.manual_seed(0)
