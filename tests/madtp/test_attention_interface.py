# SPDX-License-Identifier: Apache-2.0
"""`attn_implementation="madtp"` against "eager" on tiny models with random weights."""

from unittest.mock import patch as mocked

import pytest
import torch
import transformers as hf
from tiny_models import (
    IMAGE,
    LEFT,
    NO_DROPOUT,
    RIGHT,
    SHAPE,
    Calls,
    bart,
    bart_inputs,
    bert,
    build,
    images,
    llama,
    run,
    text_inputs,
    tokens,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from vlm_families import make_vlm, vlm_batch

from madtp.models import attention_interface

BROKEN = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1, 1], [1, 0, 1, 0, 1, 0, 1]])


def gemma2():
    """A layer with a window of 3, one without; soft caps in both."""
    config = hf.Gemma2Config(
        **SHAPE,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=40,
        attn_logit_softcapping=5.0,
        sliding_window=3,
        attention_dropout=0.0,
    )
    return build(hf.Gemma2ForCausalLM, config)


# name -> (model, inputs, real output positions, attention calls that pack)
CASES = {
    "vit": lambda: (build(hf.ViTModel, hf.ViTConfig(**IMAGE, **NO_DROPOUT)), {"pixel_values": images()}, None, 2),
    "dinov2": lambda: (build(hf.Dinov2Model, hf.Dinov2Config(**IMAGE)), {"pixel_values": images()}, None, 2),
    "clip vision": lambda: (
        build(hf.CLIPVisionModel, hf.CLIPVisionConfig(**IMAGE)),
        {"pixel_values": images()},
        None,
        2,
    ),
    "siglip vision": lambda: (
        build(hf.SiglipVisionModel, hf.SiglipVisionConfig(**IMAGE, vision_use_head=False)),
        {"pixel_values": images()},
        None,
        2,
    ),
    "clip text, right padding": lambda: (
        build(hf.CLIPTextModel, hf.CLIPTextConfig(**SHAPE, vocab_size=40, max_position_embeddings=16)),
        text_inputs(RIGHT),
        RIGHT,
        2,
    ),
    "siglip text, right padding": lambda: (
        build(hf.SiglipTextModel, hf.SiglipTextConfig(**SHAPE, vocab_size=40, max_position_embeddings=16)),
        text_inputs(RIGHT),
        RIGHT,
        2,
    ),
    "bert, right padding": lambda: (bert(), text_inputs(RIGHT), RIGHT, 2),
    "bert, left padding": lambda: (bert(), text_inputs(LEFT), LEFT, 2),
    "bert decoder": lambda: (bert(is_decoder=True), text_inputs(RIGHT), RIGHT, 2),
    "llama, left padding": lambda: (llama(), text_inputs(LEFT), LEFT, 2),
    "llama, odd head dim": lambda: (llama(head_dim=10), text_inputs(LEFT), LEFT, 2),
    "mistral, window longer than the text": lambda: (
        build(hf.MistralForCausalLM, hf.MistralConfig(**SHAPE, num_key_value_heads=1, vocab_size=40, sliding_window=9)),
        text_inputs(LEFT),
        LEFT,
        2,
    ),
    **{
        f"mistral, window of 3, {side} padding": lambda mask=mask: (
            build(
                hf.MistralForCausalLM, hf.MistralConfig(**SHAPE, num_key_value_heads=1, vocab_size=40, sliding_window=3)
            ),
            text_inputs(mask),
            mask,
            2,
        )
        for side, mask in (("left", LEFT), ("right", RIGHT), ("no", torch.ones_like(LEFT)))
    },
    "gemma 2, soft caps and windows": lambda: (gemma2(), text_inputs(LEFT), LEFT, 2),
    "bart": lambda: (bart(), bart_inputs(), bart_inputs()["decoder_attention_mask"], 6),
    "bart, equal lengths": lambda: (bart(), bart_inputs(7), bart_inputs(7)["decoder_attention_mask"], 6),
}


