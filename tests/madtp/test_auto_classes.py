# SPDX-License-Identifier: Apache-2.0
"""What was saved is loaded by the classes of transformers, patched; without madtp they do not take it for another."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers as hf
from families import CASES, CONFIG

import madtp
from madtp import hwp
from madtp.files import file_sha256
from madtp.hwp.packing import epilogues_of, schemes_of
from madtp.models import BlipForNLVR
from madtp.patching.quantizer import MadtpQuantizationConfig

TEMPERATURE = 2.0
FC1 = "vision_model.encoder.layers.0.mlp.fc1"


def compressed(name, packed=True):
    model = CASES[name].build().eval()
    handle = madtp.patch(model, CONFIG)
    handle.set_temperature(TEMPERATURE)
    if packed:
        dense = (*handle.family.dense_modules, "madtp_guide")
        hwp.prune_one_shot(model, "2:4", hwp.select_modules(model, "2:4", exclude=dense).selected)
        assert hwp.pack(model)
    return model


@torch.no_grad()
def outputs(name, model):
    result = model(**CASES[name].inputs())
    return [result[output] for output in CASES[name].outputs]


@pytest.fixture(scope="module")
def clip():
    return compressed("CLIPModel")


@pytest.fixture(scope="module")
def folder(clip, tmp_path_factory):
    directory = tmp_path_factory.mktemp("clip")
    clip.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("name", "kind", "packed"),
    [
        ("CLIPModel", hf.AutoModel, True),
        ("CLIPModel", hf.CLIPModel, False),
        ("ViTForImageClassification", hf.AutoModelForImageClassification, True),
        ("BertForSequenceClassification", hf.AutoModelForSequenceClassification, True),
        ("BlipForQuestionAnswering", hf.AutoModelForVisualQuestionAnswering, True),
        ("BlipForQuestionAnswering", hf.BlipForQuestionAnswering, False),
        ("BlipForNLVR", BlipForNLVR, True),
        ("Blip2ForConditionalGeneration", hf.Blip2ForConditionalGeneration, True),
        ("VisionTextDualEncoderModel (DINOv2, BERT)", hf.AutoModel, True),
    ],
)
def test_the_classes_of_transformers_load_a_patched_model(name, kind, packed, tmp_path):
    model = compressed(name, packed)
    model.save_pretrained(tmp_path)
    assert type(type(model).from_pretrained(tmp_path)) is type(model)  # whose class is patched itself
    loaded, report = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())  # nothing missing, nothing unexpected
    assert type(loaded) is type(model) and not loaded.training
    assert loaded.madtp_handle.temperatures == dict.fromkeys(loaded.madtp_handle.pruning, TEMPERATURE)
    assert epilogues_of(loaded) == epilogues_of(model)
    assert all(map(torch.equal, outputs(name, loaded), outputs(name, model)))
    # It is as `patch` leaves a model: not a quantized one, which could not be cast, trained or saved.
    assert not hasattr(loaded.config, "quantization_config") and not getattr(loaded, "is_quantized", False)
    assert loaded.half().dtype == torch.float16


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, {"vision_model": "cpu", "text_model": "cpu"}])
def test_device_maps(device_map, clip, folder):
    for load in (hf.AutoModel.from_pretrained, madtp.from_pretrained):
        model = load(folder, device_map=device_map)
        if next(model.parameters()).device.type == "cpu":
            assert all(map(torch.equal, outputs("CLIPModel", model), outputs("CLIPModel", clip)))
        assert len({tensor.device for tensor in (*model.parameters(), *model.buffers())}) == 1


@pytest.mark.parametrize("device_map", [{"vision_model": "cpu", "": "disk"}, {"": "disk"}, {"vision_model": 0, "": 1}])
def test_a_model_is_not_split_over_devices(device_map, folder):
    for load in (hf.AutoModel.from_pretrained, madtp.from_pretrained):
        with pytest.raises(ValueError, match="device_map must put a patched model on one device, got "):
            load(folder, device_map=device_map)


@pytest.mark.parametrize(("dtype", "packed"), [(torch.bfloat16, True), (torch.float16, False)])
def test_the_dtype_that_was_saved_comes_back(dtype, packed, tmp_path):
    model = compressed("ViTModel", packed).to(dtype)
    model.save_pretrained(tmp_path)
    weights = model.state_dict()
    for load in (madtp.from_pretrained, hf.AutoModel.from_pretrained):
        loaded = load(tmp_path)
        assert loaded.dtype == dtype
        assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())
        assert load(tmp_path, torch_dtype="float32").dtype == torch.float32
    floats = [value for value in madtp.from_pretrained(tmp_path, dtype="float32").state_dict().values()]
    assert {value.dtype for value in floats} == {torch.float32, torch.uint8}


def test_a_pipeline(tmp_path):
    model = compressed("ViTForImageClassification")
    model.save_pretrained(tmp_path)
    hf.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    classify = hf.pipeline("image-classification", model=str(tmp_path), device="cpu")
    assert classify.model.madtp_handle.temperatures == {"vision": TEMPERATURE}
    from PIL import Image

    image = Image.new("RGB", (16, 16), "red")
    expected = model(classify.image_processor(image, return_tensors="pt")["pixel_values"]).logits.softmax(-1)
    assert classify(image)[0]["score"] == pytest.approx(expected.max().item())


def test_the_base_of_a_model_and_a_head_on_it(tmp_path):
    """A packed layer has another name there."""
    head = compressed("BertForSequenceClassification")
    head.save_pretrained(tmp_path / "head")
    base = hf.AutoModel.from_pretrained(tmp_path / "head")
    inputs = CASES["BertModel"].inputs()
    with torch.no_grad():
        expected = head.bert(**inputs).last_hidden_state
        torch.testing.assert_close(base(**inputs).last_hidden_state, expected, rtol=0, atol=0)
        base.save_pretrained(tmp_path / "base")
        again = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
        torch.testing.assert_close(again.bert(**inputs).last_hidden_state, expected, rtol=0, atol=0)
    assert len(epilogues_of(base)) == len(epilogues_of(again)) == len(epilogues_of(head))


def test_another_head_is_the_choice_of_the_user(tmp_path):
    model = compressed("ViTForImageClassification")
    model.save_pretrained(tmp_path)
    kind = hf.AutoModelForImageClassification
    loaded = kind.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert loaded.classifier.weight.shape == (7, 32) and len(epilogues_of(loaded)) == len(epilogues_of(model))


def test_another_class_is_refused_by_the_one_that_will_do(tmp_path, caplog):
    compressed("BlipForQuestionAnswering", packed=False).save_pretrained(tmp_path / "patched")
    assert type(hf.AutoModel.from_pretrained(tmp_path / "patched")) is hf.BlipModel
    assert "madtp.patch knows no BlipModel, which is loaded as it is; it was saved as BlipForQuestion" in caplog.text
    compressed("BlipForQuestionAnswering").save_pretrained(tmp_path / "packed")
    with pytest.raises(madtp.ModelError, match="BlipModel must be a class .*: load it as BlipForQuestionAnswering"):
        hf.AutoModel.from_pretrained(tmp_path / "packed")
    with pytest.raises(madtp.ModelError, match="Generation must have branches .*: load it as BlipForQuestionAnswering"):
        hf.BlipForConditionalGeneration.from_pretrained(tmp_path / "packed")


def test_a_plain_model_is_not_patched_at_loading(tmp_path):
    CASES["ViTModel"].build().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="madtp does require the model to be pre-quantized"):
        hf.AutoModel.from_pretrained(tmp_path, quantization_config=MadtpQuantizationConfig())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "must be of version 6, got 99: install a newer madtp"),
        ({"version": None}, "must be of version 6, got None: save the model again"),
        ({"config": None}, "cannot be read"),
        ({"config": {"alignment_tokens": 0}}, "alignment_tokens must be an integer of at least 1"),
        ({"branches": {"vision": {"temperature": -1.0}, "text": {}}}, "temperature of vision must be a finite number"),
        ({"branches": {"vision": {}}}, "must have branches vision: load it as CLIPModel"),
        ({"branches": []}, "cannot be read"),
        ({"packed": []}, "cannot be read"),
        ({"packed": {"no.such": {"scheme": "sparse24"}}}, "cannot be read"),
        ({"packed": {"text_model": {"scheme": "sparse24"}}}, "cannot be read"),
        ({"packed": {FC1: {"scheme": "sparse24", "activation": "vision_model"}}}, "cannot be read"),
        ({"packed": {FC1: {"scheme": "int4"}}}, "scheme must be one of sparse24, int8, .*, got 'int4'"),
        ({"packed": {}}, "weights must match|ignore_mismatched_sizes"),
    ],
)
def test_damaged_settings_are_refused(change, message, folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match=message):
        hf.CLIPModel.from_pretrained(tmp_path)
    with pytest.raises(madtp.ModelError, match="config.json is not as it was written: its checksum does not match"):
        madtp.from_pretrained(tmp_path)


WITHOUT = """
import sys, torch, transformers as hf
sparse, int8, clip, shapes, patched = sys.argv[1:]
VIT = hf.ViTModel, hf.AutoModelForImageClassification
CLIP = hf.AutoModel, hf.CLIPModel, hf.CLIPVisionModel, hf.CLIPTextModelWithProjection
for folder, kinds, error, part in (
    (sparse, VIT, ValueError, "`import madtp` and load ViTForImageClassification"),
    (int8, VIT, ValueError, "`import madtp` and load ViTForImageClassification"),
    (clip, CLIP, ValueError, "`import madtp` and load CLIPModel"),
    (shapes, VIT, RuntimeError, "ignore_mismatched_sizes"),
):
    for kind in kinds:
        for options in ({}, {"dtype": "float16", "ignore_mismatched_sizes": error is ValueError}):
            try:
                kind.from_pretrained(folder, **options)
            except error as refused:
                assert part in str(refused), refused
            else:
                sys.exit(f"{kind.__name__} loaded {folder} with {options}")
