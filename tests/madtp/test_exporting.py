# SPDX-License-Identifier: Apache-2.0
"""madtp.export: the file of each format computes what the model does, on inputs with other values."""

import dataclasses
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from families import CASES, CONFIG, randomised
from torch import nn
from vlm_families import CASES as DECODERS

import madtp
import madtp_kernels
from madtp import hwp
from madtp.exporting import ONNX_PACKAGES, export

COMPILER = shutil.which(os.environ.get("CXX", "g++"))


def patched(family, selection="received", temperature=4.0, dtype=None, sparse=False, samples=1):
    """A model whose sequences keep a count, and inputs for it."""
    model = randomised(CASES[family].build())
    torch.manual_seed(0)
    madtp.patch(model, dataclasses.replace(CONFIG, selection=selection)).set_temperature(temperature)
    if sparse:
        hwp.prune_one_shot(model, "2:4", hwp.select_modules(model, "2:4").selected)
        assert hwp.pack(model, dtype=dtype)
    return model, {name: value[:samples] for name, value in CASES[family].inputs().items()}


def others(inputs):
    """Inputs of the same sizes that keep other tokens."""
    images = {name: value + 1.5 * value.roll(5, -1) for name, value in inputs.items() if value.is_floating_point()}
    texts = {name: value.flip(0) for name, value in inputs.items() if not value.is_floating_point()}
    return images | texts


def same(run, model, inputs, family, names, tolerance=5e-6):
    """run: inputs -> tensors by name."""
    for given in (inputs, others(inputs)):
        with torch.no_grad():
            expected = model(**given)
        got = run(given)
        assert set(names) <= set(got)
        for name in CASES[family].outputs:
            torch.testing.assert_close(torch.as_tensor(got[name]), expected[name], rtol=tolerance, atol=tolerance)


# --- torch.export


@pytest.mark.parametrize("selection", ["received", "tome", "instance"])
def test_a_torch_file(tmp_path, selection):
    model, inputs = patched("CLIPVisionModel", selection, sparse=selection == "received", samples=2)
    path = export(model, inputs, tmp_path / "tower.pt2")
    program = torch.export.load(path)
    same(lambda given: program.module()(**given), model, inputs, "CLIPVisionModel", CASES["CLIPVisionModel"].outputs)
    read = {str(node.target) for node in program.graph.nodes} & {
        "aten.item.default",
        "aten._local_scalar_dense.default",
    }
    assert bool(read) == (selection == "instance"), "counts are fixed but for the method's own"
    assert program.example_inputs is None, "what was given is in no file"


def test_counts_are_those_that_a_run_keeps(tmp_path):
    model, inputs = patched("SiglipVisionModel", "visionzip")
    with torch.no_grad():
        model(**inputs)
    left = [layer[0].numel() for layer in model.madtp_handle.selections["vision"]]
    assert left == [12, 9], "ceil(16 / 1.4), ceil(12 / 1.4)"


@pytest.mark.slow
@pytest.mark.parametrize("selection", ["static", "cls", "uniform", "divprune", "visionzip", "unguided"])
def test_a_torch_file_of_every_selection(tmp_path, selection):
    model, inputs = patched("SiglipVisionModel", selection, samples=3)
    path = export(model, inputs, tmp_path / "tower.pt2")
    program = torch.export.load(path).module()
    same(lambda given: program(**given), model, inputs, "SiglipVisionModel", ["pooler_output"])


@pytest.mark.slow
@pytest.mark.parametrize("family", CASES)
def test_a_torch_file_of_every_family(tmp_path, family):
    model, inputs = patched(family, temperature=0.0, samples=2)
    counted = {name for name in model.madtp_handle.temperatures if name == "vision" or "attention_mask" not in inputs}
    model.madtp_handle.set_temperature(dict.fromkeys(counted, 4.0))
    program = torch.export.load(export(model, inputs, tmp_path / "model.pt2")).module()
    same(lambda given: program(**given), model, inputs, family, CASES[family].outputs)


def test_a_model_of_image_and_text(tmp_path):
    family = "BlipForImageTextRetrieval"
    model, inputs = patched(family, temperature={"vision": 4.0}, samples=2)
    assert not inputs["attention_mask"].all(), "texts with padding, none of which is pruned"
    program = torch.export.load(export(model, inputs, tmp_path / "blip.pt2")).module()
    same(lambda given: program(**given), model, inputs, family, ["itm_score"])


def test_texts_of_one_length_keep_counts(tmp_path):
    model, inputs = patched("CLIPModel", samples=2)
    del inputs["attention_mask"]
    program = torch.export.load(export(model, inputs, tmp_path / "clip.pt2")).module()
    names = ["image_embeds", "vision_model_output.last_hidden_state"]
    same(lambda given: program(**given), model, inputs, "CLIPModel", names)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch, that copies what it deprecates
def test_plain_calls_of_torch_are_the_same():
    model, inputs = patched("CLIPVisionModel", samples=2)
    with torch.no_grad():
        program = torch.export.export(model, (), inputs)
        plain = program.run_decompositions(madtp_kernels.decompositions())
        expected, got = model(**inputs), plain.module()(**inputs)
    assert not [node for node in plain.graph.nodes if str(node.target).startswith("madtp")]
    assert [node for node in program.graph.nodes if str(node.target).startswith("madtp")]
    torch.testing.assert_close(got["last_hidden_state"], expected["last_hidden_state"], rtol=5e-6, atol=5e-6)


# --- AOTInductor


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("selection", ["received", "instance"])
def test_a_compiled_package(tmp_path, selection):
    model, inputs = patched("CLIPVisionModel", selection, sparse=True)
    package = torch._inductor.aoti_load_package(export(model, inputs, tmp_path / "tower.pt2", format="aoti"))
    same(lambda given: package(**given), model, inputs, "CLIPVisionModel", ["pooler_output"])


