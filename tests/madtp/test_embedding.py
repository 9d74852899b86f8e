# SPDX-License-Identifier: Apache-2.0
"""madtp.embed: the vectors are those of the model, whoever makes them and however often they are stopped."""

import contextlib
import io
import json
import os
import signal
import sys
import tarfile
from pathlib import Path

import families
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import BlipImageProcessorPil

import madtp
from madtp.data.errors import DataError
from madtp.embedding import encoder as encoders
from madtp.embedding.reading import Batch, _full, read_batches
from madtp.embedding.sources import find_shards, tar_items
from madtp.hwp import pack
from madtp_kernels import sparse24_prune

PROCESSOR = BlipImageProcessorPil(size={"height": 16, "width": 16})


def picture(seed, size=(20, 24)):
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def content(seed, **options):
    file = io.BytesIO()
    picture(seed, **options).save(file, "PNG")
    return file.getvalue()


def write_tar(path, samples):
    """samples: name -> bytes."""
    with tarfile.open(path, "w") as tar:
        for name, data in samples.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def photos(tmp_path):
    """Ten images in two folders, and a webdataset shard of three with their captions."""
    root = tmp_path / "photos"
    (root / "a" / "b").mkdir(parents=True)
    for i in range(10):
        picture(i).save(root / ("a/b" if i % 2 else "a") / f"{i}.png")
    (root / "a" / "notes.txt").write_text("none of them")
    samples = {}
    for i in range(3):
        samples |= {f"x/{i:03}.jpg": content(10 + i), f"x/{i:03}.txt": b"a caption"}
    write_tar(root / "more.tar", samples)
    return root


@pytest.fixture(scope="module")
def model():
    return families.build("CLIPModel")


def embed(model, images, out, **options):
    return madtp.embed(
        model, images, out, image_processor=PROCESSOR, **{"images_per_shard": 4, "batch_size": 3} | options
    )


def read(out):
    """Shard and name of an image -> its vector."""
    found = {}
    for summary in json.loads((out / "index.json").read_text())["shards"]:
        vectors = np.load(out / "shards" / f"{summary['name']}.npy")
        keys = json.loads((out / "shards" / f"{summary['name']}.keys.json").read_text())
        assert len(keys) == len(vectors) == summary["images"]
        found |= {(summary["name"], key): vector for key, vector in zip(keys, vectors, strict=True)}
    return found


