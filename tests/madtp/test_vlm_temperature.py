# SPDX-License-Identifier: Apache-2.0
"""`Keep(temperature=)` at the seams of a decoder, and `keep_rate` that finds it: each image keeps its own number.

Towers and layers are held against those of Hugging Face, as in `test_vlm_vision` and `test_vlm_prefill`.
"""

import json
import math

import numpy as np
import pytest
import torch
from test_vlm_prefill import LAYERS_BY_HAND, by_hand, plan_of
from test_vlm_vision import assert_by_hand, features, oracle
from transformers import DynamicCache, GenerationConfig, StaticCache
from vlm_families import (
    CASES,
    GREEDY,
    IMAGE,
    TOWERS,
    answers,
    close,
    families,
    make_vlm,
    mixed_prompt,
    stays,
    vlm_batch,
)

import madtp
from madtp.dtp.threshold import above_threshold, least_first
from madtp.models.bare_rows import image_units
from madtp.models.vision_seam import UnitSelection
from madtp.patching import keep_rate

pytestmark = pytest.mark.usefixtures("without_gradients")

FASTV = madtp.Keep(temperature=1.0, rule="fastv")
TEXT = madtp.Keep(temperature=1.0, rule="text")


def lengths_of(selections):
    """Of tensors, as they are nested."""
    if isinstance(selections, dict):
        return {key: lengths_of(value) for key, value in selections.items()}
    return [len(part) if isinstance(part, torch.Tensor) else lengths_of(part) for part in selections]


@pytest.fixture
def llava():
    model = make_vlm("LLaVA")
    return model, vlm_batch("LLaVA", model)


@pytest.mark.parametrize("temperature", [0.02, 0.3, 1.0, 5.0, 1000.0])
def test_the_threshold_is_that_of_the_method(temperature):
    generator = torch.Generator().manual_seed(0)
    lengths = [40, 1, 0, 2, 17, 6, 5]
    parts = [torch.rand(length, generator=generator) ** 3 for length in lengths]
    parts[4] = parts[4] - 2  # whatever the sign
    parts[5][:] = 0.1  # nothing tells them apart
    parts[6][2] = torch.nan
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    keep = above_threshold(torch.cat(parts), ends, temperature).split(lengths)
    for part, kept in zip(parts[:5], keep, strict=False):
        assert torch.equal(kept.nonzero().flatten(), stays(part, temperature)) if len(part) else not len(kept)
        alone = above_threshold(part, torch.tensor([0, len(part)], dtype=torch.int32), temperature)
        assert torch.equal(alone, kept), "an image does not know what else is in the batch"
    assert keep[5].all() and keep[6].all()
    assert all(kept.any() for kept in keep if len(kept))
    scaled = above_threshold(torch.cat(parts[:2]) * 1e-6, ends[:3], temperature)
    assert torch.equal(scaled, torch.cat(keep[:2]))


def test_what_differs_by_rounding_alone_ties():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(-2, 3, (60,), generator=generator)
    ends = torch.tensor([0, 60], dtype=torch.int32)
    for dtype in (torch.float32, torch.float64):
        eps = torch.finfo(torch.float32).eps
        for value in (0.7, -0.7, 3e-9, 3e9):
            tied = (value * (1 + noise * eps)).to(dtype)
            assert len(tied.unique()) > 2
            assert above_threshold(tied, ends, 1.0).all()
            one = torch.where(noise == 2, value * 1.0001, tied)
            assert torch.equal(above_threshold(one, ends, 1.0), (noise == 2) == (value > 0))
    apart = 1 + torch.arange(60) * 2e-6  # no rounding
    assert torch.equal(above_threshold(apart, ends, 1e3), apart > apart.mean())


@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1e20, 1e30])
def test_the_threshold_does_not_know_the_scale(scale):
    values = torch.rand(40, generator=torch.Generator().manual_seed(0)) ** 3
    ends = torch.tensor([0, 40], dtype=torch.int32)
    for temperature in (0.3, 1.0, 5.0):
        expected = above_threshold(values, ends, temperature)
        assert 0 < int(expected.sum()) < 40
        assert torch.equal(above_threshold(values * scale, ends, temperature), expected)


