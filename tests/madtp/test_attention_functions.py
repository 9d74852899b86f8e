# SPDX-License-Identifier: Apache-2.0
"""The attention and the mask function behind `attn_implementation="madtp"`, called directly."""

import pytest
import torch
import transformers as hf
from tiny_models import RIGHT, SHAPE, Calls
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_causal_mask,
    sliding_window_causal_mask_function,
)

from madtp.models.attention_interface import attention_forward, attention_mask


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
    for ragged, given in zip(calls.seen[0], (q, k, v), strict=False):
        assert ragged.data_ptr() == given.data_ptr() and ragged.is_contiguous()


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


@pytest.mark.parametrize("mask", [None, RIGHT.bool()[:, None, None]], ids=["all", "padding"])
def test_one_query_sees_every_real_key(mask):
    q, k, v = heads(1), heads(seed=1), heads(seed=2)
    with Calls() as calls:
        out, _ = attention_forward(SelfAttention(), q, k, v, mask, is_causal=True)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    assert not calls.seen


def test_one_batch_of_queries_for_all():
    q, k, v = heads(4)[:1], heads(seed=1), heads(seed=2)
    out, _ = attention_forward(CrossAttention(), q, k, v, None)
    expected, _ = attention_forward(CrossAttention(), q.expand(3, -1, -1, -1), k, v, None)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("value_dim", [16, 24], ids=["ragged", "value dims of their own"])
def test_scale_and_direction(causal, value_dim):
    q, k, v = heads(), heads(seed=1), heads(dim=value_dim, seed=2)
    with Calls() as calls:
        out, _ = attention_forward(SelfAttention(), q, k, v, None, scaling=0.7, is_causal=causal)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.7, is_causal=causal)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=2e-5, atol=2e-5)
    assert len(calls.seen) == (value_dim == 16)


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
    # Several queries on a cache: the real tokens, where the last query stands at the last key.
    several = attention_mask(batch_size=3, q_length=2, kv_length=7, q_offset=5)
    assert several.dtype == torch.int32 and torch.equal(several, torch.full((3, 1, 1, 7), 7, dtype=torch.int32))
    padded = attention_mask(batch_size=3, q_length=2, kv_length=7, q_offset=5, attention_mask=RIGHT.bool())
    assert torch.equal(padded, 7 * RIGHT.int()[:, None, None])
    assert attention_mask(batch_size=3, q_length=2, kv_length=7) is None  # an empty static cache
    # A sliding window says its size at the real tokens.
    window = sliding_window_causal_mask_function(3)
    sizes = attention_mask(3, 7, 7, mask_function=window, attention_mask=RIGHT.bool(), local_size=3)
    assert sizes.dtype == torch.int32 and torch.equal(sizes, 3 * RIGHT.int()[:, None, None])
    assert attention_mask(batch_size=3, q_length=1, kv_length=7, q_offset=6) is None


@pytest.mark.parametrize("name", ["s_aux", "sinks", "block_indices", "cache", "output_attentions"])
def test_refuses_what_it_would_ignore(name):
    q = heads()
    with pytest.raises(ValueError, match=f'^{name} must be unset with attn_implementation="madtp"'):
        attention_forward(SelfAttention(), q, q, q, None, **{name: torch.ones(2)})
    attention_forward(SelfAttention(), q, q, q, None, **{name: None})


def test_a_mask_of_another_length_never_runs_ragged():
    with pytest.raises(RuntimeError):
        attention_forward(SelfAttention(), heads(), heads(), heads(), torch.ones(3, 1, 1, 9, dtype=torch.bool))


@pytest.mark.parametrize(
    "mask, keys",
    [(RIGHT, 7), (RIGHT.bool()[:, :5], 7), (RIGHT.bool(), 9), (RIGHT.bool()[:, :5], 5)],
    ids=["not bool", "other length", "more keys", "more queries"],
)
def test_refuses_a_mask_of_two_dimensions_elsewhere(mask, keys):
    rule = r"^attention_mask of two dimensions must be bool \(3, [579]\) of causal attention, got torch\."
    with pytest.raises(ValueError, match=rule):
        attention_forward(SelfAttention(), heads(), heads(keys), heads(keys), mask, is_causal=True)
