# SPDX-License-Identifier: Apache-2.0
"""`madtp.patch(keep={"projector": ...})` on tiny decoders of many families.

Two oracles: the whole prompt with what is pruned hidden by the mask (`simulated`), and, for three families, embeddings
and positions indexed by hand, sample by sample, without padding or cache.
"""

import contextlib
import copy
import io
import json
import pickle
import re
import threading
import warnings
from pathlib import Path

import pytest
import torch
import transformers as hf
from families import blip2, blip2_inputs
from vlm_families import (
    CASES,
    END,
    GREEDY,
    IMAGE,
    PAD,
    answers,
    close,
    families,
    make_vlm,
    mixed_prompt,
    vlm_batch,
    vlm_table,
)

import madtp
from madtp.models.prompt import count_images, shorten

pytestmark = pytest.mark.usefixtures("without_gradients")

DRAWN = {"projector": madtp.Keep(0.4, rule="random")}


PLAIN = [name for name, case in CASES.items() if case.plain]


@families()
def test_all_kept_is_the_model(name):
    model = make_vlm(name)
    inputs, source = vlm_batch(name, model), type(model)
    logits, tokens = model(**inputs).logits, model.generate(**inputs, max_new_tokens=4, do_sample=False)
    beams = model.generate(**inputs, max_new_tokens=3, do_sample=False, num_beams=2)
    handle = madtp.patch(model, keep={"projector": 1.0})
    assert torch.equal(model(**inputs).logits, logits)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), tokens)
    assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False, num_beams=2), beams)
    assert [places.tolist() for places in handle.selections["projector"]] == [
        list(range(count)) for count in handle.counts(**inputs)["projector"]
    ]
    assert handle.remove() is model and type(model) is source and not hasattr(model, "madtp_projector")
    assert torch.equal(model(**inputs).logits, logits)


@families(of=PLAIN)
def test_removed_is_hidden(name):
    model = make_vlm(name)
    inputs = vlm_batch(name, model)
    handle = madtp.patch(model, keep=DRAWN)
    logits, columns = model(**inputs).logits, handle.columns
    kept = handle.selections["projector"]
    assert [len(places) for places in kept] == handle.counts(**inputs)["projector"]
    assert all(places.dtype == torch.long and (places.diff() > 0).all() for places in kept)
    search = {"num_beams": 3, "output_scores": True}
    out, beams = model.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY, **search)
    with handle.simulated():
        whole = model(**inputs).logits
        hidden, hidden_beams = model.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY, **search)
        assert [a.tolist() for a in handle.selections["projector"]] == [a.tolist() for a in kept]
    left = columns >= 0
    assert whole.shape[1] == inputs["input_ids"].shape[1] > logits.shape[1]
    close(logits[left], whole[torch.arange(2)[:, None].expand_as(columns)[left], columns[left]])
    assert torch.equal(out.sequences, hidden.sequences)
    close(answers(out), answers(hidden))
    if CASES[name].beams:
        assert torch.equal(beams.sequences, hidden_beams.sequences)
        close(beams.sequences_scores, hidden_beams.sequences_scores)


@families(quick=("LLaVA",))
def test_decoding_in_other_ways_is_the_same(name):
    if name == "Florence-2":
        pytest.skip("its decoder reads no prompt")
    case, model = CASES[name], make_vlm(name)
    inputs = vlm_batch(name, model)
    madtp.patch(model, keep=DRAWN)
    expected = model.generate(**inputs, **GREEDY)
    ways = [{"use_cache": False}]
    ways += [{"cache_implementation": "static", "disable_compile": True}] * case.static
    ways += [{"prefill_chunk_size": 7}] * case.chunks
    for way in ways:
        out = model.generate(**inputs, **GREEDY, **way)
        assert torch.equal(out.sequences, expected.sequences), way
        close(answers(out), answers(expected))
    many = model.generate(**inputs, **GREEDY, num_beams=3, num_return_sequences=2)
    assert len(many.sequences) == 4
    assert torch.equal(many.sequences[:, : inputs["input_ids"].shape[1]], inputs["input_ids"].repeat_interleave(2, 0))


@pytest.mark.slow
def test_decoding_on_a_static_cache_compiles_whole(llava):
    model, inputs = llava
    madtp.patch(model, keep=DRAWN)
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    compiled = hf.CompileConfig(backend="eager", fullgraph=True, mode=None)
    compiled._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": compiled}
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False, **options), expected)
    torch.compiler.reset()


