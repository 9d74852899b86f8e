# SPDX-License-Identifier: Apache-2.0
"""Retrieval: recall against counting by hand, the loss against Hugging Face's, plain and patched models alike."""

import pytest
import torch
import transformers as hf
from families import BERT, CASES, CLIP, CLIP_TEXT, IMAGE, VOCABULARY, randomised

import madtp
from madtp.data import pretrained
from madtp.data.emoji import EmojiRetrieval, build_tokenizer
from madtp.data.word_tokenizer import word_tokenizer
from madtp.tasks.retrieval import RANKS, RetrievalTask, recalls
from madtp.tasks.small_models import fit_projections, retrieval_model

DUAL = ["CLIPModel", "SiglipModel", "VisionTextDualEncoderModel (DINOv2, BERT)"]


def build(name):
    if name == "CLIPModel":  # its text ends where the tokenizer here ends it
        return randomised(hf.CLIPModel(hf.CLIPConfig(**CLIP | {"text_config": CLIP_TEXT | {"eos_token_id": 3}})))
    return CASES[name].build()


def recall_by_hand(images, texts, image_concepts, text_concepts):
    def one_way(queries, candidates, wanted, found, k):
        hits = 0
        for query, concept in zip(queries, wanted, strict=True):
            similar = [float(torch.cosine_similarity(query, candidate, dim=0)) for candidate in candidates]
            ranked = sorted(range(len(similar)), key=lambda i: -similar[i])[:k]
            hits += any(found[i] == concept for i in ranked)
        return hits / len(queries)

    figures = {}
    for k in RANKS:
        figures[f"image_to_text_recall@{k}"] = one_way(images, texts, image_concepts, text_concepts, k)
        figures[f"text_to_image_recall@{k}"] = one_way(texts, images, text_concepts, image_concepts, k)
    figures["recall@1"] = (figures["image_to_text_recall@1"] + figures["text_to_image_recall@1"]) / 2
    return figures


@pytest.mark.parametrize("images, texts, concepts", [(30, 45, 12), (7, 3, 2), (1, 1, 1)])
def test_recall_is_what_counting_gives(images, texts, concepts, monkeypatch):
    monkeypatch.setattr("madtp.tasks.retrieval.CHUNK", 8)
    generator = torch.Generator().manual_seed(0)
    of_image = torch.randint(concepts, (images,), generator=generator)
    of_text = torch.randint(concepts, (texts,), generator=generator)
    centres = torch.randn(concepts, 5, generator=generator)
    x = centres[of_image] + torch.randn(images, 5, generator=generator)
    y = centres[of_text] + torch.randn(texts, 5, generator=generator)
    figures = recalls(x, y, of_image, of_text)
    assert figures == pytest.approx(recall_by_hand(x, y, of_image.tolist(), of_text.tolist()))


@pytest.fixture
def data(few_emoji):
    labels = [few_emoji.concepts[number].label for number in few_emoji.of_split("test")]
    words = word_tokenizer([*labels, "small, round, odd"], max_length=9)
    assert len(words) < VOCABULARY - 2  # of the models, but for begin and end of text
    return EmojiRetrieval("test", words, 16, renders=2, mean=0.5, std=0.5, source=few_emoji)


@pytest.fixture
def task():
    return RetrievalTask(build_tokenizer())


def test_a_batch_has_every_concept_once(task, data):
    items = [data[i] for i in range(len(data))]
    batch = task.collate(items)
    count = len({item["concept"] for item in items})
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values"}
    assert {len(value) for value in batch.values()} == {count} and count < len(items)
    assert torch.equal(batch["pixel_values"][0], items[0]["pixel_values"])


@pytest.mark.parametrize("name", DUAL)
def test_loss_and_logits(task, data, name):
    model = build(name)
    batch = task.collate([data[i] for i in range(len(data))])
    output = model(**batch)
    right = torch.stack([output.logits_per_image.log_softmax(dim).diag() for dim in (0, 1)])
    torch.testing.assert_close(task.loss(output, batch), -right.mean())
    if name != "SiglipModel":  # which has a loss of another kind
        torch.testing.assert_close(task.loss(output, batch), model(**batch, return_loss=True).loss)
    logits, mask = task.logits(output, batch)
    assert mask is None and torch.equal(logits, torch.cat([output.logits_per_image, output.logits_per_image.T]))