def files(out):
    """Of a folder, with what is in them."""
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def expected(model, seed, vector):
    """Of one image, by the model itself."""
    pixels = PROCESSOR(picture(seed), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return vector(model, pixels)[0].numpy()


def own_features(model, pixels):
    return model.get_image_features(pixel_values=pixels).pooler_output


VECTORS = {
    "CLIPModel": own_features,
    "SiglipModel": own_features,
    "VisionTextDualEncoderModel (ViT, BERT)": own_features,
    "VisionTextDualEncoderModel (DINOv2, BERT)": own_features,
    "BlipForImageTextRetrieval": lambda model, pixels: F.normalize(
        model.vision_proj(model.vision_model(pixel_values=pixels).last_hidden_state[:, 0]), dim=-1
    ),
    "BlipForNLVR": lambda model, pixels: model.vision_model(pixel_values=pixels).pooler_output,
    "Blip2Model": lambda model, pixels: model.vision_model(pixel_values=pixels).pooler_output,
    "ViTForImageClassification": lambda model, pixels: model.vit(pixel_values=pixels).last_hidden_state[:, 0],
    "Dinov2Model": lambda model, pixels: model(pixel_values=pixels).pooler_output,
    "CLIPVisionModel": lambda model, pixels: model(pixel_values=pixels).pooler_output,
}


@pytest.mark.parametrize("patched", [False, True], ids=["dense", "pruned"])
@pytest.mark.parametrize("family", VECTORS)
def test_the_vectors_are_those_of_the_model(family, patched, photos, tmp_path):
    model = families.patched(family) if patched else families.build(family)
    done = embed(model, photos, tmp_path / "out")
    found = read(tmp_path / "out")
    assert (done.shards, done.images, done.skipped, done.whole, done.new_images) == (4, 13, (), True, 13)
    assert list(found)[:3] == [("more", f"x/{i:03}") for i in range(3)]
    assert [key for shard, key in found if shard != "more"] == sorted(
        f"a/{'b/' if i % 2 else ''}{i}.png" for i in range(10)
    )
    for (shard, key), vector in found.items():
        seed = int(Path(key).stem) + 10 * (shard == "more")
        assert np.allclose(vector, expected(model, seed, VECTORS[family]), atol=1e-5), key


def test_a_tower_that_is_asked_for_is_not_projected(model, photos, tmp_path):
    embed(model, photos, tmp_path / "out", vector="pooled", vector_dtype="float16")
    found = read(tmp_path / "out")
    wanted = expected(model, 0, lambda model, pixels: model.vision_model(pixel_values=pixels).pooler_output)
    vector = found["images-000000", "a/0.png"]
    assert vector.dtype == np.float16 and np.allclose(vector, wanted, atol=1e-2, rtol=1e-2)


def saved(folder, model):
    model.save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    return folder


def test_a_saved_model_pruned_and_packed(photos, tmp_path):
    model = families.patched("CLIPModel")
    with torch.no_grad():
        for module in model.vision_model.encoder.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(sparse24_prune(module.weight).to_dense())
    assert pack(model)
    folder = saved(tmp_path / "model", model)
    madtp.embed(folder, photos, tmp_path / "out")
    found = read(tmp_path / "out")
    assert np.allclose(found["more", "x/002"], expected(model, 12, own_features), atol=1e-5)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["temperature"] == 2.0 and record["settings"]["keep_rate"] is None

    madtp.embed(folder, photos, tmp_path / "kept", keep_rate=0.8)
    again = json.loads((tmp_path / "kept" / "run.json").read_text())
    model.madtp_handle.set_temperature({"vision": again["temperature"]})
    assert again["temperature"] != 2.0 and again["settings"]["model"] == record["settings"]["model"]
    assert np.allclose(read(tmp_path / "kept")["more", "x/002"], expected(model, 12, own_features), atol=1e-5)


@pytest.mark.parametrize("family", ["CLIPModel", "SiglipModel", "Blip2Model", "ViTForImageClassification"])
def test_a_keep_rate_of_a_dense_model_is_kept(family, photos, tmp_path, monkeypatch):
    folder = saved(tmp_path / "model", families.build(family))
    kept = []
    call = encoders.ImageEncoder.__call__

    def counted(self, pixels):
        vectors = call(self, pixels)
        record = self.tower.madtp_handle.pruning["vision"].last
        left = [sum(len(part) for part in layer.kept_positions()) for layer in record.layers]
        kept.append((sum(left) / len(left), record.entered.count_rows()))
        return vectors

    monkeypatch.setattr(encoders.ImageEncoder, "__call__", counted)
    madtp.embed(folder, photos, tmp_path / "out", keep_rate=0.8, images_per_shard=4)
    assert sum(left for left, _ in kept) / sum(entered for _, entered in kept) == pytest.approx(0.8, abs=0.05)
    before = files(tmp_path / "out")
    for path in ("shards/more.json", "shards/images-000001.npy", "index.json"):
        (tmp_path / "out" / path).unlink()
    monkeypatch.setattr(encoders.ImageEncoder, "set_keep_rate", None)  # the temperature is that of run.json
    torch.manual_seed(7)
    assert madtp.embed(folder, photos, tmp_path / "out", keep_rate=0.8, images_per_shard=4).new_images == 7
    assert files(tmp_path / "out") == before


def dies_at(step, after, model, photos, out):
    """Embeds in a process of its own, which is killed at a step of writing; whether it came to that."""
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL)
        return code != 0
    with contextlib.suppress(BaseException):
        torch.set_num_threads(1)
        steps = []

        def killing(function):
            def run(*arguments, **options):
                steps.append(function)
                if len(steps) == step and not after:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = function(*arguments, **options)
                if len(steps) == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return run

        os.replace, os.link, np.save = map(killing, (os.replace, os.link, np.save))
        os.mkdir = killing(os.mkdir)
        embed(model, photos, out)
        os._exit(0)
    os._exit(1)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_any_step_it_loses_and_doubles_nothing(after, model, photos, tmp_path):
    images, step = photos / "more.tar", 1
    embed(model, images, tmp_path / "whole")
    whole = files(tmp_path / "whole")
    while dies_at(step, after, model, images, out := tmp_path / f"out{step}"):
        embed(model, images, out)
        assert files(out) == whole
        assert not [path for path in out.rglob("*") if path.name.startswith(".")]
        step += 1
    assert step > 10


