# SPDX-License-Identifier: Apache-2.0
"""Fake quantisation: what its forward and its gradients are, with masks and without, and a training that is resumed."""

import copy

import pytest
import torch
from test_compression import FC1, Interrupt, Questions, Task, make_trainer, same_bits
from torch import nn
from torch.nn import functional as F

from madtp.hwp import FakeQuantizer, WeightPruner, prune_one_shot
from madtp.hwp.weight_grid import rounded
from madtp.training.trainer import last_checkpoint
from madtp_kernels import quantize, quantized_linear
from madtp_kernels.reference.quantized import quantize_rows


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8, bias=False))


def started(model, modules=("0", "2")):
    quantizer = FakeQuantizer(model, modules, total_steps=1)
    quantizer.start()
    return quantizer


def rounded_rows(x):
    integers, scale = quantize_rows(x)
    return integers.float() * scale[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_forward_is_that_of_quantized_linear(dtype):
    model, x = make_model().to(dtype), torch.randn(40, 64).to(dtype)
    x[3] = 0
    plain = model(x)
    quantizer = started(model)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for layer, inputs in (
        (model[0], x),
        (model[2], torch.randn(2, 3, 32).to(dtype)),
        (model[2], torch.ones(32).to(dtype)),
    ):
        expected = quantized_linear(inputs, quantize(layer.weight, "int8"), layer.bias)
        found = layer(inputs)
        assert found.dtype == dtype and found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert not torch.equal(model(x), plain) and model[0](x[:0]).shape == (0, 32)
    quantizer.stop()
    assert torch.equal(model(x), plain) and "forward" not in vars(model[0])
    quantizer.stop()


def test_gradients_go_straight_through():
    model, x = make_model(), torch.randn(5, 64, requires_grad=True)
    layer, weight = model[0], model[0].weight
    started(model)
    grad = torch.randn(5, 32)
    layer(x).backward(grad)
    torch.testing.assert_close(x.grad, grad @ rounded(weight.detach()))
    torch.testing.assert_close(weight.grad, grad.T @ rounded_rows(x.detach()))
    torch.testing.assert_close(layer.bias.grad, grad.sum(0))


def test_masks_and_rounding_are_one_after_the_other():
    model, decay = make_model(), 0.1
    dense = model[0].weight.detach().clone()
    pruner = WeightPruner(model, "2:4", ["0"], schedule="one_shot", decay=decay)
    keys = list(model.state_dict())
    quantizer = started(model)
    assert list(model.state_dict()) == keys  # so that checkpoints and masks do not know
    x, grad = torch.randn(5, 64), torch.randn(5, 32)
    masked = model[0].weight.detach()
    y = model[0](x)
    expected = quantized_linear(x, quantize(masked, "int8_24"), model[0].bias)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    y.backward(grad)
    original = model[0].parametrizations.weight.original
    torch.testing.assert_close(original.grad, grad.T @ rounded_rows(x) + decay * dense * (masked == 0))
    twin = copy.deepcopy(model)
    assert torch.equal(twin[0](x), y)
    twin[0].parametrizations.weight.original.data.zero_()
    assert torch.equal(model[0](x), y)  # a copy computes with its own weight
    quantizer.stop()
    pruner.finalize()
    assert torch.equal(model[0].weight, masked)  # not rounded: that is what pack does


def test_a_loss_falls_while_weights_are_rounded():
    model, x = make_model(), torch.randn(64, 64)
    target = torch.randn(64, 8)
    quantizer = FakeQuantizer(model, ["0", "2"], total_steps=20, share=1)
    optimizer, losses = torch.optim.Adam(model.parameters(), 1e-2), []
    for step in range(20):
        quantizer.step(step)
        losses.append(F.mse_loss(model(x), target))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    quantizer.stop()
    with torch.no_grad():
        hidden = quantized_linear(x, quantize(model[0].weight, "int8"), model[0].bias).relu()
        deployed = F.mse_loss(quantized_linear(hidden, quantize(model[2].weight, "int8")), target)
    assert losses[-1] < 0.7 * losses[0] and deployed <= losses[-1]


def test_the_schedule():
    model = make_model()
    quantizer = FakeQuantizer(model, ["0"], total_steps=10, share=0.3)
    active = []
    for step in (*range(11), 2, 9):
        quantizer.step(step)
        active.append(quantizer.active)
        assert ("forward" in vars(model[0])) == quantizer.active
    assert active == [False] * 7 + [True] * 4 + [False, True]
    assert FakeQuantizer(make_model(), ["0"], total_steps=10, share=0).first_step == 10


def test_scales_of_an_earlier_rounding_go():
    model = make_model()
    prune_one_shot(model, None, ["0"], weight_dtype="int8")
    started(model)
    assert not hasattr(model[0], "weight_scale")


def test_nan_stays_visible():
    model, x = make_model(), torch.randn(4, 64)
    x[1, 2] = torch.nan
    started(model)
    y = model[0](x)
    assert y[1].isnan().all() and y[[0, 2, 3]].isfinite().all()
    model[0].weight.data[5, 0] = torch.nan
    assert model[0](x[:1])[:, 5].isnan().all()


class Another(nn.Linear):
    def forward(self, input):
        return super().forward(input) + 1


def _tied(model):
    model.add_module("tied", nn.Linear(64, 32))
    model.tied.weight = model[0].weight


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda model: None, {"modules": ["1"]}, "modules must name Linear modules, got '1'"),
        (lambda model: None, {"total_steps": 0}, "total_steps must be an integer of at least 1"),
        (lambda model: None, {"share": 1.5}, r"share must be a number in \[0, 1\], got float 1.5"),
        (_tied, {}, "got '0': weight is shared with tied"),
        (lambda model: model[0].weight.data.fill_(torch.inf), {}, "got '0': weight has a NaN or an infinity"),
        (lambda model: nn.utils.parametrizations.weight_norm(model[0]), {}, "got '0': weight is parametrized already"),
        (lambda model: model.__setitem__(0, Another(64, 32)), {}, "got '0': its forward is another than that"),
        (lambda model: started(model, ["0"]), {}, "got '0': its forward is another than that"),
        (lambda model: model.to("meta"), {}, "got '0': weight is on the meta device"),
    ],
)
def test_bad_input(change, options, message):
    model = make_model()
    change(model)
    with pytest.raises(ValueError, match=message):
        FakeQuantizer(model, **{"modules": ["0"], "total_steps": 1} | options)


