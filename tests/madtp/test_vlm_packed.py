# SPDX-License-Identifier: Apache-2.0
"""Linears of decoders and their towers as 2:4 and int8 layers, with image tokens pruned beside them."""

import pytest
import torch
from vlm_families import families, make_vlm, vlm_batch

import madtp
from madtp.models.vlm import decoder_of, prefill_unsupported_reason
from madtp_kernels import dispatch

GREEDY = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
needs_extension = pytest.mark.skipif(dispatch.extension_unsupported_reason() is not None, reason="no C++ extension")


def pruned(name):
    """A patched model in float32 whose Linears are 2:4 where inputs reach them, its inputs, and those names."""
    model = make_vlm(name)
    inputs = {key: x.float() if x.is_floating_point() else x for key, x in vlm_batch(name, model).items()}
    model.float()
    keep = {"projector": madtp.Keep(0.5, rule="uniform")}
    if prefill_unsupported_reason(model) is None and name != "Qwen3-VL":  # of whose layers all get image features
        keep["prefill"] = {len(decoder_of(model).layers) - 1: madtp.Keep(0.5, rule="uniform")}
    madtp.patch(model, keep=keep)
    names = madtp.hwp.select_modules(model, "2:4").selected
    with torch.no_grad(), madtp.hwp.collect_inputs(model, names) as statistics:
        model(**inputs)
    reached = [name for name in names if statistics[name].squares.any()]
    assert len(reached) > len(names) / 2
    madtp.hwp.prune_one_shot(model, "2:4", reached, statistics)
    return model, inputs, reached


@needs_extension
@families(quick=("LLaVA", "Qwen2.5-VL"))
def test_sparse_layers_answer_as_their_dense_weights(name):
    model, inputs, names = pruned(name)
    want = model.generate(**inputs, **GREEDY)
    packed = madtp.hwp.pack(model)
    assert packed and set(packed) <= set(names)
    got = model.generate(**inputs, **GREEDY)
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), rtol=1e-4, atol=1e-4)
    lines = [line.split() for line in model.madtp_handle.explain().splitlines()]
    assert sum(int(line[2]) for line in lines if line[:2] == ["all", "Linears"]) == len(packed)
    verdicts = madtp.hwp.explain_linears(model)
    assert all(verdicts[name] == "2:4, runs sparse" for name in packed)
    madtp.hwp.unpack(model)
    assert torch.equal(torch.stack(model.generate(**inputs, **GREEDY).logits), torch.stack(want.logits))


@needs_extension
@families(quick=("LLaVA",))
def test_int8_layers_answer_as_the_reference_does(name, monkeypatch, tmp_path):
    model, inputs, _ = pruned(name)
    packed = madtp.hwp.pack(model, dtype="int8")
    assert packed
    got = model.generate(**inputs, **GREEDY)
    monkeypatch.setenv("MADTP_BACKEND", "reference")
    want = model.generate(**inputs, **GREEDY)
    monkeypatch.delenv("MADTP_BACKEND")
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), rtol=1e-3, atol=1e-3)
    model.save_pretrained(tmp_path)
    again = madtp.from_pretrained(tmp_path)
    assert type(again) is type(model) and again.madtp_handle.keep == model.madtp_handle.keep
    assert torch.equal(again.generate(**inputs, **GREEDY).sequences, got.sequences)
