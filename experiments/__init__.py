# SPDX-License-Identifier: Apache-2.0
"""Accuracy against compute on four tasks, beside what it is to be compared with: `python -m experiments.run --help`."""
