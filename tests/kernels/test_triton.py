# SPDX-License-Identifier: Apache-2.0
"""Triton kernels against the reference: in the interpreter without a GPU, on the GPU where there is one."""

import importlib
import json
import math
import os
import pkgutil
import subprocess
import sys

import pytest
import torch
from ragged_cases import LENGTHS, SUMMARIES, cu_seqlens_of, scores
from triton_cases import BFLOAT16, DEVICE, DTYPES, MARKS, ON_GPU, wild_integers, with_slow, within_twice

import madtp_kernels as mk
import madtp_kernels.triton
from madtp_kernels.selection import PADDING

pytest.importorskip("triton")

MODULES = [  # with kernels in them
    name
    for _, name, is_package in pkgutil.walk_packages(madtp_kernels.triton.__path__, "madtp_kernels.triton.")
    if not is_package and name not in ("madtp_kernels.triton.aot", "madtp_kernels.triton.embed")
]

pytestmark = MARKS


def batch(lengths, **options):
    """stats, mag_logits and cu_seqlens on the device."""
    *stats, logits = (t.to(DEVICE) for t in scores(lengths, **options))
    return mk.AttentionStats(*stats), logits, cu_seqlens_of(lengths).to(DEVICE)


def selection_of(lengths, temperature=1.0, capacity="exact", seed=0, backend="reference"):
    stats, logits, cu = batch(lengths, seed=seed)
    importance = mk.token_importance(stats, logits, cu, backend=backend)
    return mk.select_tokens(importance, logits, cu, temperature, capacity=capacity, backend=backend)


