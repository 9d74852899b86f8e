# SPDX-License-Identifier: Apache-2.0
"""What a user or a library put on a module is there after pack, after unpack, and back again."""

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from families import outputs, patched
from linear_blocks import Block
from torch import nn
from torch.nn.utils import parametrizations, prune

from madtp import hwp
from madtp.hwp import Epilogue, Sparse24Linear

ACT = {"fc1": Epilogue("act")}


def masked(model):
    hwp.prune_one_shot(model, "2:4", hwp.select_modules(model, "2:4").selected)
    return model


def stages(block, **options):
    """The block as it is, packed, plain again, and packed again."""
    yield "plain"
    hwp.pack(block, **options)
    assert type(block.fc1) is Sparse24Linear
    yield "packed"
    hwp.unpack(block)
    assert type(block.fc1) is nn.Linear and type(block.act) is nn.ReLU
    yield "unpacked"
    hwp.pack(block, **options)
    yield "packed again"


def test_hooks_fire_see_the_same_and_can_be_removed():
    block, x, seen = masked(Block()), torch.randn(4, 32, requires_grad=True), []
    see = lambda kind: lambda module, *arguments: seen.append((kind, type(module), arguments))  # noqa: E731
    handles = [
        block.fc2.register_forward_pre_hook(see("pre")),
        block.fc2.register_forward_pre_hook(see("pre, kwargs"), with_kwargs=True),
        block.fc2.register_forward_hook(see("forward"), always_call=True),
        block.fc2.register_forward_hook(see("forward, kwargs"), with_kwargs=True),
        block.fc2.register_full_backward_pre_hook(see("backward pre")),
        block.fc2.register_full_backward_hook(see("backward")),
        block.fc2.register_state_dict_post_hook(see("state dict")),
        block.fc2.register_state_dict_pre_hook(see("state dict pre")),
        block.fc2.register_load_state_dict_pre_hook(see("load")),
        block.fc2.register_load_state_dict_post_hook(see("load post")),
    ]
    expected = None
    for stage in stages(block):
        seen.clear()
        block(x).sum().backward()
        block.load_state_dict(block.state_dict())
        kinds, classes, arguments = zip(*seen, strict=True)
        assert kinds == (
            *("pre", "pre, kwargs", "forward", "forward, kwargs", "backward pre", "backward"),
            *("state dict pre", "state dict", "load", "load post"),
        )
        assert set(classes) == {Sparse24Linear if "un" not in stage and "packed" in stage else nn.Linear}
        calls = list(zip(kinds, arguments, strict=True))[:6]
        got = [(args[0][0], args[1][0]) if kind == "backward" else args[:2] for kind, args in calls]
        expected = expected or got
        torch.testing.assert_close(got, expected)
    for handle in handles:
        handle.remove()
    seen.clear()
    block(x).sum().backward()
    block.load_state_dict(block.state_dict())
    assert not seen


def test_a_hook_put_on_the_packed_layer_stays_and_changes_the_product_alone():
    block, x = masked(Block()), torch.randn(4, 32)
    plain = block.act(block.fc1(x))
    expected = 2 * block.fc2(plain) + x
    hwp.pack(block)
    handle = block.fc2.register_forward_hook(lambda module, args, output: 2 * output)
    halved = block.fc2.register_forward_pre_hook(lambda module, args: args[0] / 1)  # one value, not three
    torch.testing.assert_close(block(x), expected)
    hwp.unpack(block)
    torch.testing.assert_close(block(x), expected)
    handle.remove(), halved.remove()
    torch.testing.assert_close(block(x), expected - block.fc2(plain))


@pytest.mark.parametrize(
    "watch",
    [
        lambda block: block.fc1.register_forward_hook(lambda module, args, output: output - 1),
        lambda block: block.fc1.register_full_backward_hook(lambda *_: None),
        lambda block: add_hook_to_module(block.fc1, ModelHook()),
        lambda block: block.act.register_forward_hook(lambda module, args, output: output + 1),
        lambda block: block.act.register_forward_pre_hook(lambda module, args: args[0] - 1),
        lambda block: setattr(block.act, "forward", torch.sigmoid),
    ],
)
def test_what_is_watched_is_not_folded(watch):
    block, x = masked(Block()), torch.randn(4, 32)
    watch(block)
    expected, act = block(x), block.act
    assert hwp.pack(block, epilogues=ACT)["fc1"] == Epilogue()
    assert type(block.fc1) is Sparse24Linear and block.act is act
    torch.testing.assert_close(block(x), expected)


