# SPDX-License-Identifier: Apache-2.0
"""Files that ask for too much or are of another kind are refused at once, with what the reader promises."""

import json
import os
import shutil
import struct
import zipfile
import zlib

import pytest
import torch
import transformers as hf
from families import blip_config, randomised
from PIL import Image
from safetensors.torch import load_file, save_file
from test_auto_classes import compressed
from test_blip_original import original, saved
from torch import nn

import madtp
from madtp.budgets.plan import Plan
from madtp.building import MIN_ELEMENTS, TooLargeError, check_counts, no_larger_than
from madtp.cli.options import settings
from madtp.data.annotations import CaptionAnnotations
from madtp.data.errors import DataError
from madtp.data.images import read_image
from madtp.dtp.settings import MAX_BYTES, BranchSettings
from madtp.files import file_sha256
from madtp.models import from_original
from madtp.patching import pretrained
from madtp.tasks.loading import architecture, load_image_processor, load_model, load_tokenizer
from madtp.training.trainer import CONTROLLER_FILE, last_checkpoint
from madtp_kernels import Pattern
from madtp_kernels.bounded_file import MAX_JSON, MAX_MESSAGE, one_line, parse_json, read_bytes, read_json
from madtp_kernels.table_file import read as read_table

BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


def one_of(kind, path):
    """Something that is no regular file."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.symlink_to(path.name)
    return path


KINDS = ["pipe", "directory", "device", "loop of links"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_regular_file_is_not_opened(kind, tmp_path):
    path = one_of(kind, tmp_path / "file")
    promised = (OSError, ValueError)
    for read in (read_bytes, read_json, read_table, Plan.load, settings, lambda path: from_original(path, kind="vqa")):
        with pytest.raises(promised, match="must be a regular file|symbolic links"):
            read(path)
    with pytest.raises(DataError, match="file cannot be read .*(regular file|symbolic links).*; look"):
        read_image(path, "; look")
    with pytest.raises(DataError, match="annotation file .*(regular file|symbolic links)"):
        CaptionAnnotations(path, tmp_path, None, None)


def test_a_link_to_a_file_is_one(tmp_path):
    """As the cache of the Hub has them."""
    (tmp_path / "blob").write_text("[1]")
    (tmp_path / "file").symlink_to("blob")
    assert read_json(tmp_path / "file") == [1]


def test_a_file_may_not_be_too_large(tmp_path):
    with open(tmp_path / "file", "wb") as file:
        file.truncate(1 << 40)  # which takes no room
    for read in (read_json, Plan.load, settings):
        with pytest.raises(
            ValueError, match=f"must have at most {'1048576' if read is not read_json else MAX_JSON} bytes"
        ):
            read(tmp_path / "file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 10**5 + "]" * 10**5, "at most 32 deep"),
        ("[" * 40 + "]" * 40, "at most 32 deep"),
        ("1" + "0" * 40, "at most 64 bits, got one of 133"),
        ("1" * 5000, "4300 digits"),
        ('"\\ud800"', "surrogates not allowed"),
        (b"\xff\xfe", "decode"),
        ("{", "Expecting"),
    ],
)
def test_json_of_odd_values(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_messages_are_short():
    assert one_line("a\n b" * 1000) == one_line("a b" * 1000) and len(one_line("ab " * 10**6)) <= MAX_MESSAGE
    assert one_line(ValueError()) == "ValueError" and one_line("a\n\nb") == "a b"


@pytest.mark.parametrize("read", [Plan.load, settings])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, r"must have no aliases, got \*a"),
        ("1: 2", "keys must be text, got 1"),
        ("{" * 10**5, "maximum nesting depth|at most 32 deep"),
        ("- " * 10**5, "at most 32 deep"),
        ("seed: " + "9" * 1000, "at most 64 bits"),
        ("seed: " + "9" * 5000, "4300 digits"),
        (b"seed: \xff", "decode"),
        ("seed: 2020-01-01", "must be those of JSON, got a date"),
        ("seed: !!int x", "must be YAML of plain values"),
        ("seed: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("".join(f"{'x' * 100}{i}: 1\n" for i in range(100)), "xxx \\.\\.\\.|known fields .* \\.\\.\\."),
    ],
)
def test_yaml_of_odd_values(read, text, message, tmp_path):
    (tmp_path / "file.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path / "file.yaml")
    assert len(str(error.value)) < 800


def test_a_plan_maps_names_to_numbers():
    with pytest.raises(ValueError, match="predicted must map names to numbers, got .'ms': 'fast'"):
        Plan(0.5, {"vision": 0.5}, (), predicted={"ms": "fast"})


def test_a_pattern_is_short():
    assert Pattern.parse("2:16384").m == 16384
    with pytest.raises(ValueError, match="pattern must have an m of at most 16384, got '1:1000000000'"):
        madtp.CompressionConfig(pattern="1:1000000000")


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def picture_of(side):
    """A PNG of few bytes that says how large it is."""
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [10_000, 100_000])
def test_a_picture_of_too_many_pixels(side, tmp_path):
    (tmp_path / "1.png").write_bytes(picture_of(side))
    with pytest.raises(DataError, match="exceeds limit of"):
        read_image(tmp_path / "1.png")


@pytest.mark.parametrize(
    ("image", "message"),
    [("a\0b", "must be the name of a file"), ("none.png", "No such file"), ("x" * 5000, "too long")],
)
def test_names_that_no_picture_has(image, message, tmp_path):
    (tmp_path / "r.json").write_text(json.dumps([{"image": image, "caption": "a"}]))
    processor = hf.BlipImageProcessor(size={"height": 16, "width": 16})
    data = CaptionAnnotations(tmp_path / "r.json", tmp_path, None, processor)
    with pytest.raises(DataError, match=message) as error:
        data._image(data.records[0]["image"])
    assert len(str(error.value)) < 700


@pytest.mark.parametrize(
    "text", ["[" * 10**5, '[{"image": "1.png", "caption": "\\ud800"}]', "[1e", '[{"image": ' + "9" * 5000 + "}]"]
)
def test_annotations_of_odd_values(text, tmp_path):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(DataError, match="annotation file .* must be JSON"):
        CaptionAnnotations(tmp_path / "r.json", tmp_path, None, None)


def test_original_checkpoints_of_odd_values(tmp_path):
    state = original(randomised(hf.BlipForImageTextRetrieval(blip_config())))

    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            from_original(saved(tmp_path, state | changes), kind="retrieval")

    refused("numbered from 0 on", **{"visual_encoder.blocks.1000000000.norm1.weight": torch.ones(32)})
    refused("numbered from 0 on", **{f"text_encoder.encoder.layer.{'9' * 5000}.x": torch.ones(1)})
    refused("each of its own bytes; 'a' is none", a=torch.ones(1).expand(1 << 40))
    refused("'a' is none", a="text")
    refused("'a' is none", a=torch.ones(2).to_sparse())
    refused("'a' is none", a=torch.ones(2, dtype=torch.int8))
    refused("of four dimensions", **{"visual_encoder.patch_embed.proj.weight": torch.ones(3)})
    refused("sizes can be read off", **{"visual_encoder.pos_embed": torch.ones(1)})
    wide = {"visual_encoder.patch_embed.proj.weight": torch.ones(1 << 15, 3, 1, 1)}
    refused("can be built .config must be of a model for these weights", **wide)

    path = saved(tmp_path, state)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "packed", "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in archive.infolist():
            packed.writestr(entry.filename, archive.read(entry))
    with pytest.raises(ValueError, match="must not be compressed"):
        from_original(tmp_path / "packed", kind="retrieval")


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    compressed("ViTModel").save_pretrained(folder / "one")
    compressed("ViTModel").save_pretrained(folder / "shards", max_shard_size="20KB")
    return folder


def changed(folder, change, name="config.json"):
    """Another file of JSON, with the right checksum."""
    values = json.loads((folder / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values))
    state = json.loads((folder / "madtp.json").read_text())
    state["sha256"][name] = file_sha256(folder / name)
    (folder / "madtp.json").write_text(json.dumps(state))


def set_ours(**values):
    return lambda config: config["quantization_config"].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(num_hidden_layers=10**5), "config must be of a model for these weights"),
        (lambda c: c.update(num_hidden_layers=10**9), "num_hidden_layers of config must be at most 1048576"),
        (lambda c: c.update(num_labels=2**30), "num_labels of config must be at most"),
        (lambda c: c.update(image_size=10**8), "image_size of config must be at most"),
        (lambda c: c.update(hidden_size=2**16), "config must be of a model for these weights"),
        (lambda c: c.update(architectures=[["ViTModel"]]), "must hold one of"),
        (lambda c: c.update(architectures={}), "is not a compressed model"),
        (set_ours(packed=[]), "cannot be read"),
        (set_ours(packed={"a": []}), "cannot be read"),
        (set_ours(branches=3), "cannot be read"),
        (set_ours(config=[]), "cannot be read"),
        (set_ours(keep=[]), "cannot be read"),
        (set_ours(version=[6]), r"must be of version 6, got \[6\]"),
        (lambda c: c["quantization_config"]["config"].update(alignment_tokens=10**9), "more alignment tokens than"),
        (lambda c: c["quantization_config"]["config"].update(pattern="1:1000000000"), "an m of at most"),
    ],
)
def test_configs_that_ask_for_too_much(change, message, saved_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved_model / "one", folder)
    changed(folder, change)
    with pytest.raises(madtp.ModelError, match=message) as error:
        madtp.from_pretrained(folder)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("name", ["config.json", "madtp.json", "model.safetensors", "generation_config.json"])
@pytest.mark.parametrize("kind", KINDS)
def test_models_of_files_that_are_none(kind, name, saved_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved_model / "one", folder)
    (folder / name).unlink(missing_ok=True)
    one_of(kind, folder / name)
    with pytest.raises(madtp.ModelError, match="regular file|symbolic links"):
        madtp.from_pretrained(folder)


def test_an_index_that_leads_elsewhere(saved_model, tmp_path):
    """Its shards have the names of those that were written, in another directory."""
    folder, index = tmp_path / "model", "model.safetensors.index.json"
    shutil.copytree(saved_model / "shards", folder)
    (tmp_path / "other").mkdir()
    for path in folder.glob("*.safetensors"):
        shutil.copy(path, tmp_path / "other")
    values = json.loads((folder / index).read_text())
    values["weight_map"] = {name: f"../other/{file}" for name, file in values["weight_map"].items()}
    (folder / index).write_text(json.dumps(values))
    with pytest.raises(madtp.ModelError, match="index.json is not as it was written"):
        madtp.from_pretrained(folder)
    changed(folder, lambda index: None, index)
    with pytest.raises(madtp.ModelError, match="weight_map of model.safetensors.index.json must name files that"):
        madtp.from_pretrained(folder)


def test_a_model_that_is_written_while_it_is_read(saved_model, tmp_path, monkeypatch):
    folder, read = tmp_path / "model", pretrained._held
    shutil.copytree(saved_model / "shards", folder)

    def meanwhile(*arguments):
        shutil.copy(folder / "madtp.json", tmp_path)
        os.replace(tmp_path / "madtp.json", folder / "madtp.json")
        return read(*arguments)

    monkeypatch.setattr(pretrained, "_held", meanwhile)
    with pytest.raises(madtp.ModelError, match="was written to while it was read: load it again$"):
        madtp.from_pretrained(folder)


def test_what_cannot_be_opened_is_passed_over(saved_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved_model / "shards", folder)
    (folder / "data.json").mkdir()
    (folder / "notes.txt").symlink_to("nowhere")
    madtp.from_pretrained(folder)


def test_weights_of_others_beside_a_dense_model(tmp_path):
    model = hf.ViTModel(hf.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    os.unlink(tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "pytorch_model.bin")
    save_file({"lora": torch.zeros(3)}, tmp_path / "adapter_model.safetensors")
    assert isinstance(load_model(tmp_path), hf.ViTModel)


def test_dense_models_that_ask_for_too_much(tmp_path):
    hf.ViTModel(
        hf.ViTConfig(hidden_size=32, num_attention_heads=2, intermediate_size=48, num_hidden_layers=1)
    ).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for layers, message in ((10**5, "config must be of a model for these weights"), (10**9, "must be at most 1048576")):
        (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
        with pytest.raises(DataError, match=message):
            load_model(tmp_path, [hf.ViTModel])
    for odd in ("[]", '{"architectures": 3}', "[" * 10**5):
        (tmp_path / "config.json").write_text(odd)
        with pytest.raises(DataError, match="cannot be read"):
            architecture(tmp_path)
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match="no tokenizer .*regular file"):
        load_tokenizer(tmp_path)
    assert load_image_processor(tmp_path) is None


def test_what_is_built_is_no_larger_than_its_weights():
    with no_larger_than(2, 10):
        nn.Linear(10, 10)
        with pytest.raises(TooLargeError, match="for these weights of 10 elements"):
            nn.Linear(1, MIN_ELEMENTS, device="meta").register_parameter("more", nn.Parameter(torch.empty(100)))
        with pytest.raises(TooLargeError, match="for these 2 weights, got one of more modules"):
            nn.ModuleList(nn.Identity() for _ in range(10**5))
    nn.Linear(1, 2 * MIN_ELEMENTS, device="meta")
    check_counts({"rope_theta": 10**12, "layer_norm_eps": 1e-6, "time_limit": float("inf"), "a": {"num_layers": 12}})
    with pytest.raises(ValueError, match="a.depths of config must be at most 1048576, got 10000000"):
        check_counts({"a": {"depths": [2, 10**7]}})


def test_a_state_of_settings_is_short():
    with pytest.raises(ValueError, match="must be JSON of their settings, got 65537 bytes, above 65536"):
        BranchSettings({}).parse(torch.zeros(MAX_BYTES + 1, dtype=torch.uint8))


def test_a_checkpoint_has_a_number(tmp_path):
    for name in ("checkpoint-3", "checkpoint-20", "checkpoint-last", "checkpoint-"):
        (tmp_path / name).mkdir()
        (tmp_path / name / CONTROLLER_FILE).touch()
    assert last_checkpoint(tmp_path).name == "checkpoint-20"


def test_a_picture_is_read(tmp_path):
    Image.new("L", (3, 2), 7).save(tmp_path / "1.png")
    assert read_image(tmp_path / "1.png").getpixel((0, 0)) == (7, 7, 7)
