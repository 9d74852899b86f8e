# SPDX-License-Identifier: Apache-2.0
"""Heads and channels that are removed: what is left computes what zeros in their place would, and goes everywhere."""

import copy
import json
import math
import pickle
import runpy
from pathlib import Path

import pytest
import torch
import transformers as hf
from families import CASES, CONFIG, build, outputs
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

import madtp
from madtp import hwp, width
from madtp.handles import find_handle
from madtp.width.choice import cut

VQA = "BlipForQuestionAnswering"
WIDE = {"vision_model.encoder.layers.0.self_attn.projection": 1, "vision_model.encoder.layers.1.mlp.fc2": 32}
NARROWABLE = [name for name in CASES if "SwiGLU" not in name]


def batch_of(family):
    return CASES[family].inputs()


def zeroed(dense, narrow):
    """The dense model with zeros where the narrow one, not corrected, has lost columns."""
    model = copy.deepcopy(dense)
    for part in width.width_parts(narrow):
        full, left = model.get_submodule(part.name).weight, narrow.get_submodule(part.name).weight
        kept = (full.detach()[:, :, None] == left.detach()[:, None, :]).all(0).any(1)
        assert kept.sum() == part.width * part.size
        with torch.no_grad():
            full *= kept
    return model


@pytest.mark.parametrize("family", NARROWABLE)
def test_equals_the_dense_model_with_zeros(family):
    """Patched or not, of every family: half of all heads and channels."""
    dense = build(family)
    narrow = copy.deepcopy(dense)
    done = width.prune_width(narrow, 0.5, [batch_of(family)], score="activation", correct=False)
    assert {part.kind for part in width.width_parts(narrow)} == {"heads", "channels"}
    assert all(2 * part.width == part.full for part in width.width_parts(narrow))
    assert list(done) == [part.name for part in width.width_parts(narrow)]
    expected = zeroed(dense, narrow)
    with torch.no_grad():
        plain = [model(**batch_of(family)).to_tuple() for model in (narrow, expected)]
    for value, other in zip(*plain, strict=True):
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, other, rtol=2e-4, atol=2e-5)
    for model in (narrow, expected):
        madtp.patch(model, CONFIG)
    for name, value in outputs(family, narrow).items():
        torch.testing.assert_close(value, outputs(family, expected)[name], rtol=2e-4, atol=2e-5)
    narrow.madtp_handle.set_temperature(2.0)  # by what the heads say that are left
    assert all(value.isfinite().all() for value in outputs(family, narrow).values())


@pytest.mark.parametrize("family", [VQA, "BlipForNLVR", "CLIPModel", "Dinov2Model"])
def test_saved_and_loaded_bit_for_bit(family, tmp_path):
    model = build(family)
    madtp.patch(model, CONFIG).set_temperature(2.0)
    width.prune_width(model, 0.5, [batch_of(family)])
    expected = outputs(family, model)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["widths"]
    assert saved == width.widths_of(model) != {}
    for loaded in (madtp.from_pretrained(tmp_path), type(model).from_pretrained(tmp_path)):
        assert width.widths_of(loaded) == saved
        for name, value in outputs(family, loaded.eval()).items():
            assert torch.equal(value, expected[name])
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]["widths"] == saved