def by_hand(model, name, inputs, kept, steps):
    """-> for each sample, (steps, V) logits of greedy steps: the language model run anew for each token."""
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    pixels = {key: value for key, value in inputs.items() if key.startswith(("pixel", "image"))}
    rows = list(model.base_model.get_image_features(**pixels, return_dict=True).pooler_output)
    embeds = model.get_input_embeddings()(ids).clone()
    embeds[ids == IMAGE] = torch.cat(rows)
    alive = real.clone()
    alive[ids == IMAGE] = torch.cat([torch.isin(torch.arange(len(r)), k) for r, k in zip(rows, kept, strict=True)])
    results = []
    for sample, own in enumerate(([0], [1, 2])):
        columns = real[sample].nonzero().flatten()
        left = alive[sample][columns]
        if name == "Qwen2-VL":
            types, grids = inputs["mm_token_type_ids"][sample][columns], inputs["image_grid_thw"][own]
            positions, _ = model.base_model.get_rope_index(ids[sample][columns][None], types[None], grids)
            positions = positions[:, :, left]
        else:
            positions = torch.arange(len(columns))[left][None]
        x = embeds[sample][columns][left][None]
        image = (ids[sample][columns] == IMAGE)[left]
        logits = []
        for _ in range(steps):
            mask = torch.ones(1, x.shape[1], dtype=torch.long) if name != "Gemma 3" else gemma_masks(image, x.shape[1])
            out = model.base_model.language_model(
                inputs_embeds=x, position_ids=positions, attention_mask=mask, use_cache=False
            )
            logits.append(model.lm_head(out.last_hidden_state)[0, -1])
            x = torch.cat([x, model.get_input_embeddings()(logits[-1].argmax()[None])[None]], 1)
            positions = torch.cat([positions, positions[..., -1:] + 1], -1)
        results.append(torch.stack(logits))
    return torch.stack(results, 1)


def gemma_masks(image, length):
    """Images see themselves whole; sliding windows of 12 count what is left."""
    i, j = torch.arange(length)[:, None], torch.arange(length)
    image = torch.cat([image, image.new_zeros(length - len(image))])
    group = (image & ~torch.cat([image.new_zeros(1), image[:-1]])).cumsum(0).where(image, -1)
    full = (j <= i) | ((group[:, None] == group) & image)
    return {"full_attention": full[None, None], "sliding_attention": (full & (j > i - 12))[None, None]}


@families(quick=("LLaVA",), of=("Qwen2-VL", "LLaVA", "Gemma 3"))
@pytest.mark.parametrize("share", [0.4, 1.0])
def test_greedy_steps_by_hand(name, share):
    model = make_vlm(name)
    inputs = vlm_batch(name, model)
    handle = madtp.patch(model, keep={"projector": madtp.Keep(share, rule="random")})
    out = model.generate(**inputs, **GREEDY)
    expected = by_hand(model, name, inputs, handle.selections["projector"], 4)
    close(answers(out), expected)
    close(model(**inputs).logits[:, -1], expected[0])


@pytest.mark.slow
def test_florence_encodes_what_is_left():
    model = make_vlm("Florence-2")
    inputs = vlm_batch("Florence-2", model)
    handle = madtp.patch(model, keep=DRAWN)
    out, step = model.generate(**inputs, **GREEDY), torch.tensor([[2], [2]])
    logits = model(**inputs, decoder_input_ids=step).logits
    columns = handle.columns
    handle.remove()
    ids, real = inputs["input_ids"], columns >= 0
    embeds = model.get_input_embeddings()(ids)
    rows = model.get_image_features(inputs["pixel_values"]).pooler_output.flatten(0, 1)
    embeds[ids == IMAGE] = rows
    short = embeds.gather(1, columns.clamp(min=0)[..., None].expand(-1, -1, 32))
    close(logits, model(inputs_embeds=short, attention_mask=real.long(), decoder_input_ids=step).logits)
    close(answers(out)[0], logits[:, 0])
    assert out.sequences.shape == (2, 5), "an answer, without the prompt"


@families(quick=("Qwen2.5-VL",), of=[name for name, case in CASES.items() if case.video])
def test_images_and_videos_in_the_order_of_the_prompt(name):
    model = make_vlm(name)
    inputs, lengths = mixed_prompt(name, model)
    dense = model.generate(**inputs, **GREEDY)
    handle = madtp.patch(model, keep={"projector": 1.0})
    assert handle.counts(**inputs)["projector"] == lengths
    assert torch.equal(model.generate(**inputs, **GREEDY).sequences, dense.sequences)
    handle.remove()
    handle = madtp.patch(model, keep={"projector": madtp.Keep(3, rule="divprune")})
    out = model.generate(**inputs, **GREEDY)
    assert handle.counts(**inputs)["projector"] == [len(a) for a in handle.selections["projector"]] == [3, 3, 3]
    with handle.simulated():
        close(answers(out), answers(model.generate(**inputs, **GREEDY)))


