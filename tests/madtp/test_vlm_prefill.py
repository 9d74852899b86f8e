# SPDX-License-Identifier: Apache-2.0
"""`madtp.patch(keep={"prefill": ...})` on tiny decoders of many families.

Two oracles: the whole prompt with what is pruned hidden by a mask for each layer (`simulated`), and the layers of the
unpatched model run by hand, sample by sample, without padding or cache, their eager attention ranking the tokens.
"""

import copy
import json
import math
import pickle
import threading

import pytest
import torch
import transformers as hf
from vlm_families import (
    CASES,
    DECODERS,
    END,
    GREEDY,
    IMAGE,
    LAYERS_BY_HAND,
    PAD,
    QUICK,
    answers,
    close,
    families,
    make_vlm,
    mixed_prompt,
    stays,
    vlm_batch,
)

import madtp
from madtp.models.vlm import usual_prefill_layer
from madtp.patching.vlm_keep import keep_by_temperature

pytestmark = pytest.mark.usefixtures("without_gradients")

STATIC = [name for name in DECODERS if CASES[name].static and name not in ("Gemma 3", "Aya Vision", "Cohere2 Vision")]


def plan_of(name, *amounts):
    """An amount behind each of the first layers there are; behind the second alone where image features are added."""
    return {2: amounts[-1]} if name == "Qwen3-VL" else {1: amounts[0], 2: amounts[-1]}


def same(selections, others):
    pairs = [pair for layer in selections for pair in zip(selections[layer], others[layer], strict=True)]
    return selections.keys() == others.keys() and all(torch.equal(*pair) for pair in pairs)


def within(a, b):
    return bool(torch.isin(a, b).all())


def widths(cache):
    return [layer.keys.shape[2] for layer in cache.layers]


@families(of=DECODERS)
def test_all_kept_is_the_model(name):
    model = make_vlm(name)
    inputs = vlm_batch(name, model)
    classes = {part: type(module) for part, module in model.named_modules()}
    logits, tokens = model(**inputs).logits, model.generate(**inputs, max_new_tokens=4, do_sample=False)
    handle = madtp.patch(model, keep={"prefill": plan_of(name, 1.0)})
    assert torch.equal(model(**inputs).logits, logits)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), tokens)
    counts, selections = handle.counts(**inputs)["prefill"], handle.selections["prefill"]
    assert {n: [part.tolist() for part in parts] for n, parts in selections.items()} == {
        n: [list(range(count)) for count in parts] for n, parts in counts.items()
    }
    assert handle.remove() is model and {part: type(module) for part, module in model.named_modules()} == classes
    assert not any(key.startswith("madtp") for module in model.modules() for key in vars(module))
    assert torch.equal(model(**inputs).logits, logits)


@families(of=DECODERS)
@pytest.mark.parametrize("projector", [False, True])
def test_removed_is_hidden(name, projector):
    model = make_vlm(name)
    inputs = vlm_batch(name, model)
    keep = {"prefill": plan_of(name, 0.5, 0.25)}
    if projector:
        keep["projector"] = madtp.Keep(0.6, rule="random")
        if name == "Gemma 3":
            pytest.skip("its sliding windows count the columns that the projector leaves")
    handle = madtp.patch(model, keep=keep)
    logits, columns, kept = model(**inputs).logits, handle.columns, handle.selections["prefill"]
    assert {n: [len(part) for part in parts] for n, parts in kept.items()} == handle.counts(**inputs)["prefill"]
    assert all(part.dtype == torch.long and (part.diff() > 0).all() for parts in kept.values() for part in parts)
    assert all(within(a, b) for a, b in zip(kept[max(kept)], kept[min(kept)], strict=True))
    if projector:
        entered = handle.selections["projector"]
        assert all(within(a, b) for a, b in zip(kept[min(kept)], entered, strict=True))
    out = model.generate(**inputs, **GREEDY)
    assert same(handle.selections["prefill"], kept)
    beams = model.generate(**inputs, **GREEDY, num_beams=3, output_scores=True)
    assert same(handle.selections["prefill"], kept) or not CASES[name].beams
    with handle.simulated():
        whole, hidden = model(**inputs).logits, model.generate(**inputs, **GREEDY)
        assert same(handle.selections["prefill"], kept)
        hidden_beams = model.generate(**inputs, **GREEDY, num_beams=3, output_scores=True)
    real = columns >= 0
    assert whole.shape[1] == inputs["input_ids"].shape[1] > logits.shape[1] == columns.shape[1]
    close(logits[real], whole[torch.arange(2)[:, None].expand_as(columns)[real], columns[real]])
    close(answers(out), answers(hidden))
    if CASES[name].beams:
        assert torch.equal(beams.sequences, hidden_beams.sequences)
        close(beams.sequences_scores, hidden_beams.sequences_scores)


