# SPDX-License-Identifier: Apache-2.0
"""The tiny LLaVA, its processor and the conversations of examples/compress_vlm.py, for tests."""

import importlib.util
import json
from pathlib import Path

from madtp.data.conversations import Conversations

_SPEC = importlib.util.spec_from_file_location(
    "compress_vlm", Path(__file__).parents[2] / "examples" / "compress_vlm.py"
)
example = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(example)

CONTEXT = 128
CHAT = (
    "<s>{% for message in messages %}{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}</s> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)


def conversations(folder, count=8, processor=None, records=None, **options):
    """Of drawn pictures; `records` takes the place of what the file holds: (records) -> others."""
    file = example.write_conversations(folder, "train", count)
    if records is not None:
        file.write_text(json.dumps(records(json.loads(file.read_text()))))
    processor = example.make_processor() if processor is None else processor
    return Conversations(file, folder / "images", processor, **{"max_length": CONTEXT, **options})
