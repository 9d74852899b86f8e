# SPDX-License-Identifier: Apache-2.0
"""torch.export of patched models on a CPU: what comes out computes what the model does, on inputs of other lengths."""

import pytest
import torch
from families import CASES, CONFIG, randomised

import madtp


def patched(family, temperature, capacity="exact"):
    model = randomised(CASES[family].build())
    torch.manual_seed(0)
    madtp.patch(model, CONFIG, capacity=capacity).set_temperature(temperature)
    return model


def others(inputs):
    """Inputs of the same shape that keep other numbers of tokens."""
    inputs = {name: value.flip(0).clone() for name, value in inputs.items()}
    if "attention_mask" in inputs:
        inputs["attention_mask"][0, :3] = 0  # where CLIP does not pool
    return inputs


@torch.no_grad()
def exports(family, temperature, capacity, strict):
    model, inputs = patched(family, temperature, capacity), CASES[family].inputs()
    model(**inputs)
    before = model.madtp_handle.tokens_per_layer
    program = torch.export.export(model, (), inputs, strict=strict).module()
    assert model.madtp_handle.tokens_per_layer == before
    for given in (inputs, others(inputs)):
        expected, result = model(**given), program(**given)
        for name in CASES[family].outputs:
            torch.testing.assert_close(result[name], expected[name], rtol=1e-6, atol=1e-6)


def test_export_of_a_pruning_text_tower():
    exports("BertModel", 2.0, "upper_bound", strict=False)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("capacity", ["exact", "upper_bound"])
@pytest.mark.parametrize("temperature", [0.0, 2.0])
@pytest.mark.parametrize("family", ["ViTForImageClassification", "BertModel", "CLIPModel", "SiglipVisionModel"])
def test_export(family, temperature, capacity, strict):
    exports(family, temperature, capacity, strict)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 2.0])
@torch.no_grad()
def test_export_with_a_batch_of_any_size(temperature):
    model, inputs = patched("BertModel", temperature), CASES["BertModel"].inputs()
    sizes = {name: {0: torch.export.Dim("batch", min=2, max=64)} for name in inputs}
    program = torch.export.export(model, (), inputs, dynamic_shapes=sizes).module()
    more = {name: torch.cat((value, value))[:7] for name, value in inputs.items()}
    torch.testing.assert_close(program(**more).pooler_output, model(**more).pooler_output, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_trace_has_the_dense_model_alone():
    for capacity, gradients in (("exact", False), ("upper_bound", False), ("exact", True)):
        model, inputs = patched("BertModel", 0.0, capacity), CASES["BertModel"].inputs()
        with torch.set_grad_enabled(gradients):
            traced = torch.jit.trace(model, example_kwarg_inputs=inputs, strict=False)
        for given in (inputs, others(inputs)):
            torch.testing.assert_close(traced(**given)["pooler_output"], model(**given).pooler_output)
    model.madtp_handle.set_temperature(2.0)
    with pytest.raises(RuntimeError, match=r"temperature must be 0 under torch.jit.trace, .*, got 2; torch.export"):
        torch.jit.trace(model, example_kwarg_inputs=inputs, strict=False)
