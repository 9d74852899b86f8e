# SPDX-License-Identifier: Apache-2.0
"""Vectors of many images with a pruned, packed tower: killed in the midst, taken up again, and measured.

python examples/bulk_embedding.py --out runs/bulk

It draws the images and makes a ViT with random weights, so the vectors mean nothing; how a run is killed and goes on,
its memory and its speed are those of any model. The speed is compared with the same ViT as Hugging Face runs it.
"""

import argparse
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel
from transformers.utils import logging

import madtp
from madtp.data.scenes import Scene
from madtp.hwp import pack
from madtp.models import Family
from madtp_kernels import sparse24_prune

PER_FOLDER = 1000


def draw(folder: Path, count: int, size: int) -> None:
    """Pictures of a disc on a background, in folders of a thousand."""
    along = np.linspace(-1, 1, 48)
    inside = along[:, None] ** 2 + along[None] ** 2 < 1
    for number in range(count):
        path = folder / f"{number // PER_FOLDER:03}" / f"{number:06}.jpg"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            generator = np.random.default_rng(number)
            icon = np.full((48, 48, 4), 255, np.uint8)
            icon[..., :3], icon[..., 3] = generator.integers(0, 255, 3), 255 * inside
            picture = Scene.random(generator).draw(icon, size).transpose(1, 2, 0)
            Image.fromarray(picture).save(path)


def make_models(folder: Path, args: argparse.Namespace) -> tuple[Path, Path]:
    """A dense ViT as Hugging Face saves it, and the same with 2:4 weights, pruned to a share of its tokens."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=args.width, intermediate_size=4 * args.width, num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64, image_size=args.size, patch_size=8,
    )  # fmt: skip
    model = ViTModel(config).eval()
    with torch.no_grad():
        for module in model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(sparse24_prune(module.weight).to_dense())
    processor = ViTImageProcessorPil(size={"height": args.size, "width": args.size})
    model.save_pretrained(folder / "dense")
    pixels = processor(
        [Image.open(path) for path in sorted(folder.glob("images/000/*"))[:32]], return_tensors="pt"
    )  # of the first images
    madtp.patch(
        model, madtp.CompressionConfig(alignment_dim=args.width), family=Family({"vision": ""}),
        keep_rate=args.keep_rate, calibration=[dict(pixels)],
    )  # fmt: skip
    pack(model)
    model.save_pretrained(folder / "small")
    for name in ("dense", "small"):
        processor.save_pretrained(folder / name)
    return folder / "dense", folder / "small"


def start(model: Path, images: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "madtp", "embed", model, "--data", images, "--out", out]
    return subprocess.Popen([*map(str, command), "--vector-dtype", "float16"], start_new_session=True)


def whole_shards(out: Path) -> int:
    return len([path for path in (out / "shards").glob("*.json") if not path.name.endswith(".keys.json")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="gets images, models and vectors")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=64, help="pixels of a side, in patches of 8")
    parser.add_argument("--width", type=int, default=192, help="channels of the ViT")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--keep-rate", type=float, default=0.6, help="share of the tokens to keep, over all layers")
    parser.add_argument("--compared", type=int, default=128, help="images of each round of the comparison")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    images, out = args.out / "images", args.out / "vectors"
    draw(images, args.images, args.size)
    dense, small = make_models(args.out, args)

    rates: dict[Path, list[float]] = {dense: [], small: []}
    few = args.out / "few"
    draw(few, args.compared, args.size)
    for _ in range(4):
        for model, of_model in rates.items():
            with tempfile.TemporaryDirectory() as scratch:
                done = madtp.embed(model, few, scratch)
                of_model.append(done.new_images / done.seconds)
    ratio = statistics.median(b / a for a, b in zip(rates[dense][1:], rates[small][1:], strict=True))  # not the warm-up
    print(f"images a second, pruned and packed to dense: {ratio:.2f}")

    before = whole_shards(out)
    process = start(small, images, out)
    while process.poll() is None and whole_shards(out) < before + 3:
        time.sleep(0.01)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        print(f"killed with {whole_shards(out)} shards whole")
    if start(small, images, out).wait() != 0:
        raise SystemExit("the second run did not end well")
    index = json.loads((out / "index.json").read_text())
    keys = [
        key
        for shard in index["shards"]
        for key in json.loads((out / "shards" / f"{shard['name']}.keys.json").read_text())
    ]
    rows = sum(len(np.load(out / "shards" / f"{shard['name']}.npy", mmap_mode="r")) for shard in index["shards"])
    wanted = {path.relative_to(images).as_posix() for path in images.rglob("*.jpg")}
    print(
        f"{rows:,} vectors, {len(set(keys)):,} names, {len(wanted - set(keys))} missing, {rows - len(set(keys))} twice"
    )
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"peak memory of a process: {peak:.0f} MiB")


if __name__ == "__main__":
    main()