def test_of_an_encoder_that_a_user_describes():
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "own_encoder.py"))
    torch.manual_seed(0)
    model, ids = example["Words"]().eval(), torch.randint(1000, (4, 12))
    madtp.patch(model, CONFIG, family=madtp.models.Family({"text": ("", example["TOWER"])}))
    dense = copy.deepcopy(model)
    width.prune_width(model, 0.5, [{"input_ids": ids}], score="activation", correct=False)
    assert set(width.widths_of(model).values()) == {2, 128}
    with torch.no_grad():
        found, expected = (m(input_ids=ids).last_hidden_state for m in (model, zeroed(dense, model)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_loaded_as_the_base_of_what_was_saved(tmp_path):
    model = build("ViTForImageClassification")
    madtp.patch(model, CONFIG)
    width.prune_width(model, 0.5, [batch_of("ViTModel")])
    model.save_pretrained(tmp_path)
    base = hf.ViTModel.from_pretrained(tmp_path)
    assert {f"vit.{name}" for name in width.widths_of(base)} == set(width.widths_of(model))
    with torch.no_grad():
        expected, found = (m(**batch_of("ViTModel")) for m in (model.vit, base))
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)


@pytest.mark.parametrize("family", [VQA, "Blip2Model", "BertModel"])
def test_copied_pickled_and_without_the_patch(family):
    """After `remove` the classes of Hugging Face compute with the heads that are left, in copies too."""
    model = build(family)
    handle = madtp.patch(model, CONFIG)
    width.prune_width(model, 0.5, [batch_of(family)])
    handle.remove()
    names = {type(module).__name__ for module in model.modules()}
    assert not {name for name in names if "Narrow" in name}
    inputs = batch_of(family)
    with torch.no_grad():
        expected = model(**inputs).to_tuple()
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            for value, same in zip(other(**inputs).to_tuple(), expected, strict=True):
                assert not isinstance(value, torch.Tensor) or torch.equal(value, same)
            assert width.widths_of(other) == width.widths_of(model) != {}


def test_exported(tmp_path):
    model, inputs = build("CLIPVisionModel"), batch_of("CLIPVisionModel")
    madtp.patch(model, CONFIG).set_temperature(2.0)
    width.prune_width(model, 0.5, [inputs])
    expected = outputs("CLIPVisionModel", model)["pooler_output"]
    madtp.export(model, inputs, tmp_path / "model.pt2", format="torch")
    program = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(program(**inputs)["pooler_output"], expected, rtol=1e-4, atol=1e-5)


def test_damaged_widths_are_refused(tmp_path):
    model = build("ViTModel")
    madtp.patch(model, CONFIG)
    width.prune_width(model, 0.5, [batch_of("ViTModel")])
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (name, _), *_ = config["quantization_config"]["widths"].items()
    for damaged in ({name: 0}, {name: 3}, {name: 2**40}, {name: True}, {"none": 1}, {name: "1"}, [name]):
        config["quantization_config"]["widths"] = damaged
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "madtp.json").unlink(missing_ok=True)
        with pytest.raises(madtp.ModelError, match="cannot be read"):
            hf.ViTModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_packed_after_it(dtype, tmp_path):
    """2:4 and int8 layers of narrow Linears, folded activations with them; saved and loaded."""
    model = build(VQA)
    madtp.patch(model, CONFIG).set_temperature(2.0)
    width.prune_width(model, WIDE, [batch_of(VQA)])
    names = hwp.select_modules(model, "2:4", exclude=model.madtp_handle.dense_modules).selected
    hwp.prune_one_shot(model, "2:4", names)
    expected = outputs(VQA, model)["logits"]
    packed = hwp.pack(model, names, dtype=dtype)
    narrow = {"vision_model.encoder.layers.0.self_attn.qkv", "vision_model.encoder.layers.1.mlp.fc2", *WIDE}
    assert narrow <= packed.keys()
    result = outputs(VQA, model)["logits"]
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4 if dtype is None else 0.3)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(VQA, madtp.from_pretrained(tmp_path))["logits"], result)
    assert width.widths_of(model) == WIDE
    model.madtp_handle.remove()
    assert width.widths_of(model) == WIDE
    assert model.get_submodule("vision_model.encoder.layers.1.mlp.fc2").in_features == 32


