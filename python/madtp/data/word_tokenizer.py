# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of a closed vocabulary."""

from __future__ import annotations

from collections.abc import Iterable

SPECIAL_TOKENS = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


def word_tokenizer(texts: Iterable[str], max_length: int):
    """A Hugging Face tokenizer of every word in `texts`, in alphabetical order: lower case, [CLS] text [SEP]."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    split_words = pre_tokenizers.BertPreTokenizer()
    words = {word for text in texts for word, _ in split_words.pre_tokenize_str(text.lower())}
    vocabulary = {word: i for i, word in enumerate([*SPECIAL_TOKENS.values(), *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = split_words
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(t, vocabulary[t]) for t in ("[CLS]", "[SEP]")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **SPECIAL_TOKENS,
        bos_token="[CLS]",
        eos_token="[SEP]",
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
    )
