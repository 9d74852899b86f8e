# SPDX-License-Identifier: Apache-2.0
"""torch.export of patched models on a CPU: what comes out computes what the model does, on inputs of other lengths."""

import pytest
import torch
from families import CASES, CONFIG, randomised

import madtp
from madtp import hwp


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


ANY = torch.export.Dim("batch")
BOUNDED = torch.export.Dim("batch", min=2, max=64)


@torch.no_grad()
def exports_any_batch(family, temperature, batch, strict, packed=False):
    model, inputs = patched(family, temperature), CASES[family].inputs()
    if packed:
        hwp.prune_one_shot(model, "2:4", hwp.select_modules(model, "2:4").selected)
        assert hwp.pack(model)
    sizes = {name: {0: batch} for name in inputs}
    program = torch.export.export(model, (), inputs, dynamic_shapes=sizes, strict=strict).module()
    for count in (7, 1 if batch is ANY else 2):
        given = {name: torch.cat((value, value))[:count] for name, value in inputs.items()}
        expected, result = model(**given), program(**given)
        for name in CASES[family].outputs:
            torch.testing.assert_close(result[name], expected[name], rtol=1e-6, atol=1e-6)


def test_export_with_a_batch_of_any_size():
    exports_any_batch("ViTForImageClassification", 2.0, ANY, strict=False)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["CLIPVisionModel", "SiglipModel", "BlipForImageTextRetrieval", "BlipForNLVR"])
def test_export_of_families(family):
    exports_any_batch(family, 2.0, ANY, strict=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # layouts are packed
@pytest.mark.parametrize("strict", [False, True])
def test_export_of_packed_layers(strict):
    exports_any_batch("BertModel", 2.0, ANY, strict, packed=True)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("batch", [ANY, BOUNDED, torch.export.Dim.DYNAMIC], ids=["any", "bounded", "dynamic"])
@pytest.mark.parametrize("temperature", [0.0, 2.0])
@pytest.mark.parametrize("family", ["ViTForImageClassification", "BertModel"])
def test_export_of_batches(family, temperature, batch, strict):
    exports_any_batch(family, temperature, batch, strict)


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
