# SPDX-License-Identifier: Apache-2.0
"""Memory of a pruned forward."""

import pytest
import torch
from transformers import BlipConfig, BlipForQuestionAnswering

import madtp
from benchmarks.measure import peak_bytes
from madtp_kernels import dispatch


@pytest.mark.skipif(
    dispatch.extension_unsupported_reason() is not None, reason="the reference keeps all attention maps"
)
def test_memory_does_not_grow_with_the_square_of_the_tokens():
    shape = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "num_hidden_layers": 2}
    text = shape | {"encoder_hidden_size": 64, "vocab_size": 20, "max_position_embeddings": 16}
    vision = shape | {"image_size": 32, "patch_size": 4}
    model = BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=vision, projection_dim=64)).eval()
    handle = madtp.patch(model, madtp.CompressionConfig(alignment_tokens=8, alignment_dim=64))
    handle.set_temperature(1.0)

    @torch.no_grad()
    def peak(side):
        inputs = {"pixel_values": torch.randn(2, 3, side, side), "input_ids": torch.ones(2, 6, dtype=torch.long)}
        inputs |= {"labels": torch.ones(2, 3, dtype=torch.long), "interpolate_pos_encoding": True}
        model(**inputs)
        return peak_bytes(lambda: model(**inputs), torch.device("cpu"))

    small, large = peak(96), peak(192)  # 577 and 2305 tokens
    assert large < 5 * small
    assert large < 2 * 4 * 2305**2 * 4 / 2, "less than half of the maps of one layer"
