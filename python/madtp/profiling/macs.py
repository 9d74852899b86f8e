# SPDX-License-Identifier: Apache-2.0
"""Multiply-adds, bit operations, parameters and bytes of a model, measured on a forward pass.

MACs are what published tables count: linear layers, attention matmuls and convolutions, one multiply-add = 1, whatever
its numbers are. Bit operations weigh each by the bits of both its operands.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode

from madtp.dtp.branch import exact_capacity
from madtp.handles import find_handle, handle_of
from madtp.hwp import PackedLinear, is_pattern, matches
from madtp.hwp.adapters import MERGED
from madtp.inference import evaluating, leading_size
from madtp.models.registry import family_of
from madtp.models.vlm_branches import branches_of

OTHER = "other"


@dataclass(frozen=True)
class Account:
    """What one part of a model holds, and what one sample costs in it.

    `dense_macs`: all tokens, all weights. `counted_macs`: tokens as kept, a linear whose weight is 2:4 at half.
    `executed_macs`: tokens as kept, half only where a sparse kernel ran. `bit_operations`: each counted multiply-add
    times the bits of both operands, 8 x 8 in an int8 or fp8 layer. `weight_bytes`: of parameters and packed weights, as
    the model holds them.
    """

    params: int
    nonzero_params: int
    dense_macs: float
    counted_macs: float
    executed_macs: float
    bit_operations: float
    weight_bytes: int


@dataclass(frozen=True)
class Profile:
    """Accounts of a model. Branches, "other" among them, add up to the total; a module's includes its children's."""

    total: Account
    branches: dict[str, Account]
    modules: dict[str, Account]


def profile(
    model: nn.Module,
    inputs: Mapping[str, Any] | Sequence[Any] | Tensor,
    *,
    samples: int | None = None,
    branches: Mapping[str, Sequence[str]] | None = None,
    planned_sparse: Collection[str] = (),
) -> Profile:
    """Count a forward pass of the model in eval mode, without gradients; the training mode comes back.

    Runs once as the model is, and, if it is patched, once more as the dense model. Works on the meta device, where
    weights have no values: all count as non-zero there.

    Args:
        inputs: keyword arguments (a mapping), positional arguments (a sequence), or one tensor.
        samples: what to divide by; None is the leading size of the first tensor in inputs.
        branches: names of the modules of each branch, shell-style patterns allowed; a matmul belongs to the branch of
            the innermost running module that matches, anything else to "other". None takes what is known of the model's
            class (`madtp.models.FAMILIES`), of a decoder that reads images "vision", "projector" and "decoder", of any
            other model nothing; `madtp_handle.branches` if it is patched.
        planned_sparse: names of Linear modules to count as 2:4 whatever their weights hold yet.

    Returns:
        a Profile, per sample. Shared parameters belong to the first module that holds them. A Linear whose weight is
        used without calling the module counts as dense in the module that uses it.
    """
    if samples is None:
        samples = leading_size(inputs)
    if branches is None:
        source = find_handle(model) or family_of(model)
        branches = source.branches if source else branches_of(model)
    bits: Counter[tuple[str, ...]] = Counter()
    kept = _forward_macs(model, inputs, bits)
    dense = kept
    if find_handle(model) is not None:
        with dense_mode(model):
            dense = _forward_macs(model, inputs)

    amounts_of: defaultdict[tuple, Counter] = defaultdict(Counter)  # scope -> column -> amount

    def add(stack: tuple[str, ...], **amounts: float) -> None:
        for scope in _scopes(stack, branches):
            amounts_of[scope].update(amounts)

    for owner, count, nonzero, size in _parameters(model):
        add((owner,), params=count, nonzero_params=nonzero, weight_bytes=size)
    for stack, macs in dense.items():
        add(stack, dense_macs=macs / samples)
    modules = dict(model.named_modules())
    sparse = _sparse_shares(model, kept, planned_sparse)
    for stack, macs in kept.items():
        counted, executed = sparse[stack[-1]]
        add(stack, counted_macs=macs * counted / samples, executed_macs=macs * executed / samples)
        add(stack, bit_operations=bits[stack] * counted / samples)

    def account(*scope: str) -> Account:
        columns = amounts_of[scope]
        return Account(**{name: columns[name] for name in Account.__dataclass_fields__})

    return Profile(
        total=account("total"),
        branches={branch: account("branch", branch) for branch in (*branches, OTHER)},
        modules={name: account("module", name) for name in modules if name and ".parametrizations" not in name},
    )


def profile_batches(model: nn.Module, batches: Sequence[Mapping[str, Any]], **options) -> Profile:
    """`profile` of all the samples of several batches, which run one at a time."""
    return mean_profile([profile(model, batch, **options) for batch in batches], [leading_size(b) for b in batches])


def mean_profile(profiles: Sequence[Profile], samples: Sequence[int]) -> Profile:
    """The profile of all samples, from one of each batch and the number of samples in it."""

    def mean(accounts: Sequence[Account]) -> Account:
        columns = {
            column: sum(getattr(account, column) * size for account, size in zip(accounts, samples, strict=True))
            / sum(samples)
            for column in ("dense_macs", "counted_macs", "executed_macs", "bit_operations")
        }
        return replace(accounts[0], **columns)

    return Profile(
        total=mean([p.total for p in profiles]),
        branches={name: mean([p.branches[name] for p in profiles]) for name in profiles[0].branches},
        modules={name: mean([p.modules[name] for p in profiles]) for name in profiles[0].modules},
    )


def counted_macs(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], *, planned_sparse: Collection[str] = ()
) -> dict[str, float]:
    """The counted MACs per sample of each part of a patched model that spends its own, as `profile` has them, from one
    forward pass."""
    branches, samples = handle_of(model).spending, sum(leading_size(batch) for batch in batches)
    kept = sum((_forward_macs(model, batch) for batch in batches), Counter())
    sparse = _sparse_shares(model, kept, planned_sparse)
    macs = dict.fromkeys((*branches, OTHER), 0.0)
    for stack, amount in kept.items():
        macs[branch_of(stack, branches)] += amount * sparse[stack[-1]][0] / samples
    return macs


def dense_mode(model: nn.Module):
    """A context in which a patched model is the dense one (temperature 0, no alignment); any other stays as it is."""
    handle = find_handle(model)
    return nullcontext() if handle is None else handle.dense()


@contextmanager
def count_macs(model: nn.Module, bits: Counter | None = None) -> Iterator[Counter]:
    """Yields a Counter of the MACs run in the context, by the names of the modules running, outermost first.

    A patched model runs at exact capacity meanwhile: what counts are tokens.

    Args:
        bits: of bit operations, to which those of the context are added, by the same names.
    """
    macs: Counter[tuple[str, ...]] = Counter()
    stack: list[str] = []
    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
        hooks.append(module.register_forward_hook(lambda *_: _leave(stack), always_call=True))
    fused = torch.backends.mha.get_fastpath_enabled()  # one op for a whole encoder layer, and no formula for it
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with exact_capacity(model), _MacCounter(macs, stack, bits):
            yield macs
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for hook in hooks:
            hook.remove()


def disk_bytes(path: str | PathLike) -> int:
    """Bytes of a file, or of all files under a directory."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"path must exist, got {path}")
    return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else (path,)) if file.is_file())