@pytest.mark.parametrize("family", [VQA, "CLIPModel", "BertModel"])
def test_accounting_is_torchs(family):
    """Of a narrow model, plain and patched, every column is what torch counts."""
    model, inputs = build(family), batch_of(family)
    model.set_attn_implementation("eager")  # torch's counter knows no attention of a CPU
    before = madtp.profile(model, inputs).total.dense_macs
    width.prune_width(model, 0.5, [inputs])
    for _ in range(2):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(**inputs)
        found = madtp.profile(model, inputs, samples=1).total
        assert found.dense_macs == found.counted_macs == counter.get_total_flops() // 2 < 4 * 0.9 * before
        if find_handle(model) is None:
            madtp.patch(model, CONFIG)


def test_explain_says_what_is_left():
    model = build("CLIPModel")
    handle = madtp.patch(model, CONFIG)
    width.prune_width(model, 0.5, [batch_of("CLIPModel")])
    table = handle.explain()
    assert "1 of 2" in table and "32 of 64" in table


def test_trains_with_a_dense_teacher():
    model = build(VQA)
    madtp.patch(model, CONFIG).set_temperature(1.0)
    width.prune_width(model, 0.5, [batch_of(VQA)])
    model.train()(**batch_of(VQA)).loss.backward()
    for part in width.width_parts(model):
        for name in (part.name, *part.before):
            gradient = model.get_submodule(name).weight.grad
            assert gradient is not None and gradient.shape == model.get_submodule(name).weight.shape
            assert gradient.any()


