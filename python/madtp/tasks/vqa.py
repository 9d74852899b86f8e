# SPDX-License-Identifier: Apache-2.0
"""Visual question answering: questions that share images, and rank classification over a list of answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import cast

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import BlipForQuestionAnswering

from madtp.data.easy_vqa import ANSWERS, collate
from madtp.data.errors import DataError
from madtp.handles import find_handle
from madtp.inference import evaluating
from madtp.models import blip
from madtp.models.mixing import mixed_in
from madtp.models.registry import DECODER_MASKS
from madtp.tasks.batches import sample_count
from madtp.tasks.loading import architecture, load_tokenizer, read_dense
from madtp.tasks.processors import Processed

DENSE_EASY_VQA = Path(__file__).parents[1] / "assets" / "easy-vqa-blip"


REMEDY = "train one into a folder of its own: python examples/train_easy_vqa.py --out NEW_FOLDER"


def load_dense(directory: Path | str = DENSE_EASY_VQA):
    """Load a BlipForQuestionAnswering directory, by default the shipped easy-vqa model.

    Returns the model in eval mode and its tokenizer.
    Raises DataError when a file is missing or cut short, or the directory holds another kind of model.
    """
    directory = Path(directory)
    missing = [n for n in ("config.json", "model.safetensors", "tokenizer.json") if not (directory / n).is_file()]
    if missing:
        raise DataError(f"model directory {directory} lacks {', '.join(missing)}: {REMEDY}")
    try:
        found = architecture(directory)
        if found != BlipForQuestionAnswering.__name__:
            raise DataError(f"model directory {directory} must hold a BlipForQuestionAnswering, got {found}")
        model, info = read_dense(directory, BlipForQuestionAnswering)
        tokenizer = load_tokenizer(directory)
        unmatched = sorted({*info["missing_keys"], *info["unexpected_keys"]})
        if unmatched:
            raise DataError(
                f"model directory {directory}: weights must match config.json, {len(unmatched)} do not "
                f"(first: {unmatched[0]})"
            )
    except DataError as error:
        raise DataError(f"{error}: {REMEDY}") from error
    return model, tokenizer


def dense_forward(model: BlipForQuestionAnswering, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a plain BlipForQuestionAnswering on a batch in which questions share images.

    batch: pixel_values (I, 3, H, W), input_ids and attention_mask (Q, L), labels (Q, D) = [bos, answer, eos],
    image_index (Q,) int64, the image of each question (absent: question q asks about image q).
    Returns the decoder's logits (Q, D, V) and the scalar loss: what `model(...)` computes on repeated images when no
    question is padded, at the vision encoder's cost of the unique ones.
    """
    question, mask = encode_questions(model, batch)
    with mixed_in(model, DECODER_MASKS):
        answer = model.text_decoder(
            input_ids=batch["labels"],
            encoder_hidden_states=question,
            encoder_attention_mask=mask,
            labels=batch["labels"],
        )
    return answer.logits, answer.loss


