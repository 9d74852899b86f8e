# SPDX-License-Identifier: Apache-2.0
"""save_pretrained of a patched model: every argument of it works, or is refused before anything is written."""

import json
import os
import re
import shutil

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from test_auto_classes import compressed, outputs

import madtp
from madtp.files import file_sha256

NAME = "ViTModel"


@pytest.fixture(scope="module")
def model():
    return compressed(NAME)


def same(loaded, model):
    return all(map(torch.equal, outputs(NAME, loaded), outputs(NAME, model)))


@pytest.mark.parametrize(
    ("options", "loading"),
    [
        ({}, {}),
        ({"max_shard_size": "20KB"}, {}),
        ({"max_shard_size": 20_000, "variant": "fp16"}, {"variant": "fp16"}),
        ({"variant": "fp16"}, {"variant": "fp16"}),
        ({"safe_serialization": True, "save_function": torch.save, "token": "none", "save_peft_format": False}, {}),
    ],
)
def test_what_was_saved_loads_again(options, loading, model, tmp_path):
    model.save_pretrained(tmp_path / "first", **options)
    shutil.move(tmp_path / "first", tmp_path / "moved")  # no file knows where it lies
    folder = tmp_path / "moved"
    weights = sorted(path.name for path in folder.glob("*.safetensors"))
    assert (len(weights) > 1) == ("max_shard_size" in options)
    state = json.loads((folder / "madtp.json").read_text())
    index = [path.name for path in folder.glob("*.index*.json")]
    names = ["config.json", *weights, *index]
    assert state == {"version": 6, "sha256": {name: file_sha256(folder / name) for name in names}}
    for load in (madtp.from_pretrained, hf.AutoModel.from_pretrained):
        assert same(load(folder, **loading), model)
    assert not [name for name in os.listdir(folder) if name.startswith(".")]
    (folder / weights[-1]).write_bytes(b"x" * 100)
    for load in (madtp.from_pretrained, hf.AutoModel.from_pretrained):
        with pytest.raises(madtp.ModelError, match=f"{weights[-1]} is not as it was written: its checksum does not"):
            load(folder, **loading)


def test_nothing_is_left_of_an_earlier_save(model, tmp_path):
    """A single file would be read before the shards, and the other way round."""
    other = compressed(NAME, packed=False)
    for options in ({}, {"max_shard_size": "20KB"}, {"max_shard_size": "40KB"}, {}):
        other.save_pretrained(tmp_path, **options)
        model.save_pretrained(tmp_path, **({} if options else {"max_shard_size": "20KB"}))
        assert same(hf.AutoModel.from_pretrained(tmp_path), model)
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")  # beside the others
    for variant in (None, "fp16"):
        assert same(madtp.from_pretrained(tmp_path, variant=variant), model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"push_to_hub": True}, r"push_to_hub must be False .*, got True: call model.push_to_hub\(repo_id\)"),
        ({"distributed_checkpoint": True}, "distributed_checkpoint must be False for a patched model, got True"),
        ({"save_original_format": True}, "save_original_format must be False for a patched model, got True"),
        ({"safe_serialization": False}, "safe_serialization must be True for a patched model, got False"),
        ({"max_shard_size": "many"}, "max_shard_size must be a number of bytes or such as .*, got 'many'"),
        ({"max_shard_size": -1}, "max_shard_size must be a number of bytes or such as .*, got -1"),
        ({"variant": "a/b"}, "variant must be a part of a file name, such as fp16, got 'a/b'"),
        ({"state_dict": {}}, r"state_dict must be one of the model, \d+ keys are not \(first: embeddings.cls_token\)"),
        ({"state_dict": {"module.x": torch.ones(1)}}, "state_dict must be one of the model"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(options, message, model, tmp_path):
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="save_directory must be a directory, got the file"):
        model.save_pretrained(tmp_path / "file")


def test_what_fails_on_the_way_leaves_what_was_there(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fails(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fails)
    with pytest.raises(OSError, match="no space left"):
        compressed(NAME, packed=False).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_processes_write_nothing(model, tmp_path):
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.iterdir())


def test_a_state_dict_is_saved_with_its_settings(model, tmp_path):
    state = {
        name: torch.zeros_like(value) if "layernorm" in name else value for name, value in model.state_dict().items()
    }
    model.madtp_handle.set_temperature(3.0)
    hot = model.state_dict()
    model.madtp_handle.set_temperature(2.0)
    keys = list(state)
    model.save_pretrained(tmp_path, True, state | {"madtp_settings._extra_state": hot["madtp_settings._extra_state"]})
    assert list(state) == keys
    loaded = madtp.from_pretrained(tmp_path)
    assert loaded.madtp_handle.temperatures == {"vision": 3.0} and not loaded.layernorm.weight.any()
    del state["madtp_settings._extra_state"]
    model.save_pretrained(tmp_path, state_dict=state)
    assert madtp.from_pretrained(tmp_path).madtp_handle.temperatures == {"vision": 2.0}


def test_push_to_hub_uploads_what_is_saved(model, tmp_path, monkeypatch):
    class Anything:
        repo_id = "user/vit"

        def save(self, path):
            pass

    def upload(self, working_dir, repo_id, *args, **kwargs):
        shutil.copytree(working_dir, tmp_path / "hub")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *args, **kwargs: Anything)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *args, **kwargs: Anything())
    monkeypatch.setattr(type(model), "_upload_modified_files", upload)
    model.push_to_hub("user/vit")
    assert same(madtp.from_pretrained(tmp_path / "hub"), model)


