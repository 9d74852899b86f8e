# SPDX-License-Identifier: Apache-2.0
"""A question about an image, answered by LLaVA-1.5 with all image tokens and with some.

python examples/llava.py --image photo.jpg --question "What is in the image?" --keep 64
"""

import sys

from transformers import LlavaForConditionalGeneration
from vlm_answers import answer, parser

if __name__ == "__main__":
    try:
        answer(LlavaForConditionalGeneration, parser(__doc__, "llava-hf/llava-1.5-7b-hf").parse_args())
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
