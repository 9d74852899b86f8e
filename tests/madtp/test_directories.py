# SPDX-License-Identifier: Apache-2.0
"""Directories that take each other's place: killed at every step, written by two at once, with files of the user."""

import json
import os
import shutil
import signal
import stat
import threading

import pytest

from madtp.files import atomic_directory, atomic_write, directories
from madtp.files.directories import LEAVING, WHOLE, whole_copy
from madtp_kernels import atomic_file
from madtp_kernels.atomic_file import is_scratch

FILES = ("config.json", "weights", "more")


def write(path, text, stays=lambda new, old: ["README.md", "kept"]):
    with atomic_directory(path, stays) as folder:
        for name in FILES if text != "b" else FILES[:2]:
            (folder / name).write_text(text)


def read(path):
    """What the files that belong together hold: the same, and all of them or none."""
    whole = whole_copy(path)
    texts = {name: (whole / name).read_text() for name in FILES if (whole / name).exists()}
    (text,) = {*texts.values()}
    assert len(texts) == (2 if text == "b" else 3)
    return text


def touch(path):
    """As a user does, who may have found a directory that is replaced and removed before the kernel makes the file."""
    for _ in range(3):
        try:
            return path.touch()
        except FileNotFoundError:
            pass
    path.touch()


def leftovers(parent):
    return [name for name in os.listdir(parent) if name.startswith(".")]


@pytest.fixture(params=["exchanged", "in place"])
def target(request, tmp_path):
    """A directory with files of its own, and of the user, which holds a folder where names cannot be exchanged."""
    path = tmp_path / "model"
    write(path, "a")
    (path / "README.md").write_text("mine")
    if request.param == "in place":
        (path / "kept").mkdir()
        (path / "kept" / "file").write_text("mine")
    return path


def of_user(path):
    return (path / "README.md").read_text() == "mine" and (
        not (path / "kept").exists() or (path / "kept" / "file").read_text() == "mine"
    )


def test_one_takes_the_place_of_the_other(target, tmp_path):
    inode, mode = target.stat().st_ino, 0o750
    target.chmod(mode)
    write(target, "b")
    assert read(target) == "b" and of_user(target) and not (target / "more").exists()
    assert (target.stat().st_ino == inode) == (target / "kept").exists()
    assert stat.S_IMODE(target.stat().st_mode) == mode
    assert os.listdir(tmp_path) == ["model"] and not leftovers(target)


def test_one_inside_of_another(target, tmp_path):
    with atomic_directory(target, lambda new, old: ["README.md", "kept"]) as outer:
        write(outer, "c")
        (outer / "processor").write_text("c")
        write(outer, "b", lambda new, old: ["processor"])
        assert read(outer) == "b" and read(target) == "a"
        assert sorted(os.listdir(outer)) == ["config.json", "processor", "weights"]
        with pytest.raises(KeyboardInterrupt), atomic_directory(outer) as inner:
            (inner / "weights").write_text("d")
            raise KeyboardInterrupt
    assert (
        read(target) == "b"
        and (target / "processor").exists()
        and of_user(target)
        and not leftovers(target)
        and os.listdir(tmp_path) == ["model"]
    )


def test_a_child_that_was_forked_in_the_midst_holds_no_lock(target, monkeypatch):
    monkeypatch.setattr(directories, "MAX_WAIT", 1.0)
    with atomic_directory(target, lambda new, old: ["README.md", "kept"]) as folder:
        child = os.fork()
        if not child:
            signal.pause()
            os._exit(0)
        for name in FILES[:2]:
            (folder / name).write_text("b")
    try:
        write(target, "c")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert read(target) == "c" and of_user(target)


def test_an_interrupt_while_the_old_files_go_locks_nobody_out(target, monkeypatch):
    monkeypatch.setattr(directories, "MAX_WAIT", 1.0)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shutil, "rmtree", interrupted)
        write(target, "b")
    assert read(target) == "b"
    write(target, "c")
    assert read(target) == "c" and of_user(target) and not leftovers(target)


