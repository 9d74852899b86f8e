# SPDX-License-Identifier: Apache-2.0
"""The pipelines of transformers run a patched model as they run the unpatched one."""

import copy

import numpy as np
import pytest
import torch
import transformers as hf
from families import BERT, BLIP_TEXT, CLIP_TEXT, CONFIG, IMAGE, SIGLIP_TEXT, randomised
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import madtp

WORDS = "a photo of the red green blue small big cat dog house tree is in on".split()
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
SPECIAL |= {"mask_token": "[MASK]", "bos_token": "[CLS]", "eos_token": "[SEP]"}
LABELS = {"id2label": {0: "one", 1: "two", 2: "three"}, "label2id": {"one": 0, "two": 1, "three": 2}}
SENTENCES = ["the red cat is in the house", "a dog"]


def tokenizer(*inputs):
    vocabulary = {word: i for i, word in enumerate([*dict.fromkeys(SPECIAL.values()), *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    )
    names = list(inputs or ("input_ids", "token_type_ids", "attention_mask"))
    return hf.PreTrainedTokenizerFast(tokenizer_object=words, **SPECIAL, model_max_length=9, model_input_names=names)


def image_processor():
    return hf.ViTImageProcessor(size={"height": 16, "width": 16})


def images():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 20, 24, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


def bert(kind, **options):
    return lambda: kind(hf.BertConfig(**BERT, **options))


def vit(kind, config, **options):
    return lambda: kind(config(**IMAGE, **options))


def clip():
    text = CLIP_TEXT | {"eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=IMAGE, projection_dim=16))


def siglip():
    text = SIGLIP_TEXT | {"max_position_embeddings": 64}  # to which the pipeline pads
    text |= {"eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0}
    return hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=IMAGE))


def blip():
    return hf.BlipForConditionalGeneration(hf.BlipConfig(text_config=BLIP_TEXT, vision_config=IMAGE))


def reads(*inputs):
    return lambda: {"tokenizer": tokenizer(*inputs)}


def sees():
    return {"image_processor": image_processor()}


def reads_and_sees(*inputs):
    return lambda: {"tokenizer": tokenizer(*inputs), "image_processor": image_processor()}


def blip_processor():
    return {
        "processor": hf.BlipProcessor(hf.BlipImageProcessor(size={"height": 16, "width": 16}), tokenizer("input_ids"))
    }


def zero_shot(pipe):
    return pipe(images(), candidate_labels=["red cat", "dog"], hypothesis_template="a photo of the {}")


CASES = {  # task, model: how the model is made, what makes its inputs, a call
    "image-classification, ViT": (
        vit(hf.ViTForImageClassification, hf.ViTConfig, **LABELS),
        sees,
        lambda pipe: pipe(images(), top_k=3, batch_size=2),
    ),
    "image-classification, DINOv2": (
        vit(hf.Dinov2ForImageClassification, hf.Dinov2Config, **LABELS),
        sees,
        lambda pipe: pipe(images(), top_k=3),
    ),
    "image-feature-extraction, ViT": (vit(hf.ViTModel, hf.ViTConfig), sees, lambda pipe: pipe(images())),
    "image-feature-extraction, CLIP": (
        vit(hf.CLIPVisionModel, hf.CLIPVisionConfig),
        sees,
        lambda pipe: pipe(images(), pool=True),
    ),
    "text-classification, BERT": (
        bert(hf.BertForSequenceClassification, **LABELS),
        reads(),
        lambda pipe: pipe(SENTENCES, top_k=None),
    ),
    "token-classification, BERT": (
        bert(hf.BertForTokenClassification, **LABELS),
        reads(),
        lambda pipe: pipe(SENTENCES, aggregation_strategy="simple"),
    ),
    "fill-mask, BERT": (
        bert(hf.BertForMaskedLM),
        reads(),
        lambda pipe: pipe("the red [MASK] is in the house", targets=["cat", "dog"]),
    ),
    "feature-extraction, BERT": (bert(hf.BertModel), reads(), lambda pipe: pipe(SENTENCES)),
    "feature-extraction, CLIP": (
        lambda: hf.CLIPTextModel(hf.CLIPTextConfig(**CLIP_TEXT | {"eos_token_id": 3, "bos_token_id": 2})),
        reads("input_ids", "attention_mask"),
        lambda pipe: pipe(SENTENCES),
    ),
    "zero-shot-image-classification, CLIP": (clip, reads_and_sees("input_ids", "attention_mask"), zero_shot),
    "zero-shot-image-classification, SigLIP": (siglip, reads_and_sees("input_ids"), zero_shot),
    "image-text-to-text, BLIP": (
        blip,
        blip_processor,
        lambda pipe: pipe(images=images(), text=["a photo of", "a photo of"], max_new_tokens=3),
    ),
}


def assert_alike(result, expected):
    if isinstance(expected, dict):
        assert result.keys() == expected.keys()
        for name, value in expected.items():
            assert_alike(result[name], value)
    elif isinstance(expected, list | tuple):
        assert len(result) == len(expected)
        for part, value in zip(result, expected, strict=True):
            assert_alike(part, value)
    elif isinstance(expected, float | np.floating):
        assert result == pytest.approx(expected, rel=1e-3, abs=1e-4)
    else:
        assert result == expected


def shape(result):
    """What a result has in it, without the numbers and words."""
    if isinstance(result, dict):
        return {name: shape(value) for name, value in result.items()}
    return [shape(part) for part in result] if isinstance(result, list | tuple) else type(result)


@pytest.mark.parametrize("case", CASES)
def test_pipelines_run_patched_models(case):
    build, parts, call = CASES[case]
    torch.manual_seed(0)
    plain = randomised(build())
    model = copy.deepcopy(plain)
    handle = madtp.patch(model, CONFIG)
    task = case.split(", ")[0]
    expected = call(hf.pipeline(task, model=plain, **parts()))
    pipe = hf.pipeline(task, model=model, **parts())
    assert_alike(call(pipe), expected)
    handle.set_temperature(2.0)
    pruned = call(pipe)
    if task not in ("token-classification", "image-text-to-text"):  # where what is found varies in number and length
        assert shape(pruned) == shape(expected)
    assert len(pruned) == len(expected)
    assert all(handle.tokens_per_layer.values()), "every tower ran on ragged tokens"
