# SPDX-License-Identifier: Apache-2.0
"""Packed 2:4 layers: what they compute, that they come out again, save, load, copy and move."""

import copy

import pytest
import torch
from torch import nn
from transformers import Dinov2Config, Dinov2Model
from transformers.activations import ACT2FN

import madtp
from madtp import hwp
from madtp.hwp import Epilogue, Sparse24Linear
from madtp_kernels.nm_patterns import COMMON, Pattern

CONFIG = madtp.CompressionConfig(alignment_tokens=8, alignment_dim=24)


class Block(nn.Module):
    def __init__(self, activation="gelu"):
        super().__init__()
        self.fc1, self.fc2, self.odd = nn.Linear(32, 64), nn.Linear(64, 32, bias=False), nn.Linear(32, 12)
        self.act = ACT2FN[activation] if isinstance(activation, str) else activation

    def forward(self, x):
        return self.odd(hwp.residual_linear(self.fc2, self.act(self.fc1(x)), x))


def masked(module):
    hwp.WeightPruner(module, "2:4", hwp.select_modules(module, "2:4").selected, schedule="one_shot").finalize()
    return module.eval()


@pytest.mark.parametrize(
    ("activation", "folded"),
    [
        ("gelu", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("quick_gelu", "quick_gelu"),
        ("relu", "relu"),
        (nn.Tanh(), None),
    ],
)
def test_packed_layers_compute_the_same_and_come_out_again(activation, folded):
    block, x = masked(Block(activation)), torch.randn(3, 5, 32)
    expected, state = block(x), copy.deepcopy(block.state_dict())
    packed = hwp.pack(block, epilogues={"fc1": Epilogue("act")})
    assert packed == {"fc1": Epilogue("act" if folded else None), "fc2": Epilogue()}
    assert isinstance(block.fc1, Sparse24Linear) and type(block.odd) is nn.Linear
    assert block.fc1.activation == folded
    assert isinstance(block.act, nn.Identity) == (folded is not None)
    torch.testing.assert_close(block(x), expected)
    torch.testing.assert_close(block.fc2.sparse_weight.to_dense(), state["fc2.weight"], rtol=0, atol=0)
    hwp.unpack(block)
    assert all(torch.equal(value, state[name]) for name, value in block.state_dict().items())
    torch.testing.assert_close(block(x), expected, rtol=0, atol=0)


def test_only_what_is_named_is_packed_and_what_is_not_24_never():
    block = masked(Block())
    assert list(hwp.pack(block, ["fc2", "odd"])) == ["fc2"]
    assert hwp.pack(Block()) == {}


def test_gradients_reach_x_residual_and_bias():
    block, x = masked(Block()), torch.randn(4, 32, requires_grad=True)
    expected = torch.autograd.grad(block(x).sum(), [x, block.fc1.bias])
    hwp.pack(block, epilogues={"fc1": Epilogue("act")})
    for got, want in zip(torch.autograd.grad(block(x).sum(), [x, block.fc1.bias]), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_layerscale_is_folded_and_comes_out_again():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "image_size": 16, "patch_size": 4}
    model = Dinov2Model(Dinov2Config(**shape, layerscale_value=0.7)).eval()
    model = masked(model)
    x, state = torch.randn(2, 3, 16, 16), copy.deepcopy(model.state_dict())
    expected = model(x).last_hidden_state
    block = "encoder.layer.0"
    packed = hwp.pack(
        model,
        epilogues={
            f"{block}.attention.o_proj": Epilogue(None, f"{block}.layer_scale1"),
            f"{block}.mlp.fc1": Epilogue(f"{block}.mlp.activation_fn"),
            f"{block}.mlp.fc2": Epilogue(None, f"{block}.layer_scale2"),
        },
    )
    assert packed[f"{block}.mlp.fc2"] == Epilogue(None, f"{block}.layer_scale2")
    assert isinstance(model.encoder.layer[0].layer_scale1, nn.Identity)
    torch.testing.assert_close(model(x).last_hidden_state, expected, rtol=1e-4, atol=1e-5)
    model(x).last_hidden_state.sum().backward()
    assert model.encoder.layer[0].mlp.fc2.scale.grad.abs().sum() > 0
    with torch.no_grad():
        model.encoder.layer[0].mlp.fc2.scale.mul_(2)
    hwp.unpack(model)
    assert model.state_dict().keys() == state.keys()
    scale = f"{block}.layer_scale2.lambda1"
    assert torch.equal(model.state_dict().pop(scale), 2 * state.pop(scale))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


def test_residuals_of_a_wider_type_are_added_after():
    block, x = masked(Block()), torch.randn(4, 32)
    hwp.pack(block)
    with torch.autocast("cpu", torch.bfloat16):
        y = block.fc2(block.fc1(x).bfloat16(), x)
    assert y.dtype == torch.float32


def test_the_old_name_of_epilogues_is_told():
    with pytest.raises(TypeError, match="pack: followers is now called epilogues"):
        hwp.pack(Block(), followers={})


@pytest.mark.parametrize("pattern", [str(pattern) for pattern in COMMON if pattern.m > 2])
def test_every_pattern_that_is_24_is_packed(pattern):
    block, x = Block(), torch.randn(4, 32)
    hwp.prune_one_shot(block, pattern, ["fc1", "fc2"])
    expected = block(x)
    packed = hwp.pack(block)
    reasons = hwp.explain_linears(block)
    if not Pattern.parse(pattern).sparse24:
        assert packed == {} and reasons["fc1"] == "dense: has more than 2 non-zeros in an aligned 4"
    else:
        assert set(packed) == {"fc1", "fc2"} and reasons["fc1"].startswith("2:4, runs ")
    assert reasons["odd"] == "dense: 12 x 32 must be multiples of 8 and 16"
    torch.testing.assert_close(block(x), expected)


def test_copies_casts_and_loads():
    block, x = masked(Block()), torch.randn(4, 32)
    hwp.pack(block)
    expected, other = block(x), copy.deepcopy(block)
    torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(block).bfloat16()(x.bfloat16()).float(), expected, rtol=0.1, atol=0.1)
    other.load_state_dict(
        {name: torch.zeros_like(value) for name, value in other.state_dict().items() if "indices" not in name},
        strict=False,
    )
    assert not other(x).any()
    other.load_state_dict(block.state_dict())
    torch.testing.assert_close(other(x), expected, rtol=0, atol=0)


