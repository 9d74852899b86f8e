# SPDX-License-Identifier: Apache-2.0
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from families import CASES, CONFIG
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BlipConfig

import madtp
from madtp.hwp import Epilogue, WeightPruner, pack, select_modules
from madtp.models import BlipForNLVR
from madtp.profiling.macs import count_macs, disk_bytes, profile, profile_batches
from madtp_kernels import dispatch


def vision_macs(layers, width, ffn, patch, image):
    """A ViT: patch convolution, then per layer qkv + projection + FFN on every token, and two attention matmuls."""
    patches = (image // patch) ** 2
    tokens = patches + 1
    linear = tokens * (4 * width**2 + 2 * width * ffn)
    return patches * width * 3 * patch**2 + layers * (linear + 2 * tokens**2 * width)


def text_macs(layers, width, ffn, tokens, context_width, context):
    """A BERT layer with cross-attention to `context` rows of `context_width`."""
    self_attention = 4 * tokens * width**2 + 2 * tokens**2 * width
    cross = 2 * tokens * width**2 + 2 * context * context_width * width + 2 * tokens * context * width
    return layers * (self_attention + cross + 2 * tokens * width * ffn)


def make_blip():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    text = dict(
        hidden_size=24, encoder_hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2
    )
    text |= dict(vocab_size=50, max_position_embeddings=16, bos_token_id=1, pad_token_id=0, eos_token_id=2)
    vision = dict(hidden_size=24, intermediate_size=56, num_hidden_layers=3, num_attention_heads=3)
    vision |= dict(image_size=32, patch_size=8)
    config = transformers.BlipConfig(text_config=text, vision_config=vision, projection_dim=24)
    model = transformers.BlipForQuestionAnswering(config)
    inputs = dict(
        input_ids=torch.randint(3, 50, (5, 7)),
        attention_mask=torch.ones(5, 7, dtype=torch.long),
        pixel_values=torch.randn(5, 3, 32, 32),
        decoder_input_ids=torch.randint(3, 50, (5, 4)),
    )
    return model, inputs


VISION = vision_macs(3, 24, 56, 8, 32)
TEXT = text_macs(2, 24, 40, 7, 24, 17)
DECODER = text_macs(2, 24, 40, 4, 24, 7) + 4 * (24 * 24 + 24 * 50)


def test_blip_matches_the_closed_form():
    model, inputs = make_blip()
    model.train()
    model.text_encoder.eval()
    result = profile(model, inputs)
    assert model.training and not model.text_encoder.training and not model.text_encoder.encoder.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    macs = {branch: account.dense_macs for branch, account in result.branches.items()}
    assert macs == {"vision": VISION, "text": TEXT, "decoder": DECODER, "other": 0}
    total = result.total
    assert total.dense_macs == total.counted_macs == total.executed_macs == VISION + TEXT + DECODER

    assert total.params == sum(p.numel() for p in model.parameters())  # the tied embedding once
    for column in ("params", "nonzero_params", "dense_macs"):
        assert sum(getattr(account, column) for account in result.branches.values()) == getattr(total, column)
    layer = result.modules["vision_model.encoder.layers.1"]
    assert layer.dense_macs == 17 * (4 * 24**2 + 2 * 24 * 56) + 2 * 17**2 * 24
    assert result.modules["vision_model.encoder.layers"].dense_macs == 3 * layer.dense_macs  # a list is never called
    assert result.modules["vision_model.encoder.layers.1.mlp.fc1"].params == 24 * 56 + 56
    assert profile(model, inputs, samples=1).total.dense_macs == 5 * total.dense_macs


@pytest.mark.parametrize("family", ["CLIPModel", "BertModel", "VisionTextDualEncoderModel (ViT, BERT)"])
def test_branches_are_known_without_patching(family):
    model, inputs = CASES[family].build(), CASES[family].inputs()
    inputs = {name: value for name, value in inputs.items() if name != "attention_mask"}
    plain = profile(model, inputs)
    macs = {name: account.dense_macs for name, account in plain.branches.items()}
    madtp.patch(model, CONFIG)
    for name, account in profile(model, inputs).branches.items():  # here causal attention counts the pairs it sees
        assert 0 < account.dense_macs <= macs[name] <= 1.05 * account.dense_macs or name == "other"
    projections = sum(a.dense_macs for name, a in plain.modules.items() if name.endswith("_projection"))
    assert projections <= macs["other"] <= 1.1 * projections  # and the similarities


def test_counted_halves_24_linears_and_executed_does_not():
    model, inputs = make_blip()
    names = select_modules(model, "2:4", exclude=("text_decoder",)).selected
    planned = profile(model, inputs, planned_sparse=names)
    pruner = WeightPruner(model, "2:4", names, schedule="one_shot")
    masked = profile(model, inputs)
    pruner.finalize()
    baked = profile(model, inputs)

    linear = 17 * 3 * (4 * 24**2 + 2 * 24 * 56)
    assert baked.branches["vision"].counted_macs == VISION - linear / 2
    assert baked.branches["vision"].executed_macs == VISION
    assert baked.branches["decoder"].counted_macs == DECODER
    assert masked == baked
    weights = sum(model.get_submodule(name).weight.numel() for name in names)
    assert baked.total.params == planned.total.params
    assert baked.total.nonzero_params == pytest.approx(planned.total.nonzero_params - weights / 2)
    assert {k: v.counted_macs for k, v in planned.modules.items()} == {
        k: v.counted_macs for k, v in baked.modules.items()
    }


def test_patterns_that_do_not_run_as_24_count_in_full():
    model = nn.Sequential(nn.Linear(32, 8, bias=False))
    WeightPruner(model, "4:8", ["0"], schedule="one_shot").finalize()
    account = profile(model, torch.randn(3, 32)).total
    assert account.counted_macs == account.dense_macs == 256
    assert account.nonzero_params == 128


@pytest.mark.parametrize(("backend", "executed"), [("cpu", 128), ("reference", 256)])
def test_a_packed_linear_executes_half_where_a_sparse_kernel_runs(monkeypatch, backend, executed):
    if backend == "cpu" and dispatch.extension_unsupported_reason() is not None:
        pytest.skip("no C++ extension")
    monkeypatch.setenv("MADTP_BACKEND", backend)
    model = nn.Sequential(nn.Linear(32, 8))
    WeightPruner(model, "2:4", ["0"], schedule="one_shot").finalize()
    assert pack(model) == {"0": Epilogue()}
    account = profile(model, torch.randn(1, 32)).total
    assert (account.dense_macs, account.counted_macs, account.executed_macs) == (256, 128, executed)
    assert (account.params, account.nonzero_params) == (264, 136)


@pytest.mark.parametrize("inference", [False, True])
def test_transformer_encoder_layer(inference):
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    x = torch.randn(2, 9, 32)
    with torch.inference_mode(inference):
        result = profile(layer, (x,))
    assert result.total.dense_macs == 9 * (4 * 32**2 + 2 * 32 * 48) + 2 * 9**2 * 32
    assert result.modules["linear1"].dense_macs == 9 * 32 * 48
    assert result.branches["other"] == result.total


def test_grouped_convolution_and_agreement_with_torch():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.Flatten(2), nn.Linear(25, 6)).eval()
    x = torch.randn(2, 4, 5, 5)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    assert profile(model, x).total.dense_macs == counter.get_total_flops() / 2 / 2 == 25 * 8 * 2 * 9 + 8 * 25 * 6


