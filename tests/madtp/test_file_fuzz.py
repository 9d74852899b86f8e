# SPDX-License-Identifier: Apache-2.0
"""Files that were changed at random: each loads as it was or raises what its reader promises, soon and in a line.

`python -m pytest tests/madtp/test_file_fuzz.py -m slow` changes many more.
"""

import copy
import json
import os
import random
import resource
import shutil
import signal
import struct
from contextlib import contextmanager

import pytest
import torch
import transformers as hf
import yaml
from families import blip_config, randomised
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from test_auto_classes import compressed, outputs
from test_blip_original import original

import madtp
from madtp.budgets.plan import Plan
from madtp.cli.options import settings
from madtp.data.annotations import CaptionAnnotations
from madtp.data.errors import DataError
from madtp.data.word_tokenizer import word_tokenizer
from madtp.files import file_sha256
from madtp.models import from_original
from madtp_kernels import load_quantized, load_sparse24, quantize, save_quantized, save_sparse24, sparse24_compress
from madtp_kernels.measured import LinearCall, Measurements, Timing
from madtp_kernels.nm_masks import nm_mask
from madtp_kernels.weight_files import _checksum

NAME = "ViTModel"
SECONDS, GROWTH = 30, 2 << 20  # of one mutation; KiB of all of them
DEEP, HUGE = "@deep@", "@huge@"  # what json.dumps cannot write
ODD = [
    None,
    True,
    -1,
    0,
    1,
    7,
    10**5,
    2**31,
    2**63,
    10**30,
    1e308,
    float("inf"),
    float("nan"),
    -0.5,
    "",
    "none",
    "a\0b",
]
ODD += ["\ud800", "x" * 10**5, [], {}, [1], {"a": 1}, [[]], ["a"], [None], DEEP, HUGE, "../../x", 10**9, 5.5, False]


class Hung(BaseException):
    """Nothing that catches exceptions catches it."""


@contextmanager
def in_time():
    def ring(*args):
        raise Hung

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# What happens to a file; each takes (draw, path).


def change_bytes(draw, path):
    data = bytearray(path.read_bytes())
    for _ in range(draw.choice([1, 1, 3, 30])):
        if data:
            data[draw.randrange(min(len(data), draw.choice([64, 4096, 1 << 30])))] = draw.randrange(256)
    path.write_bytes(data)


def cut(draw, path):
    data = path.read_bytes()
    at = draw.randrange(len(data))
    path.write_bytes(draw.choice([data[:at], data[at:], data[:at] + data, data[:8], data + b"\0" * 100]))


def change_kind(draw, path):
    path.unlink()
    kind = draw.randrange(6)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        path.touch()
    elif kind == 3:
        path.symlink_to(path.name)
    elif kind == 4:
        path.symlink_to("/dev/zero")
    # else it is gone


def changed_values(draw, values):
    """One or two places of plain values, as the text of JSON."""
    values = copy.deepcopy(values)
    for _ in range(draw.choice([1, 1, 2])):
        places = list(places_of(values))
        if not places:
            return json.dumps(values)
        holder, key = draw.choice(places)
        how = draw.randrange(8)
        if how == 0:
            del holder[key]
        elif how == 1 and isinstance(holder, dict):
            holder["other"] = holder.pop(key)
        elif how == 2 and isinstance(holder[key], int):
            holder[key] = draw.choice([10, 1000, 10**5, 10**7]) * (holder[key] or 1)
        else:
            holder[key] = draw.choice(ODD)
    text = json.dumps(values)
    return text.replace(f'"{DEEP}"', "[" * 10**5 + "]" * 10**5).replace(
        f'"{HUGE}"', "9" * draw.choice([100, 4000, 10**5])
    )


def places_of(values):
    if isinstance(values, dict | list):
        for key in list(values) if isinstance(values, dict) else range(len(values)):
            yield values, key
            yield from places_of(values[key])


def change_json(draw, path):
    path.write_text(changed_values(draw, json.loads(path.read_text())))


