# SPDX-License-Identifier: Apache-2.0
"""Models with int8 layers: what they compute, on disk and back, in the accounts, and compressed by one run."""

import copy
import dataclasses
import json

import pytest
import torch
import transformers as hf
from families import CASES, CONFIG
from safetensors.torch import load_file, save_file
from test_compression import BRIEF, Questions, Task
from test_compression import CONFIG as RUN
from test_int8_layers import round_rows
from tiny_models import tiny_blip
from torch import nn

import madtp
from madtp import hwp
from madtp.cli.options import settings
from madtp.files import file_sha256
from madtp.hwp import QuantizedLinear, Sparse24Linear
from madtp.hwp.packing import epilogues_of, schemes_of
from madtp.profiling.macs import profile, weight_bytes

NAME = "ViTModel"
FC1, FC2 = "layers.0.mlp.fc1", "layers.0.mlp.fc2"


def packed(name, temperature=2.0):
    """Half of the Linears that may be pruned are 2:4, and all of them int8."""
    model = CASES[name].build().eval()
    handle = madtp.patch(model, CONFIG)
    handle.set_temperature(temperature)
    names = hwp.select_modules(model, "2:4", exclude=(*handle.family.dense_modules, "madtp_guide")).selected
    hwp.prune_one_shot(model, "2:4", names[::2])
    assert set(hwp.pack(model, names, dtype="int8")) == set(names)
    return model


@torch.no_grad()
def outputs(name, model):
    result = model(**CASES[name].inputs())
    return [result[output] for output in CASES[name].outputs]


@pytest.fixture(scope="module")
def model():
    return packed(NAME)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("int8")
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("name", [NAME, "BlipForQuestionAnswering"])
def test_a_model_computes_what_dequantised_weights_do_on_rounded_rows(name):
    model = packed(name, temperature=0.0)
    names = list(schemes_of(model))
    plain = copy.deepcopy(model)
    hwp.unpack(plain)
    assert not any(isinstance(module, hwp.PackedLinear) for module in plain.modules())
    for linear in names:
        assert type(plain.get_submodule(linear)) is nn.Linear
        plain.get_submodule(linear).register_forward_pre_hook(round_rows)
    for got, want in zip(outputs(name, model), outputs(name, plain), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    table = model.madtp_handle.explain()
    assert "int8 2:4 on " in table and "int8 on " in table and " + gelu" in table
    assert type(model.madtp_handle.remove()) is type(CASES[name].build())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (NAME, hf.AutoModel),
        ("CLIPModel", hf.CLIPModel),
        ("BlipForQuestionAnswering", hf.AutoModelForVisualQuestionAnswering),
    ],
)
def test_what_was_saved_loads_again(name, kind, tmp_path):
    model = packed(name)
    model.save_pretrained(tmp_path, **({} if name == NAME else {"max_shard_size": "50KB"}))
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written["version"] == 6
    assert {layer: of["scheme"] for layer, of in written["packed"].items()} == schemes_of(model)
    loaded, report = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    for other in (loaded, madtp.from_pretrained(tmp_path)):
        assert all(map(torch.equal, outputs(name, other), outputs(name, model)))
        assert schemes_of(other) == schemes_of(model) and epilogues_of(other) == epilogues_of(model)
        state = model.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_are_those_of_the_rest(dtype, model, folder):
    for load in (madtp.from_pretrained, hf.AutoModel.from_pretrained):
        loaded = load(folder, dtype=dtype)
        for name, layer in loaded.named_modules():
            if isinstance(layer, QuantizedLinear):
                assert torch.equal(layer.weight_scale, model.get_submodule(name).weight_scale)  # not rounded
                assert layer.bias.dtype == layer.dense_dtype == dtype
        assert loaded.dtype == dtype and outputs(NAME, loaded)[0].dtype == dtype
    assert {p.dtype for p in loaded.madtp_handle.remove().parameters()} == {dtype}


def test_int8_weights_take_a_quarter_on_disk(folder, tmp_path):
    plain = CASES[NAME].build()
    plain.save_pretrained(tmp_path)
    sizes = [(path / "model.safetensors").stat().st_size for path in (folder, tmp_path)]
    assert sizes[0] < 0.6 * sizes[1]  # embeddings, norms and names are large here


def rewritten(folder, to, change):
    """A copy of a folder with other weights, and right checksums."""
    to.mkdir(exist_ok=True)
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    weights = load_file(to / "model.safetensors")
    save_file(change(weights), to / "model.safetensors", metadata={"format": "pt"})
    state = json.loads((to / "madtp.json").read_text())
    state["sha256"]["model.safetensors"] = file_sha256(to / "model.safetensors")
    (to / "madtp.json").write_text(json.dumps(state))
    return to


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("fc1.weight", torch.Tensor.float, r"fc1.weight as config.json .* I8 of shape \(64, 16\), got F32 \(64, 16\)"),
        ("fc2.weight", lambda v: v[:, :24], r"fc2.weight as config.json .* I8 of shape \(32, 64\), got I8 \(32, 24\)"),
        ("fc2.weight_scale", torch.Tensor.half, r"fc2.weight_scale as .* F32 of shape \(32,\), got F16 \(32,\)"),
        ("fc1.weight_scale", None, r"fc1.weight_scale as config.json .* F32 of shape \(64,\), got nothing"),
        ("fc1.weight_indices", None, r"fc1.weight_indices as .* U8 of shape \(64, 4\), got nothing"),
        ("fc1.weight_indices", torch.zeros_like, "fc1.weight.indices must be two ascending columns for every group"),
        ("fc1.weight", lambda v: torch.full_like(v, -128), "fc1.weight.values must be from -127 to 127, got -128"),
        ("fc2.weight_scale", torch.neg, "fc2.weight.scale must be positive and finite, got -"),
    ],
)
def test_files_that_do_not_hold_what_they_say_are_refused(name, change, message, folder, tmp_path):
    key = f"layers.0.mlp.{name}"

    def changed(weights):
        value = weights.pop(key)
        return weights if change is None else weights | {key: change(value).contiguous()}

    rewritten(folder, tmp_path, changed)
    for load in (madtp.from_pretrained, hf.AutoModel.from_pretrained):
        with pytest.raises(madtp.ModelError, match=message):
            load(tmp_path)


