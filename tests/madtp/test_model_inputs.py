# SPDX-License-Identifier: Apache-2.0
"""Random inputs fit the forward of every family."""

import pytest
import torch
from families import CASES

import madtp
from madtp.data.model_inputs import MAX_TEXT, random_inputs


@pytest.mark.parametrize("family", CASES)
def test_random_inputs_fit(family):
    model = CASES[family].build().eval()
    inputs = random_inputs(model, 2)
    with torch.no_grad():
        model(**inputs)
    assert {name: value.shape[0] for name, value in inputs.items()} == dict.fromkeys(inputs, 2)
    assert set(inputs) <= set(CASES[family].inputs()) | {"attention_mask", "labels"}
    if "input_ids" in inputs:
        assert inputs["input_ids"].shape[1] <= MAX_TEXT
    again = random_inputs(model, 2)
    assert all(torch.equal(again[name], value) for name, value in inputs.items())
    madtp.patch(model)
    patched = random_inputs(model, 2)
    assert {name: value.shape for name, value in patched.items()} == {name: v.shape for name, v in inputs.items()}