def test_scaling_by_powers_of_two_rounds_nothing():
    values = torch.rand(40, generator=torch.Generator().manual_seed(0)) ** 3
    ends = torch.tensor([0, 25, 25, 40], dtype=torch.int32)
    prunable = torch.arange(40) != 7
    logits = least_first(values, ends, prunable)
    for begin, end in ((0, 25), (25, 40)):
        rows = torch.arange(begin, end)[prunable[begin:end]]
        centred = values[rows] - values[rows].mean()
        torch.testing.assert_close(logits[rows, 0], -centred / centred.square().mean().sqrt())
    assert torch.equal(least_first(values * 2.0**-100, ends, prunable), logits)
    assert torch.equal(least_first(values * 2.0**100, ends, prunable), logits)


def test_a_higher_temperature_keeps_less():
    importance = torch.rand(300, generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([0, 300], dtype=torch.int32)
    taus = [10 ** (power / 4) for power in range(-16, 13)]
    keeps = [above_threshold(importance, ends, tau) for tau in taus]
    counts = [int(keep.sum()) for keep in keeps]
    assert counts == sorted(counts, reverse=True) and counts[0] == 300
    assert counts[-1] == int((importance > importance.mean()).sum())
    assert all((a >= b).all() for a, b in zip(keeps, keeps[1:], strict=False))


@families(quick=("LLaVA", "Qwen2.5-VL", "SmolVLM", "LLaVA-NeXT"), of=TOWERS)
def test_towers_by_hand(name):
    model = make_vlm(name)
    inputs = vlm_batch(name, model)
    for tau in (0.6, 3.0):
        keep = madtp.Keep(temperature=tau)
        expected, deep, kept = oracle(model, inputs, keep)
        handle = madtp.patch(model, keep={"vision": keep})
        assert_by_hand(features(model, inputs), expected, deep, kept)
        handle.remove()
    assert sum(lengths_of(kept[-1])) < sum(len(part) for part in features(model, inputs).pooler_output)


@families(quick=("LLaVA",), of=LAYERS_BY_HAND)
def test_layers_by_hand(name):
    model = make_vlm(name)
    inputs = vlm_batch(name, model)
    plan = plan_of(name, FASTV)
    expected, kept = by_hand(model, name, inputs, plan, 4)
    handle = madtp.patch(model, keep={"prefill": plan})
    out = model.generate(**inputs, **GREEDY)
    record = handle.seams["prefill"].here.record
    for n in plan:
        assert all(torch.equal(a.nonzero().flatten(), b) for a, b in zip(record.kept[n], kept[n], strict=True))
    close(answers(out), expected)


def test_the_projector_ranks_by_the_text(llava):
    model, inputs = llava
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    rows = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    handle = madtp.patch(model, keep={"projector": TEXT})
    model(**inputs)
    for image, (sample, part) in enumerate(zip((0, 1, 1), rows, strict=True)):
        words = model.get_input_embeddings()(ids[sample][real[sample] & (ids[sample] != IMAGE)])
        cosine = torch.cosine_similarity(part[:, None], words[None], dim=-1)
        assert torch.equal(handle.selections["projector"][image], stays(cosine.mean(1), 1.0))


@families(quick=("LLaVA", "Qwen2.5-VL"), of=[name for name in TOWERS if name in CASES])
def test_all_seams_answer_as_with_the_rest_hidden(name):
    case, model = CASES[name], make_vlm(name)
    inputs = vlm_batch(name, model)
    handle = madtp.patch(model, keep={"vision": madtp.Keep(temperature=0.6), "projector": TEXT, "prefill": {2: FASTV}})
    out, logits = model.generate(**inputs, **GREEDY), model(**inputs).logits
    columns, kept = handle.columns, handle.selections
    for fewer, some in ((kept["projector"], kept["vision"][-1]), (kept["prefill"][2], kept["projector"])):
        for a, b in zip(fewer, some, strict=True):
            assert 0 < len(a) <= len(b) and torch.isin(a, b).all() and (a.diff() > 0).all()
    assert len(set(lengths_of(kept["prefill"][2]))) > 1 or name != "LLaVA", "each image has its own number"
    beams = model.generate(**inputs, **GREEDY, num_beams=3, output_scores=True)
    assert lengths_of(handle.selections) == lengths_of(kept) or not case.beams
    with handle.simulated():
        hidden, whole = model.generate(**inputs, **GREEDY), model(**inputs).logits
        assert lengths_of(handle.selections) == lengths_of(kept) or not case.plain
        hidden_beams = model.generate(**inputs, **GREEDY, num_beams=3, output_scores=True)
    if case.plain:
        left = columns >= 0
        close(logits[left], whole[torch.arange(2)[:, None].expand_as(columns)[left], columns[left]])
        close(answers(out), answers(hidden))
        if case.beams:
            assert torch.equal(beams.sequences, hidden_beams.sequences)


def test_a_sample_does_not_know_its_batch(llava):
    model, inputs = llava
    handle = madtp.patch(model, keep={"vision": madtp.Keep(temperature=1.0), "prefill": {1: FASTV, 2: FASTV}})
    both = model(**inputs).logits[:, -1]
    kept = handle.selections
    for sample, images in enumerate((slice(0, 1), slice(1, 3))):
        own = inputs["attention_mask"][sample] == 1
        alone = {key: inputs[key][[sample]][:, own] for key in ("input_ids", "attention_mask")}
        close(model(**alone, pixel_values=inputs["pixel_values"][images]).logits[:, -1], both[[sample]])
        found = handle.selections
        assert [[a.tolist() for a in layer[images]] for layer in kept["vision"]] == [
            [a.tolist() for a in layer] for layer in found["vision"]
        ]
        assert [a.tolist() for a in kept["prefill"][2][images]] == [a.tolist() for a in found["prefill"][2]]


def test_videos_have_a_number_of_their_own():
    model = make_vlm("Qwen2-VL")
    inputs, lengths = mixed_prompt("Qwen2-VL", model)
    keep = madtp.Keep(temperature=1.0)
    image, video = oracle(model, inputs, keep), oracle(model, inputs, keep, "video")
    handle = madtp.patch(model, keep={"vision": keep})
    model.generate(**inputs, **GREEDY)
    found = [a.tolist() for a in handle.selections["vision"][-1]]
    assert found == [a.tolist() for a in (image[2][-1][0], video[2][-1][0], image[2][-1][1])]
    assert 0 < sum(map(len, found)) < sum(lengths)


def test_zero_is_the_model_and_nothing_is_emptied(llava):
    model, inputs = llava
    logits = model(**inputs).logits
    keep = {"vision": madtp.Keep(temperature=0), "projector": TEXT, "prefill": {1: FASTV, 2: FASTV}}
    handle = madtp.patch(model, keep=keep)
    assert handle.temperatures == {"vision": 0.0, "projector": 1.0, "prefill": 1.0}
    handle.set_temperature(0)
    assert torch.equal(model(**inputs).logits, logits)
    assert handle.counts(**inputs)["vision"] == [[16] * 3] * 2, "which is known before"
    static = model.generate(**inputs, **GREEDY, cache_implementation="static", disable_compile=True)
    assert torch.equal(static.sequences, model.generate(**inputs, **GREEDY).sequences)
    handle.set_temperature({"vision": 1e6, "projector": 1e6, "prefill": 1e6})
    blank = inputs | {"pixel_values": torch.zeros_like(inputs["pixel_values"])}
    for given in (inputs, blank):
        model(**given)
        assert all(min(lengths_of(layer)) >= 1 for layer in handle.selections["vision"])
        assert min(lengths_of(handle.selections["prefill"][2])) >= 1
    with handle.dense():
        assert torch.equal(model(**inputs).logits, logits)
    assert set(handle.keep["prefill"]) == {1, 2} and handle.keep["prefill"][2].temperature == 1e6
    for wrong, message in (
        ({"decoder": 1.0}, "temperature must be for branches vision, projector, prefill, got 'decoder'"),
        (-1.0, "temperature must be a finite number >= 0, got -1.0 for vision"),
        (math.nan, "temperature must be a finite number >= 0, got nan for vision"),
        (True, "temperature must be a finite number >= 0, got True for vision"),
        (10**400, "temperature must be a finite number >= 0, got 1000.* for vision"),
    ):
        with pytest.raises(ValueError, match=message):
            handle.set_temperature(wrong)
    assert set(handle.temperatures.values()) == {1e6}


def test_a_forward_keeps_the_temperature_it_began_with(llava):
    """Whatever another thread sets, between any two of its layers, or while the first of them is planned."""
    model, inputs = llava
    keep = {"vision": madtp.Keep(temperature=1.0), "projector": TEXT, "prefill": {1: FASTV, 2: FASTV}}
    handle = madtp.patch(model, keep=keep)
    model(**inputs)
    expected = lengths_of(handle.selections)
    for part, seam in ((model.model.vision_tower.encoder, "vision"), (model.model.language_model, "prefill")):
        handle.set_temperature(1.0)
        hook = part.layers[0].register_forward_hook(lambda *_: handle.set_temperature(0.0))
        model(**inputs)
        hook.remove()
        assert lengths_of(handle.selections)[seam] == expected[seam]
        assert set(handle.temperatures.values()) == {0.0}
    seam = handle.seams["vision"]
    seam.keep = madtp.Keep(temperature=0.0)
    seam.warn_of_large = lambda *_: handle.set_temperature(1.0)  # what another thread does once the tower has begun
    assert UnitSelection(seam, [4, 5], torch.device("cpu"))._counts == [[4, 5]] * seam.layers


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"temperature": -1}, "temperature must be a finite number >= 0, got -1"),
        ({"temperature": True}, "temperature must be a finite number >= 0, got True"),
        ({"temperature": 10**400}, "temperature must be a finite number >= 0, got 1000"),
        ({"temperature": np.bool_(True)}, "temperature must be a finite number >= 0, got "),
        ({"temperature": "1"}, "temperature must be a finite number >= 0, got '1'"),
        ({"temperature": math.inf}, "temperature must be a finite number >= 0, got inf"),
        ({"temperature": 1.0, "amount": 0.5}, "temperature must be None with amount 0.5, got 1.0"),
        ({"temperature": 1.0, "mass": 0.5}, "temperature must be None with mass 0.5, got 1.0"),
        (
            {"temperature": 1.0, "rule": "tome"},
            "rule must be one of received, cls, fastv, text with a temp.*got 'tome'",
        ),
        ({"temperature": 1.0, "rule": stays}, "with a temperature, got 'stays'"),
    ],
)
def test_what_cannot_be_a_temperature(keep, message):
    with pytest.raises(ValueError, match=message):
        madtp.Keep(**keep)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (
            {"vision": TEXT},
            "keep of 'vision' must have as its rule with a temperature one of received, cls, got 'text'",
        ),
        ({"projector": FASTV}, "a temperature and the rule text, or a function; got rule 'fastv'"),
        ({"prefill": {2: TEXT}}, "keep of 'prefill' behind layer 2 must have one of the rules .*, got 'text'"),
        (
            {"prefill": {1: FASTV, 2: madtp.Keep(temperature=2.0)}},
            r"keep of 'prefill' must have one temperature behind all layers, got \[1.0, 2.0\]",
        ),
    ],
)
def test_what_cannot_be_at_a_seam(llava, keep, message):
    with pytest.raises(ValueError, match=message) as error:
        madtp.patch(llava[0], keep=keep)
    assert "\n" not in str(error.value) and not hasattr(llava[0], "madtp_handle")


