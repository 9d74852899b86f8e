# SPDX-License-Identifier: Apache-2.0
"""LoRA of peft and packed layers: put on before, put on after, trained, taken off, never merged."""

import copy

import pytest
import torch
from torch import nn

from madtp import hwp
from madtp.hwp import Epilogue, Sparse24Linear

peft = pytest.importorskip("peft")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.act, self.fc2 = nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)
        self.relu = nn.ReLU()

    def forward(self, x):
        return hwp.residual_linear(self.fc2, self.relu(self.fc1(x)), x)


def masked():
    block = Block()
    hwp.prune_one_shot(block, "2:4", ["fc1", "fc2"])
    return block


def config(**options):
    return peft.LoraConfig(r=4, lora_dropout=0.0, target_modules=["fc1", "fc2"], init_lora_weights=False, **options)


def adapters(model):
    return {name: value for name, value in model.named_parameters() if "lora_" in name}


def test_lora_on_packed_layers_is_that_on_plain_ones_trains_and_comes_off(recwarn):
    from madtp.hwp.lora import support_packed

    x, block = torch.randn(4, 32), masked()
    dense = block(x)
    plain = peft.get_peft_model(copy.deepcopy(block), config())
    hwp.pack(block, epilogues={"fc1": Epilogue("relu")})
    with pytest.raises(ValueError, match="Target module Sparse24Linear.* is not supported"):
        peft.get_peft_model(copy.deepcopy(block), config())
    model = peft.get_peft_model(block, support_packed(config()))
    assert not [warning for warning in recwarn if "Unsupported layer type" in str(warning.message)]
    assert adapters(model).keys() == adapters(plain).keys()
    model.load_state_dict(adapters(plain), strict=False)
    expected = plain(x)
    assert not torch.allclose(expected, dense)
    torch.testing.assert_close(model(x), expected)

    plain(x).square().sum().backward()
    model(x).square().sum().backward()
    for name, parameter in adapters(model).items():
        torch.testing.assert_close(parameter.grad, adapters(plain)[name].grad)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(adapters(model))

    with model.disable_adapter():
        torch.testing.assert_close(model(x), dense)
    for merge in (model.merge_adapter, lambda: model.merge_and_unload()):
        with pytest.raises(ValueError, match="LoRA must not be merged into a packed layer"):
            merge()
    torch.testing.assert_close(model(x), expected)

    twin = copy.deepcopy(model)
    hwp.unpack(twin)
    torch.testing.assert_close(twin(x), expected)
    torch.testing.assert_close(twin.merge_and_unload()(x), expected)

    bare = model.unload()
    assert bare is block and type(block.fc1) is Sparse24Linear
    torch.testing.assert_close(block(x), dense)


def test_lora_first_and_packed_below_it():
    x, block = torch.randn(4, 32), masked()
    model = peft.get_peft_model(block, config())
    expected = model(x)
    names = ["base_model.model.fc1.base_layer", "base_model.model.fc2.base_layer"]
    assert list(hwp.pack(model, epilogues={f"{names[0]}": Epilogue(), "base_model.model.fc1": Epilogue()})) == names
    assert type(block.fc1.base_layer) is Sparse24Linear
    torch.testing.assert_close(model(x), expected)
    for merge in (model.merge_adapter, lambda: model.merge_adapter(safe_merge=True)):
        with pytest.raises(RuntimeError, match="must match the size"):
            merge()
    torch.testing.assert_close(model(x), expected)
    hwp.unpack(model)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_lora_on_int8_layers_trains_and_comes_off():
    from madtp.hwp.lora import support_packed

    x, block = torch.randn(4, 32), masked()
    hwp.pack(block, epilogues={"fc1": Epilogue("relu")}, dtype="int8")
    expected = block(x)
    model = peft.get_peft_model(block, support_packed(config()))
    assert not torch.allclose(model(x), expected)
    model(x).square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(adapters(model))
    with pytest.raises(ValueError, match="LoRA must not be merged into a packed layer"):
        model.merge_and_unload()
    assert torch.equal(model.unload()(x), expected)


def test_adapters_are_saved_and_loaded(tmp_path):
    from madtp.hwp.lora import support_packed

    x, block = torch.randn(4, 32), masked()
    hwp.pack(block, epilogues={"fc1": Epilogue("relu")})
    other = copy.deepcopy(block)
    model = peft.get_peft_model(block, support_packed(config()))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(
        other, tmp_path, config=support_packed(peft.LoraConfig.from_pretrained(tmp_path))
    )
    torch.testing.assert_close(loaded(x), model(x))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
def test_lora_around_a_patched_model(blip, batch):
    import madtp
    from madtp.hwp.lora import support_packed

    handle = madtp.patch(blip, madtp.CompressionConfig(alignment_tokens=8, alignment_dim=24))
    names = [name for name in hwp.select_modules(blip, "2:4").selected if name.endswith((".fc1", ".fc2"))]
    hwp.prune_one_shot(blip, "2:4", names)
    expected = blip(**batch).logits
    assert hwp.pack(blip, names)[names[0]].activation is not None
    layers = peft.LoraConfig(r=2, target_modules=r"vision_model.*\.(fc1|fc2)")
    model = peft.get_peft_model(blip, support_packed(layers))
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    model(**batch).logits.sum().backward()
    assert all(parameter.grad is not None for name, parameter in adapters(model).items() if "lora_B" in name)
    assert handle.explain().count("2:4 on") > 0