def test_an_error_in_the_midst_of_a_shard_leaves_the_others(model, photos, tmp_path, monkeypatch):
    embed(model, photos, tmp_path / "whole")
    call, calls = encoders.ImageEncoder.__call__, []

    def failing(self, pixels):
        calls.append(len(pixels))
        if len(calls) == 4:
            raise MemoryError
        return call(self, pixels)

    monkeypatch.setattr(encoders.ImageEncoder, "__call__", failing)
    with pytest.raises(MemoryError):
        embed(model, photos, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out" / "shards").glob("*.npy")) == [
        "images-000000.npy", "more.npy",
    ]  # fmt: skip
    del calls[3:]
    calls.append(0)
    assert embed(model, photos, tmp_path / "out").new_images == 6
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_damaged_file_is_made_again(model, photos, tmp_path):
    out = tmp_path / "out"
    embed(model, photos, out)
    whole = files(out)
    for name, data in (("more.npy", b"cut"), ("images-000000.json", b"{"), ("images-000001.keys.json", None)):
        path = out / "shards" / name
        path.write_bytes(data) if data else path.unlink()
        assert embed(model, photos, out).new_images in (3, 4)
        assert files(out) == whole


def test_readers_change_nothing(model, photos, tmp_path):
    embed(model, photos, tmp_path / "one")
    embed(model, photos, tmp_path / "two", workers=2)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_images_of_one_size_go_together(tmp_path):
    for i in range(12):
        picture(i, size=(8, 8) if i % 3 else (4, 6)).save(tmp_path / f"{i:02}.png")
    (shard,) = find_shards([tmp_path], 100)

    def plain(image, return_tensors):
        return {"pixel_values": torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()}

    broken = []
    batches = list(read_batches(shard.items(), plain, 3, 0, broken.append))
    assert not broken and sorted(len(numbers) for numbers, _ in batches) == [1, 2, 3, 3, 3]
    assert sorted(number for numbers, _ in batches for number in numbers) == list(range(12))
    for numbers, pixels in batches:
        for number, image in zip(numbers, pixels, strict=True):
            size = (8, 8) if number % 3 else (4, 6)
            assert torch.equal(image, plain(picture(number, size=size), "pt")["pixel_values"][0])


def test_few_images_wait_for_others():
    chunks = [[Batch([i], torch.zeros(1, 3, i + 1, 1))] for i in range(40)]
    assert [numbers for numbers, _ in _full(chunks, 2)][:3] == [[0], [1], [2]]
    assert len(list(_full(chunks, 2))) == 40


