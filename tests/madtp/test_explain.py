# SPDX-License-Identifier: Apache-2.0
"""`handle.explain()` tells what runs in a patched model."""

import re

import pytest
import torch
from families import CASES, CONFIG, randomised

import madtp
from madtp import hwp


def patched(family):
    torch.manual_seed(0)
    model = randomised(CASES[family].build())
    return model, madtp.patch(model, CONFIG)


def rows(handle):
    """(branch, layers, part) -> what runs; every line is cut where the columns of the header begin."""
    header, *lines = handle.explain().splitlines()
    columns = [match.start() for match in re.finditer(r"\S+", header)]
    cells = [[line[a:b].strip() for a, b in zip(columns, [*columns[1:], None], strict=True)] for line in lines]
    return {tuple(cells[:3]): cells[3] for cells in cells}


def test_before_the_first_forward_nothing_is_pruned():
    model, handle = patched("CLIPModel")
    found = rows(handle)
    assert {branch for branch, *_ in found} == {"vision", "text"}
    assert found["vision", "0-1", "pruning"] == "nothing"
    assert found["text", "0-1", "mlp.fc1"] == "dense"
    assert not any(part in ("tokens", "score_and_select") for *_, part in found)


def test_layers_that_differ_have_lines_of_their_own(monkeypatch):
    monkeypatch.setenv("MADTP_TUNE", "off")
    model, handle = patched("Dinov2Model")
    handle.set_temperature(2.0)
    names = ["encoder.layer.0.attention.o_proj", "encoder.layer.0.mlp.fc1"]
    hwp.WeightPruner(model, "2:4", names, schedule="one_shot").finalize()
    hwp.pack(model)
    with torch.no_grad():
        model(**CASES["Dinov2Model"].inputs())
    found = rows(handle)
    kernel = found["vision", "0", "varlen_attention"]
    assert found["vision", "0", "attention.o_proj"] == f"2:4 on {kernel} + scale + residual"
    assert found["vision", "0", "mlp.fc1"] == f"2:4 on {kernel} + gelu"
    assert found["vision", "1", "attention.o_proj"] == found["vision", "1", "mlp.fc1"] == "dense"
    assert found["vision", "1", "gather_merge_layernorm"] == kernel
    before, after = handle.tokens_per_layer["vision"]
    assert found["vision", "0", "tokens"] == f"17.0 -> {before:.1f}"
    assert found["vision", "1", "tokens"] == f"{before:.1f} -> {after:.1f}"


@pytest.mark.parametrize(
    ("family", "branch", "gather"),
    [("BertModel", "text", "gather_merge"), ("CLIPVisionModel", "vision", "gather_merge_layernorm")],
)
def test_a_backend_that_is_asked_for_is_told(family, branch, gather, monkeypatch):
    monkeypatch.setenv("MADTP_BACKEND", "reference")
    _, handle = patched(family)
    handle.set_temperature(1.0)
    found = rows(handle)
    assert [found[branch, "0-1", op] for op in ("varlen_attention", "score_and_select", gather)] == ["reference"] * 3
    assert "asked for by MADTP_BACKEND" in handle.explain()