def test_narrowed_gives_back_every_bit():
    model = build(VQA)
    madtp.patch(model, CONFIG)
    before, expected = copy.deepcopy(model.state_dict()), outputs(VQA, model)["logits"]
    kinds = [type(module) for module in model.modules()]
    with width.narrowed(model, WIDE, [batch_of(VQA)]) as done:
        assert width.widths_of(model) == WIDE and done.keys() == WIDE.keys()
        assert not torch.equal(outputs(VQA, model)["logits"], expected)
    assert width.widths_of(model) == {} and [type(module) for module in model.modules()] == kinds
    assert torch.equal(outputs(VQA, model)["logits"], expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def statistics(x):
    found = hwp.InputStatistics(
        torch.zeros(x.shape[1], dtype=torch.float64), torch.zeros(x.shape[1], x.shape[1]).double()
    )
    found.add(x)
    return found


@pytest.mark.parametrize("size", [1, 4])
def test_correction_is_least_squares(size):
    """With a bias, the regression of the outputs on what is left; its error is what is said."""
    torch.manual_seed(0)
    x = torch.randn(400, 16) @ torch.randn(16, 16) + torch.randn(16)
    linear = nn.Linear(16, 8)
    options = {"score": "second_order", "correct": True, "damping": 1e-9}
    found = cut(linear.weight, linear.bias, statistics(x), size, 8 // size, **options)
    columns = (found.kept[:, None] * size + torch.arange(size)).flatten()
    y = (x @ linear.weight.T + linear.bias).detach().double()
    design = torch.cat((x[:, columns].double(), torch.ones(400, 1, dtype=torch.float64)), 1)
    solution = torch.linalg.lstsq(design, y).solution
    torch.testing.assert_close(torch.cat((found.weight.T, found.bias[None])).double(), solution, rtol=1e-3, atol=1e-3)
    residual = (y - design @ solution).square().sum() / (y - y.mean(0)).square().sum()
    assert found.error == pytest.approx(residual.item(), rel=1e-3)
    plain = cut(linear.weight, linear.bias, statistics(x), size, 8 // size, **options | {"correct": False})
    change = y - (x[:, columns] @ plain.weight.T + plain.bias).double()
    if torch.equal(plain.kept, found.kept):
        assert plain.error == pytest.approx((change.square().sum() / (y - y.mean(0)).square().sum()).item(), rel=1e-3)
    assert found.error < plain.error


def test_scores_take_what_costs_least():
    """A channel that another one copies costs nothing where that makes up for it; by norms the smallest goes."""
    torch.manual_seed(0)
    x = torch.randn(500, 4)
    x[:, 3] = x[:, 2]
    x[:, 0] *= 0.5
    weight = torch.eye(4)
    options = {"correct": True, "damping": 1e-6}
    second = cut(weight, None, statistics(x), 1, 3, score="second_order", **options)
    assert {2, 3} - set(second.kept.tolist()) and second.error < 1e-4
    assert cut(weight, None, statistics(x), 1, 3, score="activation", **options).kept.tolist() == [1, 2, 3]


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e5])
def test_inputs_far_from_zero(offset):
    """Their mean goes to the bias, and what is about it decides as if there were none."""
    torch.manual_seed(0)
    x, linear = torch.randn(4096, 16) * torch.linspace(0.5, 2, 16), nn.Linear(16, 8)
    options = {"score": "second_order", "correct": True, "damping": 0.01}
    expected = cut(linear.weight, linear.bias, statistics(x), 1, 8, **options)
    met = statistics(x[:1000] + offset)
    met.add(x[1000:] + offset)
    found = cut(linear.weight, linear.bias, met, 1, 8, **options)
    assert torch.equal(found.kept, expected.kept)
    torch.testing.assert_close(found.weight, expected.weight, rtol=0, atol=5e-3)
    assert found.error == pytest.approx(expected.error, rel=0.02)


@pytest.mark.parametrize("correct", [True, False])
@pytest.mark.parametrize("ids", [torch.full((1, 1), 5), torch.full((3, 1), 7)])
def test_inputs_that_are_all_the_same(ids, correct):
    """One token: nothing is about the mean, and a bias makes up for all that goes."""
    model, inputs = build("BertModel"), {"input_ids": ids}
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        done = width.prune_width(model, 0.5, [inputs], correct=correct)
        found = model(**inputs).last_hidden_state
    assert all(math.isfinite(entry.error) for entry in done.values())
    if correct:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_tiles():
    for full, size in ((3072, 64), (512, 64), (256, 32), (128, 16), (64, 16)):
        part = width.WidthPart("fc2", "channels", ("fc1",), 1, full, full)
        assert width.tile(part) == size
    assert width.tile(width.WidthPart("out", "heads", ("q",), 64, 12, 12)) == 1
    model = build(VQA)
    assert set(width.uniform_widths(model, 0.6).values()) == {48}  # two heads stay two
    assert width.uniform_widths(model, 1.0) == {}


FC2, FC1 = "vision_model.encoder.layers.1.mlp.fc2", "vision_model.encoder.layers.1.mlp.fc1"


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({FC2: 0}, "from 1 to its 64 channels"),
        ({FC2: 65}, "from 1 to its 64 channels"),
        ({FC2: 32.0}, "from 1 to its 64 channels"),
        ({FC2: 40}, "must leave shapes that kernels run"),
        ({"vision_model.encoder.layers.0.self_attn.projection": 0}, "from 1 to its 2 heads"),
        ({FC1: 32}, "of Linears that read heads or hidden channels"),
        (0.0, r"widths must be numbers by part, or one share in \(0, 1\], got float 0.0"),
        (None, "widths must be numbers by part, or one share"),
    ],
)
def test_widths_that_cannot_be(widths, message):
    model = build(VQA)
    with pytest.raises(ValueError, match=message):
        width.prune_width(model, widths, [batch_of(VQA)])
    assert width.widths_of(model) == {}


def _shared(model):
    model.get_submodule("vision_model.encoder.layers.0.mlp").fc1.weight = model.get_submodule(FC1).weight


def _twice(model):
    model.get_submodule("vision_model.encoder.layers.0.mlp").fc1 = model.get_submodule(FC1)


def _two_of_four(model):
    hwp.prune_one_shot(model, "2:4", [FC1])


def _packed(model):
    _two_of_four(model)
    hwp.pack(model, [FC1])