def test_positions_are_interpolated_for_images_of_another_size(photos, tmp_path):
    for family in ("CLIPModel", "ViTForImageClassification", "Dinov2Model", "SiglipModel"):
        model, out = families.patched(family), tmp_path / family
        large = BlipImageProcessorPil(size={"height": 24, "width": 32})
        madtp.embed(model, photos / "a", out, image_processor=large)
        pixels = large(picture(0), return_tensors="pt")["pixel_values"]
        options = {} if family == "Dinov2Model" else {"interpolate_pos_encoding": True}
        tower = model.get_submodule(model.madtp_handle.family.path("vision"))
        with torch.no_grad():
            of_tower = tower(pixel_values=pixels, **options)
            wanted = of_tower.last_hidden_state[:, 0] if of_tower.pooler_output is None else of_tower.pooler_output
            wanted = model.visual_projection(wanted) if family == "CLIPModel" else wanted
        assert np.allclose(read(out)["images-000000", "0.png"], wanted[0].numpy(), atol=1e-5)


def of_rank(rank, world, model, photos, out):
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            torch.set_num_threads(1)
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
            embed(model, photos, out)
            os._exit(0)
        os._exit(1)
    return child


def test_two_processes_write_the_files_of_one(model, photos, tmp_path, monkeypatch):
    embed(model, photos, tmp_path / "one")
    children = [of_rank(rank, 2, model, photos, tmp_path / "two") for rank in range(2)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    assert files(tmp_path / "two") == files(tmp_path / "one")

    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        done = embed(model, photos, tmp_path / "three")
        assert done.whole == (rank == 2) == (tmp_path / "three" / "index.json").exists()
    assert files(tmp_path / "three") == files(tmp_path / "one")
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(ValueError, match="RANK must be a number from 0 to below WORLD_SIZE, got '3' of '3'"):
        embed(model, photos, tmp_path / "three")


def test_the_first_record_counts(model, photos, tmp_path):
    """Processes that begin together may each find a temperature, and all take that of one."""
    from madtp.embedding.record import read_record, write_record

    for temperature in (1.5, 2.5):
        write_record(tmp_path, {"settings": {}, "temperature": temperature, "made_with": {}})
    assert read_record(tmp_path)["temperature"] == 1.5
    assert [path.name for path in tmp_path.glob("*.json")] == ["run.json"]


def test_a_file_system_without_links_does(model, photos, tmp_path, monkeypatch):
    def unsupported(*arguments, **options):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", unsupported)
    assert embed(model, photos, tmp_path / "out").whole and embed(model, photos, tmp_path / "out").new_images == 0


def test_new_shards_are_added(model, photos, tmp_path):
    embed(model, photos / "more.tar", tmp_path / "out")
    write_tar(tmp_path / "other.tar", {"0.png": content(0), "1.png": content(1)})
    done = embed(model, [photos / "more.tar", tmp_path / "other.tar"], tmp_path / "out")
    assert (done.images, done.new_images) == (5, 2) and len(read(tmp_path / "out")) == 5
    with pytest.raises(DataError, match="it has more, and they have no such shard"):
        embed(model, tmp_path / "other.tar", tmp_path / "out")


def test_images_that_changed_are_refused(model, photos, tmp_path):
    embed(model, photos, tmp_path / "out")
    before = files(tmp_path / "out")
    picture(99, size=(9, 9)).save(photos / "a" / "new.png")
    with pytest.raises(DataError, match="must be of the same images: images-00000. was made of .*'files': "):
        embed(model, photos, tmp_path / "out")
    (photos / "a" / "new.png").unlink()
    write_tar(photos / "more.tar", {"0.png": content(0)})
    with pytest.raises(DataError, match="must be of the same images: more was made of .*'bytes': "):
        embed(model, photos, tmp_path / "out")
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"vector": "pooled"}, "vector"),
        ({"vector_dtype": "float16"}, "vector_dtype"),
        ({"images_per_shard": 5}, "images_per_shard"),
    ],
)
def test_other_settings_are_refused(options, name, model, photos, tmp_path):
    embed(model, photos, tmp_path / "out")
    before = files(tmp_path / "out")
    with pytest.raises(ValueError, match=f"out must be a new folder or one with the same {name}, got "):
        embed(model, photos, tmp_path / "out", **options)
    with pytest.raises(ValueError, match="one with the same model, got "):
        embed(families.patched("CLIPModel"), photos, tmp_path / "out")
    assert files(tmp_path / "out") == before
    assert embed(model, photos, tmp_path / "out", batch_size=1, workers=1, broken="refuse").new_images == 0


