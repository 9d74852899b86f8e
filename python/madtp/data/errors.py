# SPDX-License-Identifier: Apache-2.0
"""What goes wrong with data."""


class DataError(RuntimeError):
    """A data set or model directory is missing, cut short or of another kind; the message says what to run."""
