# SPDX-License-Identifier: Apache-2.0
"""2:4 weights on disk: names, sizes, files of 0.1, indices. The rest is in test_weight_files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from madtp_kernels import Sparse24Weight, load_sparse24, nm_mask, save_sparse24, sparse24_compress
from madtp_kernels.sparse24 import files as files

FIXTURES = Path(__file__).parents[1] / "fixtures" / "v0.1"


def compressed(rows=16, columns=32, dtype=torch.float32):
    torch.manual_seed(0)
    weight = torch.randn(rows, columns).to(dtype)
    return sparse24_compress(weight.masked_fill(~nm_mask(weight, 2, 4), 0))


def mixed():
    dense = torch.arange(6.0).view(2, 3)
    return {
        "fc1.weight": compressed(),
        "fc2.weight": compressed(dtype=torch.bfloat16),
        "fc1.bias": dense[0],
        "tied": dense.T,
        "steps": torch.tensor(3),
        "none": torch.empty(0, 4),
    }


@pytest.fixture
def saved(tmp_path):
    save_sparse24(tmp_path / "w.safetensors", mixed())
    return tmp_path / "w.safetensors"


def test_names(saved):
    assert load_sparse24(saved).keys() == mixed().keys()
    with safe_open(saved, framework="pt") as file:
        assert json.loads(file.metadata()["sparse24"]) == ["fc1.weight", "fc2.weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_size_on_disk(tmp_path, dtype):
    save_sparse24(tmp_path / "w", {"weight": compressed(768, 768, dtype)})
    assert (tmp_path / "w").stat().st_size <= 0.57 * 768 * 768 * dtype.itemsize


def test_files_of_0_1_load_bit_by_bit():
    expected = load_file(FIXTURES / "weights_dense.safetensors")["dense"]
    found = load_sparse24(FIXTURES / "weights.safetensors")["layer"].to_dense()
    assert found.dtype == expected.dtype and torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def test_indices_that_do_not_ascend(saved, monkeypatch):
    weight = compressed()
    weight.indices[1, 0] = 0
    before = saved.read_bytes()
    with pytest.raises(ValueError, match=r"weights\['a'\].indices must be two ascending columns"):
        save_sparse24(saved, {"a": weight})
    assert saved.read_bytes() == before
    with monkeypatch.context() as patch:
        patch.setattr(Sparse24Weight, "check_indices", lambda *_: None)
        save_sparse24(saved, {"a": weight})
    with pytest.raises(ValueError, match="indices of 'a' must be two ascending .*, got 0, 0 at row 1, group 0"):
        load_sparse24(saved)