@families(quick=(), of=PLAIN)
def test_losses_and_gradients_are_those_of_hidden_tokens(name):
    model = make_vlm(name)
    inputs = vlm_batch(name, model, right=True)
    text = (inputs["input_ids"] > END) & (inputs["input_ids"] != IMAGE)
    after = inputs["input_ids"].roll(1, 1) > END  # behind text: it is predicted from a token that stays
    labels = torch.where(text & after & (inputs["input_ids"].roll(1, 1) != IMAGE), inputs["input_ids"], -100)
    handle = madtp.patch(model, keep=DRAWN)

    def loss_and_gradients():
        model.zero_grad()
        with torch.enable_grad():
            loss = model(**inputs, labels=labels).loss
            loss.backward()
        return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    loss, gradients = loss_and_gradients()
    with handle.simulated():
        expected, hidden = loss_and_gradients()
    close(loss, expected)
    assert gradients.keys() == hidden.keys() and any("vision" in key or "visual" in key for key in gradients)
    for key in gradients:
        close(gradients[key], hidden[key])


def test_labels_of_pruned_places_do_not_count(llava):
    model, inputs = llava
    handle = madtp.patch(model, keep=DRAWN)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    loss, columns = model(**inputs, labels=labels).loss, handle.columns
    logits = model(**inputs).logits
    short = labels.gather(1, columns.clamp(min=0)).masked_fill(columns < 0, -100)
    close(loss, torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), short[:, 1:].flatten()))


def test_right_padding_stays_on_the_right(llava):
    model, left = llava
    right = vlm_batch("LLaVA", model, right=True)
    handle = madtp.patch(model, keep=DRAWN)
    model(**right)
    assert (handle.columns[:, 0] == 0).all() and (handle.columns[0, -10:] == -1).all()
    model(**left)
    assert (handle.columns[:, -1] == left["input_ids"].shape[1] - 1).all() and (handle.columns[0, :10] == -1).all()


@pytest.mark.parametrize("name", ["LLaVA", pytest.param("Qwen2.5-VL", marks=pytest.mark.slow)])
def test_a_decoding_by_hand_goes_on_at_the_positions_of_the_whole_prompt(name):
    model = make_vlm(name)
    inputs = vlm_batch(name, model)
    keys = [key for key in inputs if key not in ("pixel_values", "image_grid_thw", "attention_mask")]
    alone = {key: inputs[key][1:] for key in keys} | {"pixel_values": inputs["pixel_values"][1:]}
    if name != "LLaVA":
        alone |= {"pixel_values": inputs["pixel_values"][32:], "image_grid_thw": inputs["image_grid_thw"][1:]}
    madtp.patch(model, keep=DRAWN)
    expected = model.generate(**alone, **GREEDY)
    out = model(**alone, use_cache=True)
    logits = [out.logits[:, -1]]
    for _ in range(3):
        out = model(input_ids=logits[-1].argmax(-1)[:, None], past_key_values=out.past_key_values)
        logits.append(out.logits[:, -1])
    close(torch.stack(logits), answers(expected))
    with pytest.raises(ValueError, match="attention_mask must have .* columns, those of the pruned prompt"):
        ids = logits[-1].argmax(-1)[:, None]
        model(input_ids=ids, past_key_values=out.past_key_values, attention_mask=torch.ones(1, 90))


def test_decoding_by_hand_needs_the_mask_of_padding(llava):
    model, inputs = llava
    words = torch.arange(20, 47)
    ids = torch.stack([inputs["input_ids"][1], inputs["input_ids"][1]])
    ids[0, 23:] = words  # as long as the other, with one image in place of two
    prompt = {"input_ids": ids, "pixel_values": inputs["pixel_values"]}
    handle = madtp.patch(model, keep={"projector": madtp.Keep(4, rule="uniform")})
    expected = model.generate(**prompt, **GREEDY)
    for context in (contextlib.nullcontext(), handle.simulated()):
        with context:
            out = model(**prompt)
            mask, logits = handle.columns >= 0, [out.logits[:, -1]]
            with pytest.raises(ValueError, match="attention_mask must be given where the cache has padding or hidden"):
                model(input_ids=ids[:, -1:], past_key_values=out.past_key_values)
            for _ in range(3):
                mask = torch.nn.functional.pad(mask, (0, 1), value=True)
                step = logits[-1].argmax(-1)[:, None]
                out = model(input_ids=step, past_key_values=out.past_key_values, attention_mask=mask)
                logits.append(out.logits[:, -1])
            close(torch.stack(logits), answers(expected))


