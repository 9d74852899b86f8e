# SPDX-License-Identifier: Apache-2.0
"""Peers side by side in one run: python -m benchmarks.run."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported: its profiler talks while it weighs calls
