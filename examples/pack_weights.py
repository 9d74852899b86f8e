# SPDX-License-Identifier: Apache-2.0
"""2:4 weights on any model, in four steps: prune in one shot, pack, run, save.

python examples/pack_weights.py
"""

import tempfile
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

import madtp
from madtp import hwp


def main() -> None:
    torch.manual_seed(0)
    config = CLIPVisionConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=6)
    model = CLIPVisionModel(config).eval()
    images = torch.randn(4, 3, 224, 224)

    linears = hwp.select_modules(model, "2:4").selected
    with torch.no_grad(), hwp.collect_inputs(model, linears) as statistics:  # what the inputs are like
        model(images)
    kept = hwp.prune_one_shot(model, "2:4", linears, statistics).magnitude_kept
    print(f"{len(linears)} Linears keep {sum(kept.values()) / len(kept):.1%} of their magnitude")

    handle = madtp.patch(model)  # packed attention; nothing is pruned at temperature 0
    with torch.no_grad():
        before = model(images).pooler_output
        hwp.pack(model, epilogues=handle.epilogues)  # activations move into the Linears
        after = model(images).pooler_output
    print(f"packed, the output differs by {(after - before).norm() / before.norm():.1e}")
    print(handle.explain())

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = (Path(folder) / "model.safetensors").stat().st_size
        loaded = madtp.from_pretrained(folder)
    dense = sum(parameter.numel() for parameter in CLIPVisionModel(config).parameters()) * 4
    with torch.no_grad():
        same = torch.equal(loaded(images).pooler_output, after)
    print(f"saved: {size / dense:.2f} of the dense bytes; loaded, it computes the same: {same}")


if __name__ == "__main__":
    main()
