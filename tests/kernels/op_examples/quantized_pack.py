# SPDX-License-Identifier: Apache-2.0
import madtp_kernels as mk
from op_examples.common import weight24


def arguments(sizes):
    weight = mk.quantize(weight24(sizes))
    return {"values": weight.values, "indices": weight.indices}
