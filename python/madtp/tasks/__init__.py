# SPDX-License-Identifier: Apache-2.0
"""What a model is compressed for: batches, losses and metrics of each task, and the table of all tasks in `registry`.

The data are in `data`, the training is in `training`.
"""