def test_broken_images_are_skipped_or_refused(model, photos, tmp_path):
    (photos / "a" / "3.png").write_bytes(b"no image")
    (photos / "a" / "4.png").write_bytes(content(4)[:300])
    os.symlink("nowhere", photos / "a" / "b" / "link.png")
    with pytest.raises(DataError, match="link.png cannot be read \\(No such file"):
        embed(model, photos, tmp_path / "out")
    (photos / "a" / "b" / "link.png").unlink()
    done = embed(model, photos, tmp_path / "out")
    reasons = {key: reason for _, key, reason in done.skipped}
    assert reasons["a/3.png"] == "no picture of a known format" and set(reasons) == {"a/3.png", "a/4.png"}
    assert done.images == 12 and not {key for _, key in read(tmp_path / "out")} & set(reasons)
    again = embed(model, photos, tmp_path / "out")
    assert again.skipped == done.skipped and again.new_images == 0
    with pytest.raises(DataError, match=r"image a/3.png of images-000000 cannot be read \(no picture"):
        embed(model, photos, tmp_path / "refused", broken="refuse")
    assert not list((tmp_path / "refused" / "shards").glob("images-000000*"))


def test_a_shard_of_broken_images_alone_is_refused(model, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="must have an image that can be read, got none of 1: a.png"):
        embed(model, tmp_path / "data", tmp_path / "out")
    folder = saved(tmp_path / "model", families.build("CLIPModel"))
    with pytest.raises(DataError, match="the first 1 images must have some that can be read, for keep_rate"):
        madtp.embed(folder, tmp_path / "data", tmp_path / "other", keep_rate=0.7)