@pytest.mark.parametrize("name", ["Qwen2.5-VL", pytest.param("Qwen3-VL", marks=pytest.mark.slow)])
def test_decoding_by_hand_with_mrope_counts_what_the_mask_shows(name):
    model = make_vlm(name)
    inputs = vlm_batch(name, model)
    handle = madtp.patch(model, keep={"projector": madtp.Keep(1, rule="uniform")})
    expected = model.generate(**inputs, **GREEDY)
    for context in (contextlib.nullcontext(), handle.simulated()):
        with context:
            out = model(**inputs)
            mask, logits = handle.columns >= 0, [out.logits[:, -1]]
            for _ in range(3):
                mask = torch.nn.functional.pad(mask, (0, 1), value=True)
                step = logits[-1].argmax(-1)[:, None]
                out = model(input_ids=step, past_key_values=out.past_key_values, attention_mask=mask.long())
                logits.append(out.logits[:, -1])
            close(torch.stack(logits), answers(expected))
    ids, types, mask = (inputs[key] for key in ("input_ids", "mm_token_type_ids", "attention_mask"))
    given, _ = model.model.get_rope_index(ids, types, inputs["image_grid_thw"], attention_mask=mask)
    deltas = model.model.rope_deltas
    model(**inputs, position_ids=given)
    assert torch.equal(model.model.rope_deltas, deltas), "they are of positions that the model made"


def test_the_prompt_comes_back_where_the_longest_has_no_image(llava):
    model, inputs = llava
    ids = inputs["input_ids"].clone()
    ids[1] = torch.arange(20, 70)
    prompt = {"input_ids": ids, "attention_mask": (ids != PAD).long(), "pixel_values": inputs["pixel_values"][:1]}
    handle = madtp.patch(model, keep={"projector": madtp.Keep(4, rule="uniform")})
    out = model.generate(**prompt, **GREEDY)
    assert torch.equal(out.sequences[:, :50], ids) and len(out.sequences[0]) == 54
    assert [len(places) for places in handle.selections["projector"]] == handle.counts(**prompt)["projector"] == [4]
    with handle.simulated():
        close(answers(model.generate(**prompt, **GREEDY)), answers(out))


def test_removing_twice_does_nothing_to_another_patch(llava):
    model, _ = llava
    first = madtp.patch(model, keep={"projector": 4})
    assert first.remove() is first.remove() is model
    second = madtp.patch(model, keep={"projector": 4})
    first.remove()
    assert model.madtp_handle is second


def test_logits_to_keep(llava):
    model, inputs = llava
    handle = madtp.patch(model, keep=DRAWN)
    logits = model(**inputs).logits
    assert torch.equal(model(**inputs, logits_to_keep=2).logits, logits[:, -2:])
    last = inputs["input_ids"].shape[1] - 1
    assert torch.equal(model(**inputs, logits_to_keep=torch.tensor([last - 3, -1])).logits, logits[:, [-4, -1]])
    gone = next(i for i in range(last) if not (handle.columns == i).any())
    with pytest.raises(ValueError, match="logits_to_keep must be a number, or places of text that are left"):
        model(**inputs, logits_to_keep=torch.tensor([gone]))


def test_sampling_and_lengths_are_of_the_prompt_that_was_given(llava):
    model, inputs = llava
    madtp.patch(model, keep=DRAWN)
    width = inputs["input_ids"].shape[1]
    torch.manual_seed(0)
    out = model.generate(**inputs, do_sample=True, num_return_sequences=3, max_length=width + 5)
    assert out.shape == (6, width + 5) and torch.equal(out[:, :width], inputs["input_ids"].repeat_interleave(3, 0))
    positional = {key: value for key, value in inputs.items() if key != "input_ids"}
    assert model.generate(inputs["input_ids"], **positional, max_new_tokens=2, do_sample=False).shape == (2, width + 2)
    assert model.generate(**inputs, do_sample=False, max_length=width + 9, min_length=width + 3).shape[1] == width + 9


def test_prompts_without_images_are_as_before(llava):
    model, _ = llava
    ids = torch.tensor([[20, 21, 22, 23]])
    logits, tokens = model(input_ids=ids).logits, model.generate(ids, max_new_tokens=3, do_sample=False)
    handle = madtp.patch(model, keep={"projector": 4})
    assert torch.equal(model(input_ids=ids).logits, logits) and torch.equal(model(ids).logits, logits)
    out = model.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(out.sequences, tokens) and handle.columns is None
    continued = torch.cat([out.sequences, torch.tensor([[30, 31]])], 1)
    again = model.generate(continued, max_new_tokens=2, do_sample=False, past_key_values=out.past_key_values)
    assert torch.equal(again, model.generate(continued, max_new_tokens=2, do_sample=False))


