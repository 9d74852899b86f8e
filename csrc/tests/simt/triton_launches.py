# SPDX-License-Identifier: Apache-2.0
"""Compares the launches of the C++ library with those of the Triton launchers in Python, over many shapes.

    python csrc/tests/simt/triton_launches.py PROGRAM

PROGRAM is triton_launches.cpp, on the machine that records launches. Kernels, grids, warps, what is fixed at compile
time, and every argument must be the same; buffers must be as large, inside of the workspace, and apart. What C++ does
in another way stands in `expected`. Exit code 77 where torch or triton is missing.
"""

import json
import os
import random
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
os.environ.pop("TRITON_INTERPRET", None)
try:
    import torch
    from triton.runtime.jit import JITFunction

    from madtp_kernels.triton import embed
    from madtp_kernels.triton.attention import forward
    from madtp_kernels.triton.attention_rows import forward as attention_rows
    from madtp_kernels.triton.tokens import scores
except ImportError as error:
    print(f"skipped: {error}")
    sys.exit(77)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # as madtp::DType numbers them
HEAD_SIZES = (64, 72, 128)  # that PROGRAM is built for
VARIANTS = {variant.name: variant for variant in embed.variants(HEAD_SIZES)}
STREAM = 4096


def python_launches(*calls) -> list[tuple[str, tuple[int, ...], dict[str, Any]]]:
    """(kernel, grid, arguments and options by name) of each call; its tensors stay."""
    runs = []

    def run(kernel, *values, grid, warmup, **named):
        runs.append((kernel.__name__, grid, dict(zip(kernel.arg_names, values, strict=False)) | named))

    with mock.patch.object(JITFunction, "run", run):
        for launch, *arguments in calls:
            launch(*arguments)
    return runs


def line(op: str, **values: Any) -> str:
    """A call for the program; a tensor is its address, None is null."""

    def number(value):
        return value.data_ptr() if isinstance(value, torch.Tensor) else 0 if value is None else value

    return " ".join([op, *(f"{name}={number(value)!r}" for name, value in values.items())])


def outputs(*names: str) -> dict[str, int]:
    """Addresses far apart."""
    return {name: (i + 1) << 44 for i, name in enumerate(names)}


def expected(name: str, arguments: dict[str, Any]) -> Any:
    """What C++ gives for an argument of Python: where this is None or fixed there, it has an argument."""
    masked = arguments.get("CAUSAL") or arguments.get("left") is not None or arguments.get("right") is not None
    if name == "left" and masked:
        longest = arguments.get("max_seqlen_k", arguments.get("max_seqlen"))
        return longest if arguments["left"] is None else arguments["left"]
    if name == "right" and masked:
        longest = arguments.get("max_seqlen_q", arguments.get("max_seqlen"))
        return 0 if arguments["CAUSAL"] else longest if arguments["right"] is None else arguments["right"]
    return False if name == "CAUSAL" else arguments[name]


class Buffers:
    """Which address in C++ is which tensor."""

    def __init__(self, workspace: int):
        self.size, self.tensors, self.addresses = workspace, {}, {}

    def add(self, tensor: torch.Tensor, address: tuple[str, int], given: bool) -> None:
        if given:
            assert address == ("given", tensor.data_ptr()), address
        assert self.tensors.setdefault(tensor.data_ptr(), address) == address
        assert self.addresses.setdefault(address, tensor).data_ptr() == tensor.data_ptr()

    def check(self) -> None:
        pieces = [(at, at + t.nbytes) for (kind, at), t in self.addresses.items() if kind == "workspace"]
        pieces.sort()
        assert all(end <= start for (_, end), (start, _) in zip(pieces[:-1], pieces[1:], strict=True)), pieces
        assert not pieces or pieces[-1][1] <= self.size, (pieces, self.size)


