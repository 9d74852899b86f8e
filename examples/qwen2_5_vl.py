# SPDX-License-Identifier: Apache-2.0
"""A question about an image, answered by Qwen2.5-VL with all image tokens and with some.

python examples/qwen2_5_vl.py --image photo.jpg --question "What is in the image?" --keep 0.25
"""

import sys

from transformers import Qwen2_5_VLForConditionalGeneration
from vlm_answers import answer, parser

if __name__ == "__main__":
    try:
        answer(Qwen2_5_VLForConditionalGeneration, parser(__doc__, "Qwen/Qwen2.5-VL-3B-Instruct").parse_args())
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