def test_a_cache_that_was_reset_is_of_no_prompt(llava):
    model, inputs = llava
    madtp.patch(model, keep=DRAWN)
    ids, cache = torch.tensor([[20, 21, 22, 23]]), hf.DynamicCache(config=model.config.text_config)
    model(**{key: value[:1] for key, value in inputs.items()}, past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values must be empty"):
        model.generate(ids, max_new_tokens=2, past_key_values=cache)
    cache.crop(-cache.get_seq_length())
    model(input_ids=ids[:, :3], past_key_values=cache)
    close(model(input_ids=ids[:, 3:], past_key_values=cache).logits, model(ids).logits[:, 3:])


@pytest.mark.parametrize("rule", ["uniform", "text", "divprune", "cdpruner", "cdpruner_negative", "tome"])
def test_rules_run_behind_the_projector(llava, rule):
    model, inputs = llava
    handle = madtp.patch(model, keep={"projector": madtp.Keep(5, rule=rule)})
    out = model.generate(**inputs, **GREEDY)
    assert [len(places) for places in handle.selections["projector"]] == [5, 5, 5]
    assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1] - 22
    with handle.simulated():
        close(answers(model.generate(**inputs, **GREEDY)), answers(out))


@families(quick=(), of=("InternVL", "OneVision", "Qwen3-VL"))
def test_merged_tokens_are_where_they_were_hidden_or_removed(name):
    model = make_vlm(name)
    inputs = vlm_batch(name, model)
    handle = madtp.patch(model, keep={"projector": madtp.Keep(0.4, rule="tome")})
    out = model.generate(**inputs, **GREEDY)
    with handle.simulated():
        close(answers(model.generate(**inputs, **GREEDY)), answers(out))


def test_a_text_guided_rule_reads_the_text_of_its_sample(llava):
    model, inputs = llava
    seen = []

    def rule(given, counts):
        seen.append(given)
        return torch.cat([torch.arange(length) < count for length, count in zip(given.lengths, counts, strict=True)])

    handle = madtp.patch(model, keep={"projector": madtp.Keep(0.25, rule=rule)})
    model(**inputs)
    (given,) = seen
    ids = inputs["input_ids"]
    words = (ids != IMAGE) & (ids != PAD)
    assert list(given.text_of) == [0, 1, 1] and list(given.text_lengths) == words.sum(1).tolist()
    assert torch.equal(given.text, model.get_input_embeddings()(ids[words]))
    assert [places.tolist() for places in handle.selections["projector"]] == [[0, 1, 2, 3]] * 3


def test_a_count_larger_than_an_image_keeps_it_and_is_said_once(llava):
    model, inputs = llava
    logits = model(**inputs).logits
    handle = madtp.patch(model, keep={"projector": 64})
    with pytest.warns(UserWarning, match="keep of the projector is 64 tokens an image, and an image has 16"):
        assert torch.equal(model(**inputs).logits, logits)
    assert handle.counts(**inputs) == {"projector": [16, 16, 16]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**inputs)


def test_one_token_of_an_image_stays(llava):
    model, inputs = llava
    handle = madtp.patch(model, keep={"projector": 0.001})
    model(**inputs)
    assert [len(places) for places in handle.selections["projector"]] == [1, 1, 1]


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"tower": 0.5}, "keep must be a dict with some of the seams 'vision', 'projector', 'prefill', got tower"),
        (0.5, "keep must be a dict with some of the seams 'vision', 'projector', 'prefill', got float"),
        ({}, "keep must be a dict with some of the seams 'vision', 'projector', 'prefill', got none"),
        ({"projector": 0}, "amount must be a share"),
        ({"projector": madtp.Keep(0.5)}, "random, uniform, text, divprune, .*or a function; got rule 'received'"),
        ({"projector": madtp.Keep(0.5, rule="cls")}, "got rule 'cls'"),
        ({"projector": madtp.Keep(mass=0.5, rule="divprune")}, "got mass 0.5"),
    ],
)
def test_what_cannot_be_kept_is_one_line(llava, keep, message):
    with pytest.raises(ValueError, match=message) as error:
        madtp.patch(llava[0], keep=keep)
    assert "\n" not in str(error.value) and not hasattr(llava[0], "madtp_handle")


