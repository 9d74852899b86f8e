# SPDX-License-Identifier: Apache-2.0
"""The version of the project: the one place that states it."""

__version__ = "0.2.0"