@pytest.mark.parametrize("cut", [100, 512, 700, 1024 + 512, 1536])
def test_a_tar_that_is_cut_off_leaves_the_others_done(cut, model, photos, tmp_path):
    samples = {f"{i}.png": content(i) for i in range(4)}
    write_tar(photos / "cut.tar", samples)
    whole = (photos / "cut.tar").read_bytes()
    end = 4 * 512 + sum(-(-len(data) // 512) * 512 for data in samples.values())
    (photos / "cut.tar").write_bytes(whole[: end - cut + (1024 if cut > 1024 else 0)])
    with pytest.raises(DataError, match="cut.tar is no whole tar file") as error:
        embed(model, photos, tmp_path / "out")
    assert "1 of 5 shards could not be embedded, first: " in str(error.value)
    assert (
        len(list((tmp_path / "out" / "shards").glob("*.npy"))) == 4 and not (tmp_path / "out" / "index.json").exists()
    )
    with pytest.raises(DataError, match="cut.tar is no whole tar file"):
        embed(model, photos, tmp_path / "new", broken="refuse")
    (photos / "cut.tar").write_bytes(whole)
    assert embed(model, photos, tmp_path / "out").new_images == 4


def test_odd_tars(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, {"x/0.jpg": content(0), "x/0.png": content(0)})
    with pytest.raises(DataError, match="must have one image of each key, got x/0.jpg and x/0.png"):
        tar_items(path)
    write_tar(path, {"x/0.left.jpg": content(0), "x/0.right.jpg": content(0)})
    with pytest.raises(DataError, match="must have one image of each key"):
        tar_items(path)
    write_tar(path, {"0.txt": b"text"})
    with pytest.raises(DataError, match="must hold images .*, got none"):
        tar_items(path)
    with tarfile.open(path, "w:gz") as tar:
        tar.add(__file__)
    with pytest.raises(DataError, match="is no whole tar file .*; compressed ones are not read"):
        tar_items(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="is no whole tar file"):
        tar_items(path)


def test_data_that_is_none(model, photos, tmp_path):
    def refused(data, match, **options):
        with pytest.raises((DataError, ValueError), match=match):
            embed(model, data, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    (tmp_path / "empty").mkdir()
    refused(tmp_path / "none", "image data .*none must exist, and does not")
    refused(tmp_path / "empty", r"must hold images \(.jpg, .*\) or .tar files, got none")
    refused([], "images must be at least one folder or tar file, got none")
    refused(photos / "a" / "0.png", "image data must be folders or .tar files")
    refused([photos, photos / "a"], "must be apart from each other")
    refused([photos, photos], "must be apart from each other")
    (tmp_path / "twice" / "a").mkdir(parents=True)
    picture(0).save(tmp_path / "twice" / "a" / "0.png")
    refused([photos, tmp_path / "twice"], "must have one file of each name, got .*0.png and .*0.png")
    write_tar(photos / "images-000000.tar", {"0.png": content(0)})
    refused(photos, "must not be called images-000000")


def test_arguments_that_break_a_rule(model, photos, tmp_path):
    out = tmp_path / "out"
    for options, match in (
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"workers": -1}, "workers must be an integer of at least 0, got -1"),
        ({"images_per_shard": 1.5}, "images_per_shard must be an integer of at least 1, got 1.5"),
        ({"ray": 0}, "ray must be an integer of at least 1, got 0"),
        ({"vector_dtype": "int8"}, "vector_dtype must be float32 or float16, got 'int8'"),
        ({"broken": "keep"}, "broken must be skip or refuse, got 'keep'"),
        ({"vector": "mean"}, "vector must be projected or pooled for a CLIPModel, got 'mean'"),
        ({"keep_rate": 0.5}, "keep_rate must be None for a model in memory, which runs as it is, got 0.5"),
        ({"image_processor": None}, "image_processor must be given for a model in memory, got None"),
    ):
        with pytest.raises(ValueError, match=match):
            madtp.embed(model, photos, out, **{"image_processor": PROCESSOR} | options)
    folder = saved(tmp_path / "model", model)
    for options, match in (
        ({"keep_rate": 1.5}, "keep_rate"),
        ({"dtype": "int8"}, "dtype must be the name of a floating-point dtype of torch, got 'int8'"),
        ({"device": "nowhere"}, "device must be one that torch can use, got 'nowhere'"),
        ({"image_processor": PROCESSOR}, "image_processor must be None for the folder of a model"),
    ):
        with pytest.raises(ValueError, match=match):
            madtp.embed(folder, photos, out, **options)
    with pytest.raises(TypeError, match="model must be one of BlipForQuestionAnswering, .*, got Linear"):
        embed(torch.nn.Linear(2, 2), photos, out)
    with pytest.raises(ValueError, match="model must have a vision tower, got a BertModel"):
        embed(families.build("BertModel"), photos, out)
    with pytest.raises(ValueError, match="vector must be pooled for a ViTModel, got 'projected'"):
        embed(families.build("ViTModel"), photos, out, vector="projected")
    assert not out.exists()
    for place in (photos, photos / "a" / "vectors"):
        with pytest.raises(ValueError, match="out must lie outside of the images"):
            embed(model, photos, place)
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="out must be an empty folder, or one of madtp embed with run.json"):
        embed(model, photos, out)
    (out / "run.json").write_text("{")
    with pytest.raises(ValueError, match="out must be a folder of madtp embed, got one whose"):
        embed(model, photos, out)


