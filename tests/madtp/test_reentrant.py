# SPDX-License-Identifier: Apache-2.0
"""A patched model among others: several threads, calls inside of calls, parts that are shared, forwards of others."""

import copy
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers as hf
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from families import BERT, CASES, CONFIG, IMAGE, build, dual, outputs, patched, randomised

import madtp
from madtp.models import mixing, tower
from madtp.patching import handle as patching


def state_of(model):
    return [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()]


def test_64_requests_at_once_are_answered_as_one_by_one():
    model = patched("BertForSequenceClassification")
    generator = torch.Generator().manual_seed(0)
    requests = [torch.randint(4, 37, (1 + i % 3, 2 + i % 13), generator=generator) for i in range(64)]

    def answer(ids):
        with torch.no_grad():
            return model(input_ids=ids).logits, model.madtp_handle.tokens_per_layer

    one_by_one = list(map(answer, requests))
    with ThreadPoolExecutor(16) as pool:
        at_once = list(pool.map(answer, requests))
    for (expected, kept), (logits, tokens) in zip(one_by_one, at_once, strict=True):
        assert torch.equal(logits, expected) and tokens == kept


def test_contexts_are_of_the_thread_that_enters_them():
    model = patched("ViTForImageClassification")
    handle, inside, may_leave, counts = model.madtp_handle, threading.Event(), threading.Event(), {}
    outputs("ViTForImageClassification", model)
    pruned = handle.tokens_per_layer

    def dense():
        with handle.dense():
            inside.set()
            may_leave.wait(30)
            outputs("ViTForImageClassification", model)
            counts["dense"] = handle.tokens_per_layer

    thread = threading.Thread(target=dense)
    thread.start()
    assert inside.wait(30)
    with handle.dense():
        outputs("ViTForImageClassification", model)
        assert handle.tokens_per_layer == {"vision": [17.0, 17.0]}
    outputs("ViTForImageClassification", model)
    assert handle.tokens_per_layer == pruned != counts
    may_leave.set()
    thread.join()
    assert counts == {"dense": {"vision": [17.0, 17.0]}} and handle.tokens_per_layer == pruned
    assert handle.temperatures == {"vision": 2.0}


def test_a_call_inside_of_a_call():
    model = patched("ViTForImageClassification")
    expected, images = outputs("ViTForImageClassification", model), CASES["ViTForImageClassification"].inputs()
    inner = []

    def again(*_):
        if not inner:
            inner.append(None)
            inner[0] = model(pixel_values=images["pixel_values"][:1]).logits

    model.vit.layers[0].register_forward_hook(again)
    result = outputs("ViTForImageClassification", model)
    assert torch.equal(result["logits"], expected["logits"])
    torch.testing.assert_close(inner[0], expected["logits"][:1])


def test_parts_of_two_models_are_patched_in_one():
    words = randomised(hf.BertModel(hf.BertConfig(**BERT)))
    one = dual(randomised(hf.ViTModel(hf.ViTConfig(**IMAGE))), words)
    other = dual(randomised(hf.ViTModel(hf.ViTConfig(**IMAGE))), words)
    handle = madtp.patch(one, CONFIG)
    before = state_of(other)
    with pytest.raises(ValueError, match="must have no part that is patched already, got one of which text_model is"):
        madtp.patch(other, CONFIG)
    with pytest.raises(ValueError, match="no part that is patched already, got one of which it belongs to one that is"):
        madtp.patch(words, CONFIG)
    assert state_of(other) == before
    handle.remove()
    madtp.patch(other, CONFIG)


@pytest.mark.parametrize("name", ["change_class", "mixed"])
def test_a_patch_that_fails_leaves_the_model_as_it_was(monkeypatch, name):
    model = build("VisionTextDualEncoderModel (ViT, BERT)")
    before, keys = state_of(model), list(model.state_dict())
    real = getattr(patching, name)

    def failing(left):
        def fail(*arguments):
            if not next(left):
                raise MemoryError("none left")
            return real(*arguments)

        return fail

    for good_calls in range(7):
        monkeypatch.setattr(
            patching, name, failing(itertools.chain([True] * good_calls, [False], itertools.repeat(True)))
        )
        with pytest.raises(MemoryError):
            madtp.patch(model, CONFIG)
        monkeypatch.setattr(patching, name, real)
        assert state_of(model) == before and list(model.state_dict()) == keys
    madtp.patch(model, CONFIG)


def test_what_accelerate_wraps_goes_on_to_work():
    family = "ViTForImageClassification"
    model, seen = build(family), []

    class Counts(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(module)
            return args, kwargs

    for when in ("before", "after"):
        model, expected = build(family), outputs(family, patched(family))
        wrapped = [model, model.vit, *model.vit.layers]
        if when == "before":
            for module in wrapped:
                add_hook_to_module(module, Counts())
        torch.manual_seed(0)
        handle = madtp.patch(model, CONFIG)
        handle.set_temperature(2.0)
        if when == "after":
            for module in wrapped:
                add_hook_to_module(module, Counts())
        seen.clear()
        assert torch.equal(outputs(family, model)["logits"], expected["logits"])
        assert seen == wrapped
        handle.remove()
        seen.clear()
        assert torch.equal(outputs(family, model)["logits"], outputs(family, build(family))["logits"])
        assert seen == wrapped
        for module in wrapped:
            remove_hook_from_module(module)
        madtp.patch(model, CONFIG).set_temperature(2.0)
        outputs(family, model)
        assert model.madtp_handle.tokens_per_layer["vision"][-1] < 17


def test_a_forward_that_is_not_of_the_class_is_refused():
    model = build("ViTForImageClassification")
    forward = model.vit.layers[1].forward
    model.vit.layers[1].forward = lambda *args, **kwargs: forward(*args, **kwargs)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"vit.layers.1.forward must be that of its class, .*: patch first, then wrap"):
        madtp.patch(model, CONFIG)
    assert state_of(model) == before


def test_classes_of_a_type_of_their_own_can_be_mixed():
    class Kind(type):
        pass

    class Model(torch.nn.Module, metaclass=Kind):
        pass

    kind = mixing.mixed(mixing.mixed(Model, tower.RaggedVisionTower), tower.RaggedTextTower)
    assert isinstance(kind, Kind) and kind.__name__ == "Model"
    assert copy.deepcopy(kind) is kind