# --- scores


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("summary_token", SUMMARIES)
@pytest.mark.parametrize("temperature", with_slow([0.0, 1.0], [1e-3, 1e6]))
def test_selects_like_the_float64_reference(lengths, summary_token, temperature):
    index = SUMMARIES[summary_token](lengths)
    index = None if index is None else index.to(DEVICE)
    stats, logits, cu = batch(lengths)
    wide, wide_logits, _ = batch(lengths, dtype=torch.float64)
    expected_importance = mk.token_importance(wide, wide_logits, cu, summary_index=index)
    expected = mk.select_tokens(expected_importance, wide_logits, cu, temperature, summary_index=index)

    importance = mk.token_importance(stats, logits, cu, summary_index=index, backend="triton")
    torch.testing.assert_close(importance.double(), expected_importance, rtol=1e-6, atol=1e-7)
    num_rows, options = expected.source.numel(), {"summary_index": index, "capacity": "upper_bound"}
    got = mk.select_tokens(importance, logits, cu, temperature, backend="triton", **options)
    assert torch.equal(got.keep.view(torch.uint8), expected.keep.view(torch.uint8))
    assert torch.equal(got.source[:num_rows], expected.source)
    assert got.source.numel() == sum(lengths) and (got.source[num_rows:] == PADDING).all()
    assert torch.equal(got.cu_seqlens_out, expected.cu_seqlens_out)
    torch.testing.assert_close(got.merge_weight.double(), expected.merge_weight, rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alignment_tokens", with_slow([1, 131], [7, 100]))
def test_scores_within_twice_the_reference_error(dtype, alignment_tokens):
    lengths = [301, 0, 1, 40, 2]
    stats, logits, cu = batch(lengths, alignment_tokens=alignment_tokens, logits_dtype=dtype)
    wide = mk.AttentionStats(*(t.double() for t in stats))
    exact = mk.token_importance(wide, logits.double(), cu)
    bound, got = (mk.token_importance(stats, logits, cu, backend=name) for name in ("reference", "triton"))
    within_twice([got], [exact], [bound])
    for temperature in (0.5, 3.0):
        exact_selection = mk.select_tokens(exact, logits.double(), cu, temperature)
        bound, got = (
            mk.select_tokens(exact.float(), logits, cu, temperature, backend=b) for b in ("reference", "triton")
        )
        assert torch.equal(got.keep, exact_selection.keep) and not got.keep.all()
        assert torch.equal(got.source, exact_selection.source)
        within_twice([got.merge_weight], [exact_selection.merge_weight], [bound.merge_weight])


def test_many_sequences():
    lengths = [2 + i % 3 for i in range(1100)] if ON_GPU else [3] * 90
    stats, logits, cu = batch(lengths)
    importance = mk.token_importance(stats, logits, cu, summary_index=cu[1:] * 0 - 1)
    expected = mk.select_tokens(importance, logits, cu, 2.0, summary_index=cu[1:] * 0 - 1, backend="reference")
    got = mk.select_tokens(importance, logits, cu, 2.0, summary_index=cu[1:] * 0 - 1, backend="triton")
    assert torch.equal(got.source, expected.source) and (got.source < 0).any()


def test_corner_sequences():
    cu = cu_seqlens_of([6, 5, 4]).to(DEVICE)
    logits = torch.randn(15, 3, device=DEVICE)

    def select(importance, temperature=1.0, logits=logits):
        return mk.select_tokens(importance, logits, cu, temperature, backend="triton")

    equal = select(torch.full((15,), 0.25, device=DEVICE))
    assert equal.source.tolist() == [0, -1, 6, -2, 11, -3]  # the summary token and one merged token
    assert equal.merge_weight[1:6].tolist() == pytest.approx([0.2] * 5)
    zero = select(torch.zeros(15, device=DEVICE))
    assert zero.merge_weight[1:6].tolist() == pytest.approx([0.2] * 5)  # nothing to weigh by: a plain mean
    negative = select(-torch.rand(15, device=DEVICE))
    pruned = ~negative.keep[:6]
    assert pruned.any()
    assert negative.merge_weight[:6][pruned].tolist() == pytest.approx([1 / int(pruned.sum())] * int(pruned.sum()))

    clean = torch.rand(15, device=DEVICE)
    for broken in (math.nan, math.inf, -math.inf):
        poisoned = clean.clone()
        poisoned[8] = broken
        selection = select(poisoned)
        assert selection.keep[6:11].all()  # the broken sequence keeps everything
        for rows in (slice(0, 6), slice(11, 15)):
            assert torch.equal(selection.keep[rows], select(clean).keep[rows])
        summary = clean.clone()
        summary[6] = broken  # the summary token takes no part
        assert torch.equal(select(summary).keep, select(clean).keep)

    for broken in (math.nan, math.inf):
        wrong = logits.clone()
        wrong[12, 1] = broken
        assert select(clean, logits=wrong).keep[11:].all()
    wrong = logits.clone()
    wrong[11:, 1] = -math.inf  # no softmax over the sequence
    assert select(clean, logits=wrong).keep[11:].all()


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-3, 1e38, 1e300])
def test_extreme_temperatures_and_logits(temperature):
    cu = cu_seqlens_of([300, 20]).to(DEVICE)
    generator = torch.Generator().manual_seed(1)
    importance = torch.rand(320, generator=generator).to(DEVICE)
    logits = (torch.randn(320, 5, generator=generator) * 1e4).to(DEVICE)
    logits[7:290, 2] = -math.inf  # a whole block of one alignment token
    got = mk.select_tokens(importance, logits, cu, temperature, backend="triton")
    assert got.merge_weight.isfinite().all()
    expected = mk.select_tokens(importance.double(), logits.double(), cu, max(temperature, 1e-290))
    assert torch.equal(got.keep, expected.keep)
    assert got.keep.all() == (temperature < 1e-9)  # there the threshold is at the least importance


def test_equal_importances_share_their_fate_across_blocks():
    lengths = [700, 3]
    cu = cu_seqlens_of(lengths).to(DEVICE)
    logits = torch.randn(703, 9, device=DEVICE)
    stats = mk.AttentionStats(torch.full((703,), 0.1, device=DEVICE), torch.full((703,), 0.3, device=DEVICE))
    importance = mk.token_importance(stats, logits * 0 + 1, cu, backend="triton")
    assert importance[1:700].unique().numel() == 1
    selection = mk.select_tokens(importance, logits, cu, 1.0, backend="triton")
    assert selection.source.tolist() == [0, -1, 700, -2]


