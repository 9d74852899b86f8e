# SPDX-License-Identifier: Apache-2.0
"""Every family of models has every property; the table of docs/models.md says so, and is made from what runs here."""

import functools
import tempfile

import matrix
import pytest
import torch
import two_processes
from families import CASES, CONFIG, build, outputs, patched, randomised, total, unpadded
from matrix import Column
from torch.nn.parallel import DistributedDataParallel
from transformers import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

import madtp
from madtp import hwp
from madtp.models import FAMILIES, Encoder, Family, Tower

CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def is_dense_at_temperature_0(family):
    model, inputs = build(family), unpadded(family)
    with torch.no_grad():
        expected = model(**inputs)
        madtp.patch(model, CONFIG)
        result = model(**inputs)
    compared = [n for n in (*CASES[family].outputs, "loss") if getattr(expected, n, None) is not None]
    assert compared
    for name in compared:
        torch.testing.assert_close(result[name], expected[name], **CLOSE)


def is_removed_without_a_trace(family):
    model, inputs = build(family), CASES[family].inputs()
    keys, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    expected = model(**inputs)
    handle = madtp.patch(model, CONFIG)
    assert [key for key in model.state_dict() if not key.startswith("madtp_")] == keys
    handle.set_temperature(2.0)
    model(**inputs)
    handle.remove()
    assert [type(module) for module in model.modules()] == kinds and list(model.state_dict()) == keys
    result = model(**inputs)
    for name in ("loss", *CASES[family].outputs):
        if getattr(expected, name, None) is not None:
            assert torch.equal(result[name], expected[name])


def prunes_each_sample_by_itself(family):
    model, inputs = patched(family), CASES[family].inputs()
    together, handle = outputs(family, model), model.madtp_handle
    layers = [layer for layers in handle.selections.values() for layer in layers]
    assert any(len({len(kept) for kept in samples}) > 1 for samples in layers)
    for i in range(4):
        alone = outputs(family, model, {name: value[i : i + 1] for name, value in inputs.items()})
        for name in CASES[family].outputs:
            torch.testing.assert_close(alone[name][0], together[name][i], **CLOSE)


def keeps_padding_out(family):
    model, inputs = patched(family), CASES[family].inputs()
    garbage = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], 7)
    before, after = outputs(family, model), outputs(family, model, inputs | {"input_ids": garbage})
    assert all(torch.equal(before[name], after[name]) for name in before)


def records_hidden_states(family):
    """Of every tower: what enters its first block and what leaves each; zeros where no token is left."""
    model = build(family)
    handle = madtp.patch(model, CONFIG)
    towers = {path: model.get_submodule(path) for path in map(handle.family.path, handle.pruning)}
    inputs = {path: CASES[family].inputs()[tower.madtp_spec.inputs] for path, tower in towers.items()}
    inputs = {path: value.flatten(0, 1) if value.ndim == 5 else value for path, value in inputs.items()}
    result = {path: tower(inputs[path], output_hidden_states=True).hidden_states for path, tower in towers.items()}
    handle.set_temperature(2.0)
    pruned = {path: tower(inputs[path], output_hidden_states=True).hidden_states for path, tower in towers.items()}
    handle.remove()
    for path, tower in towers.items():
        expected = tower(inputs[path], output_hidden_states=True).hidden_states
        torch.testing.assert_close(result[path], expected, **CLOSE)
        assert [state.shape for state in pruned[path]] == [state.shape for state in expected]
        lost = (pruned[path][-1] == 0).all(dim=-1)
        assert lost.any() and not lost.all()


def saves_and_loads(family, tmp_path):
    model = patched(family)
    model.save_pretrained(tmp_path)
    loaded = madtp.from_pretrained(tmp_path)
    assert type(loaded) is type(model) and loaded.madtp_handle.temperatures == model.madtp_handle.temperatures
    expected, result = outputs(family, model), outputs(family, loaded)
    assert all(torch.equal(result[name], expected[name]) for name in expected)


def runs_2_4_and_saves_it(family, tmp_path):
    model = patched(family)
    dense = (*model.madtp_handle.family.dense_modules, "madtp_guide")
    hwp.WeightPruner(model, "2:4", hwp.select_modules(model, "2:4", exclude=dense).selected, schedule="one_shot")
    hwp.bake(model)
    expected = outputs(family, model)
    packed = hwp.pack(model)
    assert packed
    result = outputs(family, model)
    for name in expected:
        torch.testing.assert_close(result[name], expected[name], rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = madtp.from_pretrained(tmp_path)
    weights = loaded.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    for name, value in outputs(family, loaded).items():  # torch's product rounds by where its operands lie
        torch.testing.assert_close(value, result[name], **CLOSE)


def trains(family):
    model = patched(family).train()
    handle = model.madtp_handle
    handle.collect_alignment(True)
    (total(family, model) + sum(f.sin().sum() for f in handle.aligned.values())).backward()
    assert handle.alignment_tokens.grad.abs().sum() > 0
    for path in map(handle.family.path, handle.pruning):
        embeddings = model.get_submodule(path).embeddings
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in embeddings.parameters())


