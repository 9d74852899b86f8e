# SPDX-License-Identifier: Apache-2.0
"""What leaves the repository works elsewhere: sdist, wheel, and the C++ package inside the wheel."""

import fcntl
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def run(*command, cwd, **variables) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, env={**os.environ, **variables}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def no_nvcc(tmp_path_factory) -> str:
    """A PATH with the tools of a build and no nvcc."""
    directory = tmp_path_factory.mktemp("bin")
    for name in ("cc", "c++", "gcc", "g++", "ld", "ar", "as", "ranlib", "nm", "cmake", "ctest", "ninja", "sh", "env"):
        if (found := shutil.which(name)) is not None:
            (directory / name).symlink_to(found)
    assert shutil.which("nvcc", path=str(directory)) is None
    return str(directory)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The unpacked sdist, outside git."""
    directory = tmp_path_factory.mktemp("sdist")
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    with open(ROOT / "setup.py") as file:  # setuptools collects the files in ROOT: one process at a time
        fcntl.flock(file, fcntl.LOCK_EX)
        run(sys.executable, "-c", build, directory, cwd=ROOT)
    (archive,) = directory.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(directory, filter="data")
    return directory / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(source, no_nvcc, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", directory, source)
    run(*pip, cwd=directory, PATH=no_nvcc, MADTP_CUDA="OFF", MADTP_BUILD_DIR=str(directory / "build"))
    (path,) = directory.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", directory, wheel, cwd=directory)
    return directory


def test_sdist_holds_the_sources_and_no_build_products(source):
    for name in (
        "CMakeLists.txt",
        "cmake/Isa.cmake",
        "csrc/cpu/isa.cpp",
        "csrc/tests/consumer/main.cpp",
        "LICENSE",
        "requirements.lock",
    ):
        assert (source / name).is_file(), name
    assert not list(source.rglob("*.so")) and not (source / "madtp_kernels" / "lib").exists()


def test_wheel_holds_both_packages_the_library_and_the_assets(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("madtp_kernels/_C.") and name.endswith(".so") for name in names)
    for name in (
        "madtp_kernels/_C.pyi",
        "madtp_kernels/include/madtp/tokens.h",
        "madtp_kernels/include/madtp/c_api.h",
        "madtp_kernels/include/madtp/version.h",
        "madtp_kernels/lib/libmadtp_kernels.a",
        "madtp_kernels/lib/cmake/Madtp/MadtpConfig.cmake",
        "madtp_kernels/lib/pkgconfig/madtp-kernels.pc",
    ):
        assert name in names, name
    tracked = {path.relative_to(ROOT / "python") for path in (ROOT / "python/madtp").rglob("*") if path.is_file()}
    assert {str(path) for path in tracked if "__pycache__" not in path.parts} <= set(names)
    assert not any(name.startswith(("tests/", "csrc/", "benchmarks/")) for name in names)


def test_installed_wheel_runs_and_says_it_has_no_cuda(site):
    program = "import madtp_kernels; from madtp_kernels import _C; print(_C.__file__, _C.build_info())"
    printed = run(sys.executable, "-c", program, cwd=site.parent, PYTHONPATH=str(site))
    assert printed.startswith(str(site)) and "'cuda': None" in printed and "MADTP_CUDA=OFF" in printed


def test_consumer_project_builds_against_the_wheel(site, no_nvcc, tmp_path):
    env = (sys.executable, "-m", "madtp_kernels.env", "--cmake-dir")
    cmake_dir = run(*env, cwd=site.parent, PYTHONPATH=str(site)).strip()
    assert Path(cmake_dir).is_relative_to(site)
    consumer = ROOT / "csrc/tests/consumer"
    run("cmake", "-S", consumer, "-B", tmp_path, "-G", "Ninja", f"-DMadtp_DIR={cmake_dir}", cwd=tmp_path, PATH=no_nvcc)
    run("cmake", "--build", tmp_path, cwd=tmp_path, PATH=no_nvcc)
    for name in ("consumer", "consumer_c"):
        assert "CUDA 0: ok, merged row (6, 7)" in run(tmp_path / name, cwd=tmp_path)


def test_cuda_on_without_nvcc_is_an_error_and_auto_falls_back(no_nvcc, tmp_path):
    configure = ("cmake", "-S", ROOT, "-G", "Ninja", "-B")
    said = run(*configure, tmp_path / "auto", cwd=tmp_path, PATH=no_nvcc)
    assert "CPU kernels only, no working nvcc was found" in said
    with pytest.raises(AssertionError, match="MADTP_CUDA=ON, but no working nvcc was found"):
        run(*configure, tmp_path / "on", "-DMADTP_CUDA=ON", cwd=tmp_path, PATH=no_nvcc)
    with pytest.raises(AssertionError, match="MADTP_CUDA must be AUTO, ON or OFF, got 'yes'"):
        run(*configure, tmp_path / "bad", "-DMADTP_CUDA=yes", cwd=tmp_path, PATH=no_nvcc)