@families(quick=("GLM-4.5V",), of=("GLM-4.5V", "GLM-4.6V", "EXAONE 4.5", "Qwen3-VL MoE", "DeepSeek-VL"))
def test_removed_is_hidden_in_decoders_of_other_cases(name):
    model = make_vlm(name)
    inputs = vlm_batch(name, model)
    plan = {2: 0.5} if name == "Qwen3-VL MoE" else {1: 0.5, 2: 0.25}
    handle = madtp.patch(model, keep={"prefill": plan})
    logits, columns, kept = model(**inputs).logits, handle.columns, handle.selections["prefill"]
    out = model.generate(**inputs, **GREEDY)
    with handle.simulated():
        whole, hidden = model(**inputs).logits, model.generate(**inputs, **GREEDY)
        assert same(handle.selections["prefill"], kept)
    real = columns >= 0
    assert logits.shape[1] < whole.shape[1]
    close(logits[real], whole[torch.arange(2)[:, None].expand_as(columns)[real], columns[real]])
    close(answers(out), answers(hidden))


def by_hand(model, name, inputs, plan, steps):
    """-> (steps, 2, V) logits of greedy steps, and by layer the columns that stay of each sample."""
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    pixels = {key: value for key, value in inputs.items() if key.startswith(("pixel", "image"))}
    encoded = model.base_model.get_image_features(**pixels, return_dict=True)
    rows = [part.flatten(0, -2) for part in encoded.pooler_output]
    embeds, numbers = model.get_input_embeddings()(ids).clone(), torch.full_like(ids, -1)
    embeds[ids == IMAGE] = torch.cat(rows)
    numbers[ids == IMAGE] = torch.cat([torch.full((len(part),), number) for number, part in enumerate(rows)])
    rest = {key: value for key, value in inputs.items() if key != "input_ids"}
    positions = model._prepare_position_ids_for_generation(ids, rest) + (name == "PaliGemma")
    base = model.base_model
    decoder = getattr(base, "language_model", None) or base.text_model
    types = getattr(decoder.config, "layer_types", None) or ["full_attention"] * len(decoder.layers)
    weights = []
    hooks = [layer.self_attn.register_forward_hook(lambda *x: weights.append(x[2][1])) for layer in decoder.layers]
    model.set_attn_implementation({"text_config": "eager"})
    logits, kept = [], {n: [] for n in plan}
    for sample in range(2):
        own, chosen = real[sample].nonzero().flatten(), {}
        x, image = embeds[sample][own][None], ids[sample][own] == IMAGE
        where = positions[..., [sample], :][..., own]
        where = where[1:] if where.ndim == 3 and len(where) == 4 else where
        number = numbers[sample][own]
        first = int((ids[:sample] == IMAGE).sum())
        deep = [torch.cat(list(rows)) for rows in encoded.get("deepstack_features") or ()]
        deep = [rows[first : first + int(image.sum())] for rows in deep]
        steps_of = []
        for _ in range(steps):
            length, prompt = x.shape[1], len(own)
            i, j = torch.arange(length)[:, None], torch.arange(length)
            seen = j <= i
            if name == "PaliGemma":
                seen = seen | (j < prompt) & (i < prompt)
            if name == "Gemma 3":
                group = torch.cat([number, torch.full((length - prompt,), -1)])
                seen = seen | ((group[:, None] == group) & (group >= 0))
            h, left = x, torch.arange(length)
            for n, layer in enumerate(decoder.layers):
                now = image[left.clamp(max=prompt - 1)] & (left < prompt)
                if n in plan:
                    if n not in chosen:
                        scores = weights[-1][0].sum(0)[-1][now]
                        chosen[n] = ranked(scores, left[now], number, plan[n])
                    alive = ~now | torch.isin(left, chosen[n])
                    h, left, now = h[:, alive], left[alive], now[alive]
                mask = seen & (j > i - decoder.config.sliding_window) if types[n] == "sliding_attention" else seen
                mask = torch.zeros(len(left), len(left)).double().masked_fill(~mask[left][:, left], -1e300)[None, None]
                kinds = (types[n],) if name == "Gemma 3" else ()
                tables = tuple(table[..., left, :] for table in decoder.rotary_emb(x, where, *kinds))
                h = layer(h, attention_mask=mask, position_embeddings=tables)
                if n < len(deep):
                    h[0, now] += deep[n]
            steps_of.append(model.get_output_embeddings()(decoder.norm(h))[0, -1])
            x = torch.cat([x, model.get_input_embeddings()(steps_of[-1].argmax()[None])[None]], 1)
            where = torch.cat([where, where[..., -1:] + 1], -1)
        logits.append(torch.stack(steps_of))
        for n, columns in chosen.items():
            kept[n].append(own[columns])
    for hook in hooks:
        hook.remove()
    model.set_attn_implementation({"text_config": "sdpa"})
    return torch.stack(logits, 1), kept


