# SPDX-License-Identifier: Apache-2.0
"""State dicts of patched and packed models: settings travel with them, and what does not fit is refused."""

import copy

import pytest
import torch
import transformers as hf
from families import CASES, CONFIG
from linear_blocks import saved_and_loaded
from safetensors.torch import load_file, save_file
from test_auto_classes import compressed, outputs
from torch.utils.data import Dataset

import madtp
from madtp.dtp.settings import SIZE_MULTIPLE

NAME = "CLIPModel"
KEY = "madtp_settings._extra_state"
SETTINGS = {"temperature": 1.5, "first_layer": 0, "capacity": "exact", "selection": "instance"}
SETTINGS |= {"samples_per_feature": 1}


def patched(name=NAME, temperature=0.0, **options):
    model = CASES[name].build().eval()
    madtp.patch(model, CONFIG, **options).set_temperature(temperature)
    return model


def through_safetensors(state, path):
    save_file(state, path)
    return load_file(path)


def test_settings_travel(tmp_path):
    model = patched(capacity="upper_bound")
    model.madtp_handle.set_temperature({"vision": 1.5, "text": 0.1})
    model.madtp_handle.pruning["vision"].samples_per_feature = 2
    with torch.no_grad():
        model.madtp_guide.alignment_tokens.add_(1)
    for state in (
        model.state_dict(),
        saved_and_loaded(model.state_dict(), weights_only=True),
        through_safetensors(model.state_dict(), tmp_path / "state.safetensors"),
    ):
        other = patched()
        assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
        assert other.madtp_handle.settings.values() == {
            "vision": SETTINGS | {"capacity": "upper_bound", "samples_per_feature": 2},
            "text": SETTINGS | {"capacity": "upper_bound", "temperature": 0.1},
        }
        assert all(map(torch.equal, outputs(NAME, other), outputs(NAME, model)))


def test_a_state_dict_of_before_loads_and_leaves_what_is_set():
    model, other = patched(), patched(temperature=2.0)
    state = {name: value for name, value in model.state_dict().items() if name != KEY}
    assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
    assert other.madtp_handle.temperatures == {"vision": 2.0, "text": 2.0}


def test_the_settings_of_a_part_of_a_model():
    model = torch.nn.ModuleDict({"clip": patched(temperature=2.0)})
    other = torch.nn.ModuleDict({"clip": patched()})
    other.load_state_dict(model.state_dict())
    assert other["clip"].madtp_handle.temperatures == {"vision": 2.0, "text": 2.0}


def test_a_model_that_is_not_patched_has_none():
    model = CASES[NAME].build()
    keys = list(model.state_dict())
    madtp.patch(model, CONFIG)
    assert KEY in model.state_dict() and model.state_dict()[KEY].shape == (SIZE_MULTIPLE,)
    model.madtp_handle.remove()
    assert list(model.state_dict()) == keys


