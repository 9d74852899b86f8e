# SPDX-License-Identifier: Apache-2.0
"""`python -m madtp_kernels.tune` measures the layers that models of packed 2:4 layers run."""

import pytest
import torch
import transformers as hf
from families import BERT, CONFIG, IMAGE, SIGLIP_TEXT, pixels, text

import madtp
from madtp import hwp
from madtp.hwp import Sparse24Linear
from madtp_kernels import tune
from madtp_kernels.sparse24 import tuning_cuda

WIDTH = IMAGE["hidden_size"]
MLP = {"intermediate_size": 4 * WIDTH}
TOWERS = {
    "BLIP": (hf.BlipVisionModel, hf.BlipVisionConfig(**IMAGE | MLP)),
    "CLIP": (hf.CLIPVisionModel, hf.CLIPVisionConfig(**IMAGE | MLP)),
    "SigLIP": (hf.SiglipTextModel, hf.SiglipTextConfig(**SIGLIP_TEXT | MLP)),
    "DINOv2": (hf.Dinov2Model, hf.Dinov2Config(**IMAGE, mlp_ratio=4)),
    "ViT": (hf.ViTModel, hf.ViTConfig(**IMAGE | MLP)),
    "BERT": (hf.BertModel, hf.BertConfig(**BERT | MLP)),
}


@pytest.mark.parametrize("family", TOWERS)
def test_every_layer_of_a_block_is_measured(family, monkeypatch):
    kind, config = TOWERS[family]
    torch.manual_seed(0)
    model = kind(config).eval()
    madtp.patch(model, CONFIG)
    names = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear and ".layer" in name]
    hwp.WeightPruner(model, "2:4", names, schedule="one_shot").finalize()
    assert sorted(hwp.pack(model, names)) == sorted(names)
    calls, run = [], Sparse24Linear._op

    def spy(x, weight, bias, *, activation, residual, scale, num_rows):
        calls.append(tuning_cuda.linear_call(x.bfloat16(), weight.values, activation, residual, scale))
        return run(x, weight, bias, activation=activation, residual=residual, scale=scale, num_rows=num_rows)

    monkeypatch.setattr(Sparse24Linear, "_op", staticmethod(spy))
    inputs = {"input_ids": text(padded=False)["input_ids"]} if "Text" in kind.__name__ or kind is hf.BertModel else None
    with torch.no_grad():
        model(**(inputs or {"pixel_values": pixels(4)}))
    assert len(calls) == len(names)
    assert set(calls) <= set(tune.linear_calls((WIDTH,)))
