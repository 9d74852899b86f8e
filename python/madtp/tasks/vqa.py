"""Visual question answering: questions that share images, and rank classification over a list of answers."""

import inspect
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from madtp.accounting import evaluating
from madtp.models import DECODER_MASKS
from madtp.models.tower import mixed_in

from . import DataError
from .easy_vqa import ANSWERS, answer_token, collate

DENSE_EASY_VQA = Path(__file__).parents[1] / "assets" / "easy-vqa-blip"


def load_dense(directory: Path | str = DENSE_EASY_VQA):
    """Load a BlipForQuestionAnswering directory, by default the shipped easy-vqa model.

    Returns the model in eval mode and its tokenizer.
    Raises DataError when a file is missing or cut short, or the directory holds another kind of model.
    """
    from transformers import AutoTokenizer, BlipForQuestionAnswering

    directory = Path(directory)
    remedy = f"run `python examples/train_easy_vqa.py --output {directory}`"
    missing = [n for n in ("config.json", "model.safetensors", "tokenizer.json") if not (directory / n).is_file()]
    if missing:
        raise DataError(f"model directory {directory} lacks {', '.join(missing)}: {remedy}")
    try:
        kind = (json.loads((directory / "config.json").read_text()).get("architectures") or ["nothing known"])[0]
        if kind != "BlipForQuestionAnswering":
            raise DataError(f"model directory {directory} must hold a BlipForQuestionAnswering, got {kind}: {remedy}")
        model, info = BlipForQuestionAnswering.from_pretrained(directory, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except DataError:
        raise
    except Exception as error:  # every reader (json, safetensors, transformers, tokenizers) has its own kind
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"model directory {directory} cannot be read ({reason[0]}): {remedy}") from error
    unmatched = sorted({*info["missing_keys"], *info["unexpected_keys"]})
    if unmatched:
        raise DataError(
            f"model directory {directory}: weights must match config.json, {len(unmatched)} do not "
            f"(first: {unmatched[0]}): {remedy}"
        )
    return model.eval(), tokenizer


def dense_forward(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a plain BlipForQuestionAnswering on a batch in which questions share images.

    batch: pixel_values (I, 3, H, W), input_ids and attention_mask (Q, L), labels (Q, D) = [bos, answer, eos],
    image_index (Q,) int64, the image of each question (absent: question q asks about image q).
    Returns the decoder's logits (Q, D, V) and the scalar loss: what `model(...)` computes on repeated images when no
    question is padded, at the vision encoder's cost of the unique ones.
    """
    images = model.vision_model(pixel_values=batch["pixel_values"]).last_hidden_state  # (I, N, C)
    if batch.get("image_index") is not None:
        images = images.index_select(0, batch["image_index"])  # (Q, N, C)
    question = model.text_encoder(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        encoder_hidden_states=images,
    ).last_hidden_state  # (Q, L, C)
    with mixed_in(model, DECODER_MASKS):
        answer = model.text_decoder(
            input_ids=batch["labels"],
            encoder_hidden_states=question,
            encoder_attention_mask=batch["attention_mask"],
            labels=batch["labels"],
        )
    return answer.logits, answer.loss


def forward(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits (Q, D, V), loss) of a plain model, or of one whose own forward takes `image_index` and returns logits."""
    if "image_index" in inspect.signature(model.forward).parameters:
        output = model(**batch)
        return output.logits, output.loss
    return dense_forward(model, batch)


class VqaTask:
    """Rank classification: the answer is the candidate whose token the decoder scores highest after its start token.

    answers: the candidates; each must be one token of `tokenizer` (ValueError otherwise), so that a single decoder step
    ranks them exactly. Longer candidates would need the likelihood of their whole sequence, as BLIP ranks them
    (Li et al. 2022, appendix on VQA).
    """

    metric = "accuracy"
    collate = staticmethod(collate)

    def __init__(self, tokenizer, answers: Iterable[str] = ANSWERS):
        self.tokenizer = tokenizer
        self.answers = list(answers)
        self.answer_ids = torch.tensor([answer_token(tokenizer, answer) for answer in self.answers])  # (A,)

    def save_processor(self, directory: Path | str) -> None:
        """Write the tokenizer beside a saved model."""
        self.tokenizer.save_pretrained(directory)

    def loss(self, output, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The decoder's, as the model computed it."""
        return output.loss

    def logits(self, output, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The decoder's logits (Q, D, V), and (Q, D) the positions whose next label counts."""
        following = batch["labels"][:, 1:]
        counts = (following != self.tokenizer.pad_token_id) & (following >= 0)
        return output.logits, nn.functional.pad(counts, (0, 1), value=False)

    def answer_scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Decoder logits at the start token (Q, V) -> logits of the candidates (Q, A), in the order of `answers`."""
        return logits.index_select(-1, self.answer_ids.to(logits.device))

    @torch.no_grad()
    def predict(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Index into `answers` of the best candidate of every question of a batch: (Q,) int64."""
        logits, _ = forward(model, batch)
        return self.answer_scores(logits[:, 0]).argmax(-1)

    def evaluate(
        self, model: nn.Module, data: Dataset, *, batch_size: int = 256, progress: Callable[[Iterable], Iterable] = iter
    ) -> dict[str, float]:
        """{"accuracy": fraction of the questions of `data` answered right}, with the model in eval mode.

        batch_size counts questions; the images they share are encoded once. progress wraps the batches, for a bar.
        """
        device = next(model.parameters()).device
        answer_ids = self.answer_ids.to(device)
        correct = 0
        with evaluating(model):
            for batch in progress(DataLoader(data, batch_size=batch_size, collate_fn=collate)):
                batch = {name: value.to(device) for name, value in batch.items()}
                best = answer_ids[self.predict(model, batch)]
                correct += int((best == batch["labels"][:, 1]).sum())
        return {"accuracy": correct / max(1, len(data))}
