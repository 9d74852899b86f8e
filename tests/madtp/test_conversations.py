# SPDX-License-Identifier: Apache-2.0
"""Conversations in LLaVA's files: labels where answers are, one error for whatever is wrong with a file."""

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from vlm_conversations import CHAT, CONTEXT, conversations, example

from madtp.data.conversations import IGNORED, Conversations
from madtp.data.errors import DataError
from madtp.tasks.registry import load
from madtp.tasks.vlm import VlmTask

PROMPT = "USER: {} what is on the {} ? ASSISTANT:"


def two_turns(records):
    for record in records:
        more = [{"from": "human", "value": "what is the <image> ?"}, {"from": "gpt", "value": "blue"}]
        record["conversations"] += [{**more[0], "value": "what is on the right ?"}, more[1]]
    return records


def words(data, ids):
    return " ".join(data.processor.tokenizer.convert_ids_to_tokens(ids))


@pytest.mark.parametrize("template", [None, CHAT], ids=["plain", "template"])
def test_labels_are_the_answers(tmp_path, template):
    processor = example.make_processor()
    processor.chat_template = template
    data = conversations(tmp_path, processor=processor, records=two_turns)
    item, first = data[0], data.records[0]["conversations"]
    said = words(data, item["input_ids"].tolist()).split(" <image>" * 64)
    asked = item["labels"] != IGNORED
    assert words(data, item["labels"][asked].tolist()) == f"{first[1]['value']} </s> blue </s>"
    assert torch.equal(item["labels"][asked], item["input_ids"][asked])
    begin = "" if template is None else "<s> "
    assert said[0] == f"{begin}USER:" and said[1].startswith(f" {first[0]['value'][8:]} ASSISTANT: ")
    assert said[1].endswith(" USER: what is on the right ? ASSISTANT: blue </s>")
    assert item["answer"] == "blue" and words(data, item["input_ids"][item["answer_begin"] :].tolist()) == "blue </s>"
    assert item["pixel_values"].shape == (1, 3, 32, 32) and bool(item["attention_mask"].all())


def test_images_stand_where_the_text_has_them(tmp_path):
    def several(records):
        turns = [{"from": "human", "value": "what is <image>\n?"}, {"from": "gpt", "value": "red"}]
        turns += [{"from": "human", "value": "what is the <image>"}, {"from": "gpt", "value": "blue"}]
        return [{"image": [records[0]["image"], records[1]["image"]], "conversations": turns}]

    data = conversations(tmp_path, records=several, max_length=256)
    item = data[0]
    assert item["pixel_values"].shape == (2, 3, 32, 32)
    text = words(data, item["input_ids"].tolist()).replace("<image> " * 64, "[] ")
    assert text == "USER: what is [] ? ASSISTANT: red </s> USER: what is the [] ASSISTANT: blue </s>"


def turn(number, **changes):
    def change(records):
        records[1]["conversations"][number] |= changes
        return records

    return change


def field(name, value):
    def change(records):
        records[1] = {key: x for key, x in records[1].items() if key != name}
        if value is not None:
            records[1][name] = value
        return records

    return change