def test_what_is_seen_of_the_input_alone_folds_and_so_do_hooks_put_on_the_stand_in():
    block, x, seen = masked(Block()), torch.randn(4, 32), []
    block.fc1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    assert hwp.pack(block, epilogues=ACT)["fc1"] == Epilogue("act")
    handle = block.act.register_forward_hook(lambda module, args, output: seen.append(output))
    block(x)
    hwp.unpack(block)
    block(x)
    assert torch.equal(seen[0], x) and torch.equal(seen[2], x)
    torch.testing.assert_close(seen[1], seen[3])
    handle.remove()
    block(x)
    assert len(seen) == 5


def test_attributes_flags_parameters_and_buffers():
    block, x = masked(Block()), torch.randn(4, 32)
    block.fc1.note, block.fc1._is_hf_initialized, block.fc1.weight.tag = ["mine"], True, "t"
    block.fc1.extra = nn.Parameter(torch.ones(3))
    block.fc1.register_buffer("count", torch.zeros(1), persistent=False)
    block.fc1.child = nn.Linear(2, 2)
    block.fc1.bias.requires_grad_(False)
    block.fc1.weight.requires_grad_(False)
    block.fc1.eval()
    held = [block.fc1.note, block.fc1.extra, block.fc1.count, block.fc1.child, block.fc1.bias]
    order, expected = list(block.state_dict()), block(x)
    for stage in stages(block, epilogues=ACT):
        fc1 = block.fc1
        now = [fc1.note, fc1.extra, fc1.count, fc1.child, fc1.bias]
        assert all(one is other for one, other in zip(now, held, strict=True))
        assert fc1._is_hf_initialized and not fc1.training and block.fc2.training
        assert "fc1.count" not in block.state_dict() and "fc1.extra" in block.state_dict()
        torch.testing.assert_close(block(x), expected)
        if "un" in stage:
            assert fc1.weight.tag == "t" and not fc1.weight.requires_grad and block.fc2.weight.requires_grad
            assert list(block.state_dict()) == order
    block.fc1.later = 1
    hwp.unpack(block)
    assert block.fc1.later == 1 and "activation" not in vars(block.fc1) and set(fc1._buffers) >= {"count"}


class Doubling(ModelHook):
    def __init__(self):
        self.calls = []

    def pre_forward(self, module, *args, **kwargs):
        self.calls.append(type(module))
        return args, kwargs

    def post_forward(self, module, output):
        return 2 * output


def test_hooks_of_accelerate():
    block, x, hook = masked(Block()), torch.randn(4, 32), Doubling()
    plain = block(x)
    add_hook_to_module(block.fc2, hook)
    expected, classes = block(x), []
    assert not torch.allclose(plain, expected)
    for _ in stages(block):
        hook.calls.clear()
        torch.testing.assert_close(block(x), expected)
        classes += hook.calls
    assert classes == [nn.Linear, Sparse24Linear, nn.Linear, Sparse24Linear]
    remove_hook_from_module(block.fc2)
    torch.testing.assert_close(block(x), plain)
    hwp.unpack(block)
    torch.testing.assert_close(block(x), plain)
    assert hwp.pack(block, epilogues=ACT)["fc1"] == Epilogue("act")


def wrap(module):
    forward = module.forward
    module.forward = lambda x: forward(x)


def prune_weight(module):
    prune.l1_unstructured(module, "weight", 0.5)


def prune_bias(module):
    prune.l1_unstructured(module, "bias", 2)


def norm(module):
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(module)


class MyLinear(nn.Linear):
    pass


def subclass(module):
    module.__class__ = MyLinear


