# SPDX-License-Identifier: Apache-2.0
"""Linears of a patched model that are not 2:4 run on oneDNN where that is faster: all else is as it was."""

import copy
import gc
import io

import pytest
import torch
from families import CASES, CONFIG, randomised
from torch import nn

import madtp
from madtp import hwp
from madtp_kernels import measured
from madtp_kernels.dense import onednn, packed, torch_product
from madtp_kernels.dense import tuning_cpu as tuning
from madtp_kernels.measured import Timing
from madtp_kernels.ops import dense as ops

MISSING = onednn.unsupported_reason(torch.float32)
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
NAMES = ("CLIPModel", "Dinov2Model", "BlipForImageTextRetrieval")


@pytest.fixture
def onednn_wins(monkeypatch, tmp_path):
    """Tuning on, and oneDNN is always faster. Gets the epilogues that it was asked about."""
    epilogues = set()

    def time_backends(case, backends):
        epilogues.add(case.epilogue)
        return Timing({"dense": 10.0, "onednn": 5.0}, "2026-01-02")

    def forget():
        ops._choices.clear()
        packed.forget()
        tuning.measurements.forget()

    monkeypatch.setenv("MADTP_TUNE", "on")
    monkeypatch.setenv("MADTP_CACHE", str(tmp_path))
    monkeypatch.setattr(measured, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(tuning, "time_backends", time_backends)
    monkeypatch.setattr(tuning, "MIN_MACS", 0)
    forget()
    yield epilogues
    forget()


def patched(family, temperature=2.0):
    torch.manual_seed(0)
    model = randomised(CASES[family].build())
    handle = madtp.patch(model, CONFIG)
    handle.set_temperature(temperature)
    return model, handle, CASES[family].inputs()


def outputs(family, model, inputs):
    with torch.no_grad():
        found = model(**inputs)
    return [found[name] for name in CASES[family].outputs or ("last_hidden_state",)]


@pytest.mark.parametrize("family", NAMES)
def test_a_model_gives_the_same(family, onednn_wins, monkeypatch):
    model, handle, inputs = patched(family)
    found = outputs(family, model, inputs)
    assert packed._entries and "none" in onednn_wins
    assert ("none+residual" in onednn_wins) == (family != "Dinov2Model")  # which scales before it adds
    monkeypatch.setenv("MADTP_ONEDNN", "off")
    for got, expected in zip(found, outputs(family, model, inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_bfloat16_model_takes_it_too(onednn_wins, monkeypatch):
    """On any CPU: a stand-in for oneDNN, which runs bfloat16 with AVX-512 alone."""
    family, dtypes = "CLIPModel", []

    def run(x, packed, *epilogue):
        dtypes.append((x.dtype, packed.dtype))
        return torch_product.linear(x, packed, *epilogue)

    monkeypatch.setattr(onednn, "unsupported_reason", lambda dtype: None)
    monkeypatch.setattr(onednn, "pack", torch.clone)
    monkeypatch.setattr(onednn, "linear", run)
    model, handle, inputs = patched(family, temperature=0.0)
    model.to(torch.bfloat16)
    inputs |= {name: t.to(torch.bfloat16) for name, t in inputs.items() if t.is_floating_point()}
    outputs(family, model, inputs)
    assert set(dtypes) == {(torch.bfloat16, torch.bfloat16)}
    assert "bfloat16, quick_gelu, " in handle.explain() and "dense on onednn + quick_gelu" in handle.explain()


def test_training_sees_new_weights_and_so_does_what_follows(onednn_wins, monkeypatch):
    family = "CLIPModel"
    model, handle, inputs = patched(family, temperature=0.0)
    before = outputs(family, model, inputs)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    monkeypatch.setattr(onednn, "linear", None)  # not called where there is a gradient
    sum(model(**inputs)[name].square().sum() for name in CASES[family].outputs).backward()
    monkeypatch.undo()
    optimiser.step()
    monkeypatch.setenv("MADTP_ONEDNN", "off")
    plain = outputs(family, model, inputs)
    monkeypatch.setenv("MADTP_ONEDNN", "on")
    assert not torch.allclose(before[0], plain[0])
    for got, expected in zip(outputs(family, model, inputs), plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_copies_and_files_are_those_of_the_model(onednn_wins):
    family = "CLIPModel"
    model, handle, inputs = patched(family)
    state, attributes = set(model.state_dict()), {name: set(vars(m)) for name, m in model.named_modules()}
    found = outputs(family, model, inputs)
    count = len(packed._entries)
    assert count and set(model.state_dict()) == state
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twins = [copy.deepcopy(model), torch.load(file, weights_only=False)]
    assert len(packed._entries) == count  # neither has brought any along
    for twin in twins:
        for got, expected in zip(outputs(family, twin, inputs), found, strict=True):
            torch.testing.assert_close(got, expected)
    handle.remove()
    model.double()
    del twins, twin
    gc.collect()
    assert not packed._entries


def test_explain_says_it(onednn_wins, monkeypatch):
    model, handle, inputs = patched("CLIPModel", temperature=0.0)
    outputs("CLIPModel", model, inputs)
    lines = {tuple(line.split()[:3:2]): line for line in handle.explain().splitlines()}
    assert "dense on onednn + quick_gelu" in lines["vision", "mlp.fc1"]
    assert "dense on onednn + residual" in lines["vision", "mlp.fc2"]
    assert "dense on onednn  " in lines["text", "self_attn.q_proj"]
    assert "dense 10.0 us, onednn 5.0 us" in lines["vision", "self_attn.out_proj"]
    monkeypatch.setenv("MADTP_ONEDNN", "off")
    assert handle.explain().count("not onednn: MADTP_ONEDNN is off") == 12


def test_explain_tells_packed_layers_from_those_that_are_not(onednn_wins):
    model, handle, inputs = patched("CLIPModel", temperature=0.0)
    layer = "vision_model.encoder.layers.0"
    hwp.WeightPruner(model, "2:4", [f"{layer}.mlp.fc1"], schedule="one_shot").finalize()
    hwp.pack(model, [f"{layer}.mlp.fc1"])
    hwp.pack(model, [f"{layer}.mlp.fc2"], dtype="int8")
    with torch.no_grad():
        model(**inputs)
    assert isinstance(model.get_submodule(f"{layer}.mlp.fc2"), hwp.QuantizedLinear)
    lines = {tuple(line.split()[:3]): line for line in handle.explain().splitlines()}
    assert "2:4 on " in lines["vision", "0", "mlp.fc1"] and " + quick_gelu" in lines["vision", "0", "mlp.fc1"]
    assert "int8 on " in lines["vision", "0", "mlp.fc2"] and "onednn" not in lines["vision", "0", "mlp.fc2"]
    assert "dense on onednn + residual" in lines["vision", "0", "self_attn.out_proj"]
    assert "dense on onednn + quick_gelu" in lines["vision", "1", "mlp.fc1"]


def test_explain_speaks_of_cross_attention_where_it_knows_the_rows(onednn_wins):
    family = "BlipForImageTextRetrieval"
    model, handle, inputs = patched(family, temperature=0.0)
    outputs(family, model, inputs)
    runs = {tuple(line.split()[:3:2]): line for line in handle.explain().splitlines()}
    assert "dense on onednn  " in runs["text", "crossattention.self.query"]
    assert "dense on onednn + residual" in runs["text", "crossattention.output.dense"]
    assert "the rows of its calls are not kept" in runs["text", "crossattention.self.key"]


def test_small_layers_are_called_as_they_were(onednn_wins, monkeypatch):
    monkeypatch.setattr(tuning, "MIN_MACS", 2**22)
    model, handle, inputs = patched("CLIPModel", temperature=0.0)
    outputs("CLIPModel", model, inputs)
    assert not onednn_wins and not packed._entries
    assert handle.explain().count("not onednn: it gains less than it costs to ask below 4194304 MACs") == 12


class Watched(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.act, self.second = nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)

    def forward(self, x):
        return hwp.residual_linear(self.second, hwp.activated_linear(self.first, self.act, x), x)


def hooked(model):
    seen = []
    model.act.register_forward_hook(lambda *_: seen.append("act"))
    model.second.register_forward_hook(lambda *_: seen.append("second"))
    return seen, ["act", "second"]


def parametrized(model):
    nn.utils.parametrizations.weight_norm(model.first)
    return [], []


def replaced(model):
    seen = []
    forward = model.first.forward
    model.first.forward = lambda x: seen.append("first") or forward(x)
    return seen, ["first"]


def of_a_class(model):
    class Wider(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model.first.__class__ = Wider
    return [], []


@pytest.mark.parametrize("change", [hooked, parametrized, replaced, of_a_class])
def test_a_module_with_something_put_on_it_is_called(onednn_wins, change):
    model, x = Watched(), torch.randn(16, 32)
    with torch.no_grad():
        model(x)
        assert onednn_wins == {"relu", "none+residual"}
        seen, expected = change(model)
        y = model(x)
        assert seen == expected
        torch.testing.assert_close(y, x + model.second(model.act(model.first(x))))