def test_blip_base_vision_tower_on_meta():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.BlipVisionModel(transformers.BlipVisionConfig(image_size=384))
        image = torch.empty(1, 3, 384, 384)
    total = profile(model, {"pixel_values": image}).total
    assert total.dense_macs == vision_macs(12, 768, 3072, 16, 384)
    assert total.dense_macs == pytest.approx(55.5e9, rel=0.01)
    assert total.params == total.nonzero_params


class Patched(nn.Module):
    """Stands for a patched model: two branches, a shared map run inside one of them, half the tokens unless dense."""

    def __init__(self):
        super().__init__()
        self.tower, self.head, self.maps = nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 2), nn.Linear(8, 4)
        self.tower[0].register_forward_hook(lambda module, args, out: self.align(out))
        self.keep, self.madtp_handle = 0.5, self
        self.branches, self.pruning = {"vision": ("tower", "maps")}, {}

    def __setattr__(self, name, value):
        object.__setattr__(self, name, value) if name == "madtp_handle" else super().__setattr__(name, value)

    @contextmanager
    def dense(self):
        self.keep = 1
        yield
        self.keep = 0.5

    def align(self, out):
        if self.keep < 1:
            self.maps(out)

    def forward(self, x):
        return self.head(self.tower(x)[:, : int(x.shape[1] * self.keep)])


def test_patched_model_counts_dense_and_kept_tokens():
    result = profile(Patched(), torch.randn(3, 6, 8))
    vision, other = result.branches["vision"], result.branches["other"]
    assert set(result.branches) == {"vision", "other"}
    assert (vision.dense_macs, vision.counted_macs) == (6 * 64, 6 * 64 + 6 * 32)
    assert (other.dense_macs, other.counted_macs) == (6 * 16, 3 * 16)
    assert result.modules["maps"].counted_macs == 6 * 32 and result.modules["maps"].dense_macs == 0
    assert vision.params == 72 + 36 and other.params == 18