def change_yaml(draw, path):
    """YAML is JSON and more."""
    values = yaml.safe_load(path.read_text())
    odd = draw.choice(["2020-01-01", "!!binary x", "!!int x", "!!python/name:os.system", "1:" * 9])
    text = draw.choice(
        [
            changed_values(draw, values),
            "a: &a [x, x]\n"
            + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
            f"{path.read_text()}\n1: 2\n",
            f"{path.read_text()}\nnew: {odd}\n",
            "{" * 10**5,
            "- " * 10**5,
            f"seed: {'9' * 5000}",
        ]
    )
    path.write_text(text)


def forge_config(draw, path):
    """Another config.json, with the right checksum."""
    change_json(draw, path.with_name("config.json"))
    sign(path.parent)


def forge_weights(draw, path):
    """Other weights, or another header, with the right checksum."""
    path = path.with_name("model.safetensors")
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    if draw.random() < 0.5:
        header = changed_values(draw, json.loads(data[8 : 8 + length])).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    else:
        data = bytearray(data)
        for _ in range(200):
            data[draw.randrange(8 + length, len(data))] = draw.randrange(256)
        path.write_bytes(data)
    sign(path.parent)


def sign(folder):
    state = json.loads((folder / "madtp.json").read_text())
    state["sha256"] |= {name: file_sha256(folder / name) for name in ("config.json", "model.safetensors")}
    (folder / "madtp.json").write_text(json.dumps(state))


def forge_parts(kind):
    """Other names or schemes in the metadata, with the right checksum."""

    def forge(draw, path):
        with safe_open(path, "pt") as file:
            metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
        metadata[kind] = changed_values(draw, {"parts": json.loads(metadata[kind])})[len('{"parts": ') : -1]
        if draw.random() < 0.3:
            del tensors[draw.choice(list(tensors))]
        save_file(tensors, path, metadata | {"sha256": _checksum(metadata[kind], tensors)})

    return forge


def forge_state(draw, path):
    state = torch.load(path, weights_only=True)["model"]
    name = draw.choice(list(state))
    value = state.pop(name)
    odd = [None, "x", {}, value[None], value[:0], value.to(torch.int8), torch.tensor(1.0), torch.ones(1).expand(2**33)]
    odd += [value.to_sparse(), value.repeat(*[5] * value.ndim), value.clone(), torch.ones(1).expand(64, 2**20)]
    state[draw.choice([name, name, name.replace("blocks.0", "blocks.1000000000"), "other", 7])] = draw.choice(odd)
    torch.save({"model": state}, path)


def forge_picture(draw, path):
    """A PNG that says it is of another size."""
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", *(draw.choice([0, 1, 10**4, 10**5, 2**31 - 1]) for _ in range(2)))
    path.write_bytes(data)


