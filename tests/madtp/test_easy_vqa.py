# SPDX-License-Identifier: Apache-2.0
"""easy-vqa: the real data, the shipped dense model, and what is said when either is missing or broken."""

import shutil
import subprocess

import pytest
import torch
from tiny_models import tiny_batch, tiny_blip
from transformers import AutoImageProcessor

import madtp
from madtp.data import easy_vqa
from madtp.data.easy_vqa import ANSWERS, EasyVqa, ImagesWithQuestions, build_tokenizer, collate
from madtp.data.errors import DataError
from madtp.data.word_tokenizer import word_tokenizer
from madtp.tasks.vqa import DENSE_EASY_VQA, VqaTask, dense_forward, load_dense


@pytest.fixture(scope="module")
def data_there():
    try:
        return easy_vqa.PACKAGE.prepare()
    except DataError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def dense():
    return load_dense()


@pytest.fixture(scope="module")
def test_split(data_there, dense):
    return EasyVqa("test", dense[1], limit=500)


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "split, images, questions",
    [pytest.param("train", 4000, 38575, marks=pytest.mark.slow), ("test", 1000, 9673)],
)
def test_counts_and_answers(data_there, dense, split, images, questions):
    data = EasyVqa(split, dense[1])
    assert data.images.shape == (images, 3, 64, 64) and data.images.dtype == torch.uint8
    assert len(data) == questions
    assert {answer for _, answer, _ in data.questions} == set(ANSWERS)
    assert not (data.input_ids == dense[1].unk_token_id).any()


def test_shipped_tokenizer_is_the_built_one(data_there, dense):
    assert build_tokenizer().get_vocab() == dense[1].get_vocab()


def test_pixels_are_those_of_the_image_processor(test_split):
    processor = AutoImageProcessor.from_pretrained(DENSE_EASY_VQA)
    image = test_split.images[3].permute(1, 2, 0).numpy()
    theirs = processor(image, input_data_format="channels_last", return_tensors="pt")["pixel_values"][0]
    index = test_split.image_of.index(3)
    torch.testing.assert_close(test_split[index]["pixel_values"], torch.as_tensor(theirs), atol=1e-6, rtol=0)


def test_batches_share_images(test_split):
    groups = ImagesWithQuestions(test_split, questions=4)
    batch = collate([groups[i] for i in range(5)])
    assert batch["pixel_values"].shape == (5, 3, 64, 64) and batch["image_index"].shape == (20,)
    asked = {tuple(row.tolist()) for row in test_split.input_ids}
    assert all(tuple(row.tolist()) in asked for row in batch["input_ids"])
    pair = collate([test_split[0], test_split[len(test_split) - 1], test_split[0]])
    assert pair["image_index"].tolist() == [0, 1, 0]


def test_dense_forward_is_the_model(test_split, dense):
    model, _ = dense
    lengths = test_split.attention_mask.sum(1)
    batch = collate([test_split[i] for i in (lengths == lengths[0]).nonzero().flatten().tolist()[:7]])
    for name in ("input_ids", "attention_mask"):  # Hugging Face's decoder attends to the padding of questions
        batch[name] = batch[name][:, : lengths[0]]
    logits, loss = dense_forward(model, batch)
    repeated = batch["pixel_values"][batch["image_index"]]
    theirs = model(
        pixel_values=repeated,
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=batch["labels"],
    )
    torch.testing.assert_close(loss, theirs.loss)
    assert logits.shape == (7, 3, model.config.text_config.vocab_size)


def test_dense_accuracy(test_split, dense):
    model, tokenizer = dense
    assert sum(path.stat().st_size for path in DENSE_EASY_VQA.iterdir()) <= 8_000_000
    assert VqaTask(tokenizer).evaluate(model, test_split)["accuracy"] >= 0.97


def test_answers_must_be_known(dense):
    with pytest.raises(ValueError, match=r"answers must be known to the tokenizer, got 'red cat' -> \[\d+, \d+\]"):
        VqaTask(dense[1], ["yes", "red cat"])
    with pytest.raises(ValueError, match="answers and shortlist must be at least one, got 0 answers and shortlist 128"):
        VqaTask(dense[1], [])


