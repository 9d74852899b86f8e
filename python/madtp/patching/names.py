# SPDX-License-Identifier: Apache-2.0
"""What the files of a saved model are called, and the method that config.json says it was made by."""

CONFIG_FILE, STATE_FILE = "config.json", "madtp.json"
QUANT_METHOD = "madtp"  # of `quantization_config` in config.json, by which transformers finds who loads it

# The field of config.json for the name of the weights, by which transformers refuses what it cannot read without madtp.
WEIGHTS_FIELD = "transformers_weights"
