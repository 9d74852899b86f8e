# SPDX-License-Identifier: Apache-2.0
"""Joint training: the trainer, its losses, the controller of the temperatures and the guard of their moves.

What to aim at is chosen before (`madtp.budgets`), and what is measured of the result stands in `madtp.profiling`.
"""