BAD = {
    "no image": (field("image", None), "record 1 lacks the field 'image'"),
    "no conversation": (field("conversations", []), "record 1 has 'conversations' of another kind"),
    "no mark": (turn(0, value="what is on the left ?"), "must have one <image> in its questions for each of its 1"),
    "two marks": (turn(0, value="<image> <image> what is it ?"), "for each of its 1 images, got 2"),
    "no question": (turn(0, value="<image>\n"), "must have a question beside <image> in each turn of human, got none"),
    "no answer": (turn(1, value=" "), "must have answers of text, got ' '"),
    "an image as the answer": (turn(1, value="<image>"), "must have answers of text, got '<image>'"),
    "other speakers": (
        turn(1, **{"from": "human"}),
        "must have turns of human and gpt, one after the other, got human",
    ),
    "a text in place of a turn": (field("conversations", ["hi"]), "record 1 has 'conversations' of another kind"),
    "a long answer": (turn(1, value="red " * 200), f"must have answers within {CONTEXT} tokens, got one of 200"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_with_a_record_is_said_before_anything_runs(tmp_path, name):
    records, message = BAD[name]
    with pytest.raises(DataError, match=f"train.json: .*{message.replace('?', '.')}"):
        conversations(tmp_path, records=records)


def test_a_conversation_longer_than_the_context_is_one_error(tmp_path):
    data = conversations(tmp_path, max_length=70)
    with pytest.raises(DataError, match=r"record 3 must fit the context of 70 tokens, image tokens among them, got 74"):
        data[3]


def test_the_context_is_no_longer_than_the_tokenizer_says(tmp_path):
    processor = example.make_processor()
    assert conversations(tmp_path, processor=processor, max_length=None).max_length > 10**9
    processor.tokenizer.model_max_length = 100
    assert conversations(tmp_path, processor=processor, max_length=None).max_length == 100
    assert conversations(tmp_path, processor=processor).max_length == 100
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        conversations(tmp_path, limit=0)


def test_a_missing_file_says_how_to_get_one(tmp_path):
    with pytest.raises(DataError, match=r"conversations not found at .*none.json: run `hf download .*compress_vlm.py"):
        Conversations(tmp_path / "none.json", tmp_path, example.make_processor(), max_length=CONTEXT)


def test_a_missing_image_is_one_error(tmp_path):
    data = conversations(tmp_path)
    (tmp_path / "images" / "train2.png").unlink()
    with pytest.raises(DataError, match=r"image .*train2.png cannot be read .*image_root is wrong"):
        data[2]


def test_a_tokenizer_without_the_image_token_is_refused(tmp_path):
    processor = example.make_processor()
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    processor.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    with pytest.raises(DataError, match="tokenizer must have the image token of its processor, got none for '<image>'"):
        conversations(tmp_path, processor=processor)
    with pytest.raises(DataError, match="tokenizer must have a token of padding, or of the end, got neither"):
        VlmTask(processor)
    with pytest.raises(DataError, match=r"processor must have a tokenizer and an image processor .* got a Tokenizers"):
        conversations(tmp_path, processor=example.make_processor().tokenizer)


def test_a_template_that_takes_back_what_it_said_is_refused(tmp_path):
    processor = example.make_processor()
    processor.chat_template = "{{ messages | length }} " + CHAT
    with pytest.raises(DataError, match="record 0 must be said turn by turn"):
        conversations(tmp_path, processor=processor)[0]


def test_a_template_that_fails_is_one_error(tmp_path):
    processor = example.make_processor()
    processor.chat_template = "{{ raise_exception('no system prompt') }}"
    with pytest.raises(DataError, match=r"record 0 cannot be said by the chat template .*\(no system prompt\)"):
        conversations(tmp_path, processor=processor)[0]


def test_a_template_without_text_before_the_answer_is_refused(tmp_path):
    processor = example.make_processor()
    processor.chat_template = CHAT.replace("ASSISTANT: ", "")
    data = conversations(tmp_path, processor=processor, records=turn(0, value="what is it ? <image>"))
    with pytest.raises(DataError, match="record 1 must have text between an image and the answer"):
        data[1]


def test_padding_is_on_the_right_in_training_and_on_the_left_in_prompts(tmp_path):
    data = conversations(tmp_path, records=lambda records: two_turns(records[:1]) + records[1:])
    task = VlmTask(data.processor)
    batch = task.collate([data[0], data[1]])
    short = len(data[1]["input_ids"])
    assert batch["attention_mask"][1].tolist() == [1] * short + [0] * (batch["input_ids"].shape[1] - short)
    assert (batch["labels"][1, short:] == IGNORED).all() and (batch["input_ids"][1, short:] == 0).all()
    assert list(batch)[0] == "input_ids" and batch["pixel_values"].shape == (2, 3, 32, 32)


def test_a_folder_without_a_processor_is_one_error(tmp_path):
    example.make_model(width=16).save_pretrained(tmp_path / "model")
    with pytest.raises(DataError, match="has no processor"):
        load("vlm", tmp_path / "model", "train.json", test=tmp_path / "test.json", images=tmp_path)
    with pytest.raises(
        ValueError, match="data must be mosaics, or an annotation file with test= and images=, got 'easy-vqa'"
    ):
        load("vlm", tmp_path / "model", "easy-vqa")
