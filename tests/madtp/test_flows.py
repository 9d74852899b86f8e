# SPDX-License-Identifier: Apache-2.0
"""A patched model goes wherever its Hugging Face class goes: every family through every flow.

The table of docs/models.md says so, and is made from what runs here.
"""

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import matrix
import pytest
import torch
import transformers as hf
from families import CASES, CONFIG, build, outputs, patched, total
from linear_blocks import saved_and_loaded
from matrix import VARIED, Column
from peft import LoraConfig, get_peft_model
from test_hf_trainer import trains_evaluates_and_resumes
from test_like_hugging_face import (
    has_no_attention_maps,
    says_which_inputs_there_are,
    takes_the_keywords_of_hugging_face,
)
from torch import multiprocessing
from torch.optim.swa_utils import AveragedModel

import madtp
from madtp import hwp
from madtp.hwp.lora import support_packed

CLASSIFIERS = {
    "ViTForImageClassification": "ViT",
    "BertForSequenceClassification": "BERT",
    "Dinov2ForImageClassification": "DINOv2",
    "BertForTokenClassification": "BERT, tokens",
}
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def same(family, one, other):
    expected, result = outputs(family, one), outputs(family, other)
    assert all(torch.equal(result[name], value) for name, value in expected.items())
    assert one.madtp_handle.selections.keys() == other.madtp_handle.selections.keys()
    assert one.madtp_handle.tokens_per_layer == other.madtp_handle.tokens_per_layer
    assert one.madtp_handle.temperatures == other.madtp_handle.temperatures
    assert type(one) is type(other)


def step(family, model):
    """One step of training, alignment and all."""
    model.train()
    model.madtp_handle.collect_alignment(True)
    loss = total(family, model) + sum(f.sin().sum() for f in model.madtp_handle.aligned.values())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return model.eval()


def is_copied(family):
    model = patched(family)
    same(family, model, copy.deepcopy(model))
    twin = copy.deepcopy(step(family, model))
    same(family, model, twin)
    assert twin.madtp_handle.model is twin
    assert all(branch.guide is twin.madtp_guide for branch in twin.madtp_handle.pruning.values())
    handle = model.madtp_handle
    handle.remove()
    assert twin.madtp_handle.temperatures and not hasattr(model, "madtp_handle")


def is_pickled(family):
    model = step(family, patched(family))
    same(family, model, pickle.loads(pickle.dumps(model)))
    same(family, model, saved_and_loaded(model))
    assert pickle.loads(pickle.dumps(type(model))) is type(model)


def _answer(family, model, queue):
    queue.put({name: value.numpy() for name, value in outputs(family, model).items()})


def goes_to_a_spawned_process(family):
    model, context = patched(family), multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_answer, args=(family, model, queue))
    process.start()
    result = queue.get()
    process.join()
    for name, value in outputs(family, model).items():
        torch.testing.assert_close(torch.from_numpy(result[name]), value, **CLOSE)


def is_averaged(family):
    model = patched(family)
    average = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.0))
    step(family, model)
    average.update_parameters(model)
    average.update_parameters(model)
    same(family, model, average.module)


def runs_as_a_function(family):
    model = patched(family)
    weights = {name: value.detach() * 0.9 for name, value in model.named_parameters()}
    with torch.no_grad():
        result = torch.func.functional_call(model, weights, kwargs=CASES[family].inputs())
        for parameter in model.parameters():
            parameter.mul_(0.9)
    expected = outputs(family, model)
    assert all(torch.equal(result[name], value) for name, value in expected.items())


def takes_turns_with_itself(family):
    """Threads share the model; each sees the last forward of its own."""
    model, inputs = patched(family), CASES[family].inputs()
    samples = [{name: value[i : i + 1] for name, value in inputs.items()} for i in range(4)] + [inputs]

    def answer(number):
        with torch.no_grad():
            result = outputs(family, model, samples[number % 5])
        return result, model.madtp_handle.selections

    expected = [answer(number) for number in range(5)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(answer, range(40)))
    for number, (result, selections) in enumerate(found):
        before, kept = expected[number % 5]
        assert all(torch.equal(result[name], value) for name, value in before.items())
        for branch, layers in kept.items():
            assert [[s.tolist() for s in layer] for layer in selections[branch]] == [
                [s.tolist() for s in layer] for layer in layers
            ]


def keeps_no_graph(family):
    """After a backward, and where none came, as soon as the outputs are gone and the next forward has begun."""
    for backward in (True, False):
        model = patched(family).train()
        model.madtp_handle.collect_alignment(True)
        loss = total(family, model) + sum(f.sin().sum() for f in model.madtp_handle.aligned.values())
        node = weakref.ref(loss)
        features = model.madtp_handle.summary_features
        assert any(feature.requires_grad for layers in features.values() for feature in layers)
        del features
        if backward:
            loss.backward()
            held = [*model.madtp_handle.aligned.values()]
            held += [feature for layers in model.madtp_handle.summary_features.values() for feature in layers]
            assert held and not any(feature.requires_grad for feature in held)
        del loss
        gc.collect()
        assert node() is None


