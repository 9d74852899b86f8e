# SPDX-License-Identifier: Apache-2.0
import hashlib

import pytest

from madtp.files import CHUNK, atomic_write, file_sha256, require_writable


def test_a_file_is_whole(tmp_path):
    atomic_write(tmp_path / "a.json", "τ")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == "τ"


@pytest.mark.parametrize("size", [0, CHUNK, CHUNK + 1])
def test_a_checksum_is_of_all_chunks(tmp_path, size):
    data = bytes(range(256)) * (size // 256) + bytes(size % 256)
    (tmp_path / "weights").write_bytes(data)
    assert file_sha256(tmp_path / "weights") == hashlib.sha256(data).hexdigest()


def test_a_directory_that_cannot_be_written_to(tmp_path):
    assert require_writable("output", tmp_path / "a" / "b").is_dir()
    assert not list((tmp_path / "a" / "b").iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"output must be a directory to write to, got .*file.*\(Not a directory\)"):
        require_writable("output", tmp_path / "file" / "run")
