# SPDX-License-Identifier: Apache-2.0
"""A patched model takes what the unpatched one takes, ignores what it ignores, and returns the same fields."""

import copy
import functools
import inspect

import pytest
import torch
import transformers as hf
from families import BERT, CASES, CONFIG, randomised, text, unpadded
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

import madtp
from madtp.models import Encoder, Family, Tower

CLOSE = {"rtol": 3e-5, "atol": 3e-5}
MAPS = "output_attentions must be unset: a patched Blip.* makes no attention maps; handle.remove\\(\\) brings the model"


@functools.cache
def _built(family):
    torch.manual_seed(0)
    plain = randomised(CASES[family].build())
    patched = copy.deepcopy(plain)
    madtp.patch(patched, CONFIG)
    return plain, patched


def both(family, temperature=0.0):
    plain, patched = _built(family)
    patched.madtp_handle.set_temperature(temperature)
    return plain, patched


def flat(output, path=""):
    """Dotted path -> value, of all fields of an output, nested ones too."""
    if isinstance(output, ModelOutput):
        items = list(output.items())
    elif isinstance(output, tuple):
        items = [*enumerate(output), ("length", len(output))]
    else:
        return {path: output}
    return {name: value for key, part in items for name, value in flat(part, f"{path}.{key}").items()}


