# SPDX-License-Identifier: Apache-2.0
from op_examples.common import weight24


def arguments(sizes):
    weight = weight24(sizes)
    return {"values": weight.values, "indices": weight.indices}