@pytest.mark.parametrize(
    ("keep", "decides"),
    [
        ({"vision": madtp.Keep(temperature=2.0)}, "temperature 2 at 'vision'"),
        ({"projector": TEXT}, "temperature 1 at 'projector'"),
        ({"prefill": {1: 0.5, 2: FASTV}}, "temperature 1 at 'prefill'"),
        ({"vision": madtp.Keep(mass=0.5)}, "mass 0.5 at 'vision'"),
    ],
)
def test_what_needs_fixed_counts_is_refused_before_anything_runs(llava, keep, decides):
    model, inputs = llava
    plain = model.generate(inputs["input_ids"][:, :3] % 5 + 20, **GREEDY, cache_implementation="static")
    handle = madtp.patch(model, keep=keep)
    ran = []
    model.model.vision_tower.register_forward_pre_hook(lambda *given: ran.append(given))
    model.model.vision_tower.embeddings.register_forward_pre_hook(lambda *given: ran.append(given))
    static = GREEDY | {"cache_implementation": "static"}
    own = model.generation_config
    own.cache_implementation = "static"
    with pytest.raises(ValueError, match=f"cache_implementation must not be static where a seam .*, got {decides}"):
        model.generate(**inputs, **GREEDY)
    with pytest.raises(ValueError, match="cache_implementation must not be static"):  # the given one has none
        model.generate(**inputs, generation_config=GenerationConfig(max_new_tokens=4, do_sample=False))
    own.cache_implementation = None
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    for call in (model, lambda **given: model.generate(**given, **GREEDY)):
        with pytest.raises(ValueError, match="past_key_values must not be static where a seam decides") as error:
            call(**inputs, past_key_values=cache)
    with pytest.raises(ValueError, match="counts must be of a share or a count, got"):
        handle.counts(**inputs)
    with pytest.raises(ValueError, match="cache_implementation must not be static"):
        model.generate(**inputs, **static)
    assert not ran and "\n" not in str(error.value)
    again = model.generate(inputs["input_ids"][:, :3] % 5 + 20, **static)
    assert torch.equal(again.sequences, plain.sequences), "a prompt without images has a known length"
    with handle.dense():
        model.generate(**inputs, **static, disable_compile=True)
    model.generate(**inputs, **GREEDY, past_key_values=DynamicCache())
    assert ran