def ranked(scores, columns, numbers, share):
    """Of each image the columns with the best scores, a share of the tokens that entered, or by a temperature."""
    best = []
    for number in numbers[numbers >= 0].unique():
        if isinstance(share, madtp.Keep):
            own = numbers[columns] == number
            best.append(columns[own][stays(scores[own], share.temperature)])
            continue
        own, count = numbers[columns] == number, math.ceil(share * int((numbers == number).sum()))
        order = scores[own].argsort(descending=True, stable=True)  # outside of a window all are 0: the first stay
        best.append(columns[own][order[:count]].sort().values)
    return torch.cat(best)


@families(of=LAYERS_BY_HAND)
def test_layers_by_hand(name):
    model = make_vlm(name)
    inputs = vlm_batch(name, model)
    plan = plan_of(name, 0.5, 0.25)
    expected, kept = by_hand(model, name, inputs, plan, 4)
    handle = madtp.patch(model, keep={"prefill": plan})
    out = model.generate(**inputs, **GREEDY)
    record = handle.seams["prefill"].here.record
    for n in plan:
        assert all(torch.equal(a.nonzero().flatten(), b) for a, b in zip(record.kept[n], kept[n], strict=True))
    close(answers(out), expected)
    close(model(**inputs).logits[:, -1], expected[0])
    if name != "Gemma 3":  # whose windows hold some of it
        held, last = widths(out.past_key_values), max(plan)
        assert held[0] == inputs["input_ids"].shape[1] + 3
        assert held[last:] == [handle.columns.shape[1] + 3] * len(held[last:])


@families(quick=("Qwen2.5-VL",), of=[name for name, case in CASES.items() if case.video])
def test_images_and_videos_in_the_order_of_the_prompt(name):
    model = make_vlm(name)
    inputs, _ = mixed_prompt(name, model)
    handle = madtp.patch(model, keep={"projector": 4, "prefill": {2: 3}})
    out = model.generate(**inputs, **GREEDY)
    counts, kept = handle.counts(**inputs), handle.selections
    assert counts["prefill"][2] == [len(part) for part in kept["prefill"][2]] == [3, 3, 3]
    assert all(within(a, b) for a, b in zip(kept["prefill"][2], kept["projector"], strict=True))
    with handle.simulated():
        close(answers(model.generate(**inputs, **GREEDY)), answers(out))


@families(quick=("LLaVA",), of=STATIC)
def test_a_static_cache_answers_the_same(name):
    model = make_vlm(name)
    inputs = vlm_batch(name, model)
    madtp.patch(model, keep={"prefill": plan_of(name, 0.5, 0.25)})
    out = model.generate(**inputs, **GREEDY)
    static = model.generate(**inputs, **GREEDY, cache_implementation="static", disable_compile=True)
    assert torch.equal(static.sequences, out.sequences)
    close(answers(static), answers(out))


@pytest.mark.slow
def test_decoding_on_a_pruned_cache_is_not_compiled(llava):
    model, inputs = llava
    madtp.patch(model, keep={"prefill": {1: 0.5}})
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    compiled = hf.CompileConfig(backend="none such", fullgraph=True, mode=None)
    compiled._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": compiled}
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False, **options), expected)


@pytest.mark.slow
def test_prompts_without_images_compile_whole(llava):
    model, _ = llava
    ids = torch.tensor([[20, 21, 22, 23]])
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    madtp.patch(model, keep={"projector": 0.5, "prefill": {1: 0.5}})
    compiled = hf.CompileConfig(backend="eager", fullgraph=True, mode=None)
    compiled._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": compiled}
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False, **options), expected)
    torch.compiler.reset()


@pytest.mark.slow
def test_windows_that_the_config_gives_to_all_layers():
    model = make_vlm("LLaVA-NeXT")
    inputs = vlm_batch("LLaVA-NeXT", model)
    model.config.text_config.sliding_window = 12
    handle = madtp.patch(model, keep={"prefill": {1: madtp.Keep(0.5, rule="uniform"), 2: 0.2}})
    assert model.model.language_model.layers[2].madtp_window == 12
    out = model.generate(**inputs, **GREEDY)
    assert widths(out.past_key_values) == [11, 11, 11]
    close(answers(model.generate(**inputs, **GREEDY, use_cache=False)), answers(out))
    with handle.simulated():
        close(answers(model.generate(**inputs, **GREEDY)), answers(out))


def test_padding_among_new_tokens_is_not_seen(llava):
    model, inputs = llava
    madtp.patch(model, keep={"prefill": {1: 0.5}})
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1)
    mask[0, -3:-1] = 0  # two tokens for the second sample alone
    step, where = torch.tensor([[30, 31, 32], [30, 31, 32]]), mask.cumsum(1)[:, -3:] - 1
    cache = model(**inputs, use_cache=True).past_key_values
    got = model(input_ids=step, past_key_values=cache, attention_mask=mask, position_ids=where).logits[0, -1]
    cache = model(**inputs, use_cache=True).past_key_values
    alone = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    options = {"attention_mask": alone, "position_ids": where[:, -1:]}
    close(got, model(input_ids=step[:, -1:], past_key_values=cache, **options).logits[0, -1])


