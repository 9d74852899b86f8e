# SPDX-License-Identifier: Apache-2.0
"""Smoothing between LayerNorm and Linear: the model stays, int8 costs less; and where it must not be done."""

import copy

import pytest
import torch
from families import CASES, randomised
from torch import nn

import madtp
from madtp.hwp import NormReaders, collect_inputs, prune_one_shot, rounding_sensitivity, smooth
from madtp.models import norm_readers

PAIR = NormReaders("0", ("1",))


def with_outliers(model, factor=64.0):
    """Two channels of every LayerNorm are large, and the weights that read them small."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.data[[3, 7]] *= factor
            module.bias.data[3] -= factor
    return model


def collected(model, pairs, run):
    names = [name for pair in pairs for name in pair.readers]
    with torch.no_grad(), collect_inputs(model, names, gram=True) as statistics:
        run(model)
    return statistics


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", ["ViTModel", "CLIPModel", "BlipVisionModel", "Dinov2Model (SwiGLU)"])
def test_a_model_computes_the_same(family, dtype):
    case = CASES[family]
    model = with_outliers(randomised(case.build())).to(dtype).eval()
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in case.inputs().items()}
    pairs = norm_readers(model)
    run = lambda model: model(**inputs)  # noqa: E731
    before, parameters = run(model), copy.deepcopy(model.state_dict())
    statistics = collected(model, pairs, run)
    found = smooth(model, pairs, statistics)
    assert set(found) == {pair.norm for pair in pairs}
    smoothed = {name: report for name, report in found.items() if report.divisor is not None}
    assert smoothed and all(report.outliers_after < 0.5 * report.outliers_before for report in smoothed.values())
    changed = {
        name.rpartition(".")[0] for name, value in model.state_dict().items() if (value != parameters[name]).any()
    }
    assert changed == {name for norm in smoothed for name in (norm, *found[norm].readers)}
    for name in case.outputs:
        torch.testing.assert_close(
            run(model)[name], before[name], rtol=1e-10 if dtype == torch.float64 else 1e-5, atol=0
        )


def test_pairs_of_a_patched_model_are_the_same():
    model = CASES["BlipForQuestionAnswering"].build()
    plain = norm_readers(model)
    madtp.patch(model, madtp.CompressionConfig(alignment_tokens=4, alignment_dim=32))
    assert norm_readers(model) == plain
    assert not any("text_" in pair.norm for pair in plain)  # whose norms give the residual as well
    block = "vision_model.encoder.layers.0"
    assert plain[:2] == [
        NormReaders(f"{block}.layer_norm1", (f"{block}.self_attn.qkv",)),
        NormReaders(f"{block}.layer_norm2", (f"{block}.mlp.fc1",)),
    ]


def make_model():
    torch.manual_seed(0)
    return with_outliers(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)))


def test_int8_costs_less():
    model, x = make_model(), torch.randn(200, 16)
    run = lambda model: model(x)  # noqa: E731
    statistics = collected(model, [PAIR], run)
    dense, before = model(x), rounding_sensitivity(model, statistics)["1"]
    gram = statistics["1"].gram.clone()
    report = smooth(model, [PAIR], statistics)["0"]
    assert torch.equal(model(x), dense)
    assert torch.equal(report.divisor.log2(), report.divisor.log2().round()) and report.reason is None
    anew = collected(model, [PAIR], run)
    assert rounding_sensitivity(model, anew)["1"] < 0.5 * before
    torch.testing.assert_close(statistics["1"].gram, anew["1"].gram, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(statistics["1"].amax, anew["1"].amax)
    assert not torch.allclose(gram, anew["1"].gram)
    prune_one_shot(model, None, ["1"], statistics, correct=True, weight_dtype="int8")
    assert smooth(model, [PAIR], anew, min_outliers=1)["0"].reason == "1 has a weight that is rounded already"


def test_alpha_says_who_does_the_work():
    x = torch.randn(200, 16)
    largest = {}
    for alpha in (0.0, 0.5, 1.0):
        model = make_model()
        statistics = collected(model, [PAIR], lambda model: model(x))
        largest[alpha] = smooth(model, [PAIR], statistics, alpha=alpha)["0"].outliers_after
    assert largest[1.0] < largest[0.5] < largest[0.0] and largest[1.0] <= 2


def test_channels_without_inputs_or_weights_are_left():
    model, x = make_model(), torch.randn(200, 16)
    model[0].weight.data[2], model[0].bias.data[2], model[1].weight.data[:, 9] = 0, 0, 0
    report = smooth(model, [PAIR], collected(model, [PAIR], lambda model: model(x)))["0"]
    assert report.divisor[2] == report.divisor[9] == 1 and report.divisor[3] > 1


def _hooked(model):
    model[0].register_forward_hook(lambda *_: None)


def _watched(model):
    model[1].register_forward_pre_hook(lambda *_: None)


def _masked(model):
    madtp.hwp.WeightPruner(model, "2:4", ["1"], schedule="one_shot")


def _tied(model):
    model.add_module("tied", nn.Linear(16, 8))
    model.tied.weight = model[1].weight


def _twice(model):
    model.add_module("again", model[0])


def _rms(model):
    model[0] = nn.RMSNorm(16)


def _plain(model):
    model[0] = nn.LayerNorm(16, elementwise_affine=False)


def _unread(model):
    nn.init.zeros_(model[1].weight)


def _even(model):
    model[0] = nn.LayerNorm(16)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_hooked, "0 has hooks"),
        (_watched, "1 has hooks"),
        (_masked, "1 is a ParametrizedLinear"),
        (_tied, "1: weight is shared with tied"),
        (_twice, "0 has several places"),
        (_rms, "0 is a RMSNorm"),
        (_plain, "0 has no weight"),
        (_unread, "all divisors are 1"),
        (_even, "times the median one, below 6"),
    ],
)
def test_where_it_is_left_and_why(change, reason):
    model, x = make_model(), torch.randn(200, 16)
    change(model)
    statistics = collected(model, [PAIR], lambda model: model[:2](x))
    before = copy.deepcopy(model.state_dict())
    report = smooth(model, [PAIR], statistics)["0"]
    assert report.divisor is None and reason in report.reason and report.outliers_after == report.outliers_before
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bad_input_leaves_the_model_alone():
    model, x = make_model(), torch.randn(200, 16)
    good = collected(model, [PAIR], lambda model: model(x))
    unreached = collected(model, [PAIR], lambda model: None)
    broken = collected(model, [PAIR], lambda model: model[1](torch.full((2, 16), torch.nan)))
    before = copy.deepcopy(model.state_dict())
    for pairs, statistics, options, message in (
        ([PAIR], {}, {}, "statistics must hold inputs of every pair, got none of '0'"),
        ([PAIR], unreached, {}, "statistics must hold inputs of every pair, got none of '0'"),
        ([PAIR], broken, {}, "statistics must be finite, got a NaN or an infinity behind '0'"),
        ([NormReaders("9", ("1",))], good, {}, "pairs must be of modules of the model, got '9'"),
        ([NormReaders("0", ("9",))], good, {}, "pairs must be of modules of the model, got '9'"),
        ([PAIR, NormReaders("0", ("3",))], good, {}, "pairs must be of other modules each, got '0' again"),
        ([PAIR], good, {"alpha": 2}, r"alpha must be a number in \[0, 1\], got int 2"),
        ([PAIR], good, {"min_outliers": 0.5}, "min_outliers must be a number of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            smooth(model, pairs, statistics, **options)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
