# SPDX-License-Identifier: Apache-2.0
"""What fails half-way leaves every object as it was: pack, unpack, masks and permutations, at each step."""

import copy
import itertools

import pytest
import torch
from torch import nn

from madtp import hwp
from madtp.hwp import Epilogue, folding, masking, modules, packing, pruner, takeover
from madtp.hwp.packing import replace_linear


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


def make_model():
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(3)))
    model.seen = []
    for block in model:
        block.fc2.register_load_state_dict_pre_hook(lambda module, *_: model.seen.append(module))
    return model


LINEARS = [f"{i}.{name}" for i in range(3) for name in ("fc1", "fc2")]
EPILOGUES = {f"{i}.fc1": Epilogue(f"{i}.act") for i in range(3)}


def masked():
    model = make_model()
    hwp.prune_one_shot(model, "2:4", LINEARS)
    return model


def snapshot(model):
    """All that could differ: the modules, what they hold, and every value."""
    held = [
        {key: dict(value) if isinstance(value, dict) else copy.copy(value) for key, value in vars(module).items()}
        for module in model.modules()
    ]
    values = {name: value.clone() for name, value in model.state_dict().items()}
    return list(model.modules()), [type(module) for module in model.modules()], held, values


def check_unchanged(model, before):
    modules, types, held, values = snapshot(model)
    assert all(one is other for one, other in zip(modules, before[0], strict=True)) and types == before[1]
    for now, then in zip(held, before[2], strict=True):
        assert now.keys() == then.keys() and all(
            list(now[key]) == list(then[key]) for key in ("_parameters", "_modules")
        )
        assert all(one is then["_parameters"][name] for name, one in now["_parameters"].items())
    assert all(torch.equal(value, before[3][name]) for name, value in values.items())
    model.seen.clear()
    model.load_state_dict(model.state_dict())
    assert model.seen == [block.fc2 for block in model]  # hooks that know their module


def failing(function, at):
    """A function that raises at its n-th call."""
    left = itertools.count(at - 1, -1)

    def call(*args, **kwargs):
        if next(left) == 0:
            raise torch.OutOfMemoryError("injected")
        return function(*args, **kwargs)

    return call


def fails(monkeypatch, act, prepare, steps):
    """Every step, failing at its first and at its last call but one, leaves what `prepare` made."""
    for room, name, ats in steps:
        for at in ats:
            model = prepare()
            before = snapshot(model)
            with monkeypatch.context() as patched:
                patched.setattr(room, name, failing(getattr(room, name), at))
                with pytest.raises(torch.OutOfMemoryError, match="injected"):
                    act(model)
            check_unchanged(model, before)
    model = prepare()
    act(model)
    return model


def packed_model():
    model = masked()
    hwp.pack(model, epilogues=EPILOGUES)
    return model


def test_pack_and_replace(monkeypatch):
    steps = [
        (packing, "sparse24_compress", (1, 5)),
        (packing, "is_pattern", (1, 5)),
        (folding, "is_bare", (1, 3)),
        (packing.Sparse24Linear, "__init__", (1, 5)),
        (packing.Folded, "__init__", (1, 3)),
        (packing, "take_over", (1, 5)),
        (takeover, "_rebound", (1, 60)),
        (takeover, "_rebind_hooks", (1, 5, 9)),
    ]
    model = fails(monkeypatch, lambda model: hwp.pack(model, epilogues=EPILOGUES), masked, steps)
    assert sum(isinstance(module, hwp.Sparse24Linear) for module in model.modules()) == 6
    steps = [
        (packing.Sparse24Linear, "__init__", (1,)),
        (packing.Folded, "__init__", (1,)),
        (takeover, "_rebind_hooks", (1, 2)),
    ]
    fails(monkeypatch, lambda model: replace_linear(model, "1.fc1", "sparse24", EPILOGUES["1.fc1"]), make_model, steps)