def test_importance_of_broken_statistics():
    stats, logits, cu = batch([5, 6, 4])
    expected = mk.token_importance(stats, logits, cu, backend="triton")
    stats.received_attention[5] = math.nan  # of a summary token: it takes no part
    logits[5] = math.inf
    assert torch.equal(mk.token_importance(stats, logits, cu, backend="triton"), expected)
    logits[7, 2] = math.nan
    got = mk.token_importance(stats, logits, cu, backend="triton")
    assert got[6:11].isnan().all() and got[5] == 0
    assert torch.equal(got[:5], expected[:5]) and torch.equal(got[11:], expected[11:])
    nothing = mk.AttentionStats(torch.zeros(15, device=DEVICE), torch.zeros(15, device=DEVICE))
    assert not mk.token_importance(nothing, -torch.ones_like(logits), cu, backend="triton").any()


SHARED = [(32 * 577, 100, 32, 4), (577, 100, 1, 4), (577, 1000, 1, 8), (64 * 1024, 33, 64, 2)]
ALONE = [(32 * 64, 100, 32, 1), (197, 100, 1, 1), (200 * 577, 100, 200, 1), (32 * 4096, 32, 32, 1), (0, 100, 3, 1)]


@pytest.mark.parametrize("tokens,alignment_tokens,batch,parts", SHARED + ALONE)
def test_long_sequences_are_shared_out_where_there_are_few(tokens, alignment_tokens, batch, parts):
    scores_module = importlib.import_module("madtp_kernels.triton.tokens.scores")
    for dtype in (torch.float32, torch.bfloat16):
        assert scores_module._parts(torch.empty(tokens, alignment_tokens, dtype=dtype, device="meta"), batch) == parts


@pytest.mark.parametrize("dtype", [*with_slow([torch.float32], [torch.float16]), BFLOAT16])
@pytest.mark.parametrize("parts", with_slow([2], [1, 3, 8]))
def test_a_shared_sequence_has_the_bits_of_one_that_is_not(dtype, parts, monkeypatch):
    scores_module = importlib.import_module("madtp_kernels.triton.tokens.scores")
    stats, logits, cu = batch([40, 9, 0, 12], alignment_tokens=40, logits_dtype=dtype)
    logits[44, 39] = math.nan  # of the second sequence
    logits[49:, 20] = -math.inf  # no softmax over the last one
    protected = torch.arange(61, device=DEVICE) % 5 == 3
    index = torch.tensor([0, 8, 0, -1], dtype=torch.int32, device=DEVICE)
    masks = {"summary_index": index, "protected": protected}
    importance = scores_module.token_importance(*stats, logits, cu, **masks)
    expected = importance, *scores_module.select_tokens(importance, logits, cu, 1.0, **masks)
    monkeypatch.setattr(scores_module, "_parts", lambda *_: parts)
    got = scores_module.score_and_select(*stats, logits, cu, 1.0, **masks)
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(g.nan_to_num(-1.0), e.nan_to_num(-1.0))
    keep = got[1]
    assert keep[40:].all() and not keep[:40].all() and keep[protected].all()


# --- gathers