def test_without_a_compiler_it_says_so(tmp_path, monkeypatch):
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    model, inputs = patched("CLIPVisionModel")
    with pytest.raises(RuntimeError, match=r"format aoti needs a C\+\+ compiler"):
        export(model, inputs, tmp_path / "tower.pt2", format="aoti")
    assert not list(tmp_path.iterdir())


# --- ONNX


def on_onnxruntime(path):
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda given: dict(zip(names, session.run(None, arrays(given)), strict=True))


def on_openvino(path):
    openvino = pytest.importorskip("openvino")
    model = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda given: {port.any_name: value for port, value in model(arrays(given)).items()}


def arrays(inputs):
    return {name: np.ascontiguousarray(value.numpy()) for name, value in inputs.items()}


ONNX = {  # what a case shows -> family, and what is patched
    "summary token": ("CLIPVisionModel", {}),
    "no summary token, 2:4": ("SiglipVisionModel", {"selection": "divprune", "sparse": True}),
    "2:4 int8": ("ViTModel", {"selection": "tome", "sparse": True, "dtype": "int8"}),
    "batch": ("CLIPVisionModel", {"selection": "visionzip", "samples": 4}),
    "image and text": ("BlipForImageTextRetrieval", {"temperature": {"vision": 4.0}}),
    "image and text, both of a count": ("SiglipModel", {"samples": 2}),
    "queries": ("Blip2Model", {"temperature": {"vision": 4.0}}),
    "own counts": ("CLIPVisionModel", {"selection": "instance", "samples": 2}),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of exporters
@pytest.mark.parametrize("case", ONNX)
def test_an_onnx_file(tmp_path, case):
    pytest.importorskip("onnxscript")
    family, options = ONNX[case]
    model, inputs = patched(family, **options)
    path = export(model, inputs, tmp_path / "model.onnx", format="onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    # Rows of int8 are rounded: a last bit before it may be a step behind it.
    tolerance = 5e-2 if options.get("dtype") == "int8" else 2e-5
    for load in (on_onnxruntime, on_openvino):
        same(load(path), model, inputs, family, CASES[family].outputs, tolerance)


def test_the_extra_has_what_onnx_needs():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    (line,) = re.findall(r"^export = \[(.*)\]$", project, re.MULTILINE)
    assert re.findall(r'"([a-z]+)>=', line) == [*ONNX_PACKAGES]


def test_onnx_needs_its_packages(tmp_path, monkeypatch):
    monkeypatch.setattr("madtp.exporting.find_spec", lambda name: None)
    model, inputs = patched("CLIPVisionModel")
    with pytest.raises(
        ImportError, match=r"onnx is needed for format onnx: pip install -e \.\[export\] \(or onnx onnxscript\)"
    ):
        export(model, inputs, tmp_path / "model.onnx", format="onnx")


# --- what is refused


def refused(message, model, inputs, path, **options):
    with pytest.raises(ValueError, match=message):
        export(model, inputs, path, **options)
    assert not path.exists()


def test_arguments_that_break_a_rule(tmp_path):
    model, inputs = patched("CLIPVisionModel")
    path = tmp_path / "model.pt2"
    refused("format must be one of torch, aoti, onnx, got 'tflite'", model, inputs, path, format="tflite")
    refused("path must be a file name that ends in .onnx with format onnx", model, inputs, path, format="onnx")
    refused("inputs must be a mapping from names to tensors on a CPU, .* got list", model, [inputs], path)
    refused("inputs must be .* got dict", model, {}, path)
    refused("inputs must be .* got return_dict bool", model, inputs | {"return_dict": True}, path)
    refused("model must be a module, got str", "model", inputs, path)
    refused("model must be on a CPU .* got meta", patched("CLIPVisionModel")[0].to("meta"), inputs, path)
    refused(r"model must be in eval mode .*model.eval\(\)", model.train(), inputs, path)


def test_a_number_that_onnx_has_not(tmp_path):
    pytest.importorskip("onnxscript")
    model, inputs = patched("CLIPVisionModel")
    refused("model must be of float32 .*bfloat16", model.bfloat16(), inputs, tmp_path / "m.onnx", format="onnx")


def test_a_decoder_with_seams(tmp_path):
    model = DECODERS["LLaVA"].make().eval()
    inputs = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
    madtp.patch(model, keep={"projector": 2})
    refused("model must be without the seams of a decoder .* projector", model, inputs, tmp_path / "m.pt2")


@pytest.mark.parametrize("selection", ["batch_max", lambda candidates, counts: candidates.importance > 0])
def test_counts_that_a_run_decides(tmp_path, selection):
    model, inputs = patched("CLIPVisionModel", selection)
    refused("selection of vision must be one whose counts", model, inputs, tmp_path / "m.pt2")
    with pytest.raises(RuntimeError, match="selection must"), torch.no_grad():
        torch.export.export(model, (), inputs)
    model.madtp_handle.set_temperature(0.0)
    assert export(model, inputs, tmp_path / "m.pt2").exists(), "the dense model"


def test_a_mask_where_texts_keep_a_count(tmp_path):
    model, inputs = patched("BertModel", samples=2)
    with pytest.raises(RuntimeError, match="attention_mask must be None where a model is exported"):
        export(model, inputs, tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())


def test_a_plain_model(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3)).eval()

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x)

    program = torch.export.load(export(Plain().eval(), {"x": torch.randn(2, 4)}, tmp_path / "m.pt2")).module()
    x = torch.randn(2, 4)
    torch.testing.assert_close(program(x=x)["output"], model(x))