def test_the_working_directory_may_be_gone(target, tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    write(target, "b")
    assert read(target) == "b" and of_user(target)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a directory to another user")
def test_an_owner_stays(target):
    os.chown(target, 1234, 1235)
    write(target, "b")
    assert read(target) == "b" and of_user(target)
    assert (target.stat().st_uid, target.stat().st_gid) == (1234, 1235)


def test_what_fails_leaves_what_was_there(target, tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_directory(target) as folder:
        (folder / "weights").write_text("b")
        raise KeyboardInterrupt
    assert read(target) == "a" and of_user(target) and os.listdir(tmp_path) == ["model"]


STEPS = [(os, "rename"), (os, "replace"), (os, "link"), (os, "mkdir"), (shutil, "rmtree"), (os, "fsync")]
STEPS += [(directories, "_remove"), (os, "unlink"), (directories.ctypes, "CDLL")]


def killed_at(step, path, text):
    """Whether a process that writes came to an end before it died at a step of those in STEPS, before or after it."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    left = [step]

    def dying(function):
        def step(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os._exit(9)
            return function(*args, **kwargs)

        return step

    for module, name in STEPS:
        setattr(module, name, dying(getattr(module, name)))
    try:
        write(path, text)
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)], ids=["some steps", "every step"])
def test_a_writer_that_is_killed_at_any_step(target, stride, tmp_path):
    """Either copy is there, whole, and so are the files of the user; the next writer leaves nothing of it."""
    step, seen, done = 1 - stride, set(), False
    while not done:
        step += stride
        assert step < 200
        before = read(target)
        new = "b" if before == "a" else "a"
        done = killed_at(step, target, new)
        seen.add(read(target) == new)
        assert of_user(target)
        if step // stride % 3 == 0:  # else the next is killed over what this one left
            write(target, new)
            assert read(target) == new and of_user(target)
            assert os.listdir(tmp_path) == ["model"] and not leftovers(target)
    assert seen == {True, False} and step > 10


def test_a_new_directory_is_there_or_not(tmp_path):
    step, done = -1, False
    while not done:
        step += 2
        done = killed_at(step, tmp_path / "model", "a")
        if (tmp_path / "model").exists():
            assert read(tmp_path / "model") == "a"
            shutil.rmtree(tmp_path / "model")
    write(tmp_path / "model", "a")
    assert os.listdir(tmp_path) == ["model"]


def test_two_writers(target, tmp_path):
    """The last one wins, and nobody fails."""
    failed = []

    def writer(text):
        try:
            for _ in range(15):
                write(target, text)
                touch(target / f"{text}.log")
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=writer, args=(text,)) for text in "ab"]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if target.stat().st_ino:
            threads[0].join(0.01)
    assert not failed
    assert read(target) in "ab" and of_user(target) and os.listdir(tmp_path) == ["model"] and not leftovers(target)


def test_another_writer_that_hangs_is_not_waited_for_without_end(target, monkeypatch):
    monkeypatch.setattr(directories, "MAX_WAIT", 0.05)
    held = os.open(target, os.O_RDONLY)
    assert atomic_file.try_lock(held)
    with pytest.raises(
        TimeoutError, match="model cannot be written: another process has been writing to it for 0.05 s"
    ):
        write(target, "b")
    os.close(held)
    assert read(target) == "a"


def test_a_live_scratch_folder_stays(tmp_path):
    with atomic_file.scratch_folder(tmp_path, "a") as folder:
        atomic_write(tmp_path / "a", "text")
        assert folder.is_dir()
    dead = tmp_path / ".a.00000000.partial"
    dead.mkdir()
    (tmp_path / ".b.00000000.partial").mkdir()  # of another file
    atomic_write(tmp_path / "a", "text")
    assert sorted(os.listdir(tmp_path)) == [".b.00000000.partial", "a"] and is_scratch(dead.name, "a")


def test_without_locks_nobody_is_held_to_be_dead(target, tmp_path, monkeypatch):
    def none(*args):
        raise OSError("no locks")

    monkeypatch.setattr("fcntl.flock", none)
    (tmp_path / ".model.00000000.partial").mkdir()
    write(target, "b")
    assert read(target) == "b" and leftovers(tmp_path) == [".model.00000000.partial"]


@pytest.mark.parametrize("why", ["working directory", "no renameat2", "no links", "link"])
def test_where_names_cannot_be_exchanged(why, tmp_path, monkeypatch):
    path = tmp_path / "model"
    write(path, "a")
    (path / "README.md").write_text("mine")
    inode = path.stat().st_ino
    if why == "working directory":
        monkeypatch.chdir(path)
    if why == "no renameat2":
        monkeypatch.setattr("ctypes.CDLL", lambda *args, **kwargs: object())
    if why == "no links":

        def fails(*args, **kwargs):
            raise PermissionError

        monkeypatch.setattr("os.link", fails)
    if why == "link":
        (tmp_path / "elsewhere").mkdir()
        path.rename(tmp_path / "elsewhere" / "model")
        path.symlink_to(tmp_path / "elsewhere" / "model")
    write(path, "b")
    assert read(path) == "b" and of_user(path) and not leftovers(path)
    assert (path.stat().st_ino == inode) == (why != "link")
    if why == "link":
        assert path.is_symlink() and os.listdir(tmp_path / "elsewhere") == ["model"]


def test_what_others_write_in_the_meantime_stays(tmp_path):
    path = tmp_path / "model"
    write(path, "a")

    def stays(new, old):
        (old / "late").write_text("theirs")
        return []

    write(path, "b", stays)
    assert (path / "late").read_text() == "theirs" and read(path) == "b"


def test_a_list_of_old_files_names_nothing_outside(tmp_path):
    """A directory that came from elsewhere could hold one."""
    (tmp_path / "mine").write_text("mine")
    path = tmp_path / "model"
    (path / WHOLE).mkdir(parents=True)
    (path / WHOLE / "config.json").write_text("a")
    (path / WHOLE / LEAVING).write_text(json.dumps(["../mine", str(tmp_path / "mine"), "..", ".", "", 3, None]))
    write(path, "b")
    assert (tmp_path / "mine").exists() and read(path) == "b" and not leftovers(path)


def test_files_are_on_the_disk_before_they_take_a_place(target, monkeypatch):
    done = []

    def fsync(descriptor):
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))

    monkeypatch.setattr(os, "fsync", fsync)
    write(target, "b")
    assert {"config.json", "weights"} <= {*done[:2]} and done[-1] in (target.name, target.parent.name)
    done.clear()
    atomic_write(target / "plan.yaml", "text")
    assert done == ["plan.yaml", target.name]