def test_unpack(monkeypatch):
    steps = [
        (packing, "_plain", (1, 5)),
        (packing, "_unfolded", (1, 3)),
        (packing, "take_over", (1, 9)),
        (takeover, "_rebind_hooks", (1, 5, 9)),
    ]
    model = fails(monkeypatch, hwp.unpack, packed_model, steps)
    assert torch.equal(model[2].fc1.weight, masked()[2].fc1.weight)


def test_masks_and_permutations(monkeypatch):
    norms = {name: torch.ones(64 if name.endswith("2") else 32) for name in LINEARS}
    prune = lambda model: hwp.WeightPruner(model, "2:4", LINEARS, schedule="one_shot", norms=norms)  # noqa: E731
    steps = [(masking.Masking, "__init__", (1, 5)), (pruner, "nm_mask", (1, 5)), (pruner, "activation_score", (1, 5))]
    fails(monkeypatch, prune, make_model, [*steps, (pruner, "_masking_of", (1, 5))])
    once = lambda model: hwp.prune_one_shot(model, "2:4", LINEARS)  # noqa: E731
    fails(monkeypatch, once, make_model, [(hwp.one_shot, "nm_mask", (1, 5)), (hwp.one_shot, "explain_pattern", ())])
    pairs = [(f"{i}.fc1", f"{i}.fc2") for i in range(3)]
    permute = lambda model: hwp.permute_mlps(model, "2:4", pairs)  # noqa: E731
    fails(monkeypatch, permute, make_model, [(hwp.permutation, "search_permutation", (1, 3))])


def test_writing_parameters_is_all_or_nothing():
    first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    with torch.inference_mode():
        third = nn.Parameter(torch.zeros(2))  # which cannot be written outside
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        modules.write_parameters({first: torch.ones(2), second: torch.ones(2), third: torch.ones(2)})
    assert not first.any() and not second.any()
    modules.write_parameters({first: torch.ones(2), second: torch.ones(2)})
    assert first.all() and second.all()


def test_masks_chosen_anew_are_all_or_nothing():
    model = make_model()
    masks = hwp.WeightPruner(model, "2:4", LINEARS, schedule="one_shot")
    before = {name: mask.clone() for name, (_, mask) in masks.masks(LINEARS).items()}
    for name in LINEARS:
        weight = model.get_submodule(name).parametrizations.weight.original
        weight.data.copy_(torch.randn(weight.shape) if name != LINEARS[-1] else torch.full(weight.shape, torch.nan))
    with pytest.raises(ValueError, match="weight must be free of NaN"):
        masks.step(1)
    assert all(torch.equal(mask, before[name]) for name, (_, mask) in masks.masks(LINEARS).items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ["0.fc1", "0.fc9"]}, "names must name Linear modules, got '0.fc9', which is no module of the model"),
        ({"names": ["0.fc1", "0.act"]}, "names must name Linear modules, got '0.act', which is a ReLU"),
        ({"names": "0.fc1"}, "names must be a list of names, got str '0.fc1'"),
        (
            {"epilogues": {"0.fc9": Epilogue("0.act")}},
            "epilogues must be of modules of the model, got '0.fc9' at '0.fc9'",
        ),
        (
            {"epilogues": {"0.fc1": Epilogue("0.no")}},
            "epilogues must be of modules of the model, got '0.no' at '0.fc1'",
        ),
    ],
)
def test_names_that_are_none_are_refused(arguments, message):
    model = masked()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        hwp.pack(model, **arguments)
    check_unchanged(model, before)


def test_weights_that_no_kernel_takes_are_said():
    model = masked()
    with torch.no_grad():
        model[0].fc1.weight[0, :4] = torch.tensor([torch.nan, 0, 0, 1])
    assert "0.fc1" not in hwp.pack(model, epilogues=EPILOGUES)
    assert hwp.explain_linears(model)["0.fc1"] == "dense: weight has NaN"
    assert type(model[0].act) is nn.ReLU
    for epilogue, what in ((Epilogue("0.fc2"), "activation"), (Epilogue(None, "0.fc2"), "scale")):
        with pytest.raises(ValueError, match=f"{what} of 0.fc1 must be"):
            replace_linear(model, "0.fc1", "sparse24", epilogue)