@families(quick=("LLaVA",), of=QUICK)
def test_without_a_cache_what_the_prompt_kept_stays(name):
    model = make_vlm(name)
    inputs = vlm_batch(name, model)
    handle = madtp.patch(model, keep={"projector": 0.6, "prefill": plan_of(name, 0.5, 0.25)})
    out = model.generate(**inputs, **GREEDY)
    kept, columns = handle.selections["prefill"], handle.columns
    close(answers(model.generate(**inputs, **GREEDY, use_cache=False)), answers(out))
    assert same(handle.selections["prefill"], kept) and torch.equal(handle.columns, columns)


@pytest.mark.parametrize("name", ["LLaVA", pytest.param("Qwen2.5-VL", marks=pytest.mark.slow)])
@pytest.mark.parametrize("implementation", ["eager", "madtp"])
def test_attention_of_any_implementation_ranks_the_same(name, implementation):
    model = make_vlm(name).float()
    inputs = vlm_batch(name, model.double())
    model.float()
    inputs["pixel_values"] = inputs["pixel_values"].float()
    handle = madtp.patch(model, keep={"prefill": plan_of(name, 0.5, 0.25)})
    logits, kept, out = model(**inputs).logits, handle.selections["prefill"], model.generate(**inputs, **GREEDY)
    real = handle.columns >= 0
    model.set_attn_implementation({"text_config": implementation})
    torch.testing.assert_close(model(**inputs).logits[real], logits[real], rtol=1e-3, atol=1e-3)
    assert same(handle.selections["prefill"], kept)
    assert torch.equal(model.generate(**inputs, **GREEDY).sequences, out.sequences)
    with handle.simulated():
        assert torch.equal(model.generate(**inputs, **GREEDY).sequences, out.sequences)


@families(quick=(), of=DECODERS)
def test_losses_and_gradients_are_those_of_hidden_tokens(name):
    model = make_vlm(name)
    inputs = vlm_batch(name, model, right=True)
    text = (inputs["input_ids"] > END) & (inputs["input_ids"] != IMAGE)
    after = inputs["input_ids"].roll(1, 1) > END  # behind text: it is predicted from a token that stays
    labels = torch.where(text & after & (inputs["input_ids"].roll(1, 1) != IMAGE), inputs["input_ids"], -100)
    handle = madtp.patch(model, keep={"prefill": plan_of(name, 0.5, 0.25)})

    def loss_and_gradients():
        model.zero_grad()
        with torch.enable_grad():
            loss = model(**inputs, labels=labels).loss
            loss.backward()
        return loss, {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    loss, gradients = loss_and_gradients()
    with handle.simulated():
        expected, hidden = loss_and_gradients()
    close(loss, expected)
    assert gradients.keys() == hidden.keys() and any("vision" in key or "visual" in key for key in gradients)
    for key in gradients:
        close(gradients[key], hidden[key])


def test_labels_of_pruned_places_do_not_count(llava):
    model, inputs = llava
    handle = madtp.patch(model, keep={"projector": 0.6, "prefill": {1: 0.3}})
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    loss, columns = model(**inputs, labels=labels).loss, handle.columns
    logits = model(**inputs).logits
    short = labels.gather(1, columns.clamp(min=0)).masked_fill(columns < 0, -100)
    assert logits.shape[1] == columns.shape[1]
    close(loss, torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), short[:, 1:].flatten()))


def test_gradient_checkpointing_prunes_once(llava):
    model, inputs = llava
    handle = madtp.patch(model, keep={"prefill": {1: 0.5, 2: 0.25}})
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)

    def gradients():
        model.zero_grad()
        with torch.enable_grad():
            model(**inputs, labels=labels, use_cache=False).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    model.train().activation_checkpointing_enable()
    for a, b in zip(gradients(), expected, strict=True):
        close(a, b)
    assert [len(part) for part in handle.selections["prefill"][2]] == [4, 4, 4]


@pytest.mark.parametrize("name", ["LLaVA", "PaliGemma"])  # where the first column is text, and an image's
def test_padding_on_either_side_is_the_same(name):
    model = make_vlm(name)
    left, right = vlm_batch(name, model), vlm_batch(name, model, right=True)
    handle = madtp.patch(model, keep={"prefill": {1: 0.9, 2: madtp.Keep(0.7, rule="uniform")}})
    logits, kept, columns = model(**left).logits, handle.selections["prefill"], handle.columns
    other = model(**right).logits
    assert same(handle.selections["prefill"], kept) and [len(part) for part in kept[2]] == [12, 12, 12]
    assert (handle.columns[:, 0] == 0).all() and (columns[:, -1] == left["input_ids"].shape[1] - 1).all()
    close(other[handle.columns >= 0], logits[columns >= 0])