def test_models_that_cannot_be_patched(llava):
    model, _ = llava
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    llama = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=9, **small))
    with pytest.raises(TypeError, match="projector seam, its forward must take mm_encoder_outputs, got LlamaForCausal"):
        madtp.patch(llama, keep={"projector": 0.5})
    with pytest.raises(TypeError, match="it must be a Hugging Face class with a language head, got LlavaModel"):
        madtp.patch(model.model, keep={"projector": 0.5})
    with pytest.raises(ValueError, match="keep must come without .*, got config, capacity too"):
        madtp.patch(model, madtp.CompressionConfig(), capacity="upper_bound", keep={"projector": 0.5})
    madtp.patch(model, keep={"projector": 0.5})
    with pytest.raises(ValueError, match="model must not be patched already"):
        madtp.patch(model, keep={"projector": 0.5})


def test_what_is_refused_is_refused_before_anything_runs(llava):
    model, inputs = llava
    handle = madtp.patch(model, keep={"projector": 0.5})
    out = model.generate(**inputs, **GREEDY)
    cache = out.past_key_values
    ran = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda *_: ran.append(1))
    ids = inputs["input_ids"]
    pixels = {"pixel_values": inputs["pixel_values"]}
    refused = "past_key_values must be empty, got a cache that holds a pruned prompt"
    with pytest.raises(ValueError, match=refused):
        model.generate(out.sequences, past_key_values=cache, max_new_tokens=2)
    with pytest.raises(ValueError, match=refused):
        model.generate(out.sequences, **pixels, past_key_values=copy.deepcopy(cache), max_new_tokens=2)
    with pytest.raises(ValueError, match="generate must not be assisted"):
        model.generate(**inputs, max_new_tokens=2, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="generate must not be assisted"):
        model.generate(**inputs, max_new_tokens=2, assistant_model=model)
    assert not ran
    with pytest.raises(ValueError, match=refused):
        model(**inputs, past_key_values=cache)
    with pytest.raises(ValueError, match="input_ids must be given with images, and no inputs_embeds"):
        model(inputs_embeds=torch.zeros(2, 9, 32), **pixels)
    with pytest.raises(ValueError, match=r"attention_mask must be \(2, 50\), as input_ids, got \(2, 1, 50, 50\)"):
        model(ids, **pixels, attention_mask=torch.ones(2, 1, 50, 50))
    with pytest.raises(ValueError, match="mm_encoder_outputs must be a dict by modality, got Tensor"):
        model(ids, mm_encoder_outputs=torch.zeros(3, 16, 32))
    assert len(ran) <= 4, "the model was entered, nothing of it"
    with pytest.raises(ValueError, match="input_ids must hold one image_token_id .7., not masked, for each of .* 46"):
        model(ids.where(torch.arange(50) != 30, 20), **pixels)
    with pytest.raises(ValueError, match="not masked, for each of the 48 .* got 0"):
        model(ids, **pixels, attention_mask=(ids != IMAGE).long())
    with pytest.raises(ValueError, match=r"position_ids, and attention_mask, must have 50 columns, .* got \(2, 3\)"):
        model.generate(ids, **pixels, attention_mask=torch.ones(2, 3, dtype=torch.long), max_new_tokens=2)
    with pytest.raises(ValueError, match="pixel_values must be given with images, whose shapes say where one ends"):
        handle.counts(input_ids=ids)
    with pytest.raises(ValueError, match="input_ids must be a tensor"):
        handle.counts(**pixels)
    with handle.dense(), pytest.raises(ValueError, match=refused):
        model.generate(out.sequences, past_key_values=cache, max_new_tokens=2)


@families(quick=("LLaVA", "Qwen2.5-VL", "SmolVLM", "Florence-2"))
def test_counts_refuse_what_a_forward_refuses(name):
    model = make_vlm(name)
    inputs, grids = vlm_batch(name, model), "image_grid_thw"
    handle = madtp.patch(model, keep={"projector": 0.5})
    fewer, ids = dict(inputs), inputs["input_ids"]
    if grids in inputs:
        fewer |= {
            grids: inputs[grids][:2],
            "pixel_values": inputs["pixel_values"][: int(inputs[grids][:2].prod(1).sum())],
        }
    elif inputs["pixel_values"].shape[:2] == (2, 2):  # of SmolVLM: tiles of two samples
        fewer["pixel_values"] = inputs["pixel_values"].clone()
        fewer["pixel_values"][1, 1] = 0
    else:
        sizes = {"image_sizes": inputs["image_sizes"][:2]} if "image_sizes" in inputs else {}
        fewer |= {"pixel_values": inputs["pixel_values"][:2]} | sizes
    wrong = [fewer, inputs | {"input_ids": ids.where(torch.arange(ids.shape[1]) != ids.shape[1] - 12, 20)}]
    wrong.append(inputs | {"attention_mask": (ids != IMAGE).long()})
    for given in wrong:
        with pytest.raises(ValueError, match="input_ids must (hold one|show where each)"):
            handle.counts(**given)
        if given is fewer and grids in inputs:  # transformers makes positions of grids before anything is checked
            continue
        with pytest.raises(ValueError, match="input_ids must hold one"):
            model(**given)