def test_a_model_on_the_hub(model, tmp_path, monkeypatch):
    """As it lies in the cache; nothing asks the network whether there is a newer one."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commit = "0" * 40
    repo = tmp_path / "models--user--vit"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    snapshot = repo / "snapshots" / commit / "sub"
    model.save_pretrained(snapshot, variant="fp16")
    options = {"cache_dir": tmp_path, "local_files_only": True, "subfolder": "sub", "variant": "fp16"}
    assert same(madtp.from_pretrained("user/vit", **options), model)
    assert same(hf.AutoModel.from_pretrained("user/vit", **options), model)
    with pytest.raises(madtp.ModelError, match="user/other is not a compressed model"):
        madtp.from_pretrained("user/other", **options)
    with pytest.raises(madtp.ModelError, match="user/vit is not a compressed model"):
        madtp.from_pretrained("user/vit", **options | {"subfolder": ""})
    assert same(madtp.from_pretrained(snapshot.parent, subfolder="sub", variant="fp16", use_safetensors=True), model)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "float99"}, ValueError, "dtype must be one of torch, its name, or \"auto\", got 'float99'"),
        ({"use_safetensors": False}, ValueError, "use_safetensors must be None or True, got False"),
        ({"ignore_mismatched_sizes": True}, TypeError, "unexpected keyword argument 'ignore_mismatched_sizes'"),
    ],
)
def test_loading_refuses(options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        madtp.from_pretrained(tmp_path, **options)


def test_attention_of_the_parts_that_are_not_pruned(tmp_path):
    blip = compressed("BlipForQuestionAnswering")
    blip.save_pretrained(tmp_path)
    assert madtp.from_pretrained(tmp_path, attn_implementation="eager").config._attn_implementation == "eager"


def test_weights_that_are_no_file(model, tmp_path):
    model.save_pretrained(tmp_path)
    os.remove(tmp_path / "model.safetensors")
    with pytest.raises(madtp.ModelError, match="cannot be read .*; save the model again"):
        madtp.from_pretrained(tmp_path)
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(madtp.ModelError, match="cannot be read .*; save the model again"):
        madtp.from_pretrained(tmp_path)


def rewritten(folder, change):
    """A folder with other weights and right checksums."""
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})
    state = json.loads((folder / "madtp.json").read_text())
    state["sha256"]["model.safetensors"] = file_sha256(folder / "model.safetensors")
    (folder / "madtp.json").write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: {k: v for k, v in w.items() if not re.search("fc1.indices", k)},
            "weights must hold .*fc1.indices as",
        ),
        (lambda w: {k: v for k, v in w.items() if "fc1.weight" not in k}, "weights must hold .*fc1.weight as"),
        (
            lambda w: {k: v for k, v in w.items() if "madtp_guide" not in k},
            "weights must hold madtp_guide.alignment_to",
        ),
        (
            lambda w: {k: 0 * v if "fc1.indices" in k else v for k, v in w.items()},
            "indices must .* two ascending columns",
        ),
        (
            lambda w: {k: v[:8] if "fc1.weight" in k else v for k, v in w.items()},
            "weights must hold .*fc1.weight as|ignore_",
        ),
    ],
)
def test_packed_layers_and_the_guide_need_all_their_weights(change, message, model, tmp_path):
    model.save_pretrained(tmp_path)
    rewritten(tmp_path, change)
    for load in (madtp.from_pretrained, hf.AutoModel.from_pretrained):
        with pytest.raises(RuntimeError, match=message):
            load(tmp_path)


def test_every_weight_has_its_place(model, tmp_path):
    model.save_pretrained(tmp_path)
    rewritten(tmp_path, lambda weights: weights | {"other": torch.ones(1)})
    with pytest.raises(madtp.ModelError, match="weights must match config.json, 1 do not .first: other."):
        madtp.from_pretrained(tmp_path)
    hf.AutoModel.from_pretrained(tmp_path)  # which only tells of it


@pytest.mark.parametrize("version", [3, 4])
def test_a_folder_of_an_earlier_version(version, model, tmp_path):
    """It said all in madtp.json, and called the values of a packed layer `values`."""
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    settings = config.pop("quantization_config")
    (tmp_path / "config.json").write_text(json.dumps(config))

    def earlier(weights):
        packed = {f"{name}.weight": f"{name}.values" for name in settings["packed"]}
        return {packed.get(k, k): v for k, v in weights.items() if "_extra_state" not in k}

    rewritten(tmp_path, earlier)
    if version == 3:
        settings["config"]["flops_reduction"] = settings["config"].pop("macs_reduction")
    packed = {name: {"activation": of["activation"], "scale": of["scale"]} for name, of in settings["packed"].items()}
    state = {"version": version, "config": settings["config"], "sparse24": packed}
    state |= {"temperatures": {"vision": 2.0}, "weights_sha256": file_sha256(tmp_path / "model.safetensors")}
    (tmp_path / "madtp.json").write_text(json.dumps(state))
    loaded = madtp.from_pretrained(tmp_path)
    assert same(loaded, model)
    loaded.save_pretrained(tmp_path)
    assert same(hf.AutoModel.from_pretrained(tmp_path), model)
    (tmp_path / "madtp.json").write_text(json.dumps(state | {"weights_sha256": "0"}))
    with pytest.raises(madtp.ModelError, match="model.safetensors is not as it was written"):
        madtp.from_pretrained(tmp_path)


def test_adapters_inside_are_refused_before_anything_is_written(model, tmp_path):
    peft = pytest.importorskip("peft")
    from madtp.hwp.lora import support_packed

    peft.get_peft_model(model, support_packed(peft.LoraConfig(target_modules=["q_proj"])))
    with pytest.raises(ValueError, match="model must have no adapters inside, got one at layers.0.attention.q_proj"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
