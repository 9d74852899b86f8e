# SPDX-License-Identifier: Apache-2.0
"""Questions about images, answered word by word: decoders that read images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from madtp.data.conversations import IGNORED
from madtp.data.errors import DataError
from madtp.inference import evaluating
from madtp.tasks.processors import Processed

FILLS = {"labels": IGNORED}  # of padding; token ids have a token for it, anything else 0
ABOUT_THE_ANSWER = ("question", "answer", "answer_begin")  # of an item, which no forward takes


class VlmTask(Processed):
    """With decoders that read images: LLaVA, Qwen-VL, InternVL, SmolVLM and their kind.

    Items are dicts, as of `madtp.data.conversations.Conversations`: input_ids, attention_mask, labels (L,), -100 where
    nothing is asked, what else a processor makes for the tokens, (L,), and for the images, which it counts along the
    first axis; answer, a text, and answer_begin, where the tokens of it begin, which end the item; and where pictures
    are drawn, question, a text.

    A model is judged by the share of its greedy answers that are the given ones word for word, but for case and spaces.

    Args:
        processor: of Hugging Face with its tokenizer, saved beside a model.
        batch_size: of an evaluation.
    """

    metric = "accuracy"
    samples_at_a_time = 1  # padding would be counted

    def __init__(self, processor, *, batch_size: int = 8):
        super().__init__(processor.tokenizer, getattr(processor, "image_processor", None))
        self.processor, self.batch_size = processor, batch_size
        self.padding = _padding(processor.tokenizer)

    def save_processor(self, directory) -> None:
        """Writes the processor beside a saved model."""
        self.processor.save_pretrained(directory)

    def collate(self, items: list[dict]) -> dict[str, Tensor]:
        """input_ids, attention_mask, labels (B, L), padded on the right, and the images of all."""
        names = [name for name in items[0] if name not in ABOUT_THE_ANSWER]
        return self._batch([{name: item[name] for name in names} for item in items], left=False)

    def loss(self, output, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy of the tokens of the answers, as the model computed it."""
        return output.loss

    def logits(self, output, batch: dict[str, Tensor]) -> tuple[Tensor, None]:
        """(R, V), those that a token of an answer is predicted from."""
        asked = F.pad(batch["labels"][:, 1:] != IGNORED, (0, 1), value=False)
        return output.logits[asked.to(output.logits.device)], None

    def evaluate(
        self,
        model: nn.Module,
        data: Dataset,
        *,
        batch_size: int | None = None,
        progress: Callable[[Iterable], Iterable] = iter,
    ) -> dict[str, float]:
        """{"accuracy": share of the last answers that greedy decoding gives, "loss": the mean of the loss over the
        items}, with the model in eval mode.

        progress wraps the batches, for a bar.
        """
        right, losses = 0, []
        with evaluating(model):
            for items in progress(DataLoader(data, batch_size=batch_size or self.batch_size, collate_fn=list)):
                losses += self._losses(model, items)
                said = self._answers(model, items)
                right += sum(_plain(a) == _plain(item["answer"]) for a, item in zip(said, items, strict=True))
        return {"accuracy": right / max(1, len(losses)), "loss": sum(losses) / max(1, len(losses))}

    def predictions(self, model: nn.Module, items: list[dict]) -> list[tuple[str, str]]:
        """For each item the answer of a model in eval mode, and the given one."""
        said = self._answers(model, items)
        return [(answer, item["answer"]) for answer, item in zip(said, items, strict=True)]

    def say(self, model: nn.Module, item: dict, longest: int) -> str:
        """The answer to one item of a model in eval mode, of so many tokens at most."""
        return self._answers(model, [item], longest)[0]

    def prompt(self, item: dict) -> dict[str, Tensor]:
        """The keyword arguments of a forward of one item, up to its last answer."""
        return self.prompts([item])

    def _losses(self, model: Any, items: Sequence[dict]) -> list[float]:
        """Of each item by itself: the model's own is a mean over the tokens of all."""
        batches = (self.collate([item]) for item in items)
        return [model(**_moved(batch, model)).loss.item() for batch in batches]

    @torch.no_grad()
    def _answers(self, model: Any, items: Sequence[dict], longest: int | None = None) -> list[str]:
        """What greedy decoding says, no longer than so many tokens, or the longest answer that was given."""
        longest = longest or max(len(item["input_ids"]) - item["answer_begin"] for item in items)
        batch = self.prompts(items)
        config = model.generation_config
        ends = self.tokenizer.eos_token_id if config.eos_token_id is None else config.eos_token_id
        greedy = {"max_new_tokens": longest, "do_sample": False, "num_beams": 1}
        out = model.generate(**_moved(batch, model), **greedy, eos_token_id=ends, pad_token_id=self.padding)
        said = out[:, batch["input_ids"].shape[1] :].tolist()
        stops = {ends} if isinstance(ends, int) else set(ends or ())
        cut = [row[: next((i for i, token in enumerate(row) if token in stops), len(row))] for row in said]
        return self.tokenizer.batch_decode(cut, skip_special_tokens=True)

    def prompts(self, items: Sequence[dict]) -> dict[str, Tensor]:
        """All up to the last answers, padded on the left."""
        names = [name for name in items[0] if name not in (*ABOUT_THE_ANSWER, "labels")]
        cut = [
            {name: _until(item[name], item["answer_begin"], len(item["input_ids"])) for name in names} for item in items
        ]
        return self._batch(cut, left=True)

    def _batch(self, items: Sequence[dict[str, Tensor]], *, left: bool) -> dict[str, Tensor]:
        lengths = [len(item["input_ids"]) for item in items]
        found: dict[str, Tensor] = {}
        for name in ("input_ids", *(name for name in items[0] if name != "input_ids")):
            values = [item[name] for item in items]
            if all(value.shape == (length,) for value, length in zip(values, lengths, strict=True)):
                fill = self.padding if name == "input_ids" else FILLS.get(name, 0)
                found[name] = torch.nn.utils.rnn.pad_sequence(
                    values, batch_first=True, padding_value=fill, padding_side="left" if left else "right"
                )
            else:
                found[name] = _stacked(values)
        return found


def _stacked(values: Sequence[Tensor]) -> Tensor:
    """One behind the other; zeros where an image is smaller than another, or has fewer tiles, as processors have it."""
    sizes = [max(size) for size in zip(*(value.shape[1:] for value in values), strict=True)]
    padded = []
    for value in values:
        amounts: list[int] = []
        for size, most in zip(reversed(value.shape[1:]), reversed(sizes), strict=True):
            amounts += [0, most - size]
        padded.append(F.pad(value, amounts) if any(amounts) else value)
    return torch.cat(padded)


def _until(value: Any, begin: int, length: int) -> Any:
    """What stands before an answer, of what has a value for each token."""
    return value[:begin] if isinstance(value, Tensor) and value.shape == (length,) else value


def _moved(batch: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    return {name: value.to(model.device) for name, value in batch.items()}


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _padding(tokenizer: Any) -> int:
    """The token of padding, or else that of the end, as `generate` has it."""
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if found is None:
        raise DataError("tokenizer must have a token of padding, or of the end, got neither")
    return found
