# SPDX-License-Identifier: Apache-2.0
"""The dense weight that a packed layer shows: it is made anew at every read, so what is written to it would be lost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_GET_DATA: Any = vars(torch._C.TensorBase)["data"].__get__
_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
_WRITING = ("__set__", "__setitem__", *(f"__i{operator}__" for operator in _OPERATORS))


class DenseWeight(Tensor):
    """A tensor that refuses to be written to, and so do its views and its `data`; `detach` and copies are plain."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = func.__name__
        in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        if (in_place or name in _WRITING) and args and isinstance(args[0], cls):
            raise RuntimeError(
                "weight of a packed 2:4 layer must not be written to, it is made anew at every read: unpack the model "
                "first (madtp.hwp.unpack), and do not merge LoRA into it"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        view = isinstance(result, Tensor) and result._is_view() and func is not Tensor.detach
        return result.as_subclass(cls) if view or func == _GET_DATA else result

    def __deepcopy__(self, memo):
        return self.detach().clone()

    def __reduce_ex__(self, protocol):
        return self.detach().__reduce_ex__(protocol)
