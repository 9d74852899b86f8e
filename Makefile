# SPDX-License-Identifier: Apache-2.0
# Each target prepares what it needs, given make, Python (3.11 or newer, as the pins of requirements.txt ask for) and a C++17 compiler;
# nvcc is used when it is there. The package itself installs on Python 3.10 too.
#   make demo                       creates .venv from requirements.txt, builds the kernels into it, runs the demo
#   make test PYTHON=python3.12     the same with another interpreter; VENV= says where the environment goes
#   make test PYTHON=/usr/bin/python3 VENV=     no environment: that interpreter as it is, with the torch and the rest it has;
#                                   nothing is downloaded or installed, the kernels are built into the source tree
PYTHON ?= python3
VENV ?= .venv

ifeq ($(strip $(VENV)),)
READY :=
BIN := $(dir $(shell command -v $(PYTHON)))
PY := $(PYTHON)
INSTALL := $(PY) setup.py -q build_ext --inplace
MADTP := $(PY) -c "from madtp.cli import main; main()"
export PYTHONPATH := $(CURDIR):$(CURDIR)/python:$(PYTHONPATH)
else
READY := $(VENV)/.ready
BIN := $(abspath $(VENV))/bin
PY := $(BIN)/python
INSTALL := $(PY) -m pip install --no-build-isolation --no-deps -e .
MADTP := madtp
$(READY): requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -r requirements.txt
	touch $@
endif
WORKERS ?= 2 # processes of make test, where pytest-xdist is there; each runs on one thread unless a test says otherwise
THREADS := $(or $(THREADS),$(OMP_NUM_THREADS),$(shell getconf _NPROCESSORS_ONLN))
BUILD := $(CURDIR)/build/make
export PATH := $(BIN):$(PATH)
export MADTP_BUILD_DIR := $(BUILD)
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover
ASAN := $(CURDIR)/build/asan
ASAN_TESTS = $(shell grep -l mark.sanitized $(CURDIR)/tests/kernels/test_*.py)
CLANG ?= clang++
CXX_SOURCES = $(shell find csrc examples/cpp -name '*.c' -o -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')

PARALLEL = $(shell $(PY) -c 'import xdist' 2>/dev/null && printf '%s' '-n $(strip $(WORKERS)) --dist worksteal')

.DEFAULT_GOAL := test
.PHONY: demo docs api-check test test-asan test-tsan test-emulated test-emulated-arm test-slow soak coverage-cuda test-package wheel hub-kernel bench bench-peers gpu gpu-first lint types format build clean

demo: build
	$(MADTP) demo

test: export MADTP_BUILD_TESTS := ON
test: build
	ctest --test-dir $(BUILD) --output-on-failure -j $(strip $(WORKERS)) -LE gpu
	OMP_NUM_THREADS=1 $(PY) -m pytest tests -m "not slow and not gpu" $(PARALLEL)

# The C++ tests, then the Python tests marked `sanitized`, on an extension that is built apart from the one in the source tree.
# torch is not instrumented, so the runtimes are loaded ahead of it, and what it never frees is no news.
test-asan: $(READY)
	cmake -S . -B $(ASAN) -G Ninja -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS="-O1 $(SANITIZE)" -DMADTP_CUDA=OFF -DMADTP_BUILD_TESTS=ON \
	  -DMADTP_BUILD_PYTHON=ON -DPython_EXECUTABLE=$$($(PY) -c 'import sys; print(sys.executable)') -Dpybind11_DIR=$$($(PY) -m pybind11 --cmakedir)
	cmake --build $(ASAN)
	ctest --test-dir $(ASAN) --output-on-failure
	rm -rf $(ASAN)/python && mkdir $(ASAN)/python && cp -r madtp_kernels python/madtp $(ASAN)/python
	rm -f $(ASAN)/python/madtp_kernels/_C.*.so
	cmake --install $(ASAN) --prefix $(ASAN)/python/madtp_kernels --component python
	cd $(ASAN)/python && PYTHONPATH=$(ASAN)/python OMP_NUM_THREADS=2 ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$(foreach runtime,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(runtime).so))" \
	  $(PY) -m pytest -q -p no:cacheprovider $(ASAN_TESTS) -m "sanitized and not slow and not gpu"

