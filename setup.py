# SPDX-License-Identifier: Apache-2.0
"""Drives CMake. Everything is decided in CMakeLists.txt; the environment passes through:

MADTP_CUDA=AUTO|ON|OFF, MADTP_CUDA_ARCHS, MADTP_EMBED_TRITON, MADTP_TRITON_HEAD_SIZES, MADTP_BUILD_TESTS,
MADTP_WERROR, CMAKE_ARGS, CMAKE_BUILD_PARALLEL_LEVEL, and
MADTP_BUILD_DIR for the build tree, which is kept so that installing again compiles only what changed.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
PASSED_THROUGH = (
    "MADTP_CUDA",
    "MADTP_CUDA_ARCHS",
    "MADTP_EMBED_TRITON",
    "MADTP_TRITON_HEAD_SIZES",
    "MADTP_BUILD_TESTS",
    "MADTP_WERROR",
)


def tool(name: str) -> str:
    """The tool that pip installed beside this interpreter, whether or not that is on PATH, else the first on PATH."""
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if found is None:
        raise SystemExit(f"{name} is needed to build madtp-kernels: pip install {name}")
    return found


class CMakeBuild(build_ext):
    def run(self) -> None:
        import pybind11

        cmake, ninja = tool("cmake"), tool("ninja")
        package = Path(self.get_ext_fullpath("madtp_kernels._C")).resolve().parent
        build = Path(os.environ.get("MADTP_BUILD_DIR") or ROOT / "build" / f"cmake-{sys.implementation.cache_tag}")
        configure = [
            *(cmake, "-S", ROOT, "-B", build, "-G", "Ninja"),
            "-UMADTP_*",  # what an earlier build was asked for must not stick
            f"-DCMAKE_MAKE_PROGRAM={ninja}",  # the cached one is gone with its isolated build environment
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DCMAKE_INSTALL_LIBDIR=lib",
            "-DMADTP_BUILD_PYTHON=ON",
            "-DBUILD_SHARED_LIBS=OFF",  # a wheel has no links, which a shared library has for its names
            "-DMADTP_EMBED_TRITON=OFF",  # Python compiles these kernels when it runs them
            *(f"-D{name}={os.environ[name]}" for name in PASSED_THROUGH if os.environ.get(name)),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", build], check=True)
        for component in ([], ["--component", "python"]):
            subprocess.run([cmake, "--install", build, "--prefix", package, *component], check=True)


setup(
    package_dir={"madtp_kernels": "madtp_kernels", "madtp": "python/madtp"},
    packages=find_packages(include=["madtp_kernels", "madtp_kernels.*"]) + find_packages("python"),
    package_data={
        "madtp_kernels": ["tables/*.json", "*.pyi", "py.typed"],
        "madtp": ["assets/**/*", "reporting/*.j2", "py.typed"],
    },
    ext_modules=[Extension("madtp_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