@pytest.mark.parametrize("patched", [False, True])
def test_longer_answers_are_ranked_by_their_whole_likelihood(patched):
    model = tiny_blip()
    if patched:
        madtp.patch(model, madtp.CompressionConfig(alignment_tokens=8, alignment_dim=24))
        model.madtp_handle.set_temperature(2.0)
    tokenizer = word_tokenizer(["a b c d e f g h"], max_length=16)
    answers = ["a", "a b", "c d e", "c", "h g", "b"]
    task, batch = VqaTask(tokenizer, answers), tiny_batch()
    start = batch["labels"][:, :1]
    likelihoods = torch.empty(len(start), len(answers))
    for number, answer in enumerate(answers):
        tokens = torch.tensor([[*tokenizer.encode(answer, add_special_tokens=False), tokenizer.sep_token_id]])
        tokens = tokens.expand(len(start), -1)
        labels = torch.cat([start, tokens], dim=1)
        with torch.no_grad():
            given = batch | {"labels": labels}
            logits = model(**given).logits if patched else dense_forward(model, given)[0]
        steps = logits[:, :-1].log_softmax(-1).gather(2, tokens[..., None])
        likelihoods[:, number] = steps.sum((1, 2))
    assert torch.equal(task.predict(model, batch), likelihoods.argmax(1))
    assert not likelihoods.argmax(1).eq(2).any()  # "c d e", which its first token alone would not tell from "c"
    # One answer a question is left: that of the likeliest first token.
    single = VqaTask(tokenizer, [answer.split()[0] for answer in answers]).predict(model, batch)
    alone = VqaTask(tokenizer, answers, shortlist=1).predict(model, batch)
    assert [answers[i].split()[0] for i in alone] == [answers[i].split()[0] for i in single]
    wanted = [task._number([2, *tokenizer.encode(a, add_special_tokens=False), 3, 0]) for a in (*answers, "g")]
    assert wanted == [0, 1, 2, 3, 4, 5, -1]


def test_arguments_are_checked(dense):
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'val'"):
        EasyVqa("val", dense[1])
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        EasyVqa("test", dense[1], limit=0)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short"])
def test_broken_archive(tmp_path, content):
    (tmp_path / easy_vqa.PACKAGE.file).write_bytes(content)
    with pytest.raises(DataError, match="must have sha256") as error:
        easy_vqa.PACKAGE.prepare(tmp_path)
    assert "pip download" in one_line(error)


def test_archive_that_cannot_be_fetched(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="not found") as error:
        easy_vqa.PACKAGE.prepare(tmp_path / "none", download=False)
    assert "pip download" in one_line(error)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1, "", "one\nno network"))
    with pytest.raises(DataError, match=r"\(no network\)") as error:
        easy_vqa.PACKAGE.prepare(tmp_path)
    assert "pip download" in one_line(error)
    assert list(tmp_path.iterdir()) == []


def test_broken_model_directory(tmp_path):
    with pytest.raises(DataError, match="lacks config.json, model.safetensors") as error:
        load_dense(tmp_path / "none")
    assert "train_easy_vqa.py" in one_line(error)
    shutil.copytree(DENSE_EASY_VQA, tmp_path / "m")
    weights, config = tmp_path / "m" / "model.safetensors", tmp_path / "m" / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read") as error:
        load_dense(tmp_path / "m")
    one_line(error)
    weights.write_bytes(whole)
    original = config.read_text()
    config.write_text(original.replace("BlipForQuestionAnswering", "BlipModel"))
    with pytest.raises(DataError, match="must hold a BlipForQuestionAnswering, got BlipModel"):
        load_dense(tmp_path / "m")
    config.write_text(original.replace('"num_hidden_layers": 6', '"num_hidden_layers": 7'))
    with pytest.raises(DataError, match="weights must match config.json"):
        load_dense(tmp_path / "m")
