# SPDX-License-Identifier: Apache-2.0
"""The C++ library as others find it: static and shared, through CMake and pkg-config, from C++ and from C."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import madtp_kernels as mk

ROOT = Path(__file__).resolve().parents[2]
CONSUMER = ROOT / "csrc/tests/consumer"
EXAMPLE = ROOT / "examples/cpp"
NUMBERS = "ok, merged row (6, 7)"

needs_pkg_config = pytest.mark.skipif(
    shutil.which("pkg-config") is None or shutil.which("cc") is None, reason="cc and pkg-config are needed"
)


def run(*command: object, cwd: Path | None = None, **variables: str) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, env={**os.environ, **variables}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pkg_config(prefix: Path, *options: str) -> list[str]:
    directory = str(prefix / "lib/pkgconfig")
    return run("pkg-config", *options, "madtp-kernels", PKG_CONFIG_PATH=directory, PKG_CONFIG_LIBDIR=directory).split()


@needs_pkg_config
def test_the_library_of_the_python_package_is_found_from_c(tmp_path):
    prefix = Path(mk.__file__).parent
    program = tmp_path / "consumer"
    run("cc", "-std=c11", CONSUMER / "main.c", *pkg_config(prefix, "--cflags", "--libs"), "-o", program)
    assert NUMBERS in run(program)
    assert pkg_config(prefix, "--modversion") == [mk.__version__]
    with pytest.raises(AssertionError, match="requires|no package|version"):
        pkg_config(prefix, "--print-errors", "--atleast-version=99")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> Path:
    """Both kinds of library, installed and then moved; of one instruction set, and not optimised."""
    directory = tmp_path_factory.mktemp("library")
    options = [f"-DMADTP_HAS_{isa}=OFF" for isa in ("AVX2", "AVX2_VNNI", "AVX512", "NEON_DOTPROD")]
    options += ["-DMADTP_CUDA=OFF", "-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_CXX_FLAGS_RELEASE=-O0"]
    run("cmake", "-S", ROOT, "-B", directory / "build", "-G", "Ninja", "-DCMAKE_INSTALL_LIBDIR=lib", *options)
    run("cmake", "--build", directory / "build")
    run("cmake", "--install", directory / "build", "--prefix", directory / "first")
    shutil.rmtree(directory / "build")
    return (directory / "first").rename(directory / "moved")


def configure(prefix: Path, build: Path, *options: str, source: Path = CONSUMER) -> str:
    return run("cmake", "-S", source, "-B", build, "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={prefix}", *options)


def links_shared(program: Path) -> bool:
    return "libmadtp_kernels.so" in run("readelf", "-d", program)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "shared"),
    [
        ((), False),
        (("-DBUILD_SHARED_LIBS=ON",), True),
        (("-DMADTP_COMPONENTS=shared",), True),
        (("-DBUILD_SHARED_LIBS=ON", "-DMADTP_COMPONENTS=static"), False),
    ],
)
def test_cmake_links_the_kind_that_is_asked_for(prefix, options, shared, tmp_path):
    version = ".".join(mk.__version__.split(".")[:2])
    configure(prefix, tmp_path, f"-DMADTP_WANTED={version}", *options)
    run("cmake", "--build", tmp_path)
    for name in ("consumer", "consumer_c"):
        assert links_shared(tmp_path / name) == shared
        assert f"CUDA 0: {NUMBERS}" in run(tmp_path / name)


@pytest.mark.slow
def test_cmake_says_what_is_missing(prefix, tmp_path):
    cases = {
        "-DMADTP_COMPONENTS=cuda": "component cuda: this library has no CUDA kernels (built with MADTP_CUDA=OFF)",
        "-DMADTP_COMPONENTS=python": "there is no component python: there are cpu, cuda, static and shared",
        "-DMADTP_COMPONENTS=static;shared": "components static and shared: Madtp::kernels is one of them",
        "-DMADTP_WANTED=99": 'requested version "99"',
    }
    for i, (option, said) in enumerate(cases.items()):
        with pytest.raises(AssertionError) as error:
            configure(prefix, tmp_path / str(i), option)
        assert said in " ".join(str(error.value).split())  # CMake breaks lines


@pytest.mark.slow
def test_a_project_of_c_alone_links_the_shared_library(prefix, tmp_path):
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\nproject(alone LANGUAGES C)\n"
        "find_package(Madtp CONFIG REQUIRED COMPONENTS cpu shared)\n"
        f'add_executable(alone "{CONSUMER / "main.c"}")\ntarget_link_libraries(alone PRIVATE Madtp::kernels)\n'
    )
    configure(prefix, tmp_path / "build", source=tmp_path)
    run("cmake", "--build", tmp_path / "build")
    assert NUMBERS in run(tmp_path / "build/alone")


@pytest.mark.slow
@needs_pkg_config
@pytest.mark.parametrize(("compiler", "source"), [("cc", "main.c"), ("c++", "main.cpp")])
def test_pkg_config_links_either_kind(prefix, compiler, source, tmp_path):
    for options in (("--libs",), ("--static", "--libs")):
        flags = pkg_config(prefix, "--cflags", *options)
        shared = "--static" not in options
        if not shared:
            flags = ["-l:libmadtp_kernels.a" if flag == "-lmadtp_kernels" else flag for flag in flags]
        program = tmp_path / f"consumer{shared}"
        run(compiler, CONSUMER / source, *flags, "-o", program)
        assert links_shared(program) == shared
        assert NUMBERS in run(program, LD_LIBRARY_PATH=str(prefix / "lib"))


def declared(*headers: Path) -> set[str]:
    """The functions that public headers declare, by namespace."""
    found = set()
    for header in headers:
        text = re.sub(r"#if MADTP_HAS_CUDA.*?#endif", "", header.read_text(), flags=re.DOTALL)
        found |= set(re.findall(r"^MADTP_API [\w *]*?(madtp_\w+)\(", text, flags=re.MULTILINE))
        found |= {f"madtp::cpu::{name}" for name in re.findall(r"^Status (\w+)\(", text, flags=re.MULTILINE)}
    return found


@pytest.mark.slow
def test_the_shared_library_exports_the_public_functions_alone(prefix):
    library = prefix / "lib/libmadtp_kernels.so"
    version = ".".join(mk.__version__.split(".")[:2])
    assert f"[libmadtp_kernels.so.{version}]" in run("readelf", "-d", library)
    lines = run("nm", "-D", "--defined-only", "-C", library).splitlines()
    exported = {re.sub(r"\(.*|@.*", "", line.split(maxsplit=2)[2]) for line in lines if " A " not in line}
    assert exported == declared(*(prefix / "include/madtp").glob("*.h"))
    assert "madtp_cpu_sparse24_linear" in exported and "madtp::cpu::sparse24_linear" in exported


@pytest.mark.slow
def test_what_takes_in_the_static_library_does_not_export_it(prefix, tmp_path):
    flags = pkg_config(prefix, "--cflags", "--static", "--libs")
    flags = ["-l:libmadtp_kernels.a" if flag == "-lmadtp_kernels" else flag for flag in flags]
    run("c++", "-shared", "-fPIC", CONSUMER / "main.cpp", *flags, "-o", tmp_path / "plugin.so")
    lines = run("nm", "-D", "--defined-only", tmp_path / "plugin.so").splitlines()
    assert [line.split()[2] for line in lines if " T " in line] == ["main"]  # inline functions of headers are weak


@pytest.mark.slow
def test_the_example_builds_in_both_ways(prefix, tmp_path):
    configure(prefix, tmp_path, source=EXAMPLE)
    run("cmake", "--build", tmp_path)
    flags = pkg_config(prefix, "--cflags", "--libs")
    run("c++", "-std=c++17", "-O0", EXAMPLE / "blip_vision.cpp", *flags, "-o", tmp_path / "by_pkg_config")
    for name in ("blip_vision", "by_pkg_config"):
        done = subprocess.run(
            [tmp_path / name], capture_output=True, text=True, env={"LD_LIBRARY_PATH": f"{prefix}/lib"}
        )
        assert done.returncode == 1 and done.stderr.startswith("usage: ")