WIDTHS = [1, 3, 17, 64, 129]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", with_slow([*WIDTHS, 1100], [4100]))
def test_gathers_within_twice_the_reference_error(dtype, channels):
    lengths = [63, 1, 0, 111, 5] if channels in WIDTHS or ON_GPU else [1, 0, 19]
    selection = selection_of(lengths, capacity="upper_bound" if channels == 17 else "exact")
    assert (~selection.keep).any()
    wide = selection._replace(merge_weight=selection.merge_weight.double())
    x = torch.randn(sum(lengths), channels, dtype=torch.float64).to(DEVICE, dtype)
    for affine in {dtype, torch.float32}:
        weight, bias = (torch.randn(channels).to(DEVICE, affine) for _ in range(2))
        layernorm = torch.ops.madtp.gather_merge_layernorm
        exact = layernorm(x.double(), *wide, weight.double(), bias.double(), 1e-5, "reference")
        bound, got = (layernorm(x, *selection, weight, bias, 1e-5, name) for name in ("reference", "triton"))
        within_twice(got[:2], exact[:2], bound[:2])
        stored, real = got[0].double(), selection.source != PADDING  # statistics are those of the row as stored
        torch.testing.assert_close(got[2].double(), stored.mean(1) * real, rtol=1e-6, atol=1e-6)
        rstd = (stored.var(1, correction=0) + 1e-5).rsqrt()
        torch.testing.assert_close(got[3].double(), rstd * real, rtol=1e-6, atol=1e-6)
        assert torch.equal(got[0], mk.gather_merge(x, selection, backend="triton"))
        kept = selection.source >= 0
        assert torch.equal(got[0][kept], x[selection.source[kept].long()])
        padding = selection.source == PADDING
        assert not any(t[padding].any() for t in got)

    grad = torch.randn(selection.source.numel(), channels).to(DEVICE, dtype)
    exact = torch.ops.madtp.gather_merge_backward(grad.double(), x.double(), *wide, "reference")
    bound = torch.ops.madtp.gather_merge_backward(grad, x, *selection, "reference")
    within_twice(torch.ops.madtp.gather_merge_backward(grad, x, *selection, "triton"), exact, bound)