@pytest.fixture
def few_rounds(monkeypatch):
    """Of a search on few tokens, whose share jumps."""
    monkeypatch.setattr(keep_rate, "ROUNDS", 5)


@families(quick=("SmolVLM",), of=("Qwen2.5-VL", "SmolVLM", "InternVL", "PaliGemma", "Gemma 3"))
def test_a_rate_is_a_share_of_the_image_tokens(name, few_rounds):
    model = make_vlm(name).train()
    batches = [vlm_batch(name, model.eval())]
    model.train()
    handle = madtp.patch(model, keep_rate=0.6, calibration=iter(batches))
    assert model.training and list(handle.temperatures) == ["vision"] == list(handle.keep)
    assert shares_by_hand(handle, batches)["vision"] == pytest.approx(0.6, abs=0.1)
    before = handle.temperatures["vision"]
    found = handle.set_keep_rate({"vision": 0.35}, batches)
    assert found == shares_by_hand(handle, batches)
    assert found["vision"] == pytest.approx(0.35, abs=0.1) and handle.temperatures["vision"] > before
    assert handle.set_keep_rate(1.0, batches) == {"vision": 1.0} and handle.temperatures == {"vision": 0.0}


def shares_by_hand(handle, batches):
    """Of each seam with a temperature: tokens left of those that came to it, from what the handle reports."""
    entered, left = dict.fromkeys(handle.temperatures, 0), dict.fromkeys(handle.temperatures, 0)
    handle.model.eval()
    for batch in batches:
        before = int((batch["input_ids"] == IMAGE).sum())
        handle.model(**batch)
        for name, found in handle.selections.items():
            last = found[-1] if name == "vision" else found[max(found)] if name == "prefill" else found
            after = sum(map(len, last))
            if name in entered:
                entered[name], left[name] = entered[name] + before, left[name] + after
            before = after
    return {name: left[name] / entered[name] for name in entered}


