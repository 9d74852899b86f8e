# SPDX-License-Identifier: Apache-2.0
"""A packed layer is called, copied, saved, averaged and shared between threads as nn.Linear is."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from linear_blocks import Block, saved_and_loaded
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from madtp import hwp
from madtp.hwp import Epilogue, Sparse24Linear


def pair(bias=True):
    """A plain 2:4 Linear and the packed one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64, bias=bias))
    hwp.prune_one_shot(model, "2:4", ["0"])
    plain = copy.deepcopy(model[0])
    hwp.pack(model)
    assert type(model[0]) is Sparse24Linear
    return plain, model[0]


@pytest.mark.parametrize("shape", [(32,), (1, 32), (0, 32), (2, 0, 32), (0, 3, 32), (2, 3, 32), (2, 1, 3, 2, 32)])
def test_inputs_of_every_shape(shape):
    plain, packed = pair()
    x = torch.randn(shape, requires_grad=True)
    residual = torch.randn(*shape[:-1], 64, requires_grad=True)
    for y, expected in ((packed(x), plain(x)), (packed(x, residual), plain(x) + residual), (packed(input=x), plain(x))):
        assert y.shape == expected.shape
        torch.testing.assert_close(y, expected)
        grads = [torch.autograd.grad(out.square().sum(), x, retain_graph=True)[0] for out in (y, expected)]
        torch.testing.assert_close(*grads)
    with torch.no_grad():
        torch.testing.assert_close(packed(x, residual), plain(x) + residual)


def test_inputs_of_every_stride():
    plain, packed = pair(bias=False)
    base = torch.randn(6, 5, 64)
    for x in (
        base[..., ::2],
        base[:, 0, ::2],
        base[:, ::2, :32],
        base.transpose(0, 1)[..., :32],
        base[:5, 0, :32].t().contiguous().t(),
        base[0, 0, ::2],
        base[:1, :, :32].expand(4, 5, 32),
    ):
        torch.testing.assert_close(packed(x), plain(x))
        with torch.no_grad():
            residual = plain(x).transpose(0, -1).contiguous().transpose(0, -1)
            torch.testing.assert_close(packed(x, residual), plain(x) + residual)


@pytest.mark.parametrize(
    ("x", "residual", "message"),
    [
        ((16,), None, r"x must be of 32 channels like weight, got float32 \(1, 16\)"),
        ((), None, r"x must be of shape \(..., 32\) like weight, got float32 \(1,\)"),
        ((2, 3, 16), None, r"x must be of 32 channels like weight, got float32 \(6, 16\)"),
        ((3, 16), None, r"x must be of 32 channels like weight, got float32 \(3, 16\)"),
        ((32,), (1, 64), r"residual must be of shape \(64,\) like the output, got float32 \(1, 64\)"),
        ((3, 32), (64,), r"residual must be a 2-dimensional tensor of float32, got float32 \(64,\)"),
        ((3, 32), (1, 64), r"residual must be of shape \(3, 64\), \(T, N\), got float32 \(1, 64\)"),
        ((2, 3, 32), (6, 64), r"residual must be of shape \(2, 3, 64\) like the output, got float32 \(6, 64\)"),
        ((2, 3, 32), (2, 3, 1), r"residual must be of shape \(6, 64\), \(T, N\), got float32 \(6, 1\)"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(x, residual, message):
    _, packed = pair()
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=message):
            packed(torch.ones(x), None if residual is None else torch.ones(residual))
    if residual == (1, 64) and x == (3, 32):  # of a wider type, where the sum is apart
        with pytest.raises(ValueError, match=r"residual must be of shape \(3, 64\) like the output"):
            packed(torch.ones(x), torch.ones(residual, dtype=torch.float64))


def packed_block():
    block = Block()
    hwp.prune_one_shot(block, "2:4", ["fc1", "fc2"])
    hwp.pack(block, epilogues={"fc1": Epilogue("act")})
    return block


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded])
def test_copies_before_and_after_a_step(copied):
    block, x = packed_block(), torch.randn(4, 32)
    optimizer = torch.optim.AdamW(block.parameters(), lr=1e-2)
    for _ in range(2):
        expected = block(x)
        twin = copied(block)
        torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)
        hwp.unpack(twin)
        assert type(twin.act) is nn.ReLU
        torch.testing.assert_close(twin(x), expected)
        assert torch.equal(block(x), expected)  # the copy took nothing with it
        expected.square().sum().backward()
        optimizer.step()
    layer = copied(block.fc1)  # alone
    torch.testing.assert_close(layer(x), block.fc1(x), rtol=0, atol=0)


def test_functional_call():
    block, x = packed_block(), torch.randn(4, 32)
    expected = block(x)
    state = {name: value.clone() for name, value in (*block.named_parameters(), *block.named_buffers())}
    torch.testing.assert_close(torch.func.functional_call(block, state, (x,)), expected)
    zeros = {name: torch.zeros_like(value) if value.is_floating_point() else value for name, value in state.items()}
    assert torch.equal(torch.func.functional_call(block, zeros, (x,)), x)
    assert torch.equal(block(x), expected)
    parameters = {name: value.detach().requires_grad_() for name, value in block.named_parameters()}
    torch.func.functional_call(block, parameters, (x,)).sum().backward()
    block(x).sum().backward()
    for name, parameter in block.named_parameters():
        torch.testing.assert_close(parameters[name].grad, parameter.grad)


@pytest.mark.parametrize("options", [{}, {"use_buffers": True}, {"multi_avg_fn": get_ema_multi_avg_fn(0.5)}])
def test_averaged_model(options):
    block, x = packed_block(), torch.randn(4, 32)
    block(x).sum().backward()
    averaged = AveragedModel(block, **options)
    biases = [block.fc1.bias.detach().clone()]
    averaged.update_parameters(block)
    for _ in range(2):
        with torch.no_grad():
            block.fc1.bias.add_(1)
        biases.append(block.fc1.bias.detach().clone())
        averaged.update_parameters(block)
    torch.testing.assert_close(averaged.module.fc1.weight + 0, block.fc1.weight + 0)
    if "multi_avg_fn" not in options:
        torch.testing.assert_close(averaged.module.fc1.bias, sum(biases) / 3)
    with torch.no_grad():
        block.fc1.bias.copy_(averaged.module.fc1.bias)
    torch.testing.assert_close(averaged(x), block(x))


def test_eight_threads_call_one_layer():
    plain, packed = pair()
    inputs = [torch.randn(rows % 97 + 1, 32) for rows in range(0, 800, 13)]
    residuals = [torch.randn(len(x), 64) if i % 2 else None for i, x in enumerate(inputs)]
    expected = [plain(x) if r is None else plain(x) + r for x, r in zip(inputs, residuals, strict=True)]
    calls = [i % len(inputs) for i in range(500)]
    for call in (lambda i: packed(inputs[i], residuals[i]), torch.no_grad()(lambda i: packed(inputs[i], residuals[i]))):
        with ThreadPoolExecutor(8) as pool:
            for i, y in zip(calls, pool.map(call, calls), strict=True):
                torch.testing.assert_close(y, expected[i])
