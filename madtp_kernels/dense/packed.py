# SPDX-License-Identifier: Apache-2.0
"""Dense weights as oneDNN reads them: packed once, beside the weight and not on it.

So a module is copied, pickled, saved and moved as if there was none. What was packed goes with the memory of its
weight: when that is freed, as it is when a module moves or is cast. It is packed again after the weight was written to,
and dropped by a call that records the gradient of the weight: training carries nothing that an evaluation has packed.
What is packed of one piece of memory, of which weights may be parts, takes as much again and no more.
torch counts no write through `.data`, so some of the values are compared too at every use: one that changes a whole
weight is seen, one that changes a few of its values may not be, and `forget()` is for that.
"""

from __future__ import annotations

import math
import threading
import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from madtp_kernels.dense import onednn

_SAMPLES = 64

_Key = tuple[int, torch.Size, torch.dtype]  # address, shape


class _Entry(NamedTuple):
    storage: weakref.ref[torch.UntypedStorage]
    version: int
    size: tuple[int]  # of the sample, and its stride in the weight
    stride: tuple[int]
    sample: Tensor
    packed: Tensor

    def holds(self, weight: Tensor) -> bool:
        """Whether the weight is that which was packed, with what it held then."""
        if self.version != weight._version or self.storage() is not weight.untyped_storage():
            return False
        values = weight.as_strided(self.size, self.stride)
        return torch.equal(values, self.sample) or _equal_with_nan(values, self.sample)


_entries: dict[_Key, _Entry] = {}
_packing = threading.Lock()


def can_keep(weight: Tensor) -> bool:
    """Whether what is packed of a weight on a CPU can be kept: torch counts the writes to it, and rows lie in order."""
    strided = weight.layout is torch.strided and weight.is_contiguous()
    return strided and not weight.is_inference() and weight.numel() > 0


def packed(weight: Tensor) -> Tensor:
    """The weight (N, C) as `onednn.linear` takes it. It `can_keep`."""
    key = weight.data_ptr(), weight.shape, weight.dtype
    entry = _entries.get(key)
    if entry is not None and entry.holds(weight):
        return entry.packed
    with _packing:  # by one thread, for all
        entry = _entries.get(key)
        if entry is None or not entry.holds(weight):
            _entries.pop(key, None)
            _make_room(weight)
            entry = _entries[key] = _pack(weight, key)
        return entry.packed


def drop(weight: Tensor) -> None:
    """Drops what was packed of a weight on a CPU that is about to change."""
    if _entries and weight.layout is torch.strided:  # another has no address
        _entries.pop((weight.data_ptr(), weight.shape, weight.dtype), None)


def forget() -> None:
    """Drops all that was packed. What is used again is packed again."""
    _entries.clear()


def _equal_with_nan(values: Tensor, sample: Tensor) -> bool:
    return bool(((values == sample) | (values.isnan() & sample.isnan())).all())


def _make_room(weight: Tensor) -> None:
    """Drops the oldest of what was packed of this memory, so that all of it together takes no more than the memory.

    Of parts that overlap, such as windows, there is no end.
    """
    storage = weight.untyped_storage()
    entries = _entries.copy().items()  # in which nothing is dropped meanwhile
    taken = {key: key[1].numel() * key[2].itemsize for key, entry in entries if entry.storage() is storage}
    room = storage.nbytes() - sum(taken.values())
    for key, nbytes in taken.items():
        if room >= weight.nbytes:
            break
        _entries.pop(key, None)
        room += nbytes


def _pack(weight: Tensor, key: _Key) -> _Entry:
    def drop(dead: weakref.ref[torch.UntypedStorage]) -> None:  # at any time and in any thread: it must not wait
        entry = _entries.get(key)
        if entry is not None and entry.storage is dead:
            _entries.pop(key, None)

    version, count = weight._version, min(_SAMPLES, weight.numel())
    stride = max(1, (weight.numel() - 1) // max(1, count - 1))  # from the first row to the last
    while math.gcd(stride, weight.shape[1]) > 1:  # in another column each time
        stride -= 1
    with torch.inference_mode(False), torch.no_grad():
        sample = weight.detach().as_strided((count,), (stride,)).clone()
    storage = weakref.ref(weight.untyped_storage(), drop)
    return _Entry(storage, version, (count,), (stride,), sample, onednn.pack(weight))