@pytest.fixture(scope="module")
def data():
    return Questions(48)


FC2 = "vision_model.encoder.layers.0.mlp.fc2"


def quantizing(folder, data, steps=2, share=0.5, **options):
    trainer = make_trainer(folder, data, steps, **options)
    trainer.fake_quantize([FC1, FC2], share)  # masked, and not
    return trainer


def test_a_resumed_training_rounds_where_it_would_have(tmp_path, data):
    whole = quantizing(tmp_path, data, save_steps=1)
    whole.train()
    assert whole.fake_quantizer.first_step == 1 and whole.fake_quantizer.active
    resumed = quantizing(tmp_path, data, save_steps=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "checkpoint-1"))
    assert same_bits(resumed.model, whole.model)


@pytest.mark.slow
def test_an_interrupted_training_rounds_where_it_would_have(tmp_path, data):
    whole = quantizing(tmp_path / "whole", data, 8, 0.375)
    whole.train()
    stopped = quantizing(tmp_path / "stopped", data, 8, 0.375)
    stopped.add_callback(Interrupt())  # in step 6, of which 5 is the first to be rounded
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = quantizing(tmp_path / "stopped", data, 8, 0.375)
    resumed.train(resume_from_checkpoint=str(last_checkpoint(tmp_path / "stopped" / "checkpoints")))
    assert same_bits(resumed.model, whole.model)
    finished = quantizing(tmp_path / "whole", data, 8, 0.375)
    finished.train(resume_from_checkpoint=str(last_checkpoint(tmp_path / "whole" / "checkpoints")))
    assert finished.fake_quantizer.active and finished.state.global_step == 8
    assert finished.guarded_loss() == whole.guarded_loss()
    whole.fake_quantizer.stop()
    assert finished.guarded_loss() != whole.guarded_loss()


def test_off_is_as_without(tmp_path, data):
    trainer = make_trainer(tmp_path, data, 2)
    assert trainer.fake_quantizer is None
    batch = Task.collate([data[i] for i in range(4)])
    with torch.no_grad():
        plain = trainer.model.eval()(**batch).loss
        trainer.fake_quantize([FC1, FC2], 0.5)
        assert torch.equal(trainer.model(**batch).loss, plain)
        trainer.fake_quantizer.start()
        assert not torch.equal(trainer.model(**batch).loss, plain)


def test_evaluations_count_from_when_weights_are_rounded(tmp_path, data):
    trainer = quantizing(tmp_path, data, eval_dataset=data, metric_for_best_model="loss")
    metrics = {"eval_loss": 1.0}
    trainer.pruner.advance(trainer.pruner.behind(8), 8)
    assert not trainer._determine_best_metric(metrics, None)
    trainer.fake_quantizer.start()
    assert trainer._determine_best_metric(metrics, None)
