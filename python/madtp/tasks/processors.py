# SPDX-License-Identifier: Apache-2.0
"""What tasks keep to make inputs with."""

from __future__ import annotations

from pathlib import Path


class Processed:
    """Part of a task: the tokenizer and the image processor that its model needs; either may be None."""

    def __init__(self, tokenizer, image_processor=None):
        self.tokenizer, self.image_processor = tokenizer, image_processor

    def save_processor(self, directory: Path | str) -> None:
        """Writes what there is of both beside a saved model."""
        for processor in (self.tokenizer, self.image_processor):
            if processor is not None:
                processor.save_pretrained(directory)
