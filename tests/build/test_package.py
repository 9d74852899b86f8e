# SPDX-License-Identifier: Apache-2.0
"""What leaves the repository works elsewhere: sdist, the wheel of `make wheel`, and the C++ package inside it.

`make wheel` sets up its own environment, from a package index.
"""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
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
def wheel(source, tmp_path_factory) -> Path:
    """Built from the sdist, and repaired."""
    directory = tmp_path_factory.mktemp("wheel")
    run("make", "wheel", f"PYTHON={sys.executable}", f"DIST={directory}", cwd=source, MADTP_CUDA="OFF")
    (path,) = directory.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The interpreter of a new environment with the wheel, and beside it the torch and transformers of this one."""
    directory = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", directory, cwd=directory)
    (site,) = directory.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(
        sysconfig.get_path("purelib")
    )  # a .pth in there, of an editable install, is not read
    run(directory / "bin/pip", "install", "--no-deps", wheel, cwd=directory)
    return directory / "bin/python"


def test_sdist_holds_the_sources_and_no_build_products(source):
    for name in (
        "CMakeLists.txt",
        "cmake/Isa.cmake",
        "csrc/cpu/isa.cpp",
        "csrc/tests/consumer/main.cpp",
        "LICENSE",
        "requirements.lock",
        "requirements-wheel.txt",
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
        "madtp/assets/easy-vqa-blip/model.safetensors",
        "madtp/assets/mosaics-llava/model.safetensors",
        "madtp/assets/mosaics/icons.png",
        "madtp/assets/mosaics/characters.png",
    ):
        assert name in names, name
    tracked = {path.relative_to(ROOT / "python") for path in (ROOT / "python/madtp").rglob("*") if path.is_file()}
    assert {str(path) for path in tracked if "__pycache__" not in path.parts} <= set(names)
    assert not any(name.startswith(("tests/", "csrc/", "benchmarks/")) for name in names)


def test_wheel_is_for_any_linux_of_its_glibc_and_brings_no_library_of_others(wheel):
    assert re.fullmatch(r"madtp_kernels-[\d.]+-cp3\d+-cp3\d+-manylinux_2_\d+_\w+\.whl", wheel.name)
    assert wheel.stat().st_size < 40e6
    names = zipfile.ZipFile(wheel).namelist()
    assert [name.split(".")[0] for name in names if ".so" in name] == ["madtp_kernels/_C"]


def test_the_environment_that_builds_has_no_torch(wheel, source):
    (builder,) = source.glob("build/wheel-env-*/bin/python")
    program = "import importlib.util; print([importlib.util.find_spec(name) for name in ('torch', 'numpy')])"
    assert run(builder, "-c", program, cwd=source.parent) == "[None, None]\n"


def test_installed_wheel_runs_on_the_widest_instructions_and_one_openmp_runtime(python, tmp_path):
    found = json.loads(run(python, ROOT / "tests/build/try_wheel.py", cwd=tmp_path))
    assert Path(found["package"]).is_relative_to(python.parents[1])
    assert found["cuda"] is None
    assert (found["isa"] != "baseline") == bool(found["cpu_has"])
    assert found["isa"].startswith("avx512") == ("avx512f" in found["cpu_has"])
    assert len(found["openmp"]) == 1 and "/torch" in found["openmp"][0]
    for isa in found["isas"]:
        program = "import torch; from madtp_kernels import _C; print(_C.cpu.isa())"
        assert run(python, "-c", program, cwd=tmp_path, MADTP_CPU_ISA=isa) == f"{isa}\n"
    assert "MADTP_CUDA=OFF" in run(python.parent / "madtp", "env", cwd=tmp_path)


def test_consumer_project_builds_against_the_wheel(python, no_nvcc, tmp_path):
    cmake_dir = run(python, "-m", "madtp_kernels.env", "--cmake-dir", cwd=tmp_path).strip()
    assert Path(cmake_dir).is_relative_to(python.parents[1])
    consumer = ROOT / "csrc/tests/consumer"
    run("cmake", "-S", consumer, "-B", tmp_path, "-G", "Ninja", f"-DMadtp_DIR={cmake_dir}", cwd=tmp_path, PATH=no_nvcc)
    run("cmake", "--build", tmp_path, cwd=tmp_path, PATH=no_nvcc)
    for name in ("consumer", "consumer_c"):
        assert "CUDA 0: ok, merged row (6, 7)" in run(tmp_path / name, cwd=tmp_path)


@pytest.mark.skipif(shutil.which("pkg-config") is None, reason="pkg-config is needed")
def test_pkg_config_finds_the_library_in_the_wheel(python, tmp_path):
    prefix = Path(run(python, "-m", "madtp_kernels.env", "--cmake-dir", cwd=tmp_path).strip()).parents[2]
    ask = ("pkg-config", "--cflags", "--libs", "madtp-kernels")
    flags = run(*ask, cwd=tmp_path, PKG_CONFIG_PATH=str(prefix / "lib/pkgconfig")).split()
    run("c++", "-std=c++17", ROOT / "csrc/tests/consumer/main.cpp", *flags, "-o", "consumer", cwd=tmp_path)
    assert "ok, merged row (6, 7)" in run(tmp_path / "consumer", cwd=tmp_path)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="cibuildwheel needs Python 3.11")
def test_cibuildwheel_reads_which_wheels_there_are(wheel, source):
    (command,) = source.glob("build/wheel-env-*/bin/cibuildwheel")
    ask = (command, "--print-build-identifiers", "--platform", "linux")
    expected = [f"cp{v}-manylinux_{a}" for a in ("x86_64", "aarch64") for v in ("310", "311", "312", "313")]
    assert sorted(run(*ask, cwd=source).split()) == sorted(expected)


def test_cuda_on_without_nvcc_is_an_error_and_auto_falls_back(no_nvcc, tmp_path):
    configure = ("cmake", "-S", ROOT, "-G", "Ninja", "-B")
    said = run(*configure, tmp_path / "auto", cwd=tmp_path, PATH=no_nvcc)
    assert "CPU kernels only, no working nvcc was found" in said
    with pytest.raises(AssertionError, match="MADTP_CUDA=ON, but no working nvcc was found"):
        run(*configure, tmp_path / "on", "-DMADTP_CUDA=ON", cwd=tmp_path, PATH=no_nvcc)
    with pytest.raises(AssertionError, match="MADTP_CUDA must be AUTO, ON or OFF, got 'yes'"):
        run(*configure, tmp_path / "bad", "-DMADTP_CUDA=yes", cwd=tmp_path, PATH=no_nvcc)