# clang and its OpenMP runtime, which tells the sanitizer how a team synchronises; gcc's does not, and races are seen that
# there are not. CLANG= names another version. Threads are those of every instruction set; two of these are built, as clang 16
# crashes on the widest.
test-tsan: $(READY)
	cmake -S . -B build/tsan -G Ninja -DCMAKE_CXX_COMPILER=$(CLANG) -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS="-O1 -fsanitize=thread" \
	  -DMADTP_HAS_AVX512=OFF -DMADTP_CUDA=OFF -DMADTP_BUILD_TESTS=ON
	cmake --build build/tsan --target cpu_tests
	TSAN_OPTIONS="ignore_noninstrumented_modules=1 halt_on_error=1" ctest --test-dir build/tsan --output-on-failure -R '^[a-z0-9_]*_test\.'

# The tests of AVX-512, and of AVX-VNNI, on an emulated CPU that has it; with VNNI or bfloat16 only those of the ops that use it.
# What the emulated CPU lacks is skipped.
test-emulated: $(READY)
	cmake -S . -B build/emulated -G Ninja -DCMAKE_EXE_LINKER_FLAGS=-static -DCMAKE_DISABLE_FIND_PACKAGE_OpenMP=ON -DMADTP_CUDA=OFF \
	  -DMADTP_BUILD_TESTS=ON -DMADTP_TEST_LAUNCHER=$(CURDIR)/csrc/tests/emulated/run.sh
	cmake --build build/emulated --target cpu_tests
	ctest --test-dir build/emulated --output-on-failure -j $(strip $(WORKERS)) -R '_test\.avx512$$|quantized_.*_vnni|(attention|sparse24)_.*\.avx512_bf16'

# Those of the portable kernels, and of NEON with dot products, for aarch64 on qemu.
test-emulated-arm: $(READY)
	cmake -S . -B build/arm -G Ninja -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
	  -DCMAKE_EXE_LINKER_FLAGS=-static -DCMAKE_DISABLE_FIND_PACKAGE_OpenMP=ON -DMADTP_CUDA=OFF -DMADTP_BUILD_TESTS=ON \
	  -DMADTP_TEST_LAUNCHER=$$(command -v qemu-aarch64-static)
	cmake --build build/arm --target cpu_tests
	ctest --test-dir build/arm --output-on-failure -j $(strip $(WORKERS)) -R '_test\.baseline$$|quantized_.*_dotprod|isolated'

coverage-cuda: $(READY)
	cmake -S . -B build/coverage -G Ninja -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS="-O1 --coverage" -DMADTP_CUDA=OFF -DMADTP_BUILD_TESTS=ON
	find build/coverage -name '*.gcda' -delete
	cmake --build build/coverage --target simt_tests
	ctest --test-dir build/coverage --output-on-failure -R '^simt'
	$(PY) csrc/tests/simt/coverage.py build/coverage

test-slow: build
	$(PY) -m pytest tests -m "slow and not gpu"

# Ops and patched models from several threads for MINUTES: memory stays flat, results keep their bits.
soak: build
	$(PY) tests/soak.py --minutes $(or $(MINUTES),30)

test-package: build
	$(PY) -m pytest tests/build -m slow

# The wheel of PYTHON in DIST, and the sources it was built from, by an environment without torch; with CUDA kernels as
# MADTP_CUDA says. Its tag is the oldest glibc it runs on. libgomp stays out: the one of torch serves both (docs/install.md).
DIST ?= dist
WHEEL_ENV := build/wheel-env-$(notdir $(PYTHON))
WHEEL_PY := $(CURDIR)/$(WHEEL_ENV)/bin/python
$(WHEEL_ENV)/.ready: requirements-wheel.txt
	$(PYTHON) -m venv $(WHEEL_ENV)
	$(WHEEL_PY) -m pip install -q -r requirements-wheel.txt
	touch $@
