# SPDX-License-Identifier: Apache-2.0
"""What was measured, for people: tables, Markdown, one HTML page, pictures of the tokens that are kept.

Nothing is measured here but what a picture shows; the figures come from `measure` and `compression`.
"""
