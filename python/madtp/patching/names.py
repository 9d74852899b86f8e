# SPDX-License-Identifier: Apache-2.0
"""What the files of a saved model are called, and the method that config.json says it was made by."""

from __future__ import annotations

import re

CONFIG_FILE, STATE_FILE = "config.json", "madtp.json"
ANY_VARIANT = r"(\.[\w.-]+)?"
QUANT_METHOD = "madtp"  # of `quantization_config` in config.json, by which transformers finds who loads it

# The field of config.json for the name of the weights, by which transformers refuses what it cannot read without madtp.
WEIGHTS_FIELD = "transformers_weights"


def weight_files(variant: str) -> re.Pattern[str]:
    """Names of the files of weights, and of their index. `variant`: a pattern, of what stands for it in the names."""
    return re.compile(rf"model{variant}(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index{variant}\.json")
