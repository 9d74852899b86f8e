# SPDX-License-Identifier: Apache-2.0
"""What each branch and each Linear may spend, chosen before training: sensitivities, costs, and the `Plan` of both.

Nothing here trains: `madtp.compression` carries a plan out, `madtp.training` steers towards it.
"""