wheel: export PATH := $(CURDIR)/$(WHEEL_ENV)/bin:$(PATH)
wheel: $(WHEEL_ENV)/.ready
	rm -rf build/wheel
	env -u MADTP_BUILD_DIR $(WHEEL_PY) -m build --no-isolation --outdir build/wheel .
	$(WHEEL_PY) -m auditwheel repair --exclude libgomp.so.1 --wheel-dir $(DIST) build/wheel/*.whl
	cp build/wheel/*.tar.gz $(DIST)

# The ops as a kernel of the Hugging Face Hub, in build/hub: docs/hub-kernel.md.
hub-kernel:
	$(PYTHON) -m hub.layout build/hub

bench: build
	$(PY) -m benchmarks.run

# Our CPU kernels beside what users run instead, all with the same threads. `pip install -e .[peers]` brings the peers; what is
# not there is skipped, and the run says so. LAYERS=4 takes that many blocks of each tower: a sixth of the time.
bench-peers: export OMP_NUM_THREADS := $(THREADS)
bench-peers: build
	$(PY) -m benchmarks.run quantized_linear towers --threads $(THREADS) $(if $(LAYERS),--set layers=$(LAYERS))

# What a failed stage leaves open, the next may answer: all run, and the target fails at the end.
gpu: export MADTP_BUILD_TESTS := ON
gpu: export MADTP_EMBED_TRITON := AUTO
gpu: build
	failed=0; \
	ctest --test-dir $(BUILD) --output-on-failure -L gpu || failed=1; \
	$(PY) -m pytest tests -m gpu || failed=1; \
	$(PY) -m benchmarks.run || failed=1; \
	exit $$failed

# The first minutes on a GPU: every step in a process of its own, results in OUT as they come. STEPS=linear,attention runs a
# part. It builds into build/gpu-first what it needs, so the source tree and other builds stay as they are.
gpu-first: $(READY)
	$(PY) -m benchmarks.gpu_first $(or $(OUT),build/gpu-first/results) $(if $(STEPS),--steps $(STEPS))

# The site of docs/ in build/site, which needs no network and no server; a warning is an error. With VENV= the interpreter as
# it is, with what requirements-docs.txt names.
ifeq ($(strip $(VENV)),)
DOCS_READY :=
DOCS_PY := $(PY)
else
DOCS_READY := build/docs-env/.ready
DOCS_PY := $(CURDIR)/build/docs-env/bin/python
$(DOCS_READY): requirements-docs.txt
	$(PYTHON) -m venv build/docs-env
	$(DOCS_PY) -m pip install -q -r requirements-docs.txt
	touch $@
endif
docs: $(DOCS_READY)
	$(DOCS_PY) -m website.tree build/docs
	rm -rf build/site
	$(DOCS_PY) -m sphinx -W --keep-going -q -b html -c website -d build/docs-doctrees build/docs build/site

# Whether public names and signatures break with those of an earlier commit, AGAINST= it.
AGAINST ?= $(or $(shell git describe --tags --abbrev=0 2>/dev/null),HEAD^)
api-check: $(DOCS_READY)
	$(DOCS_PY) -m website.api_check $(AGAINST)

lint: $(READY)
	ruff check .
	ruff format --check .
	clang-format --dry-run -Werror $(CXX_SOURCES)

types: $(READY)
	mypy

format: $(READY)
	ruff check --fix .
	ruff format .
	clang-format -i $(CXX_SOURCES)

build: $(READY)
	$(INSTALL)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .benchmarks madtp_kernels/include madtp_kernels/lib madtp_kernels/_C.*.so
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
