# SPDX-License-Identifier: Apache-2.0
"""Linears that are at several places, or share a weight; models that share modules."""

import copy

import pytest
import torch
from torch import nn

from madtp import hwp
from madtp.hwp import Epilogue, Sparse24Linear
from madtp.hwp.packing import replace_linear


class Part(nn.Module):
    def __init__(self, fc, act):
        super().__init__()
        self.fc, self.act = fc, act

    def forward(self, x):
        return self.act(self.fc(x))


def shared(first=None, second=None):
    torch.manual_seed(0)
    fc = nn.Linear(32, 32)
    model = nn.ModuleDict({"a": Part(fc, first or nn.ReLU()), "b": Part(fc, second or nn.ReLU())})
    hwp.prune_one_shot(model, "2:4", ["b.fc"])
    return model


BOTH = {"a.fc": Epilogue("a.act"), "b.fc": Epilogue("b.act")}


def outputs(model, x):
    return [part(x) for part in model.values()]


@pytest.mark.parametrize("names", [None, ["a.fc"], ["b.fc"], ["a.fc", "b.fc"]])
def test_a_linear_of_two_names_is_one_packed_layer_at_both(names):
    model, x = shared(), torch.randn(4, 32)
    expected, keys = outputs(model, x), list(model.state_dict())
    assert hwp.pack(model, names, epilogues=BOTH) == BOTH == hwp.packing.epilogues_of(model)
    assert model.a.fc is model.b.fc and type(model.a.fc) is Sparse24Linear
    assert list(hwp.explain_linears(model)) == ["a.fc", "b.fc"]
    torch.testing.assert_close(outputs(model, x), expected)
    twin = copy.deepcopy(model)
    for packed in (model, twin):
        hwp.unpack(packed)
        assert packed.a.fc is packed.b.fc and type(packed.a.fc) is nn.Linear and type(packed.b.act) is nn.ReLU
        assert packed.a.act is not packed.b.act and list(packed.state_dict()) == keys
        torch.testing.assert_close(outputs(packed, x), expected)


@pytest.mark.parametrize(
    ("second", "epilogues"),
    [
        (nn.GELU(), BOTH),  # no kernel
        (nn.Identity(), {"a.fc": Epilogue("a.act")}),
        (nn.ReLU(), {"a.fc": Epilogue("a.act")}),
    ],
)
def test_what_does_not_follow_at_every_place_is_not_folded(second, epilogues):
    model, x = shared(second=second), torch.randn(4, 32)
    expected = outputs(model, x)
    assert set(hwp.pack(model, epilogues=epilogues).values()) == {Epilogue()}
    torch.testing.assert_close(outputs(model, x), expected)


def test_loading_replaces_at_all_names():
    model, x = shared(), torch.randn(4, 32)
    hwp.pack(model, epilogues=BOTH)
    fresh = nn.ModuleDict({"a": Part(nn.Linear(32, 32), nn.ReLU()), "b": Part(nn.Identity(), nn.ReLU())})
    fresh.b.fc = fresh.a.fc
    epilogues = hwp.packing.epilogues_of(model)
    layers = [replace_linear(fresh, name, "sparse24", epilogue) for name, epilogue in epilogues.items()]
    assert layers[0] is layers[1] is fresh.a.fc is fresh.b.fc
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(outputs(fresh, x), outputs(model, x))
    hwp.unpack(fresh)
    assert type(fresh.a.act) is type(fresh.b.act) is nn.ReLU


def test_a_block_of_two_names_is_packed_once():
    torch.manual_seed(0)
    block = Part(nn.Linear(32, 32), nn.ReLU())
    model, x = nn.Sequential(block, block), torch.randn(4, 32)
    hwp.prune_one_shot(model, "2:4", hwp.select_modules(model, "2:4").selected)
    expected = model(x)
    epilogues = {f"{i}.fc": Epilogue(f"{i}.act") for i in range(2)}
    assert hwp.pack(model, epilogues={"0.fc": Epilogue("0.act")}) == epilogues  # it is the same place
    torch.testing.assert_close(model(x), expected)
    hwp.unpack(model)
    assert type(block.act) is nn.ReLU
    torch.testing.assert_close(model(x), expected)