def compare(python: list, cpp: list[dict], inputs: list[torch.Tensor], arch: int) -> None:
    end = cpp[-1]
    assert end["status"] == "ok", end
    assert [run[0] for run in python] == [launch["kernel"] for launch in cpp[:-1]]
    buffers, given = Buffers(end["workspace"]), {tensor.data_ptr() for tensor in inputs}
    for (kernel, grid, arguments), launch in zip(python, cpp[:-1], strict=True):
        variant = VARIANTS[launch["name"]]
        assert launch["arch"] == arch and launch["grid"] == [*grid, 1][:2], (kernel, grid, launch)
        assert launch["threads"] == 32 * arguments["num_warps"]
        names = variant.kernel.arg_names
        options = {name: value for name, value in arguments.items() if name not in names}
        fixed = {name: value for name, value in variant.options.items() if name != "maxnreg" or name in options}
        assert options == fixed, (options, variant.options)
        values = dict(zip(variant.arguments, launch["parameters"], strict=False))
        assert launch["parameters"][len(values) :] == [["given", 0]] * 2
        for name in names:
            value = expected(name, arguments)
            if name in variant.constants:
                assert variant.constants[name] == value, (kernel, name, value)
                if value is not None and name != "CAUSAL":
                    assert launch["constants"][name] == value, (kernel, name, value, launch)
            elif isinstance(value, torch.Tensor):
                buffers.add(value, tuple(values[name]), value.data_ptr() in given)
            elif value is None:  # something to point to instead
                assert values[name][0] == "workspace", (kernel, name)
            elif isinstance(value, float):
                assert values[name] == torch.tensor(value).item() or abs(values[name] / value - 1) < 1e-7
            else:
                assert values[name] == value, (kernel, name, value, values[name])
    buffers.check()