def as_state(text):
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (torch.zeros(4), r"must be uint8 of one dimension, got torch.float32 \(4,\)"),
        ({"vision": 1.0}, "must be uint8 of one dimension, got dict"),
        (torch.zeros(512, dtype=torch.uint8), "must be JSON of their settings, got "),
        (as_state("[" * 100_000), "must be JSON of their settings, got "),
        (as_state("[]"), "must be JSON of their settings, got "),
        (as_state('{"version": 2, "branches": {}}'), "must be of version 1, got 2"),
        (as_state('{"version": 1, "branches": []}'), "settings must be for branches vision, text, got list"),
        (
            as_state('{"version": 1, "branches": {"audio": {}}}'),
            "settings must be for branches vision, text, got audio",
        ),
        *(
            (as_state(f'{{"version": 1, "branches": {{"vision": {vision}, "text": {{}}}}}}'), message)
            for vision, message in (
                ("[]", "settings of vision must be a mapping, got list"),
                ('{"heat": 1}', "settings of vision must be some of temperature, .*, got 'heat'"),
                ('{"temperature": NaN}', "temperature of vision must be a finite number >= 0, got nan"),
                ('{"temperature": true}', "temperature of vision must be a finite number >= 0, got True"),
                ('{"capacity": "none"}', "capacity of vision must be one of exact, upper_bound, got 'none'"),
                ('{"capacity": []}', "capacity of vision must be one of exact, upper_bound, got "),
                ('{"first_layer": 2}', "first_layer of vision must be below 2, its layers, got 2"),
                ('{"first_layer": -1}', "first_layer of vision must be an integer of at least 0, got -1"),
                ('{"selection": "best"}', "selection of vision must be one of instance, .*, got 'best'"),
                ('{"samples_per_feature": 0}', "samples_per_feature of vision must be an integer of at least 1, got 0"),
                ('{"selection": "random", "capacity": "upper_bound"}', 'capacity of vision must be "exact" with sel'),
            )
        ),
    ],
)
def test_damaged_settings_change_nothing(state, message):
    model = patched(temperature=2.0)
    before = copy.deepcopy(model.state_dict())
    given = {name: torch.zeros_like(value) for name, value in before.items()} | {KEY: state}
    with pytest.raises(ValueError, match=message):
        model.load_state_dict(given, strict=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture(scope="module")
def packed():
    return compressed("ViTModel")


def test_a_packed_model_loads_what_a_packed_model_has(packed, tmp_path):
    keys = {name.rsplit(".", 1)[1] for name in packed.state_dict() if ".fc1." in name}
    assert keys == {"weight", "indices", "bias"}
    state = through_safetensors(packed.state_dict(), tmp_path / "state.safetensors")
    other = compressed("ViTModel")
    with torch.no_grad():
        for tensor in (*other.parameters(), *(b for b in other.buffers() if b.is_floating_point())):
            tensor.zero_()
    outputs("ViTModel", other)  # what kernels read is laid out anew
    for options in ({}, {"assign": True}):
        other.load_state_dict(state, **options)
        assert all(map(torch.equal, outputs("ViTModel", other), outputs("ViTModel", packed)))


def test_the_keys_of_before(packed):
    state = packed.state_dict()
    layer = next(name for name in state if name.endswith("fc1.indices")).removesuffix("indices")
    old = {(f"{layer}values" if name == f"{layer}weight" else name): value for name, value in state.items()}
    other = compressed("ViTModel")
    other.get_submodule(layer[:-1]).weight.zero_()
    other.load_state_dict(old)
    assert torch.equal(other.state_dict()[f"{layer}weight"], state[f"{layer}weight"]) and f"{layer}values" in old


def test_packed_and_plain_do_not_mix(packed):
    plain = patched("ViTModel")
    for model, other in ((plain, packed), (packed, plain)):
        before = model.state_dict()
        with pytest.raises(RuntimeError, match="size mismatch for .*fc1.weight"):
            model.load_state_dict(other.state_dict(), strict=False)
        assert model.state_dict().keys() == before.keys()


def test_indices_that_are_none_are_refused(packed):
    other = compressed("ViTModel")
    name = next(name for name in other.state_dict() if name.endswith("fc1.indices"))
    before = other.state_dict()[name].clone()
    with pytest.raises(RuntimeError, match=f"{name} must be two ascending columns for every group, got 0, 0 at row 0"):
        other.load_state_dict(packed.state_dict() | {name: torch.zeros_like(before)})
    assert torch.equal(other.state_dict()[name], before)


def test_accelerate_saves_and_loads_the_state(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(patched("ViTModel", temperature=2.0))
    expected = outputs("ViTModel", model)
    accelerator.save_state(tmp_path)
    model.madtp_handle.set_temperature(0)
    accelerator.load_state(tmp_path)
    assert model.madtp_handle.temperatures == {"vision": 2.0}
    assert all(map(torch.equal, outputs("ViTModel", model), expected))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint(tmp_path):
    checkpoint = pytest.importorskip("torch.distributed.checkpoint")
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    model, other = patched("ViTModel", temperature=2.0), patched("ViTModel", temperature=0.123456789012345)
    checkpoint.save(get_model_state_dict(model), checkpoint_id=tmp_path, no_dist=True)
    state = get_model_state_dict(other)
    checkpoint.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_model_state_dict(other, state)
    assert other.madtp_handle.temperatures == {"vision": 2.0}


class Images(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return {"pixel_values": torch.full((3, 16, 16), float(i)), "labels": i % 3}


def test_a_trainer_goes_on_with_the_temperature(tmp_path):
    def trainer(temperature, steps):
        arguments = hf.TrainingArguments(
            str(tmp_path), max_steps=steps, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
        )
        model = patched("ViTForImageClassification", temperature)
        loss = torch.nn.functional.cross_entropy

        class Plain(hf.Trainer):
            def compute_loss(self, model, inputs, *args, **kwargs):
                return loss(model(inputs["pixel_values"]).logits, inputs["labels"])

        return Plain(model, arguments, train_dataset=Images())

    trainer(2.0, 1).train()
    loaded = hf.AutoModelForImageClassification.from_pretrained(tmp_path / "checkpoint-1")
    assert loaded.madtp_handle.temperatures == {"vision": 2.0}
    again = trainer(0.0, 2)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2 and again.model.madtp_handle.temperatures == {"vision": 2.0}