def checkpoints_gradients(family):
    gradients = []
    for checkpointing in (False, True):
        model = patched(family).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.madtp_handle.collect_alignment(True)
        loss = total(family, model) + sum(f.sin().sum() for f in model.madtp_handle.aligned.values())
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5)


def runs_under_autocast(family):
    model = patched(family, 0.0)
    expected = outputs(family, model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = outputs(family, model)
        model.madtp_handle.set_temperature(2.0)
        pruned = outputs(family, model)
    for name, value in expected.items():
        torch.testing.assert_close(result[name].float(), value, rtol=0.1, atol=0.1 * value.abs().max().item())
        assert pruned[name].isfinite().all()


def compiles(family):
    model = patched(family)
    expected = outputs(family, model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    result = outputs(family, compiled)
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value, **CLOSE)


def generates(family):
    model, inputs = build(family), unpadded(family)
    inputs.pop("labels", None)
    options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    expected = model.generate(**inputs, **options)
    handle = madtp.patch(model, CONFIG)
    assert torch.equal(model.generate(**inputs, **options), expected)
    handle.set_temperature(2.0)
    assert len(model.generate(**inputs, **options)) == len(expected)


def _half(rank):
    """Every family as one of two processes that hold half the samples each: DDP averages what they add."""
    for family in CASES:
        inputs = {name: value[2 * rank : 2 * rank + 2] for name, value in CASES[family].inputs().items()}
        model = patched(family)
        (total(family, model) / 2).backward()
        replica = DistributedDataParallel(patched(family), find_unused_parameters=True)
        total(family, replica, inputs).backward()
        for (name, expected), parameter in zip(model.named_parameters(), replica.module.parameters(), strict=True):
            if expected.grad is not None:
                message = functools.partial("{}, {}: {}".format, family, name)
                torch.testing.assert_close(parameter.grad, expected.grad, **CLOSE, msg=message)
        _train_from_temperature_0(family, inputs)


def _train_from_temperature_0(family, inputs):
    """Steps of a plain DistributedDataParallel, which waits for the gradient of every parameter, used or not."""
    model = patched(family, 0.0)
    total(family, model).backward()
    left_out = [n for n, p in model.named_parameters() if p.grad is None and not n.startswith("madtp_")]
    model.zero_grad()
    # What the loss does not reach in Hugging Face's model either is no matter of ours.
    replica = DistributedDataParallel(model, find_unused_parameters=bool(left_out))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for temperature in (0.0, 0.0, 2.0):
        model.madtp_handle.set_temperature(temperature)
        total(family, replica, inputs).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        first = parameter.detach().clone()
        torch.distributed.broadcast(first, 0)
        assert torch.equal(parameter, first), (family, name)


@functools.cache
def _both_halves():
    """What went wrong, once for all families: starting two processes takes longer than training in them."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            two_processes.run(_half, store=f"{folder}/store", seconds=240)
        except Exception as error:
            return error


def trains_under_ddp(family):
    if error := _both_halves():
        raise error


def _padded(family):
    mask = CASES[family].inputs().get("attention_mask")
    return None if mask is not None and not mask.all() else "has no padding"


def _checkpoints(family):
    return "not in Hugging Face" if family.startswith("VisionTextDualEncoder") else None


def _generates(family):
    return None if CASES[family].generates else "does not generate"


PROPERTIES = {
    "dense at temperature 0": Column(is_dense_at_temperature_0),
    "removed without a trace": Column(is_removed_without_a_trace),
    "each sample by itself": Column(prunes_each_sample_by_itself),
    "padding kept out": Column(keeps_padding_out, _padded),
    "hidden states": Column(records_hidden_states),
    "saved and loaded": Column(saves_and_loads),
    "2:4": Column(runs_2_4_and_saves_it),
    "training": Column(trains),
    "gradient checkpointing": Column(checkpoints_gradients, _checkpoints),
    "autocast bfloat16": Column(runs_under_autocast),
    "torch.compile": Column(compiles, quick=("Dinov2Model",)),
    "DDP": Column(trains_under_ddp, quick=()),  # all families at once, in the first test that asks
    "generate, with beams": Column(generates, _generates),
}


@pytest.mark.parametrize(("family", "words"), matrix.cases(PROPERTIES))
def test_property(family, words, tmp_path):
    matrix.run(PROPERTIES[words], family, tmp_path)


def test_the_docs_have_the_table_of_what_ran():
    assert matrix.table(PROPERTIES) in matrix.DOCS.read_text(), "docs/models.md must hold matrix.table(PROPERTIES)"


def test_every_family_has_a_case():
    assert {family.source.__name__ for family in FAMILIES} == {name.split(" ")[0] for name in CASES}


class Mixer(torch.nn.Module):
    """An encoder that nothing is known of: as plain as a user's own may be."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.after = torch.nn.LayerNorm(32), torch.nn.LayerNorm(32)
            self.qkv, self.proj = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)
            self.up, self.act, self.down = torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 32)

        def forward(self, x):
            q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            x = x + self.proj(out.transpose(1, 2).flatten(2))
            return x + self.down(self.act(self.up(self.after(x))))

    def __init__(self):
        super().__init__()
        self.config = PretrainedConfig(hidden_size=32, num_attention_heads=2)
        self.embed = torch.nn.Embedding(40, 32)
        self.blocks = torch.nn.ModuleList(self.Block() for _ in range(2))

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=x[:, 0])


