# SPDX-License-Identifier: Apache-2.0
"""What every op means, in plain PyTorch: the oracle of every test and the `reference` backend, in float64 too.

It is never fast, and nothing but `ops`, where backends are registered, `decompositions` and the tests imports it.
"""