def test_newlines_are_no_part_of_a_rate(few_rounds):
    model = make_vlm("LLaVA-NeXT")
    inputs = vlm_batch("LLaVA-NeXT", model)
    units = image_units(model.base_model, inputs, "image", pruned=True)
    newlines = sum(units.newlines)
    assert newlines > 0
    handle = madtp.patch(model, keep={"vision": madtp.Keep(temperature=1.0)})
    found = handle.set_keep_rate(0.6, [inputs])["vision"]
    model(**inputs)
    left = sum(lengths_of(handle.selections["vision"][-1])) - newlines
    assert found == left / sum(units.lengths) == pytest.approx(0.6, abs=0.1)
    handle.remove()
    handle = madtp.patch(model, keep={"vision": madtp.Keep(temperature=1.0), "projector": TEXT})
    shares = handle._kept_shares([inputs])
    model(**inputs)
    came = sum(lengths_of(handle.selections["vision"][-1]))
    assert shares["vision"] == (came - newlines) / sum(units.lengths)
    assert shares["projector"] == sum(lengths_of(handle.selections["projector"])) / came


def test_rates_of_several_seams_are_of_what_came_to_each(llava, few_rounds):
    model, _ = llava
    batches = [vlm_batch("LLaVA", model)]
    rates = {"projector": 0.8, "prefill": 0.75}
    handle = madtp.patch(model, keep_rate=rates, calibration=batches)
    assert list(handle.keep) == list(rates) and list(handle.keep["prefill"]) == [2]
    assert handle.keep["projector"].rule == "text" and handle.keep["prefill"][2].rule == "fastv"
    for name, share in shares_by_hand(handle, batches).items():
        assert share == pytest.approx(rates[name], abs=0.1)
    handle.remove()
    keep = {"vision": madtp.Keep(temperature=5.0, rule="cls"), "projector": 3, "prefill": {1: 0.9, 2: FASTV}}
    handle = madtp.patch(model, keep=keep, keep_rate={"vision": 0.6}, calibration=batches)
    assert shares_by_hand(handle, batches)["vision"] == pytest.approx(0.6, abs=0.1)
    assert handle.keep["vision"].rule == "cls" and handle.temperatures["prefill"] == 1.0
    assert handle.keep["projector"] == madtp.Keep(3, rule="divprune") and handle.keep["prefill"][1].amount == 0.9


