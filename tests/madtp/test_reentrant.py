# SPDX-License-Identifier: Apache-2.0
"""A patched model among others: several threads, calls inside of calls, parts that are shared, forwards of others."""

import asyncio
import copy
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers as hf
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from families import BERT, CASES, CONFIG, IMAGE, build, dual, outputs, patched, randomised, total
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from transformers.models.vit.modeling_vit import ViTMLP

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
    with pytest.raises(ValueError, match="must have no part that is patched already, got text_model, which is one"):
        madtp.patch(other, CONFIG)
    with pytest.raises(ValueError, match="no part that is patched already, got a BertModel of a patched model"):
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


def test_a_forward_of_the_users_own_is_refused():
    class Scaled(ViTMLP):
        def forward(self, hidden):
            return 2 * super().forward(hidden)

    class Same(ViTMLP):
        pass

    model = build("ViTForImageClassification")
    model.vit.layers[1].mlp.__class__ = Same
    madtp.patch(model, CONFIG).remove()
    model.vit.layers[1].mlp.__class__ = Scaled
    before = state_of(model)
    with pytest.raises(ValueError, match=r"vit.layers.1.mlp.forward must be one of transformers, .* got the Scaled of"):
        madtp.patch(model, CONFIG)
    assert state_of(model) == before


def test_contexts_of_coroutines_end_in_any_order():
    model = patched("ViTForImageClassification")
    handle = model.madtp_handle

    async def request(seconds):
        with handle.dense():
            await asyncio.sleep(seconds)
            outputs("ViTForImageClassification", model)
            return handle.tokens_per_layer["vision"]

    async def both():
        return await asyncio.gather(request(0.01), request(0.02))

    assert asyncio.run(both()) == [[17.0, 17.0]] * 2
    outputs("ViTForImageClassification", model)
    assert handle.tokens_per_layer["vision"][-1] < 17


@pytest.mark.parametrize("kind", list(CheckpointImpl))
def test_checkpoints_of_others_around_blocks(kind):
    gradients = []
    for wrap in (False, True):
        model = patched("BlipForQuestionAnswering").train()
        if wrap:
            for layers in (model.vision_model.encoder.layers, model.text_encoder.encoder.layer):
                for number, layer in enumerate(layers):
                    layers[number] = checkpoint_wrapper(layer, kind)
        total("BlipForQuestionAnswering", model).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert sum(gradient is not None for gradient in gradients[0]) > 60
    for expected, result in zip(*gradients, strict=True):
        assert (expected is None) == (result is None)
        if expected is not None:
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_hooks_of_the_backward_on_blocks():
    model, seen = patched("ViTForImageClassification"), []
    for layer in model.vit.layers:
        layer.register_full_backward_pre_hook(lambda module, grads: seen.append("pre"))
        layer.register_full_backward_hook(lambda module, grads, given: seen.append("full"))
    total("ViTForImageClassification", model).backward()
    assert seen == ["pre", "full"] * 2


@pytest.mark.parametrize("family", ["BertModel", "BertForSequenceClassification", "BlipForQuestionAnswering"])
def test_a_sample_without_tokens_is_by_itself(family):
    model, inputs = patched(family), CASES[family].inputs()
    for empty in (0, 3):
        mask = inputs["attention_mask"].clone()
        mask[empty] = 0
        given = inputs | {"attention_mask": mask}
        others = given | {"input_ids": inputs["input_ids"].flip(1) * mask}
        expected, result = outputs(family, model, given), outputs(family, model, others)
        for name in expected:
            assert expected[name].isfinite().all()
            torch.testing.assert_close(result[name][empty], expected[name][empty])


def test_a_model_patched_in_inference_mode_can_be_trained():
    model = build("ViTForImageClassification")
    with torch.inference_mode():
        madtp.patch(model, CONFIG).set_temperature(2.0)
    total("ViTForImageClassification", model).backward()
    assert model.madtp_handle.alignment_tokens.grad is not None


def test_norms_without_bias_prune():
    model = patched("ViTForImageClassification", 0.0)
    for layer in model.vit.layers:
        layer.layernorm_after.bias = None
    dense = outputs("ViTForImageClassification", model)
    model.madtp_handle.set_temperature(2.0)
    pruned = outputs("ViTForImageClassification", model)
    assert not torch.equal(pruned["logits"], dense["logits"]) and pruned["logits"].isfinite().all()


def test_features_can_be_saved_and_a_copy_is_not_taken_for_them(tmp_path):
    model = patched("BertModel")
    with torch.no_grad():
        features = model(**CASES["BertModel"].inputs()).last_hidden_state
    torch.save(features, tmp_path / "features.pt")
    assert torch.equal(torch.load(tmp_path / "features.pt"), features)
    assert tower.ragged_of(copy.deepcopy(features)) is None
    features.mul_(2)
    with pytest.raises(RuntimeError, match="must be what the patched tower returned, got one written to since"):
        tower.ragged_of(features)
