# SPDX-License-Identifier: Apache-2.0
"""Prunes the tokens of a model without training, and says what that saves and costs: what the four scripts share."""

import argparse
from collections.abc import Callable

from torch import nn
from torch.utils.data import Dataset

import madtp
from madtp.tasks.task import Task


def parser(description: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--keep-rate", type=float, default=0.7, help="share of the tokens to keep, over all layers")
    made.add_argument("--samples", type=int, default=64, help="of the test set")
    return made


def compare(model: nn.Module, task: Task, data: Dataset, keep_rate: float, show: Callable[[nn.Module], None]) -> None:
    """Patches the model, finds its temperatures on a few samples, and measures it dense and pruned.

    show: prints what the model says of a sample.
    """
    batch = task.collate([data[i] for i in range(min(16, len(data)))])
    # Small models: alignment of the default size would cost more than it saves.
    config = madtp.CompressionConfig(alignment_dim=getattr(model.config, "vision_config", model.config).hidden_size)
    handle = madtp.patch(model.eval(), config, keep_rate=keep_rate, calibration=[batch])
    temperatures = handle.temperatures
    for name, chosen in (("dense", 0), ("pruned", temperatures)):
        handle.set_temperature(chosen)
        metrics = ", ".join(f"{metric} {value:.3f}" for metric, value in task.evaluate(model, data).items())
        total = madtp.profile(model, batch).total
        print(f"{name}: {metrics}; {total.counted_macs / 1e6:.1f} MMACs a sample")
        show(model)
    for branch, tokens in handle.tokens_per_layer.items():
        print(f"{branch} tokens after each layer: {', '.join(f'{count:.1f}' for count in tokens)}")
