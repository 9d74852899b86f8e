# SPDX-License-Identifier: Apache-2.0
"""Files of 2:4 and of int8 weights: what both keep, notice and refuse. What is of one kind is in the file of that."""

import json
import os
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sparse24_cases import dense24

from madtp_kernels import (
    load_quantized,
    load_sparse24,
    quantize,
    save_quantized,
    save_sparse24,
    sparse24_compress,
    weight_files,
)
from madtp_kernels.quantized import files as quantized
from madtp_kernels.sparse24 import files as sparse24


class Kind(NamedTuple):
    """A kind of file; weight: the class it is for; part: a tensor that is stored of the weight "a"; make: a weight of a
    2:4 tensor, other: one of another sort."""

    save: Any
    load: Any
    files: Any
    weight: str
    part: str
    make: Any
    other: Any

    @property
    def format(self):
        return f"madtp-{self.files.KIND}"

    def mixed(self):
        dense = torch.arange(6.0).view(2, 3)
        others = {"fc1.bias": dense[0], "tied": dense.T, "steps": torch.tensor(3), "none": torch.empty(0, 4)}
        return {"fc1": self.make(dense24(16, 32)), "fc2": self.other()} | others


KINDS = [
    Kind(
        *(save_sparse24, load_sparse24, sparse24, "Sparse24Weight", "a.values", sparse24_compress),
        other=lambda: sparse24_compress(dense24(16, 32).bfloat16()),
    ),
    Kind(
        *(save_quantized, load_quantized, quantized, "QuantizedWeight", "a.weight", quantize),
        other=lambda: quantize(torch.linspace(-1, 1, 35).view(5, 7), "int8"),
    ),
]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.files.KIND)
def kind(request):
    return request.param


@pytest.fixture
def saved(kind, tmp_path):
    kind.save(tmp_path / "w.safetensors", kind.mixed())
    return tmp_path / "w.safetensors"


def parts(weight):
    found = (getattr(weight, name, None) for name in ("values", "indices", "scale"))
    return [part for part in found if part is not None]


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        if isinstance(weight, torch.Tensor):
            assert found[name].dtype == weight.dtype and torch.equal(found[name], weight)
        else:
            assert type(found[name]) is type(weight) and found[name].dtype == weight.dtype
            assert len(parts(found[name])) == len(parts(weight))
            assert all(map(torch.equal, parts(found[name]), parts(weight)))
    return True


def test_round_trip(kind, saved):
    assert same(kind.load(saved), kind.mixed())
    assert [path.name for path in saved.parent.iterdir()] == ["w.safetensors"]


def test_every_flipped_bit_is_noticed(kind, saved):
    whole = saved.read_bytes()
    for at in range(0, len(whole), 13):
        changed = bytearray(whole)
        changed[at] ^= 1 << at % 8
        saved.write_bytes(changed)
        try:
            found = kind.load(saved)
        except ValueError as error:
            assert "path must be" in str(error)
        else:  # blanks around JSON
            assert same(found, kind.mixed())
            assert at < 8 + int.from_bytes(whole[:8], "little")


def test_truncated_and_foreign_files(kind, saved, tmp_path):
    whole = saved.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"path must be a whole {kind.format} file, got .*w.safetensors"):
            kind.load(saved)
    message = f"path must be a file of format {kind.format}, version 1, got .*w.safetensors of format "
    save_file({"a": torch.ones(1)}, saved)
    with pytest.raises(ValueError, match=message + "None"):
        kind.load(saved)
    (other,) = (other for other in KINDS if other is not kind)
    other.save(saved, other.mixed())
    with pytest.raises(ValueError, match=message + f"{other.format}, version 1"):
        kind.load(saved)
    with pytest.raises(FileNotFoundError):
        kind.load(tmp_path / "absent")


def test_another_version(kind, saved, monkeypatch):
    with safe_open(saved, framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    with monkeypatch.context() as patch:
        patch.setattr(kind.files, "VERSION", "2")
        with pytest.raises(ValueError, match=f"version 2, got .* of format {kind.format}, version 1"):
            kind.load(saved)
    save_file(tensors, saved, metadata | {"version": "2"})
    with pytest.raises(ValueError, match=f"version 1, got .*w.safetensors of format {kind.format}, version 2"):
        kind.load(saved)


def test_views_are_stored_as_what_they_hold(kind, tmp_path):
    views = {"neg": torch._neg_view(torch.ones(2)), "t": torch.arange(6.0).view(2, 3).t(), "e": torch.ones(1).expand(5)}
    views["one"] = torch.ones(1, 2)[:, ::2]  # contiguous, with a stride of 2
    kind.save(tmp_path / "w", views)
    assert same(kind.load(tmp_path / "w"), views)


def test_a_failed_write_leaves_what_was_there(kind, saved, monkeypatch):
    before = saved.read_bytes()

    def interrupted(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kind.save(saved, kind.mixed())
    assert saved.read_bytes() == before and [path.name for path in saved.parent.iterdir()] == ["w.safetensors"]


def test_a_folder_that_is_not_there(kind, tmp_path):
    with pytest.raises(OSError, match="absent/w cannot be written"):
        kind.save(tmp_path / "absent" / "w", kind.mixed())


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (lambda kind: {"a": 3}, r"weights\['a'\] must be a {0.weight} or a tensor, got int 3"),
        (
            lambda kind: {"a": kind.make(dense24(8, 16)), kind.part: torch.ones(1)},
            "weights must be of names that differ once stored, got {0.part} twice",
        ),
        (lambda kind: [torch.ones(1)], "weights must be a mapping of names to weights, got list"),
        (lambda kind: {1: torch.ones(1)}, "weights must be named by strings, got int 1"),
        (
            lambda kind: {"a": torch.eye(3).to_sparse()},
            r"weights\['a'\] must be strided and not on meta, got float32 \(3, 3\)",
        ),
        (
            lambda kind: {"a": torch.ones(2, device="meta")},
            r"weights\['a'\] must be strided and not on meta, got float32 \(2,\)",
        ),
    ],
)
def test_save_refuses_and_leaves_what_was_there(kind, saved, weights, message):
    before = saved.read_bytes()
    with pytest.raises(ValueError, match=message.format(kind)):
        kind.save(saved, weights(kind))
    assert saved.read_bytes() == before and [path.name for path in saved.parent.iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize(
    "parts",
    [
        [3],
        ["a", "a"],
        ["none"],
        [["a"]],
        {"a": []},
        {"a": {}},
        {"a": "int8", "b": 3},
        7,
        None,
        "a",
        [None],
        {"none": "int8"},
    ],
)
def test_odd_parts_with_a_right_checksum(kind, saved, parts):
    with safe_open(saved, framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    text = json.dumps(parts)
    save_file(tensors, saved, metadata | {kind.files.KIND: text, "sha256": weight_files._checksum(text, tensors)})
    with pytest.raises(ValueError, match=r"w\.safetensors"):
        kind.load(saved)


@pytest.mark.parametrize("text", ["[" * 10**5, "1" * 5000, '"\\ud800"', ""])
def test_parts_that_are_no_json(kind, saved, text):
    with safe_open(saved, framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    save_file(tensors, saved, metadata | {kind.files.KIND: text, "sha256": weight_files._checksum(text, tensors)})
    with pytest.raises(ValueError, match="path must be a whole madtp"):
        kind.load(saved)


def test_what_is_no_regular_file(kind, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(ValueError, match="must be a regular file"):
            kind.load(path)
