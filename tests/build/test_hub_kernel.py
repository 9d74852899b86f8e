# SPDX-License-Identifier: Apache-2.0
"""The ops as a kernel of the Hugging Face Hub: imported as its loader does, beside the package itself, and by it."""

import ast
import importlib.util
import json
import os
import pkgutil
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import madtp_kernels as mk

pytest.importorskip("tomllib", reason="the layout needs Python 3.11")

from hub import layout

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "kernel"
    layout.lay_out(folder)
    return folder


@pytest.fixture(scope="module")
def kernel(folder):
    """The kernel, by the three lines in which the loader imports one."""
    variant = folder / "build/torch-cpu"
    identifier = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(identifier, variant / "__init__.py")
    module = sys.modules[identifier] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in [name for name in sys.modules if name.split(".")[0] == identifier]:
        del sys.modules[name]


def test_files_import_their_own_package_by_relative_names_alone(folder):
    for part in ("torch-ext/madtp_kernels", "build/torch-cpu", "build/torch-cuda"):
        assert (folder / part / "triton/attention/forward.py").is_file()
        for path in (folder / part).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    assert not [alias.name for alias in node.names if alias.name.startswith("madtp_kernels")], path
                if isinstance(node, ast.ImportFrom):
                    assert node.level or not str(node.module).startswith("madtp_kernels"), path
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    assert not re.fullmatch(r"madtp_kernels\.\w+|madtp::\w+", node.value), path
    assert not (folder / "torch-ext/madtp_kernels/_ops.py").exists()  # kernel-builder writes it
    assert not list(folder.rglob("*.so"))


def test_it_runs_beside_the_package_with_ops_of_its_own(kernel):
    assert kernel.__all__ == mk.__all__
    assert kernel.varlen_attention is not mk.varlen_attention
    q, k, v = torch.randn(3, 24, 2, 16)
    cu_seqlens = torch.tensor([0, 9, 24], dtype=torch.int32)
    x, alignment = torch.randn(24, 32), torch.randn(24, 5)
    results = []
    for ops in (kernel, mk):
        leaf = q.clone().requires_grad_()
        attention = {"max_seqlen_q": 15, "return_stats": True, "backend": "reference"}
        out, stats = ops.varlen_attention(leaf, k, v, cu_seqlens, **attention)
        out.sum().backward()
        pruned = ops.prune_tokens(x, stats, alignment, cu_seqlens, temperature=1.0, backend="reference")
        weight = ops.quantize(torch.eye(32), "int8")
        results.append((out, leaf.grad, pruned.x, ops.quantized_linear(pruned.x, weight, backend="reference")))
    for theirs, ours in zip(*results, strict=True):
        assert torch.equal(theirs, ours)
    namespace = getattr(torch.ops, kernel.__name__)
    assert namespace.varlen_attention is not torch.ops.madtp.varlen_attention


def test_every_module_of_it_can_be_imported(kernel):
    pytest.importorskip("triton")
    modules = [module.name for module in pkgutil.walk_packages(kernel.__path__, f"{kernel.__name__}.")]
    for module in modules:
        importlib.import_module(module)
    assert f"{kernel.__name__}.triton.attention.forward" in modules
    assert f"{kernel.__name__}.triton.aot" not in modules


def test_it_takes_no_compiled_kernels_and_says_so(kernel):
    x = torch.randn(8, 32)
    with pytest.raises(RuntimeError, match=r"cannot be loaded \(No module named '_madtp_kernels_cpu_\w+\._C'\)"):
        kernel.sparse24_prune(x, backend="cpu")


def test_what_has_no_relative_form_is_an_error():
    with pytest.raises(ValueError, match=r"ops/x.py:1: import madtp_kernels has no relative form"):
        layout.rewritten("import madtp_kernels.ops\n", Path("ops/x.py"))
    with pytest.raises(ValueError, match="ops/x.py: ops is the name of something else"):
        layout.rewritten("ops = 1\nf(ops)\ntorch.ops.madtp.f()\n", Path("ops/x.py"))
    source = '"""Of madtp_kernels."""\nfrom madtp_kernels import a\nfrom madtp_kernels.b.c import d\nf("madtp::d")\n'
    assert layout.rewritten(source, Path("ops/x.py")) == (
        '"""Of madtp_kernels."""\nfrom .._ops import add_op_namespace_prefix\nfrom .. import a\n'
        'from ..b.c import d\nf(add_op_namespace_prefix("d"))\n'
    )


PROGRAM = """
import sys
from pathlib import Path
import kernels, torch
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata

folder = Path(sys.argv[1])
backends = [str(backend).lower() for backend in Build.open(folder).general.backends]
assert backends == ["cpu", "cuda"], backends
for backend in backends:
    variant = folder / "build" / f"torch-{backend}"
    found = Digest.hash_variant(DigestAlgorithm.SHA256, variant)
    Metadata.read_from_file(variant / "metadata.json").digest.validate(found)
ops = kernels.get_local_kernel(folder, backend="cpu")
q, k, v = torch.randn(3, 12, 2, 16)
ends = torch.tensor([0, 5, 12], dtype=torch.int32)
triton, reference = (
    ops.varlen_attention(q, k, v, ends, max_seqlen_q=7, backend=name)[0] for name in ("triton", "reference")
)
torch.testing.assert_close(triton, reference)
x, weight = torch.randn(5, 32), ops.sparse24_prune(torch.randn(16, 32))
compiled = torch.compile(lambda x: ops.sparse24_linear(x, weight), backend="eager", fullgraph=True)
assert torch.equal(compiled(x), ops.sparse24_linear(x, weight))
assert "madtp_kernels" not in sys.modules
print(ops.__name__)
"""


@pytest.mark.slow
def test_the_loader_of_hugging_face_takes_it_and_triton_runs(folder):
    try:
        metadata.version("kernels")
    except metadata.PackageNotFoundError:
        pytest.skip("pip install kernels")
    variables = {**os.environ, "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    command = (sys.executable, "-c", PROGRAM, str(folder))
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("_madtp_kernels_cpu_")