def test_counts_of_images_that_are_encoded_already(llava):
    model, inputs = llava
    handle = madtp.patch(model, keep={"projector": 0.25})
    pixels = inputs.pop("pixel_values")
    encoded = {"image": model.get_image_features(pixels, return_dict=True)}
    assert handle.counts(**inputs, mm_encoder_outputs=encoded) == {"projector": [4, 4, 4]}
    fewer = {"image": model.get_image_features(pixels[:2], return_dict=True)}
    for call in (handle.counts, model):
        with pytest.raises(ValueError, match="input_ids must hold one .* of the 32 tokens that the projector gives"):
            call(**inputs, mm_encoder_outputs=fewer)


def test_images_of_one_size_end_where_runs_do():
    """Where nothing is known but shapes of pixels."""
    config = type("Config", (), {"image_token_id": IMAGE, "video_token_id": None})()

    def lengths(images, *runs):
        ids = torch.tensor([[token for run in runs for token in (20, *[IMAGE] * run)]])
        return count_images(ids, config, {"pixel_values": torch.zeros(images, 3, 4, 4)}, "image").lengths

    assert lengths(3, 4, 4, 4) == lengths(3, 8, 4) == lengths(3, 2, 2, 8) == [4, 4, 4]
    assert lengths(1, 4, 4, 4) == [12], "rows of one image"
    for wrong in ((2, 4, 4, 4), (3, 5, 7), (3, 6, 6)):
        with pytest.raises(ValueError, match="input_ids must show where each image ends"):
            lengths(*wrong)


def test_padding_is_no_placeholder(llava):
    model, inputs = llava
    handle = madtp.patch(model, keep=DRAWN)
    expected = model.generate(**inputs, **GREEDY)
    model.config.text_config.pad_token_id = IMAGE
    for options in ({}, {"num_beams": 2}):
        out = model.generate(**inputs, **GREEDY, **options)
        assert len(handle.selections["projector"]) == 3 and torch.isfinite(answers(out)).all()
    assert torch.equal(model.generate(**inputs, **GREEDY).sequences, expected.sequences)