def test_weights_that_are_not_there_are_refused_and_a_pooler_goes(photos, tmp_path):
    model = families.build("ViTForImageClassification")
    folder = saved(tmp_path / "model", model)
    weights = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["ViTModel"]}))
    save_file({name.removeprefix("vit."): value for name, value in weights.items()}, folder / "model.safetensors")
    for options in ({}, {"keep_rate": 1.0}):
        madtp.embed(folder, photos, tmp_path / f"out{len(options)}", **options)
        found = read(tmp_path / f"out{len(options)}")["more", "x/001"]
        assert np.allclose(found, expected(model, 11, VECTORS["ViTForImageClassification"]), atol=1e-5)
    weights.pop("vit.layernorm.weight")
    save_file({name.removeprefix("vit."): value for name, value in weights.items()}, folder / "model.safetensors")
    with pytest.raises(DataError, match="must hold all weights, lacks 1 .first: layernorm.weight"):
        madtp.embed(folder, photos, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_vector_too_large_for_its_dtype_is_refused(photos, tmp_path):
    model = families.build("CLIPModel")
    with torch.no_grad():
        model.visual_projection.weight.mul_(1e6)
    with pytest.raises(DataError, match="must have a finite vector in float16, got another"):
        embed(model, photos, tmp_path / "out", vector_dtype="float16")
    assert embed(model, photos, tmp_path / "wide").images == 13


def test_the_command(photos, tmp_path, monkeypatch, capsys):
    from madtp import cli

    folder = saved(tmp_path / "model", families.build("CLIPModel"))
    (photos / "a" / "3.png").write_bytes(b"no image")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["madtp", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code or 0, *capsys.readouterr()

    command = ("embed", folder, "--data", photos / "a", "--data", photos / "more.tar", "--out", tmp_path / "out")
    options = ("--vector-dtype", "float16", "--dtype", "bfloat16", "--images-per-shard", 4)
    code, out, err = run(*command, *options)
    assert code == 0, err
    assert out.splitlines()[0] == "13 images in 4 shards, 1 skipped" and str(tmp_path / "out" / "index.json") in out
    assert "skipped 3.png of images-000000: no picture of a known format" in err and "a second" in out
    assert next(iter(read(tmp_path / "out").values())).dtype == np.float16
    assert "new: 0\n" in run(*command, *options)[1]
    code, out, err = run(*command)
    assert (code, out) == (2, "") and err.startswith("error: out must be a new folder or one with the same dtype")

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("madtp.embedding.run.find_shards", interrupted)
    code, _, err = run(*command)
    assert code == 130 and err.strip().endswith(f"go on with: madtp {' '.join(map(str, command))}")


@pytest.mark.slow
def test_ray_writes_the_files_of_one_process(model, photos, tmp_path):
    ray = pytest.importorskip("ray", reason="ray is not installed")
    write_tar(tmp_path / "cut.tar", {"0.png": content(0)})
    (tmp_path / "cut.tar").write_bytes((tmp_path / "cut.tar").read_bytes()[:700])
    embed(model, photos, tmp_path / "one")
    try:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        done = embed(model, photos, tmp_path / "two", ray=2)
        assert done.new_images == 13 and files(tmp_path / "two") == files(tmp_path / "one")
        (tmp_path / "two" / "shards" / "more.json").unlink()
        assert embed(model, photos, tmp_path / "two", ray=2).new_images == 3
        assert files(tmp_path / "two") == files(tmp_path / "one")
        with pytest.raises(DataError, match="1 of 5 shards could not be embedded, first: .*cut.tar"):
            embed(model, [photos, tmp_path / "cut.tar"], tmp_path / "two", ray=1)
    finally:
        ray.shutdown()


def test_ray_that_is_not_there(model, photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match="ray is needed for ray=: pip install ray"):
        embed(model, photos, tmp_path / "out", ray=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "ray", sys)
    monkeypatch.setitem(sys.modules, "ray.util", sys)
    with pytest.raises(ValueError, match="ray must be None where WORLD_SIZE is above 1"):
        embed(model, photos, tmp_path / "out", ray=2)
    assert not (tmp_path / "out").exists()