def attention_case(pick: random.Random, dtype: int, head_dim: int):
    batch, key_heads, group = pick.randint(1, 5), pick.randint(1, 4), pick.choice([1, 1, 2, 4])
    statistics, heads = pick.random() < 0.6, key_heads * group
    longest_q = pick.choice([1, 31, 64, 129, 577])
    longest_k = longest_q if statistics else pick.choice([1, 50, 700])
    tokens_q, tokens_k = longest_q * batch, longest_k * batch
    if group == 1 and tokens_q == tokens_k:
        qkv = torch.empty(tokens_q, 3, heads, head_dim, dtype=DTYPES[dtype])
        q, k, v = qkv.unbind(1)
    else:
        q = torch.empty(tokens_q, heads, head_dim, dtype=DTYPES[dtype])
        k, v = (torch.empty(tokens_k, key_heads, head_dim, dtype=DTYPES[dtype]) for _ in range(2))
    cu_q, cu_k = torch.empty(batch + 1, dtype=torch.int32), torch.empty(batch + 1, dtype=torch.int32)
    cu_k = cu_q if statistics else cu_k
    index = torch.empty(batch, dtype=torch.int32) if pick.random() < 0.5 else None
    causal, left, right = pick.choice([(False, -1, -1)] * 3 + [(True, -1, -1), (False, 7, 300), (True, 10**9, -1)])
    scale = pick.choice([0.125, 0.0, 2.0])
    call = (forward.varlen_attention, q, k, v, cu_q, cu_k, longest_q, longest_k, scale)
    call += (causal, left, right, 0.0, None, index, statistics)
    strides = {
        f"{n}_{a}": t.stride(i) for n, t in (("q", q), ("k", k), ("v", v)) for i, a in enumerate(("row", "head"))
    }
    to = outputs("out", "lse", "summary_attention", "received_attention")
    if not statistics:
        to |= {"summary_attention": 0, "received_attention": 0}
    text = {"dtype": dtype, "q": q, "k": k, "v": v, **strides, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    text |= {"tokens_q": tokens_q, "tokens_k": tokens_k, "batch": batch, "heads": heads, "key_heads": key_heads}
    text |= {"head_dim": head_dim, "softmax_scale": scale, "causal": int(causal), "window_left": left}
    text |= {"window_right": right, "summary_index": index, "max_seqlen_q": longest_q, "max_seqlen_k": longest_k}
    inputs = [t for t in (q, k, v, cu_q, cu_k, index) if t is not None]
    return [call], ("attention", text | to), inputs


def rows_case(pick: random.Random, dtype: int, head_dim: int):
    batch, key_heads, group = pick.randint(1, 5), pick.randint(1, 3), pick.choice([1, 4, 16])
    count, tokens = pick.choice([1, 17, 40]), pick.choice([1, 63, 65, 900])
    q = torch.empty(count, key_heads * group, head_dim, dtype=DTYPES[dtype])
    k = torch.empty(tokens, 2, key_heads, head_dim, dtype=DTYPES[dtype])[:, 1]
    cu_q, cu_k = (torch.empty(batch + 1, dtype=torch.int32) for _ in range(2))
    position = torch.empty(count, dtype=torch.int32) if pick.random() < 0.5 else None
    scale = pick.choice([0.125, -1.0])
    call = (attention_rows.attention_rows, q, k, cu_q, cu_k, position, scale)
    text = {"dtype": dtype, "q": q, "k": k, "q_row": q.stride(0), "q_head": q.stride(1), "k_row": k.stride(0)}
    text |= {"k_head": k.stride(1), "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "rows": count, "tokens": tokens}
    text |= {"batch": batch, "heads": key_heads * group, "key_heads": key_heads, "head_dim": head_dim}
    text |= {"softmax_scale": scale, "row_position": position} | outputs("attention")
    return [call], ("attention_rows", text), [t for t in (q, k, cu_q, cu_k, position) if t is not None]


def scores_case(pick: random.Random, dtype: int, alignment_tokens: int):
    batch, length = pick.choice([(1, 577), (4, 577), (32, 8), (130, 300), (2, 5000)])
    tokens, temperature = batch * length, pick.choice([0.0, 1e-3, 1.0, 1e300])
    logits = torch.empty(tokens, alignment_tokens + pick.choice([0, 3]), dtype=DTYPES[dtype])[:, :alignment_tokens]
    summary, received, importance = (torch.empty(tokens) for _ in range(3))
    cu = torch.empty(batch + 1, dtype=torch.int32)
    index = torch.empty(batch, dtype=torch.int32) if pick.random() < 0.5 else None
    protected = torch.empty(tokens, dtype=torch.bool) if pick.random() < 0.5 else None
    op = pick.choice(["token_importance", "select_tokens", "score_and_select"])
    to = outputs("keep", "cu_seqlens_out", "source", "merge_weight", "importance")
    inputs = [summary, received, logits, cu, index, protected]
    if op == "token_importance":
        calls = [(scores.token_importance, summary, received, logits, cu, index, protected)]
    elif op == "select_tokens":
        calls = [(scores.select_tokens, importance, logits, cu, temperature, index, protected)]
        to["importance"] = importance
        inputs.append(importance)
    elif scores._parts(logits, batch) > 1:
        calls = [(scores.score_and_select, summary, received, logits, cu, temperature, index, protected)]
    else:  # one kernel in Python, which has the bits of these two
        kept = torch.empty(tokens)
        with mock.patch.object(scores, "empty_float32", side_effect=[kept, torch.empty(tokens)]):
            first = python_launches((scores.token_importance, summary, received, logits, cu, index, protected))
        second = python_launches((scores.select_tokens, kept, logits, cu, temperature, index, protected))
        calls = first + second
    text = {"dtype": dtype, "mag_logits": logits, "logits_stride": logits.stride(0), "batch": batch, "tokens": tokens}
    text |= {"alignment_tokens": alignment_tokens, "cu_seqlens": cu, "summary_index": index, "protected": protected}
    text |= {"summary_attention": summary, "received_attention": received, "temperature": temperature} | to
    return calls, (op, text), [t for t in inputs if t is not None]


def main() -> int:
    pick, cases = random.Random(0), []
    for dtype, arch in product(range(3), (80, 86, 90)):
        for _ in range(6):
            cases.append((arch, *attention_case(pick, dtype, pick.choice(HEAD_SIZES))))
            cases.append((arch, *rows_case(pick, dtype, pick.choice([64, 72, 128, 256]))))
            cases.append((arch, *scores_case(pick, dtype, pick.choice([1, 7, 16, 17, 32, 50, 64, 100, 400]))))
    text = "\n".join(line(op, capability=arch, stream=STREAM, **values) for arch, _, (op, values), _ in cases)
    done = subprocess.run([sys.argv[1]], input=text + "\n", capture_output=True, text=True, check=True)
    printed = [json.loads(answer) for answer in done.stdout.splitlines()]
    kernels = set()
    for arch, calls, (op, values), inputs in cases:
        length = next(i for i, answer in enumerate(printed) if "status" in answer) + 1
        answers, printed = printed[:length], printed[length:]
        python = calls if isinstance(calls[0][0], str) else python_launches(*calls)
        try:
            compare(python, answers, inputs, 80 if arch < 90 else arch)
        except AssertionError:
            print(f"{op}: { ({n: v for n, v in values.items() if not isinstance(v, torch.Tensor)}) }")
            raise
        kernels |= {launch["kernel"] for launch in answers[:-1]}
    assert not printed and kernels == {variant.kernel.__name__ for variant in VARIANTS.values()}, kernels
    print(f"{len(cases)} calls, {len(kernels)} kernels: the launches are the same")
    return 0


if __name__ == "__main__":
    sys.exit(main())
