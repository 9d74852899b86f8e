# SPDX-License-Identifier: Apache-2.0
"""examples/cpp runs the vision tower of a saved BLIP with the bits of Python, and refuses damaged files in a line.

A patched BLIP leaves to torch the patch embedding, the first LayerNorm of each block, the last of the tower, and the
alignment of MAG. Bits are compared with a model in which these run on our kernels too, as in the example; all else is
the code of a patched model as it is. Beside torch's own the rows are close, and as many tokens stay.
"""

import random
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

import madtp
import madtp_kernels as mk
from madtp.hwp import pack, prune_one_shot
from madtp.models.tower import tokens_left

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(mk.__file__).parent
MODEL = ROOT / "python/madtp/assets/easy-vqa-blip"


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """The example, built through pkg-config against the library inside the Python package."""
    if shutil.which("c++") is None or shutil.which("pkg-config") is None:
        pytest.skip("c++ and pkg-config are needed")
    target = tmp_path_factory.mktemp("cpp") / "blip_vision"
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "PKG_CONFIG_PATH": str(PACKAGE / "lib/pkgconfig")}
    ask = ("pkg-config", "--cflags", "--libs", "madtp-kernels")
    flags = subprocess.run(ask, env=environment, capture_output=True, text=True, check=True).stdout.split()
    source = ROOT / "examples/cpp/blip_vision.cpp"
    build = ("c++", "-std=c++17", "-O0", "-Wall", "-Wextra", source, *flags, "-o", target)
    subprocess.run(build, env=environment, check=True)
    return target


def compressed(scheme: str) -> nn.Module:
    torch.manual_seed(0)
    model = transformers.BlipForQuestionAnswering.from_pretrained(MODEL).eval()
    handle = madtp.patch(model)
    linears = [n for n, m in model.vision_model.named_modules(prefix="vision_model") if isinstance(m, nn.Linear)]
    if scheme == "sparse24":
        prune_one_shot(model, "2:4", linears)
        pack(model)
    else:  # int8 and int8 2:4 in turn
        prune_one_shot(model, "2:4", linears[::2], weight_dtype="int8")
        prune_one_shot(model, None, linears[1::2], weight_dtype="int8")
        pack(model, linears, dtype="int8")
    handle.pruning["vision"].temperature = 0.05
    return model