class Subject:
    """A kind of file: how it is made, read and changed.

    same: whether what was read is what was written, where a change that a checksum would see was made.
    """

    def __init__(self, files, read, error, mutations, same=None, forging=()):
        self.files, self.read, self.error = files, read, error
        self.mutations, self.same, self.forging = [*mutations, *forging], same, forging


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    """By name: the folder that holds an intact one, and the Subject."""
    root, every = tmp_path_factory.mktemp("intact"), [change_bytes, cut, change_kind]
    hf.logging.set_verbosity_error()
    model = compressed(NAME)
    expected = outputs(NAME, model)
    model.save_pretrained(root / "model")

    dense = torch.randn(16, 32)
    weight = sparse24_compress(dense * nm_mask(dense, 2, 4))
    for name in ("sparse24", "quantized", "plan", "config", "annotations", "original", "table"):
        (root / name).mkdir()
    save_sparse24(root / "sparse24" / "w", {"a": weight, "b.c": torch.ones(3)})
    rounded = {"a": quantize(weight), "d": quantize(dense, "int8"), "e": quantize(weight, "fp8_24")}
    save_quantized(root / "quantized" / "w", rounded | {"b": torch.ones(3)})
    Plan(0.5, {"vision": 0.5}, ("a.b", "c"), predicted={"distill_loss": 0.1}, weight_dtypes={"a.b": "int8"}).save(
        root / "plan" / "plan.yaml"
    )
    (root / "config" / "config.yaml").write_text(
        'pattern: "2:8"\nseed: 3\ntraining: {max_steps: 3}\nsparse_include: ["*"]\n'
    )
    Image.new("RGB", (20, 12), (255, 0, 0)).save(root / "annotations" / "1.png")
    (root / "annotations" / "records.json").write_text(
        json.dumps([{"image": "1.png", "caption": ["A cat.", "red"]}] * 2)
    )
    tokenizer = word_tokenizer(["a cat red"], max_length=16)
    processor = hf.BlipImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    blip = randomised(hf.BlipForImageTextRetrieval(blip_config()))
    torch.save({"model": original(blip)}, root / "original" / "model.pth")
    table = Measurements("fuzz", LinearCall, 0.9, "")
    call = LinearCall(4, 8, 16, "float32", "none", 1)
    rows = [(call, *Timing({"cpu": 1.5, "dense": 2.5}, "2026-01-01"))]
    (root / "table" / "t.json").write_text(json.dumps({"version": 2, "timings": rows}))

    def read_records(folder):
        return CaptionAnnotations(folder / "records.json", folder, tokenizer, processor, max_length=9)[0]

    def same_model(loaded):
        return all(map(torch.equal, outputs(NAME, loaded), expected))

    promised = (ValueError, OSError)
    files = ("config.json", "madtp.json", "model.safetensors")
    made = {
        "model": Subject(
            files, madtp.from_pretrained, madtp.ModelError, every, same_model, [forge_config, forge_weights]
        ),
        "settings": Subject(("config.json",), madtp.from_pretrained, madtp.ModelError, [], None, [forge_config]),
        "state": Subject(("madtp.json",), madtp.from_pretrained, madtp.ModelError, [change_json], same_model),
        "sparse24": Subject(("w",), lambda f: load_sparse24(f / "w"), promised, every, None, [forge_parts("sparse24")]),
        "quantized": Subject(
            ("w",), lambda f: load_quantized(f / "w"), promised, every, None, [forge_parts("quantized")]
        ),
        "plan": Subject(
            ("plan.yaml",), lambda f: Plan.load(f / "plan.yaml"), promised, [*every, change_yaml, change_yaml]
        ),
        "config": Subject(("config.yaml",), lambda f: settings(f / "config.yaml"), promised, [*every, change_yaml]),
        "annotations": Subject(("records.json",), read_records, DataError, [*every, change_json, change_json]),
        "picture": Subject(("1.png",), read_records, DataError, [*every, forge_picture]),
        "original": Subject(
            ("model.pth",),
            lambda f: from_original(f / "model.pth", kind="retrieval"),
            promised,
            [*every, forge_state, forge_state],
        ),
        "table": Subject(("t.json",), lambda f: table.read(f / "t.json"), (), [*every, change_json]),
    }
    folders = {"settings": "model", "state": "model", "picture": "annotations"}
    return {name: (root / folders.get(name, name), subject) for name, subject in made.items()}


# Of 300 that any run tries: those of a model take most of the time.
COUNTS = {"model": 40, "settings": 40, "state": 20, "plan": 30, "config": 25, "annotations": 30, "picture": 25}
COUNTS |= {"sparse24": 25, "quantized": 25, "original": 20, "table": 20}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("times", [1, pytest.param(17, marks=pytest.mark.slow)], ids=["some", "many"])
@pytest.mark.parametrize("name", COUNTS)
def test_changed_files(name, times, subjects, tmp_path):
    intact, subject = subjects[name]
    memory, outcomes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for seed in range(COUNTS[name] * times):
        draw, folder = random.Random(seed + 10**6 * (times > 1)), tmp_path / str(seed)
        shutil.copytree(intact, folder)
        mutation, file = draw.choice(subject.mutations), draw.choice(subject.files)
        what = f"seed {seed}: {mutation.__name__} of {file}"
        mutation(draw, folder / file)
        try:
            with in_time():
                loaded = subject.read(folder)
            outcomes.append("loaded")
            checked = mutation not in subject.forging and subject.same is not None
            assert not checked or subject.same(loaded), what
        except subject.error as error:
            outcomes.append("refused")
            message = str(error)
            assert len(message) < 1000 and "\n" not in message.strip(), f"{what}: {message[:2000]}"
        except (Exception, Hung) as error:
            raise AssertionError(f"{what}: {error!r:.500}") from error
        shutil.rmtree(folder)
    assert "refused" in outcomes or not subject.error
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < GROWTH
    print(name, {outcome: outcomes.count(outcome) for outcome in set(outcomes)})
