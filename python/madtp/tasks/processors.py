# SPDX-License-Identifier: Apache-2.0
"""What tasks keep to make inputs with."""

from __future__ import annotations

from pathlib import Path


class Processed:
    """Part of a task: the tokenizer and the image processor that its model needs; the latter may be None."""

    def __init__(self, tokenizer, image_processor=None):
        self.tokenizer, self.image_processor = tokenizer, image_processor

    def save_processor(self, directory: Path | str) -> None:
        """Writes both beside a saved model."""
        self.tokenizer.save_pretrained(directory)
        if self.image_processor is not None:
            self.image_processor.save_pretrained(directory)