def test_files_of_another_scheme_are_refused(folder, tmp_path):
    rewritten(folder, tmp_path, lambda weights: weights)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["packed"][FC1]["scheme"] = "int8"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(madtp.ModelError, match=r"fc1.weight as .* I8 of shape \(64, 32\), got I8 \(64, 16\)"):
        hf.AutoModel.from_pretrained(rewritten_checksum(tmp_path))
    config["quantization_config"]["packed"][FC1]["scheme"] = "sparse24"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(madtp.ModelError, match="weights must hold .*fc1.indices as config.json describes it"):
        hf.AutoModel.from_pretrained(rewritten_checksum(tmp_path))


def rewritten_checksum(folder):
    state = json.loads((folder / "madtp.json").read_text())
    state["sha256"]["config.json"] = file_sha256(folder / "config.json")
    (folder / "madtp.json").write_text(json.dumps(state))
    return folder


def test_version_5_knew_24_layers_alone(tmp_path):
    model = CASES[NAME].build().eval()
    handle = madtp.patch(model, CONFIG)
    handle.set_temperature(2.0)
    hwp.prune_one_shot(model, "2:4", [FC1, FC2])
    hwp.pack(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    values = config["quantization_config"]
    values["version"] = 5
    values["sparse24"] = {name: {k: of[k] for k in ("activation", "scale")} for name, of in values["packed"].items()}
    del values["packed"], values["config"]["weight_dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = json.loads((tmp_path / "madtp.json").read_text()) | {"version": 5}
    (tmp_path / "madtp.json").write_text(json.dumps(state))
    rewritten_checksum(tmp_path)
    for load in (madtp.from_pretrained, hf.AutoModel.from_pretrained):
        loaded = load(tmp_path)
        assert type(loaded.get_submodule(FC1)) is Sparse24Linear and epilogues_of(loaded) == epilogues_of(model)
        assert all(map(torch.equal, outputs(NAME, loaded), outputs(NAME, model)))


def test_bits_and_bytes_are_figures_of_their_own():
    torch.manual_seed(0)
    model = nn.ModuleDict({"sparse": nn.Linear(32, 16), "dense": nn.Linear(32, 16), "plain": nn.Linear(32, 16)})
    model.forward = lambda x: model["sparse"](x) + model["dense"](x) + model["plain"](x)
    hwp.prune_one_shot(model, "2:4", ["sparse"])
    x = torch.randn(3, 32)
    before, size = profile(model, x), weight_bytes(model)
    assert before.modules["plain"].bit_operations == 512 * 32 * 32 and before.modules["plain"].weight_bytes == 528 * 4
    assert before.total.weight_bytes == size == 3 * 528 * 4
    hwp.pack(model, ["sparse", "dense"], dtype="int8")
    after = profile(model, x)
    for name, counted, weight in (("sparse", 256, 256 + 64 + 64), ("dense", 512, 512 + 64)):
        account = after.modules[name]
        assert (account.params, account.dense_macs, account.counted_macs) == (528, 512, counted)
        assert account.bit_operations == counted * 8 * 8 and account.weight_bytes == weight + 16 * 4
    assert after.total.bit_operations == (256 + 512) * 64 + 512 * 1024
    assert after.total.counted_macs == before.total.counted_macs
    assert profile(model.bfloat16(), x.bfloat16()).total.bit_operations == (256 + 512) * 64 + 512 * 256


def test_the_command_line_and_the_config_take_int8(tmp_path):
    (tmp_path / "config.yaml").write_text("weight_dtype: int8\nmacs_reduction: 0.3\n")
    assert settings(tmp_path / "config.yaml")[0].weight_dtype == "int8"
    assert settings(None)[0].weight_dtype is None
    config, _ = settings(None, weights="int8")
    assert madtp.CompressionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="weight_dtype must be None or int8 or fp8, got 'int4'"):
        settings(None, weights="int4")


def test_a_compression_ends_in_int8(tmp_path):
    data = Questions(24)
    config = dataclasses.replace(RUN, weight_dtype="int8", hwp_schedule="one_shot", macs_reduction=0.5)
    result = madtp.compress(tiny_blip(), Task(), data, data, config, output_dir=tmp_path, training=BRIEF)
    plan, figures = result.report["plan"], result.report["compressed"]
    assert plan["quantized_modules"] == dict.fromkeys(sorted(plan["sparse_modules"]), "int8_24")
    assert plan["packed_modules"] == sorted(plan["sparse_modules"])
    assert schemes_of(result.model) == plan["quantized_modules"]
    assert figures["counted_gmacs"] == pytest.approx(0.5 * figures["dense_gmacs"], rel=0.1)
    assert figures["counted_gbops"] < 0.3 * result.report["dense"]["counted_gbops"]
    assert figures["weight_bytes"] < 0.7 * result.report["dense"]["weight_bytes"]
    assert result.report["config"]["weight_dtype"] == "int8"
