# SPDX-License-Identifier: Apache-2.0
"""Files: read in bounded time and memory whatever they are, and written whole or not at all."""

from madtp.files.directories import atomic_directory
from madtp.files.saving import CHUNK, atomic_write, file_sha256, require_writable, require_writable_file

__all__ = ["CHUNK", "atomic_directory", "atomic_write", "file_sha256", "require_writable", "require_writable_file"]
