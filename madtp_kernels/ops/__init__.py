# SPDX-License-Identifier: Apache-2.0
"""The ops as users and torch see them: public functions, argument checks, schemas, fake and autograd.

No kernel lives here: the backends are in `reference`, `native`, `triton` and `sparse24`, and `dispatch` chooses.
"""