class _MacCounter(TorchDispatchMode):
    """Applies the FLOP formulas of torch, those of `register_flop_formula` included, to every op that runs."""

    # torch counts the attention kernels of GPUs only; a 2:4 product counts as the dense one here, and halves later.
    extra = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flop_counter.sdpa_flop,
        torch.ops.madtp.sparse24_linear: lambda x, values, *_, **__: 4 * x.shape[0] * values.numel(),
        torch.ops.madtp.quantized_linear: lambda x, values, *_, **__: 2 * x.numel() * values.shape[0],
    }

    def __init__(self, macs: Counter, stack: list[str], bits: Counter | None = None):
        super().__init__()
        self.macs, self.stack, self.bits = macs, stack, bits
        self.formulas = flop_counter.flop_registry | self.extra

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        formula = self.formulas.get(func.overloadpacket)
        if formula is None:
            with self:  # under inference mode a composite op arrives whole: its parts are what counts
                out = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if out is NotImplemented else out
        out = func(*args, **kwargs)
        macs = formula(*args, **kwargs, out_val=out) // 2
        self.macs[tuple(self.stack)] += macs
        if self.bits is not None:
            self.bits[tuple(self.stack)] += macs * _operand_bits(func.overloadpacket, (*args, *kwargs.values())) ** 2
        return out