def _rounded(model):
    hwp.prune_one_shot(model, None, [FC1], weight_dtype="int8")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_shared, "weight is shared with"),
        (_twice, "it is .*layers.0.mlp.fc1 and .*layers.1.mlp.fc1"),
        (_two_of_four, "its weight is 2:4 already, and width goes first"),
        (_packed, r"it is packed \(2:4\), and width goes first"),
        (_rounded, "its weight is rounded already"),
        (lambda model: model.get_submodule(FC2).register_forward_hook(print), "it has hooks"),
        (
            lambda model: parametrize.register_parametrization(model.get_submodule(FC2), "weight", nn.Identity()),
            "more than",
        ),
    ],
)
def test_linears_that_cannot_become_smaller(spoil, message):
    model = build(VQA)
    spoil(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        width.prune_width(model, {**WIDE, FC2: 32}, [batch_of(VQA)])
    assert width.widths_of(model) == {}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_other_arguments_that_cannot_be(llava):
    model, batch = build(VQA), batch_of(VQA)
    for options, message in (({"score": "taylor"}, "score must be one of"), ({"correct": 1}, "correct must be")):
        with pytest.raises(ValueError, match=message):
            width.prune_width(model, WIDE, [batch], **options)
    with pytest.raises(ValueError, match="damping must be"):
        width.prune_width(model, WIDE, [batch], damping=0)
    with pytest.raises(ValueError, match="batches must be at least one"):
        width.prune_width(model, WIDE, [])
    for wrong, kind in ((batch, "str"), ([None], "NoneType")):
        with pytest.raises(ValueError, match=f"batches must be keyword arguments of forwards, .* got a {kind}"):
            width.prune_width(model, WIDE, wrong)
    with pytest.raises(ValueError, match="batches must be such as give finite numbers, got others at 'vision"):
        width.prune_width(model, WIDE, [batch | {"pixel_values": batch["pixel_values"] * torch.nan}])
    with pytest.raises(ValueError, match="model must be one of towers with heads"):
        width.prune_width(nn.Linear(4, 4), 0.5, [])
    decoder, prompts = llava
    for _ in range(2):
        with pytest.raises(ValueError, match="model must be one of towers with heads .* got a Llava"):
            width.prune_width(decoder, 0.5, [prompts])
        if find_handle(decoder) is None:
            madtp.patch(decoder, keep={"projector": 0.5})
    assert width.widths_of(model) == {} and model.get_submodule(FC2).in_features == 64


def test_the_tower_of_a_decoder_is_not_saved_narrow(llava, tmp_path):
    model = copy.deepcopy(llava[0])
    tower = model.model.vision_tower
    width.prune_width(tower, 0.5, [{"pixel_values": llava[1]["pixel_values"]}])
    madtp.patch(model, keep={"projector": 0.5})
    with pytest.raises(ValueError, match="must have all its heads and channels .* got fewer at model.vision_tower"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_parts_that_the_batches_do_not_reach():
    """They stay where a share is asked for, and are refused by name."""
    family, cross = "BlipForImageTextRetrieval", "text_encoder.encoder.layer.0.crossattention.output.dense"
    batch = batch_of(family) | {"use_itm_head": False}
    model = build(family)
    done = width.prune_width(model, 0.5, [batch])
    assert done and cross not in done and cross not in width.widths_of(model)
    model = build(family)
    with pytest.raises(
        ValueError, match=f"batches must be such as reach all parts of widths, got .*no input of '{cross}'"
    ):
        width.prune_width(model, {"vision_model.encoder.layers.0.mlp.fc2": 32, cross: 1}, [batch])
    assert width.widths_of(model) == {}


def test_what_fails_in_the_midst_leaves_the_model_as_it_was(monkeypatch):
    model = build(VQA)
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr("madtp.width.prune.AT_A_TIME", 1)
    batches, seen = [batch_of(VQA)], []

    def fails(module, *_):
        seen.append(module)
        if len(seen) == 2:
            raise RuntimeError("in the midst")

    model.register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="in the midst"):
        width.prune_width(model, WIDE, batches)
    assert width.widths_of(model) == {}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