def is_checkpointed_in_every_mode(family):
    """What a block does again for its gradient is what it did, whatever was set in between."""
    gradients = []
    for options in (None, {"use_reentrant": True}, {"use_reentrant": False}):
        model = patched(family).train()
        if options is not None:
            model.gradient_checkpointing_enable(options)
        loss = total(family, model)
        model.madtp_handle.set_temperature(5.0)
        outputs(family, model)
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for other in gradients[1:]:
        assert other.keys() == gradients[0].keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-5)


def fires_the_hooks_of_others(family):
    """Of the towers' blocks and of all that is a Linear or a norm in them, put on before or after the patch."""
    model, seen = build(family), []

    def watch(when):
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear | torch.nn.LayerNorm) or name.rpartition(".")[2].isdigit():
                module.register_forward_hook(lambda *_, name=name: seen.append((when, name)))

    watch("before")
    with torch.no_grad():
        model(**CASES[family].inputs())
    plain = {name for _, name in seen}
    madtp.patch(model, CONFIG)
    watch("after")
    for temperature in (0.0, 2.0):
        seen.clear()
        model.madtp_handle.set_temperature(temperature)
        outputs(family, model)
        for put_on in ("before", "after"):
            assert plain <= {name for when, name in seen if when == put_on}


def arrives_by_state_dict(family):
    """Weights, and what the branches are set to."""
    model, other = patched(family), madtp.patch(build(family), CONFIG).model
    other.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    same(family, model, other)


def is_loaded_by_its_class(family, tmp_path):
    """Of transformers, as what was saved: patched, in its dtype, with nothing missing and nothing left over."""
    model = patched(family).bfloat16()
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    for kind in (type(CASES[family].build()), *_auto_classes(model)):
        loaded, report = kind.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values()) and loaded.dtype == torch.bfloat16
        same(family, model, loaded)
        assert kind.from_pretrained(tmp_path, dtype=torch.float32, device_map="cpu").dtype == torch.float32


def _auto_classes(model):
    return [hf.AutoModel] if type(model.config) in hf.AutoModel._model_mapping and _is_base(model) else []


def _is_base(model):
    return hf.AutoModel._model_mapping[type(model.config)].__name__ == type(model).__name__


def takes_lora(family):
    """Of peft, on plain and on packed Linears of the towers; what it adds alone is trained."""
    for packed in (False, True):
        model = patched(family)
        handle = model.madtp_handle
        towers = [(handle.family.path(branch), handle.tower(branch).madtp_spec.encoder) for branch in handle.pruning]
        blocks = tuple(".".join(filter(None, (path, encoder.blocks))) for path, encoder in towers)
        names = [name for name in hwp.select_modules(model, "2:4").selected if name.startswith(blocks)]
        if packed:
            hwp.prune_one_shot(model, "2:4", names)
            assert hwp.pack(model, names)
        expected = outputs(family, model)
        adapted = get_peft_model(model, support_packed(LoraConfig(target_modules=names, init_lora_weights=False)))
        assert any(not torch.equal(value, expected[name]) for name, value in outputs(family, adapted).items())
        with adapted.disable_adapter():
            for name, value in outputs(family, adapted).items():
                torch.testing.assert_close(value, expected[name], **CLOSE)
        total(family, adapted).backward()
        trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
        assert trained and all(".lora_" in name for name in trained)


def trains_with_the_trainer(family, tmp_path):
    """Evaluates, saves, takes the best checkpoint at the end, and goes on where it stopped."""
    trains_evaluates_and_resumes(CLASSIFIERS[family], 2.0, tmp_path)


def _classifies(family):
    return None if family in CLASSIFIERS else "has no labels"


def _checkpoints(family):
    return "not in Hugging Face" if family.startswith("VisionTextDualEncoder") else None


FLOWS = {
    "deepcopy": Column(is_copied, quick=VARIED),
    "pickle, torch.save": Column(is_pickled, quick=VARIED),
    "spawn": Column(goes_to_a_spawned_process, quick=("CLIPModel",)),
    "AveragedModel": Column(is_averaged, quick=VARIED),
    "functional_call": Column(runs_as_a_function, quick=VARIED),
    "threads": Column(takes_turns_with_itself, quick=VARIED),
    "no graph kept": Column(keeps_no_graph, quick=VARIED),
    "checkpointing, both modes": Column(is_checkpointed_in_every_mode, _checkpoints, quick=VARIED),
    "hooks": Column(fires_the_hooks_of_others, quick=VARIED),
    "state dict": Column(arrives_by_state_dict, quick=VARIED),
    "its own class, and Auto": Column(is_loaded_by_its_class),
    "keywords, return_dict, hidden states": Column(takes_the_keywords_of_hugging_face),
    "attention maps": Column(has_no_attention_maps),
    "signature": Column(says_which_inputs_there_are),
    "LoRA": Column(takes_lora, quick=VARIED),
    "Trainer": Column(trains_with_the_trainer, _classifies, quick=()),  # test_hf_trainer has a quick one
}


@pytest.mark.parametrize(("family", "words"), matrix.cases(FLOWS))
def test_flow(family, words, tmp_path):
    matrix.run(FLOWS[words], family, tmp_path)


def test_the_docs_have_the_table_of_what_ran():
    assert matrix.table(FLOWS) in matrix.DOCS.read_text(), "docs/models.md must hold matrix.table(FLOWS)"
