# SPDX-License-Identifier: Apache-2.0
"""What a model costs and how well it answers: MACs, parameters, times, the figures of reports, inputs of its Linears.

Nothing here changes a model; choices made from what is measured are in `madtp.budgets`, tables in `madtp.reporting`.
"""