def test_caches_of_the_caller(llava):
    model, inputs = llava
    madtp.patch(model, keep={"prefill": {1: 0.5, 2: 0.25}})
    expected = model.generate(**inputs, **GREEDY)
    cache = hf.DynamicCache()  # whose layers come with what they hold
    out = model.generate(**inputs, **GREEDY, past_key_values=cache)
    close(answers(out), answers(expected))
    assert widths(cache) == widths(expected.past_key_values)


def test_what_else_generate_runs_is_not_pruned(llava):
    model, inputs = llava
    madtp.patch(model, keep={"prefill": {1: 1.0}})
    options = {"max_new_tokens": 3, "do_sample": False, "guidance_scale": 1.5}  # a prompt of its own, without images
    out = model.generate(**inputs, **options)
    model.madtp_handle.remove()
    assert torch.equal(out, model.generate(**inputs, **options))


@pytest.mark.parametrize("name", ["LLaVA", pytest.param("Qwen2.5-VL", marks=pytest.mark.slow)])
def test_a_decoding_by_hand_goes_on_from_the_cache(name):
    model = make_vlm(name)
    inputs = vlm_batch(name, model)
    keys = [key for key in inputs if key not in ("pixel_values", "image_grid_thw", "attention_mask")]
    alone = {key: inputs[key][1:] for key in keys} | {"pixel_values": inputs["pixel_values"][1:]}
    if name != "LLaVA":
        alone |= {"pixel_values": inputs["pixel_values"][32:], "image_grid_thw": inputs["image_grid_thw"][1:]}
    madtp.patch(model, keep={"prefill": {1: 0.5, 2: 0.25}})
    expected = model.generate(**alone, **GREEDY)
    out = model(**alone, use_cache=True)
    logits = [out.logits[:, -1]]
    for _ in range(3):
        out = model(input_ids=logits[-1].argmax(-1)[:, None], past_key_values=out.past_key_values)
        logits.append(out.logits[:, -1])
    close(torch.stack(logits), answers(expected))
    assert widths(out.past_key_values)[0] == inputs["input_ids"].shape[1] + 3 > widths(out.past_key_values)[1]


@pytest.mark.parametrize("rule", ["received", "random", "uniform", "divprune"])
def test_other_rules(llava, rule):
    model, inputs = llava
    handle = madtp.patch(model, keep={"prefill": {1: madtp.Keep(5, rule=rule), 2: madtp.Keep(3, rule=rule)}})
    out = model.generate(**inputs, **GREEDY)
    assert [[len(part) for part in parts] for parts in handle.selections["prefill"].values()] == [[5] * 3, [3] * 3]
    with handle.simulated():
        close(answers(model.generate(**inputs, **GREEDY)), answers(out))


@pytest.mark.parametrize("rule", ["fastv", "received"])
def test_a_causal_mask_alone_is_ranked_by_the_op(llava, monkeypatch, rule):
    """As by the map that is made where a mask is given, as in eager attention."""
    from madtp.models import prefill_run

    model, inputs = llava
    ids = inputs["input_ids"]
    full = inputs | {"input_ids": ids.masked_fill(ids == PAD, 20), "attention_mask": torch.ones_like(ids)}
    calls, run, found = [], prefill_run.attention_rows, []
    monkeypatch.setattr(
        prefill_run, "attention_rows", lambda *args, **options: calls.append(0) or run(*args, **options)
    )
    handle = madtp.patch(model, keep={"prefill": {1: madtp.Keep(9, rule=rule), 2: madtp.Keep(mass=0.5, rule=rule)}})
    for form in ("sdpa", "madtp", "eager"):
        model.set_attn_implementation({"text_config": form})
        logits = model(**full).logits
        found.append((logits[handle.columns >= 0], handle.selections["prefill"]))
        assert len(calls) == (0 if form == "eager" else 1), "behind the first layer samples have other lengths"
        calls.clear()
    model.set_attn_implementation({"text_config": "sdpa"})
    model(**inputs)
    assert not calls, "padding is hidden by a mask"
    for logits, kept in found[:2]:
        close(logits, found[2][0])
        assert same(kept, found[2][1])