def test_a_rate_of_the_tower_runs_the_tower_alone(llava, few_rounds):
    model, inputs = llava
    ran = []
    hook = model.model.language_model.register_forward_pre_hook(lambda *given: ran.append(given))
    madtp.patch(model, keep_rate=0.6, calibration=[{"pixel_values": inputs["pixel_values"], "labels": None}])
    hook.remove()
    assert not ran


@pytest.mark.filterwarnings("ignore:keep of the projector is 5 tokens")
def test_what_cannot_be_reached_is_refused_and_leaves_the_model_alone(llava):
    model, inputs = llava
    kinds, ids = [type(module) for module in model.modules()], {"input_ids": inputs["input_ids"]}
    both = {"vision": madtp.Keep(temperature=1.0), "projector": 5}
    for options, message in (
        (
            {"keep_rate": 0.01, "calibration": [inputs]},
            r"keep_rate of vision must be 1 or from 0\.\d+ to 1.000, .*, got 0.01",
        ),
        (
            {"keep_rate": 0.5},
            "calibration must be an iterable of dicts of model inputs, at least one, .*, got NoneType",
        ),
        (
            {"keep_rate": 0.5, "calibration": [ids]},
            "must have pixels of images, got a batch with input_ids alone",
        ),
        (
            {"keep_rate": {"tower": 0.5}, "calibration": [inputs]},
            "keep_rate must be for branches vision, projector, pref",
        ),
        ({"keep_rate": 1.5, "calibration": [inputs]}, r"keep_rate must be a number in \(0, 1\]"),
        (
            {"keep_rate": 0.5, "calibration": [inputs], "capacity": "upper_bound"},
            "keep_rate of a decoder must come without",
        ),
        ({"keep": both, "calibration": [inputs]}, "keep_rate must be given with calibration, got None"),
        ({"keep": both, "keep_rate": {"projector": 0.5}, "calibration": [inputs]}, "must be for branches vision, got"),
        (
            {"keep": {"projector": 5}, "keep_rate": 0.5, "calibration": [inputs]},
            "keep must have a seam with a temperature",
        ),
    ):
        with pytest.raises(ValueError, match=message) as error:
            madtp.patch(model, **options)
        assert "\n" not in str(error.value)
        assert [type(module) for module in model.modules()] == kinds and not hasattr(model, "madtp_handle")
    handle = madtp.patch(model, keep=both)
    with pytest.raises(ValueError, match="keep_rate of vision must be 1 or from"):
        handle.set_keep_rate(0.001, [inputs])
    with handle.dense(), pytest.raises(ValueError, match="keep_rate must be set outside of dense"):
        handle.set_keep_rate(0.5, [inputs])
    assert handle.temperatures == {"vision": 1.0}
    handle.remove()
    model.config.vision_feature_select_strategy = "full"
    with pytest.raises(TypeError, match="model must have a vision seam, its tokens must be its patches"):
        madtp.patch(model, keep_rate=0.5, calibration=[inputs])