def test_batches_count_as_one():
    model, (a, b) = Patched(), torch.randn(4, 6, 8).split([1, 3])
    whole = profile(model, {"x": torch.cat([a, b])})
    assert profile_batches(model, [{"x": a}, {"x": b}]) == whole
    uneven = profile_batches(model, [{"x": a}, {"x": b[:, :2]}])
    assert uneven.total.dense_macs == pytest.approx((6 * 80 + 3 * 2 * 80) / 4)
    assert uneven.total.params == whole.total.params


def test_hooks_go_away_after_an_error_and_training_comes_back():
    model = nn.Sequential(nn.Linear(8, 8)).train()
    with pytest.raises(RuntimeError):
        profile(model, torch.randn(2, 9))
    assert model.training and not model[0]._forward_hooks and not model[0]._forward_pre_hooks
    with pytest.raises(ValueError, match="inputs must hold a tensor"):
        profile(model, {"x": 1})


def test_count_macs_and_attention_on_cpu():
    model = nn.Linear(4, 4)
    with count_macs(model) as macs, torch.no_grad():
        model(torch.randn(3, 4))
        F.scaled_dot_product_attention(*torch.randn(3, 2, 5, 7, 8).unbind(0))
    assert macs == {("",): 3 * 16, (): 2 * 2 * 5 * 7 * 7 * 8}


class Positional(nn.Module):
    """A model whose named inputs come by position and one output leaves, as fvcore traces it."""

    def __init__(self, model, names, output):
        super().__init__()
        self.model, self.names, self.output = model, names, output

    def forward(self, *values):
        return self.model(**dict(zip(self.names, values, strict=True)))[self.output]


def clip_of_two_layers():
    layers = {"num_hidden_layers": 2}
    return hf.CLIPModel(hf.CLIPConfig(text_config=layers, vision_config=layers, attn_implementation="eager"))


def blip_base():
    vision, text = {"image_size": 384}, {"encoder_hidden_size": 768}
    return hf.BlipForImageTextRetrieval(hf.BlipConfig(vision_config=vision, text_config=text))


@pytest.mark.parametrize(
    ("build", "size", "output"),
    [
        (clip_of_two_layers, 224, "logits_per_image"),
        pytest.param(blip_base, 384, "itm_score", marks=pytest.mark.slow),
    ],
    ids=["CLIP", "BLIP-base"],
)
@pytest.mark.filterwarnings("ignore")
def test_counts_what_fvcore_does(build, size, output):
    """To the last multiply-add in products; fvcore counts LayerNorms too, 0.1 % more."""
    fvcore = pytest.importorskip("fvcore.nn")
    model = build().eval()
    inputs = {"input_ids": torch.ones(1, 20, dtype=torch.long), "pixel_values": torch.zeros(1, 3, size, size)}
    counted = fvcore.FlopCountAnalysis(Positional(model, list(inputs), output), tuple(inputs.values()))
    counted.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    total = profile(model, inputs).total.dense_macs
    assert counted.total() == pytest.approx(total, rel=3e-3)
    assert counted.total() - counted.by_operator()["layer_norm"] == total


def test_counting_leaves_outputs_alone():
    model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.randn(2, 4)
    with count_macs(model) as macs:
        out = model(x)
    assert torch.equal(out, model(x)) and dict(macs) == {("", "0"): 24}


def test_disk_bytes(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.bin").write_bytes(b"12345")
    (tmp_path / "sub" / "b.bin").write_bytes(b"123")
    assert disk_bytes(tmp_path) == 8 and disk_bytes(tmp_path / "a.bin") == 5
    with pytest.raises(FileNotFoundError, match="path must exist"):
        disk_bytes(tmp_path / "none")


def test_nlvr_has_the_published_figures():
    """132.54 GMACs and 259.4 M parameters: MADTP (arXiv 2403.02991), two 384-pixel images and 36 text tokens."""
    config = BlipConfig(
        vision_config={"image_size": 384}, text_config={"encoder_hidden_size": 768, "vocab_size": 30524}
    )
    with torch.device("meta"):
        model = BlipForNLVR(config)
        inputs = {"pixel_values": torch.empty(1, 2, 3, 384, 384), "input_ids": torch.zeros(1, 36, dtype=torch.long)}
    total = profile(model, inputs).total
    assert total.dense_macs == pytest.approx(132.54e9, rel=3e-3)
    assert total.params == pytest.approx(259.4e6, rel=1e-3)