def test_what_tokens_receive_is_the_sum_of_an_attention_map(llava, monkeypatch):
    from madtp.models import prefill_run

    model, inputs = llava
    monkeypatch.setattr(prefill_run, "ROWS", 7)
    monkeypatch.setattr(prefill_run, "ROWS_OF_OP", 11)
    seen = []

    def rule(given, counts):
        seen.append(given.importance)
        return torch.ones(len(given.features), dtype=torch.bool)

    alone = {key: value[:1, inputs["attention_mask"][0] == 1] for key, value in inputs.items() if value.ndim == 2}
    alone["pixel_values"] = inputs["pixel_values"][:1]
    handle = madtp.patch(model, keep={"prefill": {1: madtp.Keep(rule=rule)}})
    model(**alone)
    handle.remove()
    madtp.patch(model, keep={"prefill": {1: madtp.Keep(4, rule="received")}})
    model(**alone)
    kept = model.madtp_handle.selections["prefill"][1][0]
    model.madtp_handle.remove()
    model.set_attn_implementation({"text_config": "eager"})
    weights = model(**alone, output_attentions=True).attentions[0][0].sum(0)  # (S, S)
    image = alone["input_ids"][0] == IMAGE
    close(seen[0], weights[-1][image])
    assert torch.equal(kept, weights.sum(0)[image].topk(4).indices.sort().values)


def test_the_fewest_tokens_that_hold_a_mass_stay(llava):
    model, inputs = llava
    shares = []

    def rule(given, counts):
        shares.extend(part / part.sum() for part in given.importance.split(given.lengths))
        return torch.ones(len(given.features), dtype=torch.bool)

    handle = madtp.patch(model, keep={"prefill": {1: madtp.Keep(rule=rule), 2: madtp.Keep(mass=0.7, rule="fastv")}})
    model(**inputs)
    kept = handle.selections["prefill"][2]
    handle.remove()
    handle = madtp.patch(model, keep={"prefill": {2: madtp.Keep(rule=rule)}})
    model(**inputs)
    for share, places in zip(shares[-3:], kept, strict=True):
        assert share[places].sum() >= 0.7 > share[places].sum() - share[places].min()
    with pytest.raises(ValueError, match="counts must be of a share or a count"):
        handle.counts(**inputs)


def test_counts_and_shares_are_of_what_entered(llava):
    model, inputs = llava
    handle = madtp.patch(model, keep={"projector": 0.5, "prefill": {1: 6, 2: 0.5}})
    model(**inputs)
    assert handle.counts(**inputs) == {"projector": [8, 8, 8], "prefill": {1: [6, 6, 6], 2: [4, 4, 4]}}
    assert [[len(part) for part in parts] for parts in handle.selections["prefill"].values()] == [[6] * 3, [4] * 3]
    handle.remove()
    handle = madtp.patch(model, keep={"prefill": {1: 64, 2: 1.0}})
    with pytest.warns(UserWarning, match="keep of prefill behind layer 1 is 64 tokens an image, and an image has 16"):
        model(**inputs)
    assert handle.counts(**inputs) == {"prefill": {1: [16] * 3, 2: [16] * 3}}
    handle.remove()
    handle = madtp.patch(model, keep={"prefill": {1: 2, 2: 1.0}})  # a share of more than is left keeps what is left
    model(**inputs)
    assert [len(part) for part in handle.selections["prefill"][2]] == handle.counts(**inputs)["prefill"][2] == [2, 2, 2]


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (0.5, "keep of 'prefill' must be a dict by how many layers have run, such as {2: 0.5}, got 0.5"),
        ({}, "must be a dict by how many layers have run"),
        ({0: 0.5}, "by a number of layers, an int >= 1, got 0"),
        ({"2": 0.5}, "by a number of layers, an int >= 1, got '2'"),
        ({1: 0.25, 2: 0.5}, "must not grow from layer to layer, got 0.25 behind 1 and 0.5 behind 2"),
        ({2: 5, 1: 4}, "must not grow from layer to layer, got 4 behind 1 and 5 behind 2"),
        ({3: 0.5}, "must be behind layers 1 to 2 of this model, got 3"),
        ({1: 0}, "amount must be a share"),
        ({1: madtp.Keep(4, rule="tome")}, "rules received, fastv, random, uniform, divprune, or a function"),
        ({1: madtp.Keep(4, rule="cdpruner")}, "or a function, got 'cdpruner'"),
    ],
)
def test_what_cannot_be_kept_is_one_line(llava, keep, message):
    with pytest.raises(ValueError) as error:
        madtp.patch(llava[0], keep={"prefill": keep})
    assert message in str(error.value) and "\n" not in str(error.value) and not hasattr(llava[0], "madtp_handle")


def test_models_that_cannot_be_patched():
    with pytest.raises(TypeError, match="a prefill seam, its decoder must read the prompt, .*, got Florence2"):
        madtp.patch(make_vlm("Florence-2"), keep={"prefill": {1: 0.5}})
    with pytest.raises(ValueError, match="must be behind layers 2 to 2 of this model, got 1"):
        madtp.patch(make_vlm("Qwen3-VL"), keep={"prefill": {1: 0.5}})