def _operand_bits(op: Any, args: Sequence[Any]) -> int:
    """Of each of the two numbers in a multiply-add: ops multiply what is of one dtype."""
    if op is torch.ops.madtp.quantized_linear:
        return 8
    return 8 * next(arg.element_size() for arg in args if isinstance(arg, Tensor))


def _leave(stack: list[str]) -> None:
    """As a hook: what it returns, were it not None, would be the output of the module."""
    stack.pop()


def _forward_macs(model: nn.Module, inputs, bits: Counter | None = None) -> Counter:
    with evaluating(model), count_macs(model, bits) as macs:
        if isinstance(inputs, Mapping):
            model(**inputs)
        else:
            model(*((inputs,) if isinstance(inputs, Tensor) else inputs))
    return macs


def branch_of(stack: Sequence[str], branches: Mapping[str, Sequence[str]]) -> str:
    """The branch of the innermost running module that belongs to one."""
    return next((b for name in reversed(stack) for b, patterns in branches.items() if matches(name, patterns)), OTHER)


def _scopes(stack: tuple[str, ...], branches: Mapping[str, Sequence[str]]) -> set[tuple[str, ...]]:
    """Everything an amount in the innermost module of the stack counts for."""
    branch = branch_of(stack, branches)
    names = {".".join(parts[:i]) for parts in (name.split(".") for name in stack) for i in range(1, len(parts) + 1)}
    return {("total",), ("branch", branch), *(("module", name) for name in names)}


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters, and how many are not zero; a packed weight counts as the dense one it stands for."""
    counts = [(count, nonzero) for _, count, nonzero, _ in _parameters(model)]
    return sum(count for count, _ in counts), sum(nonzero for _, nonzero in counts)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and packed weights as the model holds them; what a backend packs them into is not counted."""
    return sum(size for *_, size in _parameters(model))


def _parameters(model: nn.Module) -> Iterator[tuple[str, int, int, int]]:
    """Every parameter once, as the forward pass sees it: the module that owns it, its size, how much is not zero, and
    its bytes."""
    seen = set()
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            weight = module.packed_weight
            yield name, weight.shape.numel(), int((module.weight != 0).sum()), weight.nbytes
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                masked = isinstance(module, ParametrizationList) and module.is_tensor
                used = (module() if masked else parameter).detach()
                nonzero = used.numel() if used.is_meta else int(used.count_nonzero())
                yield name.partition(".parametrizations.")[0], used.numel(), nonzero, used.nbytes


def _sparse_shares(model: nn.Module, macs: Counter, planned_sparse: Collection[str]) -> dict[str, tuple[float, float]]:
    """(counted, executed) share of the MACs of each module that ran some, each weight looked at once."""
    modules = dict(model.named_modules())
    names = {stack[-1] for stack in macs}
    return {name: _sparsity(modules[name], name in planned_sparse) for name in names}


def _sparsity(module: nn.Module, planned: bool) -> tuple[float, float]:
    """(counted, executed) share of the MACs run directly in the module."""
    if hasattr(module, MERGED):
        return 0.0, 0.0
    if isinstance(module, PackedLinear):
        return 0.5 if module.sparse else 1.0, 0.5 if module.executes_sparse else 1.0
    if not isinstance(module, nn.Linear):
        return 1.0, 1.0
    return (0.5 if planned or has_sparse24_weight(module) else 1.0), 1.0


def has_sparse24_weight(module: nn.Linear) -> bool:
    """Whether its weight is 2:4, packed or not; one without values is none."""
    weight = module.weight.detach()
    return not weight.is_meta and is_pattern(weight[:1], "2:4") and is_pattern(weight, "2:4")  # most are told by a row
