"""`attn_implementation="madtp"` against "eager" on tiny models with random weights."""

from unittest.mock import patch as mocked

import pytest
import torch
import transformers as hf
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

import madtp  # noqa: F401  registers the implementation
from madtp import attention_interface
from madtp.attention_interface import attention_forward, attention_mask

SHAPE = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "num_hidden_layers": 2}
IMAGE = SHAPE | {"image_size": 16, "patch_size": 4}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
RIGHT = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]])
LEFT = RIGHT.flip(1)


class Calls(TorchDispatchMode):
    """The arguments of every varlen_attention that runs."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.madtp.varlen_attention.default:
            self.seen.append(args)
        return function(*args, **(kwargs or {}))


def build(kind, config, seed=0):
    torch.manual_seed(seed)
    config._attn_implementation = "eager"
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def tokens(mask=RIGHT, seed=1, vocabulary=40):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, vocabulary, mask.shape, generator=generator)


def images():
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def llama(**options):
    config = SHAPE | {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 40} | options
    return build(hf.LlamaForCausalLM, hf.LlamaConfig(**config, bos_token_id=1, eos_token_id=None, pad_token_id=0))


def bert(**options):
    return build(hf.BertForMaskedLM, hf.BertConfig(**SHAPE, **NO_DROPOUT, vocab_size=40, **options))


def bart():
    shape = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 40, "dropout": 0.0}
    shape |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    return build(hf.BartForConditionalGeneration, hf.BartConfig(**shape, max_position_embeddings=32))


def bart_inputs(target_length=5):
    target = torch.ones(3, target_length, dtype=torch.long)
    target[1, 3:] = 0
    return {
        "input_ids": tokens(),
        "attention_mask": RIGHT,
        "decoder_input_ids": tokens(target, seed=2),
        "decoder_attention_mask": target,
    }


def text_inputs(mask):
    return {"input_ids": tokens(mask), "attention_mask": mask}


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
    "bart": lambda: (bart(), bart_inputs(), bart_inputs()["decoder_attention_mask"], 6),
    "bart, equal lengths": lambda: (bart(), bart_inputs(7), bart_inputs(7)["decoder_attention_mask"], 6),
}


def run(model, inputs, implementation):
    """Real outputs' values and the gradients of a sum over them, with the packed calls."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    with Calls() as calls:
        output = model(**inputs)
    return (output.logits if "logits" in output else output.last_hidden_state), calls.seen


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
    assert len(calls.seen) >= 2 * 3  # every step of one token, both layers
    if mask is LEFT and cache == "dynamic":
        assert calls.seen[-1][1].shape[0] == LEFT.sum() + 3 * 3  # the cached keys that are real, and no other


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


# What the packed op does not have: exactly SDPA.

FALLBACKS = {
    "sliding window": lambda: (
        build(hf.MistralForCausalLM, hf.MistralConfig(**SHAPE, num_key_value_heads=1, vocab_size=40, sliding_window=3)),
        text_inputs(LEFT),
        LEFT,
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


def test_several_new_tokens_on_a_cache():
    model, ids = llama(), tokens()
    expected, _ = run(model, {"input_ids": ids}, "madtp")
    for mask in (None, torch.ones(3, 7)):
        cache = model(input_ids=ids[:, :3], use_cache=True).past_key_values
        later = model(input_ids=ids[:, 3:], attention_mask=mask, past_key_values=cache).logits
        torch.testing.assert_close(later, expected[:, 3:], rtol=2e-5, atol=2e-5)


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


# The two functions themselves.


class SelfAttention(torch.nn.Module):
    is_causal = False

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        raise NotImplementedError


class CrossAttention(SelfAttention):
    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        raise NotImplementedError


def heads(length=7, count=2, dim=16, seed=0):
    return torch.randn(3, count, length, dim, generator=torch.Generator().manual_seed(seed))


def test_a_batch_without_padding_is_packed_without_copies():
    q, k, v = (heads(seed=seed).transpose(1, 2).contiguous().transpose(1, 2) for seed in range(3))
    with Calls() as calls:
        attention_forward(SelfAttention(), q, k, v, None)
    for packed, given in zip(calls.seen[0], (q, k, v), strict=False):
        assert packed.data_ptr() == given.data_ptr() and packed.is_contiguous()


@pytest.mark.parametrize("kind", [SelfAttention, CrossAttention])
def test_padding_queries(kind):
    q, k, v, real = heads(), heads(seed=1), heads(seed=2), RIGHT.bool()
    out, weights = attention_forward(kind(), q, k, v, real[:, None, None])
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None]).transpose(1, 2)
    assert weights is None and out.shape == (3, 7, 2, 16)
    torch.testing.assert_close(out[real], expected[real], rtol=2e-5, atol=2e-5)
    if kind is SelfAttention:
        assert not out[~real].any()
    else:  # equal lengths do not make it self-attention: every query is real
        torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5)