def compare(model, inputs, real, packed_calls):
    results = []
    for implementation in ("eager", "madtp", "eager"):
        output, calls = run(model, inputs, implementation)
        if real is not None:
            output = output[real.bool()]
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
        (output * weights).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert len(calls) == (packed_calls if implementation == "madtp" else 0)
        results.append((output.detach(), gradients))
    (eager, eager_gradients), (ours, our_gradients), (again, _) = results
    torch.testing.assert_close(ours, eager, rtol=2e-5, atol=2e-5)
    assert torch.equal(again, eager)
    assert our_gradients.keys() == eager_gradients.keys()
    for name, gradient in our_gradients.items():
        scale = eager_gradients[name].abs().max().clamp_min(1.0).item()
        torch.testing.assert_close(gradient, eager_gradients[name], rtol=1e-4, atol=2e-5 * scale, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_eager(case):
    compare(*CASES[case]())


@pytest.mark.parametrize("case", ["bert, right padding", "bert, left padding", "llama, left padding"])
def test_padding_rows_are_never_computed(case):
    model, inputs, real, _ = CASES[case]()
    _, calls = run(model, inputs, "madtp")
    for q, k, _, cu_q, *_ in calls:
        assert q.shape[0] == k.shape[0] == real.sum()
        assert cu_q.diff().tolist() == real.sum(dim=1).tolist()


@pytest.mark.parametrize("case", ["bert, right padding", "clip text, right padding", "llama, left padding"])
def test_a_sample_alone_equals_it_in_a_batch(case):
    model, inputs, real, _ = CASES[case]()
    batched, _ = run(model, inputs, "madtp")
    for row in range(3):
        alone, _ = run(model, {"input_ids": inputs["input_ids"][row : row + 1, real[row].bool()]}, "madtp")
        torch.testing.assert_close(batched[row, real[row].bool()], alone[0], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("mask", [LEFT, torch.ones_like(LEFT)], ids=["padded", "full"])
def test_generate_with_a_cache_is_that_of_eager(mask, cache):
    model = llama()
    found = []
    for implementation in ("eager", "madtp"):
        model.set_attn_implementation(implementation)
        with Calls() as calls:
            found.append(
                model.generate(
                    **text_inputs(mask),
                    max_new_tokens=4,
                    do_sample=False,
                    cache_implementation=cache,
                    disable_compile=True,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
            )
    assert torch.equal(found[0].sequences, found[1].sequences)
    torch.testing.assert_close(torch.stack(found[0].logits), torch.stack(found[1].logits), rtol=2e-5, atol=2e-5)
    # The prompt runs ragged; the one token of each later step is not worth a copy of its cache.
    assert len(calls.seen) == (0 if cache == "static" and mask is LEFT else 2)


def test_bart_generates_as_eager():
    model = bart()
    inputs = {"input_ids": tokens(), "attention_mask": RIGHT}
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False, num_beams=2)
    model.set_attn_implementation("madtp")
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False, num_beams=2), expected)


def test_loading_with_the_name(tmp_path):
    model = bert()
    model.save_pretrained(tmp_path)
    loaded = hf.BertForMaskedLM.from_pretrained(tmp_path, attn_implementation="madtp")
    expected, _ = run(model, text_inputs(RIGHT), "madtp")
    with Calls() as calls:
        assert torch.equal(loaded.eval()(**text_inputs(RIGHT)).logits, expected)
    assert len(calls.seen) == 2


def test_vit_compiles_as_one_graph():
    model = build(hf.ViTModel, hf.ViTConfig(**IMAGE | {"num_hidden_layers": 1}, **NO_DROPOUT))
    expected, _ = run(model, {"pixel_values": images()}, "madtp")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(pixel_values=images()).last_hidden_state, expected)


def test_padding_compiles_through_sdpa():
    model = bert()
    expected, _ = run(model, text_inputs(RIGHT), "madtp")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(**text_inputs(RIGHT)).logits
    torch.testing.assert_close(found[RIGHT.bool()], expected[RIGHT.bool()], rtol=2e-5, atol=2e-5)


# What the ragged op does not have: exactly SDPA.

FALLBACKS = {
    "window over padding between tokens": lambda: (
        build(hf.MistralForCausalLM, hf.MistralConfig(**SHAPE, num_key_value_heads=1, vocab_size=40, sliding_window=3)),
        text_inputs(BROKEN),
        BROKEN,
        0,
    ),
    "position bias": lambda: (
        build(
            hf.T5ForConditionalGeneration,
            hf.T5Config(d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2, vocab_size=40, dropout_rate=0.0),
        ),
        bart_inputs(),
        bart_inputs()["decoder_attention_mask"],
        0,
    ),
    "additive mask": lambda: (
        bert(),
        {"input_ids": tokens(), "attention_mask": torch.randn(3, 1, 7, 7, generator=torch.Generator().manual_seed(4))},
        None,
        0,
    ),
}


@pytest.mark.parametrize("case", FALLBACKS)
def test_fallbacks_are_exact(case):
    compare(*FALLBACKS[case]())