@pytest.mark.parametrize(
    ("change", "reason", "written"),
    [
        (wrap, "its forward was replaced", True),
        (lambda module: module.compile(backend="eager"), "it is compiled", True),
        (lambda module: module.weight.register_hook(torch.neg), "weight has hooks on its gradient", True),
        (lambda module: setattr(module, "scale", 2), "scale is an attribute of it that a packed layer has too", True),
        (subclass, "a MyLinear is more than a Linear", True),
        (
            prune_bias,
            "bias is computed from bias_orig at every call",
            True,
        ),
        (
            prune_weight,
            "weight is computed from weight_orig at every call",
            False,
        ),
        (norm, "weight is computed from weight_g, weight_v at every call", False),
        (torch.nn.utils.spectral_norm, "weight is computed from weight_orig at every call", False),
        (parametrizations.weight_norm, "weight is parametrized already", False),
        (parametrizations.spectral_norm, "weight is parametrized already", False),
        (lambda module: module.double().to(torch.float8_e4m3fn), "weight is torch.float8_e4m3fn", None),
        (lambda module: module.to("meta"), "weight is on the meta device", None),
    ],
)
def test_what_could_not_come_along_stays_dense_and_says_why(change, reason, written):
    """written: whether masks can still be put on it, as its weight is a parameter of its own."""
    block = masked(Block())
    change(block.fc1)
    module = block.fc1
    assert "fc1" not in hwp.pack(block) and block.fc1 is module
    assert hwp.explain_linears(block)["fc1"] == f"dense: {reason}"
    selected, dense = hwp.select_modules(block, "2:4")
    if written is not None:
        assert selected == (["fc1"] if written else [])
        assert dense.get("fc1") == (None if written else reason)
    if written is False:
        block = masked(Block())
        change(block.fc1)
        before = {name: value.clone() for name, value in block.state_dict().items()}
        for write in (
            lambda: hwp.prune_one_shot(block, "2:4", ["fc1"]),
            lambda: hwp.WeightPruner(block, "2:4", ["fc1"], schedule="one_shot"),
            lambda: hwp.permute_mlps(block, "2:4", [("fc1", "fc2")]),
        ):
            with pytest.raises(ValueError, match=f"got 'fc1': {reason}"):
                write()
        with pytest.raises(ValueError, match=f"first must be a Linear whose parameters can be written, got {reason}"):
            hwp.fold_permutation(block.fc1, nn.Linear(64, 16), torch.arange(63, -1, -1))
        assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


def test_a_linear_that_is_compiled_by_itself_stays_and_a_compiled_model_packs():
    block, x = masked(Block()), torch.randn(4, 32)
    expected = block(x)
    block.fc1 = torch.compile(block.fc1, backend="eager")
    compiled = torch.compile(block, backend="eager")
    compiled(x)
    assert list(hwp.pack(compiled)) == ["_orig_mod.fc2"]
    assert hwp.explain_linears(compiled)["_orig_mod.fc1._orig_mod"] == "dense: it is compiled"
    torch.testing.assert_close(compiled(x), expected)
    block.fc2.register_forward_hook(lambda module, args, output: 0 * output)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(block, backend="eager", fullgraph=True)(x), x)


@pytest.mark.parametrize("family", ["ViTForImageClassification", "Dinov2ForImageClassification"])
def test_a_hook_put_on_after_packing_sees_the_linear_alone(family):
    plain, model = patched(family), patched(family)
    for one in (plain, model):
        hwp.prune_one_shot(one, "2:4", hwp.select_modules(one, "2:4", exclude=("classifier", "madtp_guide")).selected)
    hwp.pack(model)
    seen = []
    for one in (plain, model):
        for name, module in one.named_modules():
            if name.rpartition(".")[2] in ("fc1", "fc2", "o_proj"):
                module.register_forward_hook(lambda _, given, output: seen.append(output) or output * 0.5)
    results = [outputs(family, one)["logits"] for one in (plain, model)]
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    assert len(seen) == 12
    for first, second in zip(seen[:6], seen[6:], strict=True):
        torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-4)