def test_the_usual_layer_follows_full_attention(llava):
    assert usual_prefill_layer(llava[0]) == 2
    model = make_vlm("Gemma 3")
    decoder = model.model.language_model
    window, full = "sliding_attention", "full_attention"
    for kinds, layer in (
        ([window, full, window, full], 2),
        ([window, window, full, window], 3),
        ([window, window, window, full], 2),  # behind the last one nothing is left to prune
        ([full, window, window, window], 2),
    ):
        decoder.config.layer_types = kinds
        assert usual_prefill_layer(model) == layer
    decoder.layers = torch.nn.ModuleList([decoder.layers[0]] * 12)
    decoder.config.layer_types = hf.Gemma3TextConfig(num_hidden_layers=12).layer_types
    assert usual_prefill_layer(model) == 6
    assert list(keep_by_temperature(model, ["prefill"])["prefill"]) == [6]


@pytest.mark.slow
def test_decoders_whose_layers_are_not_known():
    from families import blip2

    model = blip2(hf.Blip2ForConditionalGeneration)
    with pytest.raises(TypeError, match="model must have a prefill seam, its layers must .*: Qwen-VL, LLaVA"):
        madtp.patch(model, keep={"prefill": {1: 0.5}})


def test_what_is_refused(llava):
    model, inputs = llava
    madtp.patch(model, keep={"prefill": {1: 0.5}})
    out = model.generate(**inputs, **GREEDY)
    refused = "past_key_values must be empty, got a cache that holds a pruned prompt"
    ran = []
    for layer in model.model.language_model.layers:
        layer.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(ValueError, match=refused):
        model.generate(out.sequences, past_key_values=out.past_key_values, max_new_tokens=2)
    with pytest.raises(ValueError, match=refused):
        model(**inputs, past_key_values=out.past_key_values)
    with model.madtp_handle.dense():
        with pytest.raises(ValueError, match=refused):
            model(**inputs, past_key_values=out.past_key_values)
        assert not ran
        whole = model.generate(**inputs, **GREEDY).past_key_values
    ran.clear()
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="past_key_values must be empty, got a cache that holds a prompt"):
            call(**inputs, past_key_values=whole)
    with pytest.raises(ValueError, match="generate must not be assisted"):
        model.generate(**inputs, max_new_tokens=2, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="prefill_chunk_size must be None where layers prune the prompt, got 7"):
        model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=7)
    with pytest.raises(ValueError, match="logits_to_keep must be a number where layers prune"):
        model(**inputs, logits_to_keep=torch.tensor([3]))
    with pytest.raises(ValueError, match="input_ids must be given with images, and no inputs_embeds"):
        model(inputs_embeds=torch.zeros(2, 9, 32), pixel_values=inputs["pixel_values"])
    with pytest.raises(ValueError, match=r"attention_mask must be \(2, 50\), as input_ids"):
        model(**{**inputs, "attention_mask": torch.ones(2, 1, 50, 50)})
    model.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation must be one of sdpa, eager, madtp .*, got flash"):
        model(**inputs)
    assert not ran
    out.past_key_values.reset()
    model.config.text_config._attn_implementation = "sdpa"
    ids = torch.tensor([[20, 21, 22]])
    close(model(ids, past_key_values=out.past_key_values).logits, model(ids).logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Gemma 3", "Cohere2 Vision"])
def test_static_sliding_windows_are_refused(name):
    model = make_vlm(name)
    madtp.patch(model, keep={"prefill": {1: 0.5}})
    with pytest.raises(ValueError, match="past_key_values must have no static sliding window where layers prune"):
        model.generate(**vlm_batch(name, model), **GREEDY, cache_implementation="static", disable_compile=True)


def test_sampling_and_prompts_without_images(llava):
    model, inputs = llava
    ids = torch.tensor([[20, 21, 22, 23]])
    logits, tokens = model(ids).logits, model.generate(ids, max_new_tokens=3, do_sample=False)
    handle = madtp.patch(model, keep={"prefill": {1: 0.5}})
    assert torch.equal(model(ids).logits, logits) and handle.columns is None and handle.selections == {"prefill": {}}
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), tokens)
    torch.manual_seed(0)
    width = inputs["input_ids"].shape[1]
    out = model.generate(**inputs, do_sample=True, num_return_sequences=3, max_length=width + 5)
    assert out.shape == (6, width + 5) and torch.equal(out[:, :width], inputs["input_ids"].repeat_interleave(3, 0))
    beams = model.generate(**inputs, do_sample=False, num_beams=3, num_return_sequences=2, max_new_tokens=2)
    assert beams.shape == (4, width + 2) and len(handle.selections["prefill"][1]) == 3
    with handle.dense():
        assert model(**inputs).logits.shape[1] == width