@pytest.mark.parametrize("make", [llama, gemma2, lambda: CASES["mistral, window of 3, left padding"]()[0]])
@pytest.mark.parametrize("mask", [None, torch.ones_like(LEFT), LEFT, RIGHT])
def test_several_new_tokens_on_a_cache(make, mask):
    model, ids = make(), tokens()
    real = torch.ones_like(LEFT) if mask is None else mask
    positions = (real.cumsum(1) - 1).clamp(min=0)
    expected, _ = run(model, {"input_ids": ids, "attention_mask": mask, "position_ids": positions}, "eager")
    model.set_attn_implementation("madtp")
    with torch.no_grad():
        first = None if mask is None else mask[:, :3]
        cache = model(input_ids=ids[:, :3], attention_mask=first, position_ids=positions[:, :3], use_cache=True)
        with Calls() as calls:
            later = model(
                input_ids=ids[:, 3:],
                attention_mask=mask,
                position_ids=positions[:, 3:],
                past_key_values=cache.past_key_values,
            ).logits
    assert len(calls.seen) == 2, "it runs ragged"
    kept = real[:, 3:].bool()
    torch.testing.assert_close(later[kept], expected[:, 3:][kept], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("make", [gemma2, lambda: CASES["mistral, window of 3, left padding"]()[0]])
def test_windows_and_soft_caps_generate_as_eager(make, cache):
    model, answers = make(), []
    for implementation in ("eager", "madtp"):
        model.set_attn_implementation(implementation)
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        options |= {} if cache == "dynamic" else {"cache_implementation": "static", "disable_compile": True}
        for chunk in (None, 2):
            answers.append(model.generate(**text_inputs(LEFT), **options, prefill_chunk_size=chunk))
    assert all(torch.equal(answer, answers[0]) for answer in answers)


def test_chunks_are_no_windows():
    from transformers.masking_utils import chunked_causal_mask_function, sliding_window_causal_mask_function

    chunked = chunked_causal_mask_function(3, torch.zeros(3, dtype=torch.int64))
    window = sliding_window_causal_mask_function(3)
    assert not attention_interface._is_window(chunked, 3) and attention_interface._is_window(window, 3)
    assert not attention_interface._is_window(window, 4)


def test_several_texts_in_one_row():
    model, positions = llama(), torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    ids = tokens()[:1]
    together, _ = run(model, {"input_ids": ids, "position_ids": positions, "use_cache": False}, "madtp")
    for part in (slice(0, 4), slice(4, 7)):
        alone, _ = run(model, {"input_ids": ids[:, part]}, "madtp")
        torch.testing.assert_close(together[:, part], alone, rtol=2e-5, atol=2e-5)


def test_dropout_runs_through_sdpa():
    model = llama(attention_dropout=0.5).train()
    with mocked.object(attention_interface, "sdpa_attention_forward", wraps=attention_interface.sdpa_attention_forward):
        output, calls = run(model, text_inputs(LEFT), "madtp")
        given = attention_interface.sdpa_attention_forward.call_args
    assert not calls and given.kwargs["dropout"] == 0.5
    expected = torch.ones(7, 7, dtype=torch.bool).tril() & LEFT.bool()[:, None, None]
    assert torch.equal(given.args[4], expected)
    assert output[LEFT.bool()].isfinite().all()


def test_refuses_attention_weights_from_a_model():
    model = bert()
    model.set_attn_implementation("madtp")
    with pytest.raises(ValueError, match="output_attentions"):
        model(**text_inputs(RIGHT), output_attentions=True)


def test_soft_caps_under_a_mask_of_ones_own():
    mask = torch.randn(3, 1, 7, 7, generator=torch.Generator().manual_seed(4))
    compare(gemma2(), {"input_ids": tokens(), "attention_mask": mask}, None, 0)


@pytest.mark.parametrize("name", ["PaliGemma", "PaliGemma 2"])
def test_a_causal_mask_of_a_module_that_has_other_masks_too(name):
    """Attention of PaliGemma says that it is not causal; a second turn on a cache is."""
    model, logits = make_vlm(name).float(), []
    inputs = {key: x.float() if x.is_floating_point() else x for key, x in vlm_batch(name, make_vlm(name)).items()}
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 3, dtype=torch.long)], 1)
    for implementation in ("eager", "madtp"):
        model.set_attn_implementation(implementation)
        cache = hf.DynamicCache(config=model.config.get_text_config())
        with torch.no_grad():
            model(**inputs, past_key_values=cache, use_cache=True)
            later = {"input_ids": torch.arange(20, 26).view(2, 3), "token_type_ids": torch.zeros(2, 3).long()}
            logits.append(model(**later, attention_mask=mask, past_key_values=cache).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [3, 64])
@pytest.mark.parametrize("where", [lambda: torch.device("meta"), FakeTensorMode])
def test_masks_without_values(where, window):
    """What has none is asked for none: on the meta device, and in fake tensors."""
    shape = SHAPE | {"num_hidden_layers": 1, "vocab_size": 40}
    config = hf.MistralConfig(**shape, num_key_value_heads=1, sliding_window=window)
    with where(), torch.no_grad():
        model = hf.MistralForCausalLM(config)
        model.set_attn_implementation("madtp")
        ids = torch.ones(2, 7, dtype=torch.long)
        for mask in (None, torch.ones_like(ids)):
            cache = hf.DynamicCache(config=config)
            assert model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits.shape == (2, 7, 40)
            later = None if mask is None else torch.ones(2, 10, dtype=torch.long)
            assert model(ids[:, :3], attention_mask=later, past_key_values=cache).logits.shape == (2, 3, 40)
        encoder = hf.BertModel(hf.BertConfig(**shape))
        encoder.set_attn_implementation("madtp")
        assert encoder(ids, attention_mask=torch.ones_like(ids)).last_hidden_state.shape[:2] == (2, 7)
