# SPDX-License-Identifier: Apache-2.0
"""Data sets, tokenizers and weights: drawn, fetched as packages, or read from annotation files of the user.

How a batch is made of their items, and what a model is judged by, is in `tasks`.
"""