def test_numbers_of_numpy_are_numbers(llava, few_rounds):
    model, inputs = llava
    keep = madtp.Keep(temperature=np.float32(0.5), duplicates=np.int64(0))
    assert (keep.temperature, keep.duplicates) == (0.5, 0.0)
    shares = [madtp.Keep(np.float32(0.5)), madtp.Keep(np.float64(0.5)), madtp.Keep(mass=np.float16(0.5)), madtp.Keep(1)]
    assert shares[0] == shares[1] == madtp.Keep(0.5) and shares[2] == madtp.Keep(mass=0.5)
    json.dumps([keep.to_dict(), *(share.to_dict() for share in shares)])
    assert madtp.Keep(np.int64(3)) == madtp.Keep(3) and type(madtp.Keep(np.int64(3)).amount) is int
    for wrong in (np.bool_(True), True, 10**400, np.float32("nan"), 1.5, 0):
        for name in ("amount", "mass"):
            with pytest.raises(ValueError, match=f"{name} must be"):
                madtp.Keep(**{name: wrong})
    handle = madtp.patch(model, keep={"vision": keep})
    handle.set_temperature(np.int64(2))
    assert handle.temperatures == {"vision": 2.0} and type(handle.temperatures["vision"]) is float
    assert handle.set_keep_rate(np.float32(1), [inputs]) == {"vision": 1.0}


def test_without_a_temperature_there_is_none_to_set(llava):
    model, inputs = llava
    handle = madtp.patch(model, keep={"vision": 0.5})
    for call, name in (
        (lambda: handle.set_temperature(2.0), "temperature"),
        (lambda: handle.set_temperature({"vision": 2.0}), "temperature"),
        (lambda: handle.set_keep_rate(0.5, [inputs]), "keep_rate"),
    ):
        rule = f"^{name} must be of a model patched with a temperature at a seam, .*, got .* and no seam with one$"
        with pytest.raises(ValueError, match=rule):
            call()


def test_a_removed_handle_says_so(llava):
    model, inputs = llava
    handle = madtp.patch(model, keep={"vision": madtp.Keep(temperature=1.0)})
    handle.remove()
    for call in (
        lambda: handle.set_temperature(2.0),
        lambda: handle.set_keep_rate(0.5, [inputs]),
        lambda: handle.counts(**inputs),
    ):
        with pytest.raises(ValueError, match="model must be patched by this handle, got one of which it was removed"):
            call()
    assert handle.temperatures == {"vision": 1.0}


def test_calibration_without_image_tokens(llava):
    model, inputs = llava
    handle = madtp.patch(model, keep={"vision": madtp.Keep(temperature=1.0)})
    videos = {"pixel_values_videos": inputs["pixel_values"]}
    with pytest.raises(ValueError, match="calibration must have pixels of images, got a batch with pixel_values_video"):
        handle.set_keep_rate(0.5, [videos])
    with pytest.raises(ValueError, match="calibration must have image tokens to prune at the seam 'vision', got none"):
        handle._kept_shares([])
    assert handle.temperatures == {"vision": 1.0}


