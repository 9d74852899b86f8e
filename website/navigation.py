# SPDX-License-Identifier: Apache-2.0
"""The order of the pages: caption -> files of the repository. The first page of the site is docs/README.md."""

from __future__ import annotations

FIRST = "docs/README.md"
NAVIGATION = {
    "Start": ("README.md", "docs/install.md", "docs/concepts.md", "docs/troubleshooting.md"),
    "Usage": (
        "docs/usage/patching.md",
        "docs/usage/decoders.md",
        "docs/usage/transformers-attention.md",
        "docs/usage/weights.md",
        "docs/export.md",
        "docs/usage/bulk.md",
        "docs/usage/serving.md",
        "docs/usage/command-line.md",
        "docs/usage/cpp.md",
        "docs/hub-kernel.md",
        "docs/usage/tuning.md",
    ),
    "Ops": (
        "docs/usage/ops.md",
        "docs/ops/README.md",
        "docs/ops/varlen_attention.md",
        "docs/ops/attention_rows.md",
        "docs/ops/token_importance.md",
        "docs/ops/select_tokens.md",
        "docs/ops/score_and_select.md",
        "docs/ops/gather_merge.md",
        "docs/ops/gather_merge_layernorm.md",
        "docs/ops/gather_merge_rmsnorm.md",
        "docs/ops/prune_tokens.md",
        "docs/ops/sparse24_linear.md",
        "docs/ops/sparse24_prune.md",
        "docs/ops/quantized_linear.md",
        "docs/ops/dense_linear.md",
    ),
    "Models and training": ("docs/models.md", "docs/tasks.md", "docs/usage/training.md"),
    "Performance": (
        "docs/benchmarks.md",
        "docs/measuring.md",
        "docs/performance-notes.md",
        "docs/gpu-model.md",
        "docs/newer-gpus.md",
    ),
    "Evidence": (
        "docs/method.md",
        "docs/experiments.md",
        "docs/experiments-notes.md",
        "docs/neighbours.md",
        "docs/guarantees.md",
        "docs/simulation.md",
    ),
    "Reference": (
        "docs/api/README.md",
        "docs/api/madtp.md",
        "docs/api/madtp_kernels.md",
        "docs/formats.md",
        "docs/environment.md",
        "docs/migration.md",
    ),
    "Project": ("docs/architecture.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "docs/dependencies.md"),
}


def pages() -> list[str]:
    return [FIRST, *(page for listed in NAVIGATION.values() for page in listed)]
