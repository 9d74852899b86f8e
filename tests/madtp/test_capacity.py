"""`capacity="upper_bound"`: what "exact" computes, in shapes that no value decides, with nothing read on the host."""

import pytest
import torch
from families import CASES, CONFIG, pixels, randomised

import madtp
from madtp import hwp
from madtp.accounting import profile

CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)


def patched(family, capacity="upper_bound"):
    torch.manual_seed(0)
    model = randomised(CASES[family].build())
    handle = madtp.patch(model, CONFIG, capacity=capacity)
    handle.set_temperature(2.0)
    return model, handle


def rows(handle):
    """Per branch, the rows entering the first block and leaving each."""
    return {
        name: [branch.entered.origin.numel(), *(layer.origin.numel() for layer in branch.layers)]
        for name, branch in handle.pruning.items()
    }


@pytest.mark.parametrize("family", CASES)
def test_computes_what_exact_does(family):
    model, handle = patched(family)
    inputs, results, selections = CASES[family].inputs(), {}, {}
    for capacity in ("exact", "upper_bound"):
        handle.capacity = capacity
        with torch.no_grad():
            results[capacity] = model(**inputs)
        selections[capacity] = [kept for layers in handle.selections.values() for layer in layers for kept in layer]
    assert any(found != [layers[0]] * len(layers) for layers in rows(handle).values() for found in [layers])
    for kept, expected in zip(selections["upper_bound"], selections["exact"], strict=True):
        assert torch.equal(kept, expected)
    for name in CASES[family].outputs:
        torch.testing.assert_close(results["upper_bound"][name], results["exact"][name], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("family", CASES)
def test_reads_nothing_and_keeps_its_shapes(family):
    """Tensors of the meta device have no values: who reads one raises, and no shortcut of the CPU is taken."""
    model, handle = patched(family)
    model.to("meta")
    inputs = {name: value.to("meta") for name, value in CASES[family].inputs().items()}
    with torch.no_grad():
        model(**inputs)
    for layers in rows(handle).values():
        assert layers[0] > 0 and layers == [layers[0]] * len(layers)
    handle.capacity = "exact"
    with torch.no_grad(), pytest.raises((RuntimeError, NotImplementedError)):
        model(**inputs)