def test_a_rate_of_one_where_amounts_leave_less(llava, few_rounds):
    model, inputs = llava
    keep = {"prefill": {1: 0.5, 2: FASTV}}
    for rate, message in (
        (1, "keep_rate of prefill must be below 1 where amounts or duplicates leave 0.500 at temperature 0, got 1"),
        (0.9, r"keep_rate of prefill must be from 0\.\d+ to 0.500, what temperatures .*, got 0.9"),
    ):
        with pytest.raises(ValueError, match=message):
            madtp.patch(model, keep=keep, keep_rate=rate, calibration=[inputs])
        assert not hasattr(model, "madtp_handle")


def test_saved_and_loaded(llava, tmp_path):
    model, inputs = llava
    keep = {"vision": madtp.Keep(temperature=1.0, duplicates=0.0), "projector": TEXT, "prefill": {1: 0.9, 2: FASTV}}
    handle = madtp.patch(model, keep=keep)
    handle.set_temperature({"vision": 0.75, "prefill": 2.5})
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path / "pruned")
    saved = json.loads((tmp_path / "pruned" / "config.json").read_text())["quantization_config"]["keep"]
    assert saved["vision"] == {
        "amount": None,
        "mass": None,
        "temperature": 0.75,
        "duplicates": 0.0,
        "rule": "received",
    }
    assert saved["prefill"]["2"] == {"amount": None, "mass": None, "temperature": 2.5, "rule": "fastv"}
    loaded = madtp.from_pretrained(tmp_path / "pruned")
    assert loaded.madtp_handle.keep == handle.keep and loaded.madtp_handle.temperatures == handle.temperatures
    assert torch.equal(loaded(**inputs).logits, expected)
    loaded.madtp_handle.set_temperature({"vision": 2.0, "prefill": 0.5})
    assert handle.temperatures == {"vision": 0.75, "projector": 1.0, "prefill": 2.5}


def test_explained_and_costed(llava):
    model, inputs = llava
    keep = {"vision": madtp.Keep(temperature=1.5), "projector": TEXT, "prefill": {2: FASTV}}
    handle = madtp.patch(model, keep=keep)
    model(**inputs)
    lines = {tuple(line.split()[:2]): line for line in handle.explain().splitlines()}
    assert lines["vision", "rule"].split()[2:6] == ["received", "temperature", "1.5", "of"]
    assert lines["projector", "rule"].split()[2:5] == ["text", "temperature", "1"]
    counts = lengths_of(handle.selections)
    assert f"48 -> {sum(counts['vision'][-1])}" in lines["vision", "units"]
    with pytest.raises(ValueError, match="counts must be given for 'vision', where temperature 1.5 decides by what"):
        madtp.prompt_cost(model, **inputs)
    cost = madtp.prompt_cost(model, counts=counts, **inputs)
    measured = madtp.profile(model, {**inputs, "logits_to_keep": 1}).branches
    assert [cost.vision, cost.projector] == [2 * measured[name].counted_macs for name in ("vision", "projector")]


def test_checkpointed_gradients_are_those_of_the_temperature_that_was_set(llava):
    model, inputs = llava
    handle = madtp.patch(model, keep={"vision": madtp.Keep(temperature=1.0)})

    def gradients(later):
        model.zero_grad()
        handle.set_temperature(1.0)
        with torch.enable_grad():
            out = torch.cat(features(model, inputs).pooler_output)
            handle.set_temperature(later)
            (out**2).mean().backward()
        return {name: p.grad.clone() for name, p in model.model.vision_tower.named_parameters() if p.grad is not None}

    expected = gradients(1.0)
    model.train().activation_checkpointing_enable()
    found = gradients(50.0)
    assert found.keys() == expected.keys() and len(found) > 10
    for key in found:
        close(found[key], expected[key])
