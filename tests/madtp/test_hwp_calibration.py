# SPDX-License-Identifier: Apache-2.0
"""Statistics of inputs, collected from a plain model and, token-weighted, from a pruned one."""

import pytest
import torch
from torch import nn

import madtp
from madtp.hwp import collect_inputs
from madtp_kernels import gather_merge

CONFIG = madtp.CompressionConfig(alignment_tokens=8, alignment_dim=32)


def test_statistics_of_a_plain_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    batches = [torch.randn(3, 5, 8), torch.randn(2, 8)]
    with collect_inputs(model, ["0", "2"], gram=True) as statistics:
        for x in batches:
            model(x)
    model(batches[0])  # after the context nothing is added
    rows = torch.cat([x.flatten(0, -2) for x in batches]).double()
    hidden = model[:2](rows.float()).double()
    for name, x in (("0", rows), ("2", hidden)):
        found = statistics[name]
        assert found.weight_sum == 17
        torch.testing.assert_close(found.gram, x.T @ x, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.norms, x.square().mean(0).sqrt().float())
    assert not found.gram.requires_grad


def patched(blip, temperature):
    torch.manual_seed(1)
    handle = madtp.patch(blip, CONFIG)
    handle.set_temperature(temperature)
    return handle


def weight_of(importance, cu_seqlens):
    """Brute force: the importance of every row, the summary's being the best of its sequence."""
    weight = importance.clone()
    for begin, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        weight[begin] = importance[begin:end].max()
    return weight


def expected_squares(x, weight):
    weight = weight / weight.mean()
    return (weight[:, None] * x.square()).sum(0).double(), weight.sum().item()


def test_rows_weigh_what_their_tokens_are_worth(blip, batch):
    handle = patched(blip, 1.0)
    names = {
        "qkv 0": "vision_model.encoder.layers.0.self_attn.qkv",
        "fc1 0": "vision_model.encoder.layers.0.mlp.fc1",
        "qkv 1": "vision_model.encoder.layers.1.self_attn.qkv",
        "fc1 1": "vision_model.encoder.layers.1.mlp.fc1",
        "query 0": "text_encoder.encoder.layer.0.attention.self.query",
        "cross key": "text_encoder.encoder.layer.1.crossattention.self.key",
        "cross query": "text_encoder.encoder.layer.1.crossattention.self.query",
        "decoder": "text_decoder.bert.encoder.layer.0.intermediate.dense",
    }
    inputs, steps = {}, {"vision": [], "text": []}
    hooks = [
        blip.get_submodule(name).register_forward_pre_hook(lambda _, args, key=key: inputs.update({key: args[0]}))
        for key, name in names.items()
    ]
    for branch, taken in steps.items():
        handle.pruning[branch].observer = lambda *step, taken=taken: taken.append(step)
    with torch.no_grad():
        blip(**batch)
    for hook in hooks:
        hook.remove()
    with torch.no_grad(), collect_inputs(blip, names.values(), token_weighted=True) as statistics:
        blip(**batch)

    def after(branch, layer):
        importance, selection = steps[branch][layer]
        weight = weight_of(importance, selection.cu_seqlens_in)
        return gather_merge(weight[:, None], selection)[:, 0]

    first = {branch: weight_of(taken[0][0], taken[0][1].cu_seqlens_in) for branch, taken in steps.items()}
    weights = {
        "qkv 0": first["vision"],
        "fc1 0": after("vision", 0),
        "qkv 1": after("vision", 0),
        "fc1 1": after("vision", 1),
        "query 0": first["text"],
        "cross key": after("vision", 1),
        "cross query": after("text", 1),
        "decoder": torch.ones(inputs["decoder"].shape[:-1].numel()),
    }
    assert len(weights["fc1 0"]) < len(weights["qkv 0"])  # some tokens went
    for key, name in names.items():
        squares, rows = expected_squares(inputs[key].flatten(0, -2), weights[key])
        torch.testing.assert_close(statistics[name].squares, squares, rtol=1e-5, atol=1e-6, msg=key)
        assert statistics[name].weight_sum == pytest.approx(rows, rel=1e-5)
    assert all(len(taken) == 2 for taken in steps.values())  # our observers came back, and were not called meanwhile
    with torch.no_grad():
        blip(**batch)
    assert all(len(taken) == 4 for taken in steps.values())


def test_a_branch_that_keeps_all_weighs_evenly(blip, batch):
    patched(blip, {"vision": 1.0, "text": 0.0})
    names = ["text_encoder.encoder.layer.0.attention.self.query", "vision_model.encoder.layers.0.self_attn.qkv"]
    with torch.no_grad(), collect_inputs(blip, names, token_weighted=True) as weighted:
        blip(**batch)
    with torch.no_grad(), collect_inputs(blip, names) as plain:
        blip(**batch)
    torch.testing.assert_close(weighted[names[0]].squares, plain[names[0]].squares)
    assert not torch.allclose(weighted[names[1]].squares, plain[names[1]].squares, rtol=1e-3)
    assert weighted[names[1]].weight_sum == pytest.approx(plain[names[1]].weight_sum, rel=1e-5)


def test_bad_input(blip):
    with pytest.raises(
        ValueError, match="modules must name Linear modules, got 'vision_model', which is a BlipVisionModel"
    ):
        with collect_inputs(blip, ["vision_model"]):
            pass
    for dense in (blip, madtp.patch(blip, CONFIG).model):
        with pytest.raises(ValueError, match="model must be patched and prune tokens"):
            with collect_inputs(dense, [], token_weighted=True):
                pass