@pytest.mark.parametrize("name", DUAL)
def test_evaluate_is_the_recall_of_the_embeddings(task, data, name):
    model = build(name)
    items = [data[i] for i in range(len(data))]
    inputs = {key: torch.stack([item[key] for item in items]) for key in ("input_ids", "pixel_values")}
    inputs["attention_mask"] = torch.stack([item["attention_mask"] for item in items])
    concepts = [item["concept"] for item in items]
    with torch.no_grad():
        output = model(**inputs)
    expected = recall_by_hand(output.image_embeds, output.text_embeds, concepts, concepts)
    seen = []
    figures = task.evaluate(model.train(), data, batch_size=7, progress=lambda b: (seen.append(x) or x for x in b))
    assert figures == pytest.approx(expected) and 0 < figures["image_to_text_recall@10"] <= 1
    assert list(figures)[0] == task.metric and sum(map(len, seen)) == len(data) and model.training
    handle = madtp.patch(model, madtp.CompressionConfig(alignment_tokens=8, alignment_dim=32))
    assert task.evaluate(model, data, batch_size=7) == pytest.approx(expected, abs=2 / len(data))
    handle.set_temperature(50.0)
    task.evaluate(model, data, batch_size=7)
    assert handle.tokens_per_layer["vision"][-1] < 17


def test_an_image_with_several_texts_is_one_candidate(task, data):
    items = [data[i] for i in range(6)]
    shared = [
        item | {"image": i // 3, "concept": i // 3, "pixel_values": items[i // 3]["pixel_values"]}
        for i, item in enumerate(items)
    ]
    seen = []
    model = build("CLIPModel")
    model.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    figures = task.evaluate(model, shared, batch_size=4)
    assert seen == [2, 1] and figures["image_to_text_recall@10"] == 1.0 and figures["text_to_image_recall@5"] == 1.0


def test_projections_find_what_features_share():
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(400, 6, generator=generator)
    images, texts = (
        shared @ torch.randn(6, 12, generator=generator) + 0.1 * torch.randn(400, 12, generator=generator)
        for _ in range(2)
    )
    of_images, of_texts = fit_projections(images[:300], texts[:300], ridge=0.01)
    pair = torch.arange(100)
    assert recalls(images[300:], texts[300:], pair, pair)["recall@1"] < 0.1
    assert recalls(images[300:] @ of_images.T, texts[300:] @ of_texts.T, pair, pair)["recall@1"] > 0.9


def test_the_dual_encoder_starts_with_fitted_projections(task, data, monkeypatch):
    torch.manual_seed(0)
    vision, words = hf.Dinov2Model(hf.Dinov2Config(**IMAGE)), hf.BertModel(hf.BertConfig(**BERT))
    config = hf.VisionTextDualEncoderConfig.from_vision_text_configs(vision.config, words.config, projection_dim=32)
    model = randomised(hf.VisionTextDualEncoderModel(config, vision_model=vision, text_model=words))
    monkeypatch.setattr(pretrained, "dual_encoder", lambda: (model, None))
    before = task.evaluate(model, data)["recall@1"]
    towers = [parameter.clone() for parameter in (*vision.parameters(), *words.parameters())]
    assert task.evaluate(retrieval_model(data, ridge=0.01), data)["recall@1"] > before + 0.2
    assert all(map(torch.equal, towers, (*vision.parameters(), *words.parameters())))


def test_other_models_are_refused(task, data):
    with pytest.raises(TypeError, match="model must be a dual encoder such as CLIPModel, got BlipForNLVR"):
        task.evaluate(CASES["BlipForNLVR"].build(), data)


@pytest.mark.slow  # test_compress_tasks has a quick one
def test_compress(task, data, tmp_path):
    config = madtp.CompressionConfig(macs_reduction=0.5, alignment_tokens=8, alignment_dim=32, controller_interval=2)
    training = {"max_steps": 6, "per_device_train_batch_size": 8, "disable_tqdm": True, "save_strategy": "no"}
    model = CASES["VisionTextDualEncoderModel (ViT, BERT)"].build()
    result = madtp.compress(model, task, data, data, config, output_dir=tmp_path, training=training)
    report = result.report
    assert report["metric"] == "recall@1" and 0 <= report["compressed"]["metrics"]["recall@1"] <= 1
    assert report["compressed"]["counted_gmacs"] < 0.6 * report["dense"]["counted_gmacs"]
    assert (result.path / "tokenizer.json").exists()
