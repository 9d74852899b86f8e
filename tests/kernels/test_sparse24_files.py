# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

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


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        if isinstance(weight, Sparse24Weight):
            assert found[name].dtype == weight.dtype
            assert torch.equal(found[name].values, weight.values)
            assert torch.equal(found[name].indices, weight.indices)
        else:
            assert found[name].dtype == weight.dtype and torch.equal(found[name], weight)
    return True


def test_round_trip(saved):
    assert same(load_sparse24(saved), mixed())
    assert [path.name for path in saved.parent.iterdir()] == ["w.safetensors"]
    with safe_open(saved, framework="pt") as file:
        assert json.loads(file.metadata()["sparse24"]) == ["fc1.weight", "fc2.weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_size_on_disk(tmp_path, dtype):
    save_sparse24(tmp_path / "w", {"weight": compressed(768, 768, dtype)})
    assert (tmp_path / "w").stat().st_size <= 0.57 * 768 * 768 * dtype.itemsize


def test_every_flipped_bit_is_noticed(saved):
    whole = saved.read_bytes()
    for at in range(0, len(whole), 13):
        changed = bytearray(whole)
        changed[at] ^= 1 << at % 8
        saved.write_bytes(changed)
        try:
            found = load_sparse24(saved)
        except ValueError as error:
            assert "path must be" in str(error)
        else:  # blanks around JSON
            assert same(found, mixed())
            assert at < 8 + int.from_bytes(whole[:8], "little")


def test_truncated_and_foreign_files(saved, tmp_path):
    whole = saved.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="path must be a whole madtp-sparse24 file, got .*w.safetensors"):
            load_sparse24(saved)
    save_file({"a": torch.ones(1)}, saved)
    with pytest.raises(ValueError, match="path must be a file of format madtp-sparse24, version 1, got .* format None"):
        load_sparse24(saved)
    with pytest.raises(FileNotFoundError):
        load_sparse24(tmp_path / "absent")


def test_another_version(saved, monkeypatch):
    monkeypatch.setattr(files, "VERSION", "2")
    with pytest.raises(ValueError, match="version 2, got .* of format madtp-sparse24, version 1"):
        load_sparse24(saved)


def test_a_file_of_a_newer_version_is_refused_by_name_and_version(saved):
    with safe_open(saved, framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    save_file(tensors, saved, metadata | {"version": "2"})
    with pytest.raises(ValueError, match="version 1, got .*w.safetensors of format madtp-sparse24, version 2"):
        load_sparse24(saved)


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


def test_a_failed_write_leaves_what_was_there(saved, monkeypatch):
    before = saved.read_bytes()

    def interrupted(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_sparse24(saved, {"a": compressed()})
    assert saved.read_bytes() == before and [path.name for path in saved.parent.iterdir()] == ["w.safetensors"]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(OSError, match="absent/w cannot be written"):
        save_sparse24(tmp_path / "absent" / "w", {"a": compressed()})


@pytest.mark.parametrize(
    "weights, message",
    [
        ({"a": 3}, r"weights\['a'\] must be a Sparse24Weight or a tensor, got int 3"),
        ({"a": compressed(), "a.values": torch.ones(1)}, "weights must be of names that differ once stored, got a"),
    ],
)
def test_save_refuses(tmp_path, weights, message):
    with pytest.raises(ValueError, match=message):
        save_sparse24(tmp_path / "w", weights)
    assert not list(tmp_path.iterdir())