def assert_same(result, expected, values=True):
    result, expected = flat(result), flat(expected)
    result.pop(".logits", None) if ".logits" not in expected else None  # of VQA, which Hugging Face leaves out
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor) and values:
            torch.testing.assert_close(result[name], value, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
        elif isinstance(value, torch.Tensor):
            assert result[name].shape == value.shape, name
        else:
            assert type(result[name]) is type(value), name


def keywords(inputs):
    """What Hugging Face takes beside the inputs, by name: used by some families, ignored by others."""
    batch = len(next(iter(inputs.values())))
    length = inputs["input_ids"].shape[1] if "input_ids" in inputs else 5
    return (
        {"num_items_in_batch": torch.tensor(3)},
        {"unheard_of": 1},
        {"head_mask": torch.ones(2, 2)},
        {"cu_seq_lens_q": torch.ones(3), "max_length_q": 3},
        {"use_cache": True},
        {"position_ids": torch.arange(length).flip(0)[None]},
        {"token_type_ids": torch.ones(batch, length, dtype=torch.long)},
        {"interpolate_pos_encoding": True},
        {"return_dict": False},
        {"output_hidden_states": True},
        {"output_hidden_states": [0, -1, 9]},
        {"output_hidden_states": True, "return_dict": False},
    )


@torch.no_grad()
def takes_the_keywords_of_hugging_face(family):
    plain, patched = both(family)
    inputs = unpadded(family)
    for options in ({}, *keywords(inputs)):
        if family == "BlipForQuestionAnswering" and "position_ids" in options:
            inputs = inputs | {"labels": inputs["input_ids"]}  # whose decoder gets them too
        assert_same(patched(**inputs, **options), plain(**inputs, **options))
    patched.madtp_handle.set_temperature(2.0)
    for options in keywords(inputs):
        assert_same(patched(**inputs, **options), plain(**inputs, **options), values=False)


@torch.no_grad()
def has_no_attention_maps(family):
    plain, patched = both(family)
    inputs = unpadded(family)
    if plain.config._attn_implementation == "sdpa":
        assert_same(patched(**inputs, output_attentions=True), plain(**inputs, output_attentions=True))
    else:
        with pytest.raises(ValueError, match=MAPS):
            patched(**inputs, output_attentions=True)


def says_which_inputs_there_are(family):
    plain, patched = (list(inspect.signature(model.forward).parameters) for model in both(family))
    assert [name for name in patched if name != "image_index"] == plain


@torch.no_grad()
def test_the_configuration_asks_like_an_argument():
    for family in ("ViTModel", "BertModel", "BlipVisionModel"):
        plain, patched = (copy.deepcopy(model) for model in both(family))
        for model in (plain, patched):
            model.config.output_hidden_states = True
            model.config.tie_last_hidden_states = True
            model.config.return_dict = False
        assert_same(patched(**unpadded(family)), plain(**unpadded(family)))
    patched.config.output_attentions = True
    with pytest.raises(ValueError, match=MAPS):
        patched(**unpadded(family))
    for family in ("BlipForQuestionAnswering", "BlipForConditionalGeneration", "BlipForImageTextRetrieval"):
        plain, patched = (copy.deepcopy(model) for model in both(family))
        for model in (plain, patched):
            model.config.return_dict = False
            model.config.vision_config.output_hidden_states = True
        assert_same(patched(**unpadded(family)), plain(**unpadded(family)))


@torch.no_grad()
def test_positional_arguments_have_the_order_of_hugging_face():
    for family in ("ViTModel", "Dinov2Model"):
        plain, patched = (copy.deepcopy(model) for model in both(family))
        for model in (plain, patched):
            model.embeddings.mask_token = nn.Parameter(torch.ones(1, 1, 32))
        pixels = unpadded(family)["pixel_values"]
        masked = torch.arange(16).expand(4, 16) < 5
        assert_same(patched(pixels, masked), plain(pixels, masked))
    plain, patched = both("BertModel")
    ids = text()["input_ids"]
    order = ids, torch.ones_like(ids), torch.ones_like(ids), torch.arange(9).flip(0)[None]
    assert_same(patched(*order), plain(*order))
    with pytest.raises(TypeError, match="BertModel.forward got multiple values for argument attention_mask"):
        patched(*order, attention_mask=order[1])
    with pytest.raises(TypeError, match="BertModel.forward takes at most 9 positional arguments, got 12"):
        patched(*order * 3)


@torch.no_grad()
def test_pixels_of_another_dtype_are_read_alike():
    for family in ("ViTModel", "CLIPVisionModel"):
        plain, patched = (copy.deepcopy(model).double() for model in both(family))
        assert_same(patched(**unpadded(family)), plain(**unpadded(family)))


@torch.no_grad()
def test_embeddings_in_the_place_of_token_ids():
    words = torch.randn(2, 9, 32)
    order = torch.arange(9).flip(0)[None]
    for family in ("BertModel", "BertForSequenceClassification"):
        plain, patched = both(family)
        for options in ({}, {"position_ids": order}, {"token_type_ids": torch.ones(2, 9, dtype=torch.long)}):
            assert_same(patched(inputs_embeds=words, **options), plain(inputs_embeds=words, **options))
        patched.madtp_handle.set_temperature(2.0)
        assert_same(patched(inputs_embeds=words), plain(inputs_embeds=words), values=False)
    plain, patched = (model.text_encoder for model in both("BlipForImageTextRetrieval"))
    for options in ({"inputs_embeds": words}, {"encoder_embeds": words}):
        given, again = ({name: value.clone() for name, value in options.items()} for _ in range(2))
        assert_same(patched(**given), plain(**again))  # BLIP adds positions in place
    with pytest.raises(ValueError, match="inputs_embeds must be unset where input_ids are given, got both"):
        patched(text()["input_ids"], inputs_embeds=words)
    with pytest.raises(ValueError, match=r"inputs_embeds must be a tensor of shape \(B, N, C\), got \(9, 32\)"):
        patched(inputs_embeds=words[0])
    with pytest.raises(ValueError, match="inputs_embeds must be unset: CLIPTextModel has no such argument"):
        both("CLIPTextModel")[1](text()["input_ids"], inputs_embeds=words)


def additive(seen):
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


@torch.no_grad()
def test_masks_of_three_and_four_dimensions():
    """Where they say which tokens are real they do what (B, N) does, and elsewhere they are refused."""
    ids, mask = text().values()
    real = mask.bool()
    forms = [mask, real, mask.float(), mask * 7]
    for full in (real[:, None, :].expand(-1, 9, -1), real[:, None, :] & real[:, :, None], real[:, None, :]):
        forms += [full, full[:, None], additive(full), additive(full)[:, None].half().float()]
    for family in ("BertModel", "SiglipTextModel"):
        _, patched = both(family, 2.0)
        if family == "SiglipTextModel":
            ids, forms = ids.flip(1), [form.flip(-1).flip(-2) if form.ndim > 2 else form.flip(1) for form in forms]
        expected = patched(ids, forms[0])
        for form in forms[1:]:
            assert_same(patched(ids, form), expected)
    _, patched = both("BertModel")
    triangle = torch.ones(4, 9, 9, dtype=torch.bool).tril()
    for form in (triangle, triangle[:, None], additive(triangle)):
        with pytest.raises(ValueError, match="or such that every real token sees the same, got another"):
            patched(ids, form)
    with pytest.raises(ValueError, match="or additive with 0 and at most -10000 alone, got other values"):
        patched(ids, torch.full((4, 1, 9, 9), -1.5))
    for form in (mask[:, :8], mask[:1], mask[:, None].expand(4, 3, 9), mask[:, None, None], mask[0]):
        with pytest.raises(ValueError, match=r"attention_mask must be \(4, 9\) with non-zero at real tokens"):
            patched(ids, form)
    with pytest.raises(ValueError, match="attention_mask must be .*, got list of 4"):
        patched(ids, mask.tolist())


@torch.no_grad()
def test_masks_of_a_causal_tower_are_causal():
    plain, patched = both("CLIPTextModel")
    ids = CASES["CLIPTextModel"].inputs()["input_ids"]
    triangle = torch.ones(4, 1, 9, 9, dtype=torch.bool).tril()
    assert_same(patched(ids, triangle), plain(ids, triangle))
    with pytest.raises(ValueError, match="or such that every real token sees those up to it, got another"):
        patched(ids, torch.ones_like(triangle))
    with pytest.raises(ValueError, match="attention_mask must have a real end of text: CLIP pools there"):
        patched(ids, (torch.arange(9) < 2).expand(4, 9))
    with pytest.raises(ValueError, match="is_causal must be None or True in a patched CLIPTextModel, got False"):
        patched(ids, is_causal=False)
    with pytest.raises(ValueError, match="is_causal must be None or False in a patched ViTModel, got True"):
        both("ViTModel")[1](**unpadded("ViTModel"), is_causal=True)


@torch.no_grad()
def test_images_with_a_mask_of_patches():
    mask = torch.ones(4, 17, dtype=torch.long)
    mask[1, 5:] = 0
    plain, patched = both("ViTModel")
    pixels = unpadded("ViTModel")["pixel_values"]
    result, expected = patched(pixels, attention_mask=mask), plain(pixels, attention_mask=mask)
    torch.testing.assert_close(result.pooler_output, expected.pooler_output, **CLOSE)
    real = mask.bool()
    torch.testing.assert_close(result.last_hidden_state[real], expected.last_hidden_state[real], **CLOSE)
    with pytest.raises(ValueError, match="attention_mask must be unset: CLIPVisionModel has no such argument"):
        both("CLIPVisionModel")[1](pixels, attention_mask=mask)
    plain, patched = both("BlipVisionModel")  # has none, and drops it
    assert_same(patched(pixels, attention_mask=mask), plain(pixels, attention_mask=mask))


@torch.no_grad()
def test_cross_attention_is_used_or_refused():
    ids, keys = text()["input_ids"], torch.randn(4, 5, 32)
    plain, patched = (model.text_encoder for model in both("BlipForImageTextRetrieval"))
    assert_same(patched(ids, encoder_hidden_states=keys), plain(ids, encoder_hidden_states=keys))
    mask = torch.tensor([[1] * 5, [1] * 5, [1] * 5, [1, 1, 0, 0, 0]])
    result = patched(ids, encoder_hidden_states=keys, encoder_attention_mask=mask)
    alone = patched(ids[3:], encoder_hidden_states=keys[3:, :2])
    torch.testing.assert_close(result.last_hidden_state[3:], alone.last_hidden_state, **CLOSE)
    with pytest.raises(ValueError, match="past_key_values must be unset: a patched BlipTextModel is an encoder"):
        patched(ids, past_key_values=hf.DynamicCache())
    with pytest.raises(ValueError, match="is_decoder must be unset: a patched BlipTextModel is an encoder, got bool"):
        patched(ids, is_decoder=True)
    plain, patched = both("BertModel")  # an encoder, which ignores what a decoder reads
    options = {"encoder_hidden_states": keys, "encoder_attention_mask": mask, "use_cache": True}
    assert_same(patched(ids, **options), plain(ids, **options))
    with pytest.raises(ValueError, match="past_key_values must be unset: a patched BertModel is an encoder"):
        patched(ids, past_key_values=hf.DynamicCache())
    decoder = hf.BertModel(hf.BertConfig(**BERT, is_decoder=True))
    with pytest.raises(ValueError, match="config.is_decoder of a BertModel must be False"):
        madtp.patch(decoder, CONFIG)
    assert type(decoder) is hf.BertModel and not hasattr(decoder, "madtp_handle")


@torch.no_grad()
def test_generate_takes_lists_and_no_text():
    for family in ("BlipForQuestionAnswering", "BlipForConditionalGeneration"):
        plain, patched = both(family)
        inputs = unpadded(family)
        pixels, ids = inputs["pixel_values"], inputs["input_ids"]
        options = {"max_new_tokens": 3, "do_sample": False}
        expected = plain.generate(input_ids=ids.tolist(), pixel_values=pixels, **options)
        assert torch.equal(patched.generate(input_ids=ids.tolist(), pixel_values=pixels, **options), expected)
        with pytest.raises(ValueError, match=r"input_ids must be token ids of shape \(Q, L\), got list of 2 of"):
            patched.generate(input_ids=[[1], [2, 3]], pixel_values=pixels[:2])
    assert torch.equal(patched.generate(pixels, **options), plain.generate(pixels, **options))
    plain, patched = both("Blip2ForConditionalGeneration")
    inputs = unpadded("Blip2ForConditionalGeneration")
    for given in (inputs, {"pixel_values": inputs["pixel_values"]}):
        assert torch.equal(patched.generate(**given, **options), plain.generate(**given, **options))


def test_messages_are_bounded():
    _, patched = both("ViTModel")
    for value, got in (
        ([torch.zeros(3, 16, 16)] * 4, "list of 4"),
        (None, "NoneType"),
        (torch.zeros(3, 16, 16).numpy(), "ndarray"),
    ):
        with pytest.raises(ValueError, match=r"pixel_values must be a tensor of shape \(B, 3, H, W\), got .*") as error:
            patched(value)
        assert str(error.value).endswith(got)
    _, patched = both("BertModel")
    with pytest.raises(ValueError, match=r"input_ids must be a tensor of shape \(B, N\), got list of 2$"):
        patched(input_ids=[[1, 2, 3], [4, 5, 6]])


class Plain(nn.Module):
    """An encoder of one's own, whose input has a name of its own and which takes nothing else."""

    def __init__(self):
        super().__init__()
        self.config = PretrainedConfig(hidden_size=32, num_attention_heads=2)
        self.embed = nn.Embedding(40, 32)
        block = nn.Module()
        block.before, block.after, block.qkv, block.proj = (
            nn.LayerNorm(32),
            nn.LayerNorm(32),
            nn.Linear(32, 96),
            nn.Linear(32, 32),
        )
        block.mlp = nn.Linear(32, 32)
        self.blocks = nn.ModuleList([block])

    def forward(self, words):
        return BaseModelOutputWithPooling(last_hidden_state=self.embed(words))


def test_an_encoder_of_ones_own_keeps_the_name_of_its_input():
    encoder = Encoder(blocks="blocks", qkv=("qkv",), out="proj", norm1="before", norm2="after", mlp=("mlp",))
    tower = Tower(encoder, "input_ids", pool=lambda tower, batch: batch.summary_features(), embeddings="embed")
    model, ids = Plain(), torch.arange(10).view(2, 5)
    madtp.patch(model, CONFIG, family=Family({"text": ("", tower)}))
    assert torch.equal(model(ids).last_hidden_state, model(words=ids).last_hidden_state)
    masked = model(ids, attention_mask=torch.tensor([[1] * 5, [1, 1, 1, 0, 0]]), output_hidden_states=True)
    assert len(masked.hidden_states) == 2 and (masked.last_hidden_state[1, 3:] == 0).all()
    with pytest.raises(TypeError, match="Plain.forward got an unexpected keyword argument position_ids"):
        model(ids, position_ids=ids)
    with pytest.raises(ValueError, match="output_attentions must be unset: a patched Plain makes no attention maps"):
        model(ids, output_attentions=True)


def test_the_features_of_a_tower_have_to_arrive_as_they_are():
    """Their ragged form goes with them; a copy would be read as if padding were tokens."""
    _, patched = both("BlipForImageTextRetrieval")
    hook = patched.vision_model.register_forward_hook(
        lambda module, args, output: output.__class__(last_hidden_state=output.last_hidden_state.clone())
    )
    try:
        with pytest.raises(RuntimeError, match="last_hidden_state must be the tensor that the patched tower returned"):
            patched(**unpadded("BlipForImageTextRetrieval"))
    finally:
        hook.remove()
