# SPDX-License-Identifier: Apache-2.0
"""Dense models of the emoji tasks, before and after training."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import BlipConfig, BlipForConditionalGeneration, Trainer, TrainingArguments
from transformers.modeling_outputs import BaseModelOutput

from madtp.data import pretrained
from madtp.inference import evaluating
from madtp.models import BlipForNLVR
from madtp.tasks.batches import sample_count
from madtp.tasks.retrieval import RetrievalTask
from madtp.tasks.task import Task

WIDTH, HEADS, PATCH, VISION_LAYERS, TEXT_LAYERS = 128, 4, 8, 4, 2
# The 0.02 of BERT is for a width of 768; at 128 it starves the signal: on easy-vqa, shapes are still at chance after 15
# epochs.
INIT_STD = 0.06


def small_blip(tokenizer, image_size: int = 64, vision_layers: int = VISION_LAYERS) -> BlipConfig:
    """Of about 1 M parameters: 4 vision and 2 text layers, 128 wide, patches of 8 pixels."""
    shape = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "initializer_range": INIT_STD}
    text = shape | {
        "num_hidden_layers": TEXT_LAYERS,
        "intermediate_size": 2 * WIDTH,
        "encoder_hidden_size": WIDTH,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "layer_norm_eps": 1e-5,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "label_smoothing": 0.0,
    }
    vision = shape | {
        "num_hidden_layers": vision_layers,
        "intermediate_size": 3 * WIDTH,
        "image_size": image_size,
        "patch_size": PATCH,
    }
    return BlipConfig(
        text_config=text,
        vision_config=vision,
        projection_dim=WIDTH,
        image_text_hidden_size=WIDTH,
        initializer_range=INIT_STD,
    )


def nlvr_model(tokenizer, image_size: int = 64, vision=None) -> BlipForNLVR:
    """A small BlipForNLVR; `vision`, a model of the same size, lends it the weights of its vision encoder."""
    model = BlipForNLVR(small_blip(tokenizer, image_size))
    if vision is not None:
        model.vision_model.load_state_dict(vision.vision_model.state_dict())
    return model


def captioning_model(tokenizer, image_size: int = 64) -> BlipForConditionalGeneration:
    """A small BlipForConditionalGeneration."""
    return BlipForConditionalGeneration(small_blip(tokenizer, image_size))


def train(
    model: nn.Module,
    task: Task,
    data: Dataset,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    output_dir: str | Path,
    seed: int = 0,
) -> None:
    """Trains a plain model with the loss of its task; AdamW, cosine schedule."""
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.05,
        max_grad_norm=1.0,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_steps=100,
        seed=seed,
        remove_unused_columns=False,
        report_to=[],
    )
    _TaskTrainer(task, model=model, args=arguments, train_dataset=data).train()
    model.eval()


def train_after_vision(model: BlipForNLVR, task: Task, data: Dataset, **options) -> None:
    """`train`, but for the vision encoder: every image of `data` is encoded once, so that many epochs cost little.

    Args:
        data: items whose pixel_values are (2, 3, H, W); the features of all are held in memory.
        options: of `train`.
    """
    vision, features = model.vision_model, []
    with evaluating(model):
        for items in DataLoader(data, batch_size=64, collate_fn=list):
            images = torch.cat([item["pixel_values"] for item in items])  # (2B, 3, H, W)
            features.append(vision(images).last_hidden_state)
    try:
        model.vision_model = _Known(torch.cat(features))  # type: ignore[assignment]  # called as it is
        train(model, task, _Numbered(data), **options)
    finally:
        model.vision_model = vision


class _Known(nn.Module):
    """In the place of a vision encoder: an "image" is the number of its features."""

    features: Tensor

    def __init__(self, features: Tensor):
        super().__init__()
        self.register_buffer("features", features, persistent=False)

    def forward(self, pixel_values: Tensor, **_) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.features[pixel_values.flatten()])


class _Numbered(Dataset):
    """Items with the numbers of their images in the place of the images."""

    def __init__(self, data: Dataset):
        self.items = [
            {name: value for name, value in data[i].items() if name != "pixel_values"}
            for i in range(sample_count(data))
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict:
        return self.items[index] | {"pixel_values": torch.tensor([2 * index, 2 * index + 1]).view(2, 1, 1, 1)}


class _TaskTrainer(Trainer):
    """`transformers.Trainer` with the loss of a task."""

    def __init__(self, task: Task, **kwargs):
        super().__init__(data_collator=task.collate, **kwargs)
        self.task, self.model_accepts_loss_kwargs = task, False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        output = model(**inputs)
        loss = self.task.loss(output, inputs)
        return (loss, output) if return_outputs else loss


def retrieval_model(data: Dataset, *, ridge: float = 1.0, batch_size: int = 64, progress=iter):
    """The dual encoder of `madtp.data.pretrained`, with projections fitted in closed form.

    Text features are whitened, and a ridge regression takes the image features there; the towers stay as they are.

    Args:
        data: items of `EmojiRetrieval`, from which the projections are fitted.
        ridge: the penalty, in units of the mean square of the features.
        progress: wraps the batches, for a bar.
    """
    model, tokenizer = pretrained.dual_encoder()
    task, images, texts = RetrievalTask(tokenizer), [], []
    with evaluating(model):
        for items in progress(DataLoader(data, batch_size=batch_size, collate_fn=list)):
            batch = task.collate(items)
            images.append(model.vision_model(batch.pop("pixel_values")).pooler_output)
            texts.append(model.text_model(**batch).pooler_output)
    towards_images, towards_texts = fit_projections(torch.cat(images), torch.cat(texts), ridge)
    with torch.no_grad():
        model.visual_projection.weight.copy_(towards_images)
        model.text_projection.weight.copy_(towards_texts)
    return model


def fit_projections(images: Tensor, texts: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Weights of two bias-free Linears, (T, I) and (T, T), for features of pairs, images (N, I) and texts (N, T)."""
    images, texts = images.double(), texts.double()

    def moments(features: Tensor) -> Tensor:
        square = features.T @ features / len(features)
        return square + ridge * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype)

    values, vectors = torch.linalg.eigh(moments(texts))
    whiten = vectors @ torch.diag(values.rsqrt()) @ vectors.T  # (T, T), symmetric
    regression = torch.linalg.solve(moments(images), images.T @ (texts @ whiten) / len(images))  # (I, T)
    return regression.T.float(), whiten.float()