def test_an_activation_after_two_linears_is_taken_by_both_or_stays():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.one, self.other, self.act = nn.Linear(32, 32), nn.Linear(32, 32), nn.ReLU()

        def forward(self, x):
            return self.act(self.one(x)) + self.act(self.other(x))

    x, epilogues = torch.randn(4, 32), {"one": Epilogue("act"), "other": Epilogue("act")}
    for names in (["one"], ["other"], ["one", "other"]):
        model = Two()
        hwp.prune_one_shot(model, "2:4", ["one", "other"])
        expected = model(x)
        folded = "act" if len(names) == 2 else None
        assert hwp.pack(model, names, epilogues=epilogues) == dict.fromkeys(names, Epilogue(folded))
        torch.testing.assert_close(model(x), expected)
        hwp.pack(model, epilogues=epilogues)
        torch.testing.assert_close(model(x), expected)
        hwp.unpack(model)
        assert type(model.act) is nn.ReLU
        torch.testing.assert_close(model(x), expected)


def test_a_weight_of_two_modules_stays_dense():
    torch.manual_seed(0)
    model = nn.ModuleDict({"embedding": nn.Embedding(64, 32), "head": nn.Linear(32, 64), "fc": nn.Linear(32, 64)})
    hwp.prune_one_shot(model, "2:4", ["head", "fc"])
    model.embedding.weight = model.head.weight
    assert list(hwp.pack(model)) == ["fc"]
    assert hwp.explain_linears(model)["head"] == "dense: weight is shared with embedding"
    assert model.head.weight is model.embedding.weight
    with pytest.raises(ValueError, match="got 'head': weight is shared with embedding"):
        hwp.prune_one_shot(model, "2:4", ["head"])


def test_another_model_keeps_the_linear_it_shares():
    model, x = shared(), torch.randn(4, 32)
    fc = model.a.fc
    other = nn.Sequential(fc, nn.Tanh())
    expected = other(x)
    hwp.pack(model, epilogues=BOTH)
    assert other[0] is fc and type(fc) is nn.Linear
    assert torch.equal(other(x), expected) and list(other.state_dict()) == ["0.weight", "0.bias"]


def test_only_the_whole_of_what_was_folded_is_unpacked():
    model, x = shared(), torch.randn(4, 32)
    outer = nn.ModuleDict({"inner": model})
    expected = outputs(model, x)
    hwp.pack(outer, epilogues={f"inner.{name}": Epilogue(f"inner.{e.activation}") for name, e in BOTH.items()})
    with pytest.raises(ValueError, match="model must be the one that was packed, with the ReLU that fc has taken over"):
        hwp.unpack(model.a)
    assert type(model.a.fc) is Sparse24Linear
    torch.testing.assert_close(outputs(model, x), expected)
    hwp.unpack(model)  # another root than that of pack
    torch.testing.assert_close(outputs(model, x), expected)
    assert type(model.a.act) is nn.ReLU
    with pytest.raises(ValueError, match="model must be what holds the packed layers, got one of them"):
        hwp.unpack(Sparse24Linear(hwp.packing.sparse24_compress(model.a.fc.weight)))
    assert hwp.pack(model.a.fc) == {}
    assert hwp.explain_linears(model.a.fc) == {"": "dense: it is the whole model, nothing holds it"}


def test_masks_of_a_linear_of_two_names():
    model = shared()
    model.requires_grad_(True)
    assert hwp.select_modules(model, "2:4") == (["a.fc"], {})
    assert hwp.select_modules(model, "2:4", exclude=("b.*",)) == ([], {"a.fc": "excluded"})
    pruner = hwp.WeightPruner(model, "2:4", ["b.fc", "a.fc"], schedule="one_shot")
    assert list(pruner.modules) == ["b.fc"]
    with hwp.collect_inputs(model, ["a.fc", "b.fc"]) as statistics:
        model.a(torch.randn(3, 32))
        model.b.fc(input=torch.randn(2, 32))
    assert [statistics[name].weight_sum for name in ("a.fc", "b.fc")] == [5, 5]
    pruner.finalize()
    assert list(model.a.fc.state_dict()) == ["weight", "bias"]


def test_permutations_of_what_is_at_two_places_are_refused():
    torch.manual_seed(0)
    model = nn.ModuleDict({"fc1": nn.Linear(8, 16), "fc2": nn.Linear(16, 8), "other": nn.Linear(16, 8)})
    model["again"] = model["fc1"]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"pairs must be of Linears that no other MLP uses.*'fc1' that is fc1 and again"
    ):
        hwp.permute_mlps(model, "2:4", [("fc1", "fc2")])
    del model["again"]
    model["other"].bias = model["fc2"].bias
    model["tied"] = nn.Linear(8, 16)
    model["tied"].bias = model["fc1"].bias
    with pytest.raises(ValueError, match="no other MLP uses.*, got bias is shared with tied"):
        hwp.permute_mlps(model, "2:4", [("fc1", "fc2")])
    assert all(
        torch.equal(model.state_dict()[name], value)
        for name, value in before.items()
        if name in ("fc1.weight", "fc2.weight")
    )