def encode_questions(
    model: BlipForQuestionAnswering, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the answer decoder reads of every question, (Q, L, C), and the mask (Q, L) of what of it is real."""
    ids, mask, index = batch["input_ids"], batch["attention_mask"], batch.get("image_index")
    if isinstance(model, blip.BlipForQuestionAnswering):  # patched
        return model.encode_questions(ids, batch["pixel_values"], mask, image_index=index)
    images = model.vision_model(pixel_values=batch["pixel_values"]).last_hidden_state  # (I, N, C)
    if index is not None:
        images = images.index_select(0, index)  # (Q, N, C)
    question = model.text_encoder(input_ids=ids, attention_mask=mask, encoder_hidden_states=images)
    return question.last_hidden_state, mask


class VqaTask(Processed):
    """Rank classification: the answer is the candidate that the decoder finds likeliest (Li et al. 2022, BLIP).

    Where every candidate is one token, its first step ranks them. Else that step chooses the `shortlist` candidates
    with the likeliest first tokens, and the likelihood of their whole sequence, end included, ranks those.

    Args:
        tokenizer: of the model.
        answers: the candidates.
        shortlist: of longer candidates, for each question.
        image_processor: saved beside a model with the tokenizer; may be None.

    Raises:
        ValueError: an answer is empty or unknown to the tokenizer, or there are none.
    """

    metric = "accuracy"
    collate = staticmethod(collate)

    def __init__(self, tokenizer, answers: Iterable[str] = ANSWERS, *, shortlist: int = 128, image_processor=None):
        super().__init__(tokenizer, image_processor)
        self.answers = list(answers)
        if not self.answers or shortlist < 1:
            given = f"{len(self.answers)} answers and shortlist {shortlist}"
            raise ValueError(f"answers and shortlist must be at least one, got {given}")
        tokens = [tuple(tokenizer.encode(answer, add_special_tokens=False)) for answer in self.answers]
        for answer, of_answer in zip(self.answers, tokens, strict=True):
            if not of_answer or tokenizer.unk_token_id in of_answer:
                raise ValueError(f"answers must be known to the tokenizer, got {answer!r} -> {list(of_answer)}")
        self.shortlist = min(shortlist, len(tokens))
        self.number_of: dict[tuple[int, ...], int] = {}  # tokens -> the first answer that has them
        for number, of_answer in enumerate(tokens):
            self.number_of.setdefault(of_answer, number)
        self.first_ids = torch.tensor([of_answer[0] for of_answer in tokens])  # (A,)
        longest = max(map(len, tokens))
        self.sequences = None  # (A, D): the tokens and the end of each, where one has several
        if longest > 1:
            rows = [[*of_answer, tokenizer.sep_token_id] for of_answer in tokens]
            self.sequences = torch.tensor([row + [-100] * (longest + 1 - len(row)) for row in rows])

    def loss(self, output, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The decoder's, as the model computed it."""
        return output.loss

    def logits(self, output, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The decoder's logits (Q, D, V), and (Q, D) the positions whose next label counts."""
        following = batch["labels"][:, 1:]
        counts = (following != self.tokenizer.pad_token_id) & (following >= 0)
        return output.logits, nn.functional.pad(counts, (0, 1), value=False)

    @torch.no_grad()
    def predict(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Index into `answers` of the best candidate of every question of a batch: (Q,) int64."""
        question, mask = encode_questions(cast(BlipForQuestionAnswering, model), batch)
        with mixed_in(model, DECODER_MASKS if find_handle(model) is None else {}):
            start = batch["labels"][:, :1]
            first = self._decode(model, start, question, mask)[:, 0].index_select(-1, self.first_ids.to(start.device))
            if self.sequences is None:
                return first.argmax(-1)
            best = first.topk(self.shortlist, dim=-1).indices  # (Q, S)
            sequences = self.sequences.to(start.device)
            ranked = [
                self._likelihoods(model, sequences[numbers], *of_question).argmax()
                for numbers, *of_question in zip(best, start, question, mask, strict=True)
            ]
        return best.gather(1, torch.stack(ranked)[:, None])[:, 0]

    def evaluate(
        self, model: nn.Module, data: Dataset, *, batch_size: int = 256, progress: Callable[[Iterable], Iterable] = iter
    ) -> dict[str, float]:
        """{"accuracy": fraction of the questions of `data` answered right}, with the model in eval mode.

        Right is the answer in labels; one that is no candidate is never met. batch_size counts questions; the images
        they share are encoded once. progress wraps the batches, for a bar.
        """
        device = next(model.parameters()).device
        correct = 0
        with evaluating(model):
            for batch in progress(DataLoader(data, batch_size=batch_size, collate_fn=collate)):
                wanted = torch.tensor([self._number(row) for row in batch["labels"].tolist()])
                found = self.predict(model, {name: value.to(device) for name, value in batch.items()})
                correct += int((found.cpu() == wanted).sum())
        return {"accuracy": correct / max(1, sample_count(data))}

    def predictions(self, model: nn.Module, items: list[dict]) -> list[tuple[str, str]]:
        """For each item the answer of a model in eval mode, and the right one."""
        batch, device = self.collate(items), next(model.parameters()).device
        given = self.predict(model, {name: value.to(device) for name, value in batch.items()}).tolist()
        labels = [[token for token in row if token >= 0] for row in batch["labels"].tolist()]
        wanted = self.tokenizer.batch_decode(labels, skip_special_tokens=True)
        return [(self.answers[number], right) for number, right in zip(given, wanted, strict=True)]

    def _decode(self, model, ids, question, mask) -> torch.Tensor:
        """Logits (Q, D, V)."""
        return model.text_decoder(
            input_ids=ids, encoder_hidden_states=question, encoder_attention_mask=mask
        ).logits.float()

    def _likelihoods(self, model, sequences, start, question, mask) -> torch.Tensor:
        """log p of the candidates `sequences` (S, D) of one question, (S,)."""
        count = len(sequences)
        given = torch.cat([start.expand(count, 1), sequences[:, :-1].clamp(min=0)], dim=1)
        logits = self._decode(model, given, question.expand(count, *question.shape), mask.expand(count, -1))
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), sequences, reduction="none")  # 0 at -100
        return -losses.sum(-1)

    def _number(self, labels: list[int]) -> int:
        """Of the answer in a row of labels, [start, answer, end, padding]; -1: none of `answers`."""
        ends = {self.tokenizer.sep_token_id, self.tokenizer.pad_token_id, -100}
        end = next((i for i, token in enumerate(labels[1:], 1) if token in ends), len(labels))
        return self.number_of.get(tuple(labels[1:end]), -1)
