# SPDX-License-Identifier: Apache-2.0
"""Vectors of many images, in shards that are whole or not there: what `madtp.embed` does."""

from madtp.embedding.run import Embedded, embed

__all__ = ["Embedded", "embed"]
