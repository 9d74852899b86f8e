# SPDX-License-Identifier: Apache-2.0
"""The ops run where nothing but torch is installed: no transformers, matplotlib, rich, triton, and the rest."""

import subprocess
import sys

BLOCKED = (
    *("transformers", "accelerate", "tokenizers", "safetensors", "huggingface_hub", "matplotlib", "PIL", "yaml"),
    *("rich", "typer", "click", "jinja2", "packaging", "triton", "madtp"),
)
PROGRAM = f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
import torch
import madtp_kernels as mk

q = torch.randn(9, 2, 16)
cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
out, stats = mk.varlen_attention(q, q, q, cu_seqlens, max_seqlen_q=5, return_stats=True)
pruned = mk.prune_tokens(torch.randn(9, 8), stats, torch.randn(9, 3), cu_seqlens, temperature=5.0)
assert pruned.x.shape[1] == 8 and out.shape == q.shape

weight = torch.randn(16, 32)
sparse = mk.sparse24_compress(weight * mk.nm_mask(weight, 2, 4))
x = torch.randn(3, 32)
assert torch.allclose(mk.sparse24_linear(x, sparse), x @ sparse.to_dense().T, atol=1e-5)
assert "2:4" in str(mk.explain_pattern("2:4"))
try:
    mk.save_sparse24("never.safetensors", {{"layer": sparse}})
except ImportError as error:
    assert "safetensors" in str(error) and "pip install" in str(error), error
else:
    raise AssertionError("save_sparse24 needs safetensors")
print("ran")
"""


def test_the_ops_run_with_torch_alone(tmp_path):
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout == "ran\n", done.stderr