def test_threads_generate_at_the_same_time(llava):
    model, first = llava
    second = vlm_batch("LLaVA", model, seed=5)
    handle = madtp.patch(model, keep={"prefill": {1: 0.5, 2: 0.25}})
    expected = [model.generate(**inputs, **GREEDY).sequences for inputs in (first, second)]
    wrong = []

    @torch.no_grad()
    def work(number, inputs):
        for _ in range(3):
            with handle.simulated() if number else handle.dense():
                model(**inputs)
            if not torch.equal(model.generate(**inputs, **GREEDY).sequences, expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate((first, second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_fewer_operations_are_counted(llava):
    model, inputs = llava
    dense = madtp.profile(model, inputs).total.counted_macs
    madtp.patch(model, keep={"prefill": {1: 0.25}})
    profile = madtp.profile(model, inputs).total
    assert profile.counted_macs < profile.dense_macs == dense


def test_explain(llava):
    model, inputs = llava
    handle = madtp.patch(model, keep={"prefill": {1: 0.5, 2: madtp.Keep(3, rule="uniform")}})
    model(**inputs)
    table = [line.split() for line in handle.explain().splitlines()]
    assert table[0][:5] == ["prefill", "rule,", "1", "fastv", "0.5"] and table[1][3] == "uniform"
    assert table[2][3:6] == ["48", "->", "24"] and table[3][3:6] == ["24", "->", "9"]
    assert [line[2] for line in table[4:7]] == ["50", "34", "24"]
    assert " ".join(table[4][3:]) == "columns after the prompt, layers 0 to 0"
    assert sum(line[1] == "refused" for line in table) == 7


def test_saved_and_loaded(llava, tmp_path):
    model, inputs = llava
    keep = {"projector": madtp.Keep(9, rule="uniform"), "prefill": {1: 0.5, 2: madtp.Keep(3, rule="divprune")}}
    handle = madtp.patch(model, keep=keep)
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert settings["keep"]["prefill"]["2"] == {"amount": 3, "mass": None, "rule": "divprune"}
    loaded = madtp.from_pretrained(tmp_path)
    assert loaded.madtp_handle.keep == handle.keep
    assert torch.equal(loaded(**inputs).logits, expected)
    settings["keep"]["prefill"]["2"]["rule"] = "best"
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(madtp.ModelError, match="cannot be read"):
        hf.LlavaForConditionalGeneration.from_pretrained(tmp_path)


def test_copies_prune_too(llava):
    model, inputs = llava
    model = make_vlm("LLaVA")  # before a forward, after which transformers puts hooks on LLaVA that no pickle takes
    madtp.patch(model, keep={"projector": 9, "prefill": {1: 0.3}})
    copies = [pickle.loads(pickle.dumps(model)), copy.deepcopy(model)]
    expected = model(**inputs).logits
    for other in copies:
        assert other.madtp_handle.model is other and other.madtp_handle.columns is None
        assert torch.equal(other(**inputs).logits, expected)
        assert type(other.madtp_handle.remove()) is hf.LlavaForConditionalGeneration
    model.madtp_handle.remove()


def test_a_prompt_that_does_not_say_who_sees_whom():
    model = make_vlm("PaliGemma")
    inputs = vlm_batch("PaliGemma", model)
    images = int((inputs["input_ids"][:1] == IMAGE).sum()) // 16
    inputs = {name: value[: images if name == "pixel_values" else 1] for name, value in inputs.items()}
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    madtp.patch(model, keep={"prefill": {1: madtp.Keep(0.5, rule="received")}})
    with torch.no_grad():
        model(**inputs)
        del inputs["token_type_ids"]
        with pytest.raises(ValueError, match="not causal, got no mask: pass token_type_ids"):
            model(**inputs)


@pytest.mark.parametrize("rule", ["fastv", "received"])
def test_soft_caps_take_part_in_the_ranking(rule):
    kept = {}
    for implementation in ("eager", "madtp"):
        model = make_vlm("PaliGemma 2")
        inputs = vlm_batch("PaliGemma 2", model)
        for module in model.modules():
            if hasattr(module, "attn_logit_softcapping"):
                module.attn_logit_softcapping = 0.5
        model.set_attn_implementation(implementation)
        handle = madtp.patch(model, keep={"prefill": {1: madtp.Keep(0.5, rule=rule)}})
        with torch.no_grad():
            model(**inputs)
        kept[implementation] = [places.tolist() for places in handle.selections["prefill"][1]]
    assert kept["madtp"] == kept["eager"]


@pytest.mark.parametrize("keep", [{"prefill": {1: 0.5}}, {"projector": 0.5, "prefill": {1: 0.5}}])
def test_a_step_by_hand_takes_the_mask_of_the_first_layer(llava, keep):
    model, inputs = llava
    madtp.patch(model, keep=keep)
    want = torch.stack(model.generate(**inputs, **GREEDY).logits)[1]
    with torch.no_grad():
        out = model(**inputs)
        cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        mask = torch.cat([cache.madtp_columns >= 0, torch.ones(2, 1, dtype=torch.bool)], 1).long()
        with pytest.raises(ValueError, match=rf"attention_mask must have {mask.shape[1]} columns, .* got 7"):
            model(input_ids=token, attention_mask=mask[:, :7], past_key_values=cache)
        close(model(input_ids=token, attention_mask=mask, past_key_values=cache).logits[:, -1], want)