def dense(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + bias as the sum of two 2:4 products, as in examples/cpp/layers.h."""
    rows, columns = weight.shape
    pad = -rows % 8
    groups = nn.functional.pad(weight, (0, 0, 0, pad)).unflatten(1, (columns // 4, 4))
    y = None
    for half, nibbles in ((0, 0x44), (1, 0xEE)):
        values = groups[:, :, 2 * half : 2 * half + 2].flatten(1).contiguous()
        indices = torch.full((rows + pad, columns // 8), nibbles, dtype=torch.uint8)
        added = None if bias is None or half else nn.functional.pad(bias, (0, pad))
        y = mk.sparse24_linear(x, mk.Sparse24Weight(values, indices), added, residual=y)
    return y[:, :rows]


class Patches(nn.Conv2d):
    def forward(self, pixels):
        p = self.kernel_size[0]
        columns = nn.functional.unfold(pixels, p, stride=p).mT  # (B, N, 3 p p)
        y = dense(columns.flatten(0, 1).contiguous(), self.weight.flatten(1), self.bias)
        side = pixels.shape[-1] // p
        return y.unflatten(0, (pixels.shape[0], side, side)).permute(0, 3, 1, 2)


class Norm(nn.LayerNorm):
    def forward(self, x):
        ends = torch.tensor([0, x.shape[0]], dtype=torch.int32)
        everything = mk.select_tokens(x.new_zeros(x.shape[0]), x.new_zeros(x.shape[0], 1), ends, 0.0)
        return mk.gather_merge_layernorm(x, everything, self.weight, self.bias, self.eps)[1]


class Map(nn.Linear):
    def forward(self, x):
        return dense(x, self.weight, self.bias)


class Logits(nn.Module):
    def forward(self, q, alignment_tokens):
        return dense(q, alignment_tokens, None)


def on_our_kernels(model: nn.Module) -> None:
    vision = model.vision_model
    vision.embeddings.patch_embedding.__class__ = Patches
    for norm in (vision.post_layernorm, *(layer.layer_norm1 for layer in vision.encoder.layers)):
        norm.__class__ = Norm
    model.madtp_guide.maps["vision"].__class__ = Map
    model.madtp_guide.logits["vision"] = Logits()


def encode(model: nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, list[list[int]]]:
    """The rows that leave the tower, and how many tokens of each image are left after every layer."""
    left: list[list[int]] = []
    branch = model.madtp_handle.pruning["vision"]
    branch.observer = lambda importance, selection: left.append(selection.cu_seqlens_out.diff().tolist())
    with torch.no_grad():
        rows = tokens_left(model.vision_model(pixels).last_hidden_state).x
    branch.observer = None
    return rows, left


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("scheme", ["sparse24", pytest.param("int8", marks=pytest.mark.slow)])
def test_tower_has_the_bits_of_python(program, scheme, tmp_path, monkeypatch):
    monkeypatch.setenv("MADTP_BACKEND", "cpu")  # auto may have measured another library to be faster
    model = compressed(scheme)
    model.save_pretrained(tmp_path / "model")
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    save_file({"pixel_values": pixels}, tmp_path / "images.safetensors")
    torchs, left_of_torchs = encode(model, pixels)
    on_our_kernels(model)
    ours, left = encode(model, pixels)
    assert left[-1] != [65, 65]
    for threads in (1, 2):
        arguments = (tmp_path / "model", tmp_path / "images.safetensors", "--threads", threads)
        done = run(program, *arguments, "--out", tmp_path / "rows")
        assert done.returncode == 0, done.stderr
        *layers, last = done.stdout.splitlines()
        assert [[int(count) for count in line.partition(":")[2].split()] for line in layers] == left
        rows = torch.frombuffer(bytearray((tmp_path / "rows").read_bytes()), dtype=torch.float32).view(-1, 128)
        assert torch.equal(rows.view(torch.int32), ours.view(torch.int32))
        assert last.startswith(f"{len(rows)} rows, checksum ")
    if scheme == "sparse24":  # int8 rounds what differs in its last bit to another integer
        assert left == left_of_torchs
        torch.testing.assert_close(rows, torchs, rtol=1e-3, atol=1e-3)


def test_damaged_files_are_refused_in_a_line(program, tmp_path):
    """What is read before the tower is built, so no model is needed but the dense one."""
    folder, images, out = tmp_path / "model", tmp_path / "images.safetensors", tmp_path / "rows"
    shutil.copytree(MODEL, folder)
    save_file({"pixel_values": torch.zeros(1, 3, 64, 64)}, images)
    config, weights = (folder / "config.json").read_bytes(), (folder / "model.safetensors").read_bytes()

    def refused(config: bytes = config, weights: bytes = weights) -> str:
        (folder / "config.json").write_bytes(config)
        (folder / "model.safetensors").write_bytes(weights)
        done = run(program, folder, images, "--out", out)
        assert done.returncode == 1 and done.stdout == "" and not out.exists()
        assert done.stderr.count("\n") == 1
        return done.stderr

    assert "config.json: must have a quantization_config: save a BLIP that madtp has patched" in refused()
    assert "is no JSON at byte" in refused(config[:-5])
    assert "is no JSON at byte" in refused(config + b"x")
    assert "nested too deeply" in refused(b"[" * 1000)
    assert "a name twice" in refused(b'{"a": 1, "a": 2}')
    assert "is cut short" in refused(weights=weights[:4])
    assert "is cut short" in refused(weights=weights[:-4])
    assert "does not end where its last tensor does" in refused(weights=weights + b"1234")
    assert "header of more than 16 MiB" in refused(weights=struct.pack("<Q", 2**60) + weights[8:])
    length = struct.unpack("<Q", weights[:8])[0]
    header = weights[8 : 8 + length]
    for was, is_now in ((b'"F32"', b'"F16"'), (b"[128,", b"[129,"), (b'"F32"', b'"X32"')):
        assert ": " in refused(weights=weights[:8] + header.replace(was, is_now, 1) + weights[8 + length :])
    assert run(program, tmp_path / "none", images).stderr.endswith("none/config.json: is not there\n")
    assert run(program, folder / "config.json", images).stderr.endswith("config.json/config.json: is not there\n")
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    assert run(program, folder, images).stderr.endswith("model/config.json: is no regular file\n")
    assert run(program).stderr.startswith("usage: ")


@pytest.mark.slow
def test_no_change_of_a_byte_crashes_it(program, tmp_path):
    folder, images = tmp_path / "model", tmp_path / "images.safetensors"
    compressed("sparse24").save_pretrained(folder)
    save_file({"pixel_values": torch.zeros(1, 3, 64, 64)}, images)
    generator = random.Random(0)
    for path in (folder / "config.json", folder / "model.safetensors", images):
        whole = path.read_bytes()
        head = len(whole) if path.suffix == ".json" else 8 + struct.unpack("<Q", whole[:8])[0]
        for _ in range(25):
            changed = bytearray(whole)
            for _ in range(generator.choice((1, 1, 4))):
                changed[generator.randrange(head)] = generator.choice(b'0129-eE.,:[]{}"\\ntfu\x00\xff')
            path.write_bytes(changed)
            done = run(program, folder, images, "--threads", 1)
            assert done.returncode in (0, 1), (path, done)
            assert done.stderr.count("\n") == done.returncode, done.stderr
        path.write_bytes(whole)
    assert run(program, folder, images).returncode == 0