def test_what_padding_holds_never_matters():
    q, k, v, real = heads(), heads(seed=1), heads(seed=2), RIGHT.bool()
    poisoned = [t.masked_fill(~real[:, None, :, None], torch.nan) for t in (q, k, v)]
    for mask, causal in ((real, True), (real[:, None, None], False)):
        out, _ = attention_forward(SelfAttention(), q, k, v, mask, is_causal=causal)
        assert torch.equal(attention_forward(SelfAttention(), *poisoned, mask, is_causal=causal)[0], out)


def test_a_sequence_without_any_key_gets_zeros():
    real = RIGHT.bool().clone()
    real[1] = False
    q = heads(4).requires_grad_()
    out, _ = attention_forward(CrossAttention(), q, heads(seed=1), heads(seed=2), real[:, None, None])
    out.sum().backward()
    assert not out[1].any() and out[0].any() and out[2].any() and q.grad.isfinite().all()
    out, _ = attention_forward(SelfAttention(), heads(), heads(), heads(), real & False, is_causal=True)
    assert not out.any()


def test_one_batch_of_queries_for_all():
    q, k, v = heads(4)[:1], heads(seed=1), heads(seed=2)
    out, _ = attention_forward(CrossAttention(), q, k, v, None)
    expected, _ = attention_forward(CrossAttention(), q.expand(3, -1, -1, -1), k, v, None)
    torch.testing.assert_close(out, expected)


def test_value_dims_of_their_own():
    q, k, v = heads(), heads(seed=1), heads(dim=24, seed=2)
    out, _ = attention_forward(SelfAttention(), q, k, v, None)
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2))


def test_float64_gradients():
    inputs = [heads(4, count, seed=seed).double().requires_grad_() for seed, count in enumerate((2, 1, 1))]
    real = RIGHT[:, :4].bool()

    def attend(q, k, v):
        return attention_forward(SelfAttention(), q, k, v, real, scaling=0.5, is_causal=True)[0]

    assert torch.autograd.gradcheck(attend, inputs, fast_mode=True)


def test_forms_of_the_mask():
    config = hf.LlamaConfig(**SHAPE)
    config._attn_implementation = "madtp"
    embeds, full = torch.zeros(3, 7, 32), torch.ones(3, 7)
    for mask in (None, full):
        assert create_causal_mask(config, embeds, mask, None) is None
        assert create_bidirectional_mask(config, embeds, mask) is None
    real = create_causal_mask(config, embeds, RIGHT, None)
    assert real.dtype == torch.bool and torch.equal(real, RIGHT.bool())
    keys = create_bidirectional_mask(config, embeds, RIGHT)
    assert torch.equal(keys, RIGHT.bool()[:, None, None])
    # Whoever forbids the short forms gets the whole mask.
    assert create_causal_mask(config, embeds, RIGHT, None, allow_is_causal_skip=False).shape == (3, 1, 7, 7)
    assert create_bidirectional_mask(config, embeds, None, allow_is_bidirectional_skip=False).shape == (3, 1, 7, 7)
    # Several queries on a cache.
    assert attention_mask(batch_size=3, q_length=2, kv_length=7, q_offset=5).shape == (3, 1, 2, 7)
    assert attention_mask(batch_size=3, q_length=1, kv_length=7, q_offset=6) is None


@pytest.mark.parametrize("name", ["softcap", "s_aux", "sinks", "block_indices", "cache", "output_attentions"])
def test_refuses_what_it_would_ignore(name):
    q = heads()
    with pytest.raises(ValueError, match=f'^{name} must be unset with attn_implementation="madtp"'):
        attention_forward(SelfAttention(), q, q, q, None, **{name: torch.ones(2)})
    attention_forward(SelfAttention(), q, q, q, None, **{name: None})


def test_refuses_attention_weights_from_a_model():
    model = bert()
    model.set_attn_implementation("madtp")
    with pytest.raises(ValueError, match="output_attentions"):
        model(**text_inputs(RIGHT), output_attentions=True)


def test_refuses_a_model_with_soft_caps():
    config = hf.Gemma2Config(**SHAPE, num_key_value_heads=1, head_dim=16, vocab_size=40, attn_logit_softcapping=5.0)
    model = build(hf.Gemma2ForCausalLM, config)
    model.set_attn_implementation("madtp")
    with pytest.raises(ValueError, match="^softcap must be unset"):
        model(**text_inputs(LEFT))


def test_a_mask_of_another_length_is_never_packed():
    with pytest.raises(RuntimeError):
        attention_forward(SelfAttention(), heads(), heads(), heads(), torch.ones(3, 1, 1, 9, dtype=torch.bool))


@pytest.mark.parametrize(
    "mask, causal, keys",
    [
        (RIGHT.bool(), False, 7),
        (RIGHT, True, 7),
        (RIGHT.bool()[:, :5], True, 7),
        (RIGHT.bool(), True, 9),
    ],
    ids=["not causal", "not bool", "other length", "more keys"],
)
def test_refuses_a_mask_of_two_dimensions_elsewhere(mask, causal, keys):
    rule = r"^attention_mask of two dimensions must be bool \(3, 7\) in causal self-attention, got torch\."
    with pytest.raises(ValueError, match=rule):
        attention_forward(SelfAttention(), heads(), heads(keys), heads(keys), mask, is_causal=causal)