def test_an_encoder_of_ones_own_needs_a_description():
    encoder = Encoder(
        blocks="blocks", qkv=("qkv",), out="proj", norm1="before", norm2="after", mlp=("up", "act", "down")
    )
    tower = Tower(encoder, "input_ids", pool=lambda tower, batch: batch.summary_features(), embeddings="embed")
    model, ids = randomised(Mixer()), torch.randint(40, (3, 9), generator=torch.Generator().manual_seed(0))
    expected = model(ids)
    with pytest.raises(TypeError, match="model must be one of .*, or come with a family=, got Mixer"):
        madtp.patch(model, CONFIG)
    with pytest.raises(TypeError, match="model must be one of .*, or described by a Tower, got Mixer"):
        madtp.patch(model, CONFIG, family=Family({"text": ""}))
    handle = madtp.patch(model, CONFIG, family=Family({"text": ("", tower)}))
    for name in ("last_hidden_state", "pooler_output"):
        torch.testing.assert_close(model(ids)[name], expected[name], **CLOSE)
    handle.set_temperature(2.0)
    model(ids)
    assert handle.tokens_per_layer["text"][-1] < 9
    handle.remove()
    assert type(model) is Mixer


def test_towers_refuse_what_they_cannot_read():
    model = patched("ViTModel")
    with pytest.raises(ValueError, match=r"pixel_values must be a tensor of shape \(B, 3, H, W\), got \(3, 16, 16\)"):
        model(torch.zeros(3, 16, 16))
    model.config._attn_implementation = "eager"
    with pytest.raises(ValueError, match="output_attentions must be unset: a patched ViTModel makes no attention maps"):
        model(torch.zeros(1, 3, 16, 16), output_attentions=True)
    text = patched("SiglipTextModel")
    with pytest.raises(ValueError, match="attention_mask must have real tokens last"):
        text(torch.ones(1, 9, dtype=torch.long), attention_mask=torch.tensor([[1] * 8 + [0]]))
    nlvr, inputs = patched("BlipForNLVR"), CASES["BlipForNLVR"].inputs()
    with pytest.raises(ValueError, match=r"pixel_values must be of shape \(4, 2, 3, H, W\), got \(4, 3, 16, 16\)"):
        nlvr(inputs["pixel_values"][:, 0], inputs["input_ids"])


@pytest.mark.parametrize("family", CASES)
def test_what_hugging_face_loaded_is_saved_and_loaded(family, tmp_path):
    """Whose weights may have had other names in its files."""
    plain = build(family)
    plain.save_pretrained(tmp_path / "plain")
    model = type(plain).from_pretrained(tmp_path / "plain").eval()
    madtp.patch(model, CONFIG)
    model.save_pretrained(tmp_path / "patched")
    loaded = madtp.from_pretrained(tmp_path / "patched")
    again = type(plain).from_pretrained(tmp_path / "patched")  # a directory for Hugging Face too
    weights = plain.state_dict()
    for other in (loaded.madtp_handle.remove(), again.madtp_handle.remove()):
        assert all(torch.equal(value, weights[name]) for name, value in other.state_dict().items())
