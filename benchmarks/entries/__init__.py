# SPDX-License-Identifier: Apache-2.0
"""What is measured: a file per op or family of ops, with its `ENTRIES`."""
