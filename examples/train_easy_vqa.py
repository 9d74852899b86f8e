# SPDX-License-Identifier: Apache-2.0
"""Train the small dense BLIP of the demo on easy-vqa: the checkpoint in python/madtp/assets/easy-vqa-blip.

    python examples/train_easy_vqa.py --out runs/easy-vqa-blip

Ctrl-C is safe: the last whole checkpoint stays in OUT/checkpoints and `--resume` goes on from it.
"""

import argparse
import sys
import time
from pathlib import Path

from transformers import (
    BlipForQuestionAnswering,
    BlipImageProcessor,
    Trainer,
    TrainingArguments,
    set_seed,
)

from madtp.data.easy_vqa import IMAGE_SIZE, EasyVqa, ImagesWithQuestions, build_tokenizer, collate
from madtp.data.errors import DataError
from madtp.tasks.small_models import small_blip
from madtp.tasks.vqa import VqaTask, dense_forward

VISION_LAYERS = 6


class DenseTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits, loss = dense_forward(model, inputs)
        return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss

    def _run_epoch(self, *arguments, **kwargs):
        """Makes no step where a training is resumed that was finished: Hugging Face makes one before it looks."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*arguments, **kwargs)


def last_whole_checkpoint(folder: Path) -> Path | None:
    """Newest checkpoint whose writing was finished: trainer_state.json is the last file the Trainer writes."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/easy-vqa-blip"))
    parser.add_argument("--epochs", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUT")
    options = parser.parse_args()

    set_seed(options.seed)
    tokenizer = build_tokenizer()
    train, test = EasyVqa("train", tokenizer), EasyVqa("test", tokenizer)
    model = BlipForQuestionAnswering(small_blip(tokenizer, IMAGE_SIZE, VISION_LAYERS))
    trainer = DenseTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(options.out / "checkpoints"),
            num_train_epochs=options.epochs,
            max_steps=options.max_steps,
            per_device_train_batch_size=32,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            weight_decay=0.05,
            max_grad_norm=1.0,
            dataloader_pin_memory=False,
            save_total_limit=2,
            save_strategy="epoch",
            logging_steps=125,
            seed=options.seed,
            remove_unused_columns=False,
            report_to=[],
        ),
        train_dataset=ImagesWithQuestions(train),
        data_collator=collate,
    )
    checkpoints = options.out / "checkpoints"
    resume = last_whole_checkpoint(checkpoints) if options.resume else None
    start = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    except KeyboardInterrupt:
        last = last_whole_checkpoint(checkpoints)
        sys.exit(f"stopped; --resume goes on from {last}" if last else "stopped before the first checkpoint")
    minutes = (time.perf_counter() - start) / 60

    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    BlipImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(options.out)
    accuracy = VqaTask(tokenizer).evaluate(model, test)["accuracy"]
    parameters = sum(p.numel() for p in model.parameters())
    print(f"test accuracy {accuracy:.4f} on {len(test)} questions, {parameters} parameters, {minutes:.1f} min")


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"error: {error}")