assert "madtp" not in sys.modules
torch.save(hf.AutoModel.from_pretrained(patched).state_dict(), patched + "/state.pt")
"""


def in_int8(name):
    model = compressed(name, packed=False)
    hwp.pack(model, hwp.select_modules(model, "2:4", exclude=("madtp_guide",)).selected, dtype="int8")
    assert set(schemes_of(model).values()) == {"int8"}  # whose weights have the shapes of plain ones
    return model


def without_note(folder):
    """As directories were before config.json named no file of weights."""
    config = json.loads((folder / "config.json").read_text())
    assert "`import madtp`" in config.pop("transformers_weights")
    (folder / "config.json").write_text(json.dumps(config))
    state = json.loads((folder / "madtp.json").read_text())
    state["sha256"]["config.json"] = file_sha256(folder / "config.json")
    (folder / "madtp.json").write_text(json.dumps(state))


def test_without_madtp_packed_weights_are_not_taken_for_others(tmp_path):
    model = compressed("ViTForImageClassification")
    model.save_pretrained(tmp_path / "sparse")
    model.save_pretrained(tmp_path / "shapes")
    without_note(tmp_path / "shapes")
    in_int8("ViTForImageClassification").save_pretrained(tmp_path / "int8")
    in_int8("CLIPModel").save_pretrained(tmp_path / "clip")
    patched = compressed("ViTModel", packed=False)
    patched.save_pretrained(tmp_path / "patched")
    arguments = [str(tmp_path / name) for name in ("sparse", "int8", "clip", "shapes", "patched")]
    done = subprocess.run([sys.executable, "-c", WITHOUT, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    state, weights = torch.load(tmp_path / "patched" / "state.pt"), patched.state_dict()
    assert state and all(torch.equal(value, weights[name]) for name, value in state.items())


def test_with_madtp_nothing_is_left_of_what_the_others_are_told(tmp_path):
    model = in_int8("CLIPModel")
    model.save_pretrained(tmp_path / "now")
    model.save_pretrained(tmp_path / "before")
    without_note(tmp_path / "before")
    for load, folder in ((madtp, "now"), (hf.AutoModel, "before"), (hf.CLIPModel, "now")):
        loaded = load.from_pretrained(tmp_path / folder)
        assert all(map(torch.equal, outputs("CLIPModel", loaded), outputs("CLIPModel", model)))
        assert "transformers_weights" not in json.dumps(loaded.config.to_dict())
    with pytest.raises(ValueError, match="`import madtp` and load CLIPModel"):  # a tower is not a model of madtp
        hf.CLIPVisionModel.from_pretrained(tmp_path / "now")
    hwp.unpack(loaded)
    loaded.save_pretrained(tmp_path / "now")  # nothing is packed any more, and anybody may read it
    assert "transformers_weights" not in (tmp_path / "now" / "config.json").read_text()