def test_long_sequence():
    """More rows than one block of any kernel, and several programs per sequence in the backward."""
    selection = selection_of([577, 3], capacity="upper_bound")
    x = torch.randn(580, 260, device=DEVICE)
    out = mk.gather_merge(x, selection, backend="triton")
    torch.testing.assert_close(out, mk.gather_merge(x, selection, backend="reference"))
    expected = torch.ops.madtp.gather_merge_backward(out, x, *selection, "reference")
    got = torch.ops.madtp.gather_merge_backward(out, x, *selection, "triton")
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_differentiates_like_the_reference(temperature):
    lengths = [9, 0, 1, 12]
    gradients = {}
    for backend in ("reference", "triton"):
        stats, logits, cu = batch(lengths)
        inputs = [t.requires_grad_() for t in (*stats, logits)]
        x = torch.linspace(-1, 1, 22 * 6, device=DEVICE).sin().reshape(22, 6).requires_grad_()
        weight, bias = (torch.linspace(0.5, 2, 6, device=DEVICE).requires_grad_() for _ in range(2))
        importance = mk.token_importance(stats, logits, cu, backend=backend)
        selection = mk.select_tokens(importance, logits, cu, temperature, capacity="upper_bound", backend=backend)
        out, normed = mk.gather_merge_layernorm(x, selection, weight, bias, backend=backend)
        loss = mk.gather_merge(x, selection, backend=backend).sum() + out.square().sum() + normed.sin().sum()
        gradients[backend] = torch.autograd.grad(loss, [*inputs, x, weight, bias])
    for got, expected in zip(gradients["triton"], gradients["reference"], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_kept_rows_do_not_reach_the_merged_row():
    selection = selection_of([40, 12])
    x = torch.randn(52, 20, device=DEVICE)
    expected = mk.gather_merge(x, selection, backend="triton")
    broken = torch.where(selection.keep[:, None], math.nan, x)
    merged = selection.source < 0
    assert torch.equal(mk.gather_merge(broken, selection, backend="triton")[merged], expected[merged])


# --- all of them


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sample_does_not_depend_on_its_batch(dtype):
    lengths = [37, 301, 64, 5]
    stats, logits, cu = batch(lengths, logits_dtype=dtype)
    x = torch.randn(sum(lengths), 70).to(DEVICE, dtype)
    weight, bias = torch.randn(2, 70).to(DEVICE).unbind()

    def prune(rows, cu):
        importance = mk.token_importance(
            mk.AttentionStats(*(s[rows] for s in stats)), logits[rows], cu, backend="triton"
        )
        selection = mk.select_tokens(importance, logits[rows], cu, 0.8, backend="triton")
        pruned = mk.gather_merge_layernorm(x[rows], selection, weight, bias, backend="triton")
        grads = torch.ops.madtp.gather_merge_backward(pruned[1], x[rows], *selection, "triton")
        return (importance, selection.keep, selection.merge_weight, *grads), pruned, selection

    everything, pruned, selection = prune(slice(None), cu)
    assert (~selection.keep).any()
    begin = 0
    for b, length in enumerate(lengths):
        rows = slice(begin, begin + length)
        span = slice(*selection.cu_seqlens_out[b : b + 2].tolist())
        alone, alone_pruned, _ = prune(rows, cu_seqlens_of([length]).to(DEVICE))
        assert all(torch.equal(together[rows], single) for together, single in zip(everything, alone, strict=True))
        assert all(torch.equal(together[span], single) for together, single in zip(pruned, alone_pruned, strict=True))
        begin += length


def test_empty_batch():
    cu = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    nothing, logits = torch.zeros(0, device=DEVICE), torch.zeros(0, 3, device=DEVICE)
    importance = mk.token_importance(mk.AttentionStats(nothing, nothing), logits, cu, backend="triton")
    selection = mk.select_tokens(importance, logits, cu, 1.0, backend="triton")
    x, affine = torch.zeros(0, 8, device=DEVICE), torch.ones(8, device=DEVICE)
    assert mk.gather_merge(x, selection, backend="triton").shape == (0, 8)
    assert mk.gather_merge_layernorm(x, selection, affine, affine, backend="triton")[1].shape == (0, 8)
    assert torch.ops.madtp.gather_merge_backward(x, x, *selection, "triton")[0].shape == (0, 8)
    assert selection.cu_seqlens_out.tolist() == [0]


def test_non_contiguous_inputs_give_the_same_result():
    stats, logits, cu = batch([30, 12])
    expected = mk.token_importance(stats, logits, cu, backend="triton")
    strided = mk.AttentionStats(*torch.stack(stats, 1).unbind(1))
    views = [logits.T.contiguous().T, torch.cat([logits, logits], 1)[:, :7], logits.repeat_interleave(2, 0)[::2]]
    for view in views:
        assert not view.is_contiguous()
        assert torch.equal(mk.token_importance(strided, view, cu, backend="triton"), expected)
        importance = torch.stack([expected, expected], 1)[:, 0]
        got = mk.select_tokens(importance, view, torch.stack([cu, cu], 1)[:, 0], 1.0, backend="triton")
        selection = mk.select_tokens(expected, logits, cu, 1.0, backend="triton")
        assert all(torch.equal(g, e) for g, e in zip(got, selection, strict=True))

    strided = selection._replace(**{n: torch.stack([t, t], 1)[:, 0] for n, t in selection._asdict().items()})
    x, affine = torch.randn(42, 10, device=DEVICE), torch.randn(10, 2, device=DEVICE).unbind(1)
    out = mk.gather_merge_layernorm(x, selection, *(t.contiguous() for t in affine), backend="triton")
    grad = torch.randn_like(out[0])
    grads = torch.ops.madtp.gather_merge_backward(grad, x, *selection, "triton")
    for view, grad_view in (
        (torch.cat([x, x], 1)[:, :10], torch.cat([grad, grad], 1)[:, 10:]),
        (x.T.contiguous().T, grad.T.contiguous().T),
        (x.repeat_interleave(2, 0)[::2], grad.repeat_interleave(3, 0)[::3]),
    ):
        assert not view.is_contiguous() and not grad_view.is_contiguous()
        got = mk.gather_merge_layernorm(view, strided, *affine, backend="triton")
        got_grads = torch.ops.madtp.gather_merge_backward(grad_view, view, *strided, "triton")
        assert all(torch.equal(g, e) for g, e in zip((*got, *got_grads), (*out, *grads), strict=True))
    ones = torch.ones((), device=DEVICE).expand_as(grad)  # the gradient of sum()
    assert torch.ops.madtp.gather_merge_backward(ones, x, *selection, "triton")[0].isfinite().all()


@pytest.mark.parametrize("seed", with_slow([0, 1], [2, 3]))
def test_no_value_makes_a_kernel_write_out_of_bounds(seed, monkeypatch):
    """On a GPU values are not checked: the guards of the outputs see a write past the end, the process a wild read."""
    scores_module = importlib.import_module("madtp_kernels.triton.tokens.scores")
    gather_module = importlib.import_module("madtp_kernels.triton.tokens.gather_merge")
    generator = torch.Generator().manual_seed(seed)

    def any_of(n):
        return wild_integers(n, generator)

    rows, sequences = 40, 6
    cu, cu_out, index = any_of(sequences + 1), any_of(sequences + 1), any_of(sequences)
    *stats, logits = (t.to(DEVICE) for t in scores([rows]))
    importance = scores_module.token_importance(*stats, logits, cu, index)
    *_, source, weight = scores_module.select_tokens(stats[0], logits, cu, 1.0, index)
    scores_module.select_tokens(importance, logits, cu, 1.0, index)
    for parts in (1, 2):
        monkeypatch.setattr(scores_module, "_parts", lambda *_, parts=parts: parts)
        scores_module.score_and_select(*stats, logits, cu, 1.0, index)
    keep = torch.rand(rows, generator=generator).to(DEVICE) < 0.5
    x, affine = torch.randn(rows, 12, device=DEVICE), torch.ones(12, device=DEVICE)
    for wild_source in (any_of(rows), -any_of(rows).clamp(-7, 7), source):
        selection = (keep, cu, cu_out, wild_source, weight)
        out = gather_module.gather_merge(x, *selection)
        nowhere = (wild_source >= rows) | (wild_source < -sequences)
        assert not out[nowhere].any()
        gather_module.gather_merge_layernorm(x, *selection, affine, affine, 1e-5)
        gather_module.gather_merge_backward(out, x, *selection)


# --- compiled without a GPU


def aot(*options, folder):
    """The report of `python -m madtp_kernels.triton.aot`, which needs a process without TRITON_INTERPRET."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = folder / "aot.json"
    command = [sys.executable, "-m", "madtp_kernels.triton.aot", "--out", str(path), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text())


def check_aot(report):
    kernels = {name for module in MODULES for name in vars(importlib.import_module(module)) if name.endswith("_kernel")}
    compiled = {(row["kernel"], row["target"]) for row in report}
    assert compiled >= {(kernel, target) for kernel in kernels for target in ("sm_80", "sm_90")}
    assert all(row["spilled_bytes"] == 0 for row in report)
    assert all(row["shared_bytes"] <= 99 * 1024 for row in report)  # what a block may have on sm_86 and sm_89


def test_kernels_compile_for_both_targets_without_spills(tmp_path):
    report = aot(folder=tmp_path)
    check_aot(report)
    assert {row["dtype"] for row in report} == {"float32", "bfloat16", "float16"}


@pytest.mark.slow
def test_kernels_compile_at_other_sizes(tmp_path):
    check_aot(aot("--all", folder=tmp_path))


def test_aot_refuses_the_interpreter(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module("madtp_kernels.triton.aot").main([])
    assert "unset it" in capsys.readouterr().err


def test_aot_names_the_kernel_that_spills(monkeypatch, capsys):
    aot_module = importlib.import_module("madtp_kernels.triton.aot")
    rows = [
        dict.fromkeys(aot_module.WIDTHS, 0) | {"kernel": name, "spilled_bytes": 8 * i} for i, name in enumerate("ab")
    ]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(aot_module, "reports", lambda sizes: iter(rows))
    assert aot_module.main([]) == 1
    assert capsys.readouterr().err == "registers spill to local memory in b\n"
