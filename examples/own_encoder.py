# SPDX-License-Identifier: Apache-2.0
"""An encoder that nobody described: say where its parts are, and its tokens are pruned.

python examples/own_encoder.py
"""

import torch
from torch import nn
from transformers import PretrainedConfig

import madtp
from madtp.models import Encoder, Family, Tower


class Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)


class Block(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)). What is computed is in the description below."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width)
        self.up, self.act, self.down = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)


class Words(nn.Module):
    def __init__(self, vocabulary: int = 1000, width: int = 64, layers: int = 3):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.config = PretrainedConfig(hidden_size=width, num_attention_heads=4)


ENCODER = Encoder(
    blocks="blocks",
    qkv=("attention.qkv",),
    out="attention.out",
    norm1="norm1",
    norm2="norm2",
    mlp=("up", "act", "down"),
)
TOWER = Tower(ENCODER, "input_ids", pool=lambda tower, batch: batch.summary_features(), embeddings="embed")


def main() -> None:
    torch.manual_seed(0)
    model, ids = Words().eval(), torch.randint(1000, (8, 128))
    config = madtp.CompressionConfig(alignment_tokens=16, alignment_dim=64)
    handle = madtp.patch(model, config, family=Family({"text": ("", TOWER)}))
    for temperature in (0.0, 1.0, 10.0):
        handle.set_temperature(temperature)
        macs = madtp.profile(model, {"input_ids": ids}).total.counted_macs
        with torch.no_grad():
            feature = model(input_ids=ids).pooler_output
        tokens = ", ".join(f"{count:.1f}" for count in handle.tokens_per_layer["text"])
        print(f"temperature {temperature}: {macs / 1e6:.1f} MMACs, tokens {tokens}, features {tuple(feature.shape)}")


if __name__ == "__main__":
    main()