def test_threads_generate_at_the_same_time(llava):
    model, first = llava
    second = vlm_batch("LLaVA", model, seed=5)
    handle = madtp.patch(model, keep={"projector": 0.3})
    expected = [model.generate(**inputs, **GREEDY).sequences for inputs in (first, second)]
    found, wrong = {}, []

    @torch.no_grad()
    def work(number, inputs):
        for _ in range(4):
            if number == 1:
                with handle.simulated():
                    model(**inputs)
            out = model.generate(**inputs, **GREEDY).sequences
            found[number] = handle.selections["projector"]
            if not torch.equal(out, expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate((first, second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(found) == 2
    assert any(a.tolist() != b.tolist() for a, b in zip(found[0], found[1], strict=True))
    assert [a.tolist() for a in handle.selections["projector"]] == [a.tolist() for a in found[1]]


def test_contexts_and_explain(llava):
    model, inputs = llava
    dense = model(**inputs).logits
    handle = madtp.patch(model, keep={"projector": madtp.Keep(4, rule="uniform")})
    assert handle.columns is None and len(handle.explain().splitlines()) == 5
    model(**inputs)
    table = [line.split() for line in handle.explain().splitlines()]
    assert table[0] == ["projector", "rule", "uniform", "4", "of", "each", "image"]
    assert table[1][:5] == ["projector", "tokens", "48", "->", "12"]
    assert table[2][:5] == ["projector", "columns", "50", "->", "26"] and table[3][:3] == ["projector", "cache", "26"]
    assert [line[1] for line in table[4:]] == ["refused"] * 4
    with handle.dense():
        assert torch.equal(model(**inputs).logits, dense)
        width = inputs["input_ids"].shape[1]
        assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] == width + 2
    profile = madtp.profile(model, inputs).total
    assert profile.counted_macs < profile.dense_macs


def test_copies_prune_too(llava):
    model, (_, inputs) = make_vlm("LLaVA"), llava
    handle = madtp.patch(model, keep={"projector": 0.3})
    buffer = io.BytesIO()
    torch.save(model, buffer)  # before a forward, after which transformers puts hooks on LLaVA that no pickle takes
    buffer.seek(0)
    copies = [pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    expected = model(**inputs).logits
    assert pickle.loads(pickle.dumps(handle.seams["projector"])).here.record.columns is None
    for other in (*copies, copy.deepcopy(model)):
        assert other.madtp_handle.model is other and other.madtp_handle.columns is None
        assert torch.equal(other(**inputs).logits, expected)
        assert other.madtp_handle.selections["projector"]


def test_saved_and_loaded(llava, tmp_path):
    model, inputs = llava
    handle = madtp.patch(model, keep={"projector": madtp.Keep(5, rule="cdpruner")})
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path / "pruned")
    settings = json.loads((tmp_path / "pruned" / "config.json").read_text())["quantization_config"]
    assert settings["keep"] == {"projector": {"amount": 5, "mass": None, "rule": "cdpruner"}}
    loaded = madtp.from_pretrained(tmp_path / "pruned")
    assert loaded.madtp_handle.keep == handle.keep
    assert torch.equal(loaded(**inputs).logits, expected)


@pytest.mark.slow
def test_saved_in_parts_and_loaded_by_other_classes(llava, tmp_path):
    model, inputs = llava
    handle = madtp.patch(model, keep={"projector": madtp.Keep(5, rule="cdpruner")})
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path, state_dict=dict(model.state_dict()), max_shard_size="50KB")
    for kind in (type(model), hf.LlavaForConditionalGeneration, hf.AutoModelForImageTextToText):
        loaded = kind.from_pretrained(tmp_path)
        assert loaded.madtp_handle.keep == handle.keep
        assert torch.equal(loaded(**inputs).logits, expected)
    assert not hasattr(hf.AutoModel.from_pretrained(tmp_path), "madtp_handle"), "it has no head"


def test_a_rule_of_the_user_is_not_saved(llava, tmp_path):
    madtp.patch(llava[0], keep={"projector": madtp.Keep(5, rule=lambda given, counts: None)})
    with pytest.raises(ValueError, match="rule must be one of .* to be saved, got the function <lambda>"):
        llava[0].save_pretrained(tmp_path / "third")
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize("damage", [{"amount": 0}, {"rule": "best"}, {"amount": None}])
def test_damaged_settings_are_refused(llava, tmp_path, damage):
    model, _ = llava
    madtp.patch(model, keep={"projector": 5})
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["keep"]["projector"] |= damage
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(madtp.ModelError, match="cannot be read"):
        hf.LlavaForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.slow
def test_packed_layers_are_saved_too(llava, tmp_path):
    model, inputs = llava
    inputs["pixel_values"] = inputs["pixel_values"].float()
    madtp.patch(model.float(), keep={"projector": 0.3})
    name = "model.language_model.layers.0.mlp.up_proj"
    madtp.hwp.pack(model, names=[name], dtype="int8")
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    loaded = madtp.from_pretrained(tmp_path)
    assert torch.equal(loaded(**inputs).logits, expected)
    assert isinstance(loaded.get_submodule(name), madtp.hwp.QuantizedLinear)
    assert type(loaded.madtp_handle.remove().get_submodule(name)) is torch.nn.Linear


@pytest.mark.slow
def test_a_class_that_asks_for_pixels_by_name():
    model, inputs = blip2(hf.Blip2ForConditionalGeneration).eval(), blip2_inputs()
    logits = model(**inputs).logits
    handle = madtp.patch(model, keep={"projector": 1.0})
    close(model(**inputs).logits, logits)
    handle.remove()
    handle = madtp.patch(model, keep={"projector": 2})
    short = model(**inputs).logits
    with handle.simulated():
        close(short[:, -1], model(**inputs).logits[:, -1])
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape == (4, 12)


def test_the_documents_say_what_is_tested():
    assert vlm_table() in (Path(__file__).parents[2] / "docs" / "models.md").read_text()


def test_arguments_are_those_of_the_class(llava):
    import inspect

    model, _ = llava
    before = inspect.signature(model.forward)
    madtp.patch(model, keep={"projector": 5})
    assert inspect.signature(model.forward) == before and re.fullmatch("Llava.*", type(model).__name__)


def test_shortened_arguments_of_any_name():
    ids = torch.arange(8).reshape(2, 4) + 20
    kept = torch.tensor([[True, False, True, True], [True, True, False, False]])
    kwargs = {"any_types": torch.ones(2, 4, dtype=torch.int), "position_ids": torch.arange(4)[None], "other": "x"}
    made = shorten(ids, kwargs, kept, pad=3)
    assert made.input_ids.tolist() == [[20, 22, 23], [3, 24, 25]]
    assert made.columns.tolist() == [[0, 2, 3], [-1, 0, 1]]
    assert made.kwargs["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
    assert made.kwargs["any_types"].tolist() == [[1, 1, 1], [0, 1, 1]] and made.kwargs["other"] == "x"
    assert made.kwargs["position_ids"][0].tolist() == [0, 2, 3]