def test_a_packed_model_is_smaller_on_disk_loads_and_unpacks(blip, batch, tmp_path):
    handle = madtp.patch(blip, CONFIG)
    names = hwp.select_modules(blip, "2:4", exclude=("text_decoder", "madtp_guide")).selected
    hwp.WeightPruner(blip, "2:4", names, schedule="one_shot").finalize()
    handle.set_temperature(2.0)
    blip.save_pretrained(tmp_path / "masked")
    expected = blip(**batch).logits
    packed = hwp.pack(blip, names)
    assert sorted(packed) == sorted(names)
    assert {name for name in packed if blip.get_submodule(name).activation == "gelu"} == {
        name for name in names if name.endswith(("fc1", "intermediate.dense"))
    }
    torch.testing.assert_close(blip(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    blip.save_pretrained(tmp_path / "packed")
    sizes = [(tmp_path / kind / "model.safetensors").stat().st_size for kind in ("masked", "packed")]
    assert sizes[1] < 0.8 * sizes[0]
    loaded = madtp.from_pretrained(tmp_path / "packed")
    torch.testing.assert_close(loaded(**batch).logits, blip(**batch).logits, rtol=0, atol=0)
    plain = loaded.madtp_handle.remove()
    assert not any(isinstance(module, Sparse24Linear) for module in plain.modules())
    assert plain.state_dict().keys() == type(plain)(plain.config).state_dict().keys()
