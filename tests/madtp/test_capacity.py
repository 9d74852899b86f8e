# SPDX-License-Identifier: Apache-2.0
"""`capacity="upper_bound"`: what "exact" computes, in shapes that no value decides, with nothing read on the host."""

import pytest
import torch
from families import CASES, CONFIG, pixels, randomised

import madtp
from madtp import hwp
from madtp.profiling import macs as accounting

GRAPH = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def blip_questions(model, inputs):
    index = torch.tensor([1, 0, 1, 3], device=model.device)  # two questions share an image
    return model.encode_questions(
        inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"], image_index=index
    )


# Decoders and the Q-Former, which are transformers' own, read on the host whether a mask hides anything. What they get:
BEFORE_DECODERS = {
    "BlipForQuestionAnswering": blip_questions,
    "BlipForConditionalGeneration": lambda model, inputs: model.vision_model(inputs["pixel_values"]),
} | dict.fromkeys(
    ("Blip2ForConditionalGeneration", "Blip2Model", "Blip2ForImageTextRetrieval"),
    lambda model, inputs: model.vision_model(inputs["pixel_values"]),
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
        name: [branch.last.entered.origin.numel(), *(layer.origin.numel() for layer in branch.last.layers)]
        for name, branch in handle.pruning.items()
    }


def same_selections(handle, expected):
    pairs = [
        pair
        for name in handle.selections
        for layers in zip(handle.selections[name], expected.selections[name], strict=True)
        for pair in zip(*layers, strict=True)
    ]
    return bool(pairs) and all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("family", CASES)
def test_computes_what_exact_does(family):
    """On a CPU, attention leaves NaN in the rows past the sequences: no output may read them."""
    (model, handle), (other, exact), inputs = patched(family), patched(family, "exact"), CASES[family].inputs()
    with torch.inference_mode():
        result, expected = model(**inputs), other(**inputs)
    assert same_selections(handle, exact)
    assert any(found[-1] > total[-1] for found, total in zip(rows(handle).values(), rows(exact).values(), strict=True))
    for name in CASES[family].outputs:
        torch.testing.assert_close(result[name], expected[name], **CLOSE)


@pytest.mark.parametrize("family", CASES)
def test_reads_nothing_and_keeps_its_shapes(family):
    """Tensors of the meta device have no values: who reads one raises, and no shortcut of the CPU is taken."""
    model, handle = patched(family)
    model.to("meta")
    inputs = {name: value.to("meta") for name, value in CASES[family].inputs().items()}
    run = BEFORE_DECODERS.get(family, lambda model, inputs: model(**inputs))
    with torch.no_grad():
        run(model, inputs)
        for layers in rows(handle).values():
            assert set(layers) <= {layers[0]} and layers[0] > 0
        handle.capacity = "exact"
        with pytest.raises(RuntimeError, match="meta"):
            run(model, inputs)


def test_questions_that_share_an_image_and_their_answers():
    inputs, results = CASES["BlipForQuestionAnswering"].inputs(), []
    index, labels = torch.tensor([1, 0, 1, 3]), inputs.pop("labels")
    for capacity in ("exact", "upper_bound"):
        model, _ = patched("BlipForQuestionAnswering", capacity)
        with torch.no_grad():
            logits = model(**inputs, labels=labels, image_index=index).logits
        results.append((logits, model.generate(**inputs, image_index=index, max_new_tokens=4, num_beams=2)))
    (expected, tokens), (logits, same) = results
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert torch.equal(tokens, same)


def graphed(run, device):
    """A function that runs `run`: in one CUDA graph on a GPU."""
    if device == "cpu":
        return run
    run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()

    def replay():
        graph.replay()
        return outputs

    return replay


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GRAPH)])
@pytest.mark.parametrize("family", ["CLIPVisionModel", "SiglipVisionModel", "ViTForImageClassification"])
@torch.no_grad()
def test_a_pruned_vision_tower_fits_one_graph(family, device):
    (model, handle), (other, exact) = patched(family), patched(family, "exact")
    model, other, images = model.to(device), other.to(device), pixels(4).to(device)
    replay = graphed(lambda: model(images), device)
    for seed in (5, 6):
        images.copy_(pixels(4, seed=seed))
        result, expected = replay(), other(images)
        assert same_selections(handle, exact) and len(set(handle.tokens_per_layer["vision"])) > 1
        for name in CASES[family].outputs:
            torch.testing.assert_close(result[name], expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["CLIPVisionModel", pytest.param("BlipForNLVR", marks=pytest.mark.slow)])
@torch.no_grad()
def test_compiles_into_one_graph(family):
    """`fullgraph` raises at the first value that the host has to read; on a CPU checks of the ops read some."""
    model, handle = patched(family)
    inputs = {name: value.to("meta") for name, value in CASES[family].inputs().items()}
    torch._dynamo.reset()
    result = torch.compile(model.to("meta"), backend="eager", fullgraph=True)(**inputs)
    assert result[CASES[family].outputs[0]].shape[0] == 4 and all(len(layers) == 3 for layers in rows(handle).values())


def test_gradients_and_training_are_exact():
    model, handle = patched("CLIPVisionModel")
    inputs = CASES["CLIPVisionModel"].inputs()
    for training, gradients in ((False, True), (True, False), (True, True)):
        model.train(training)
        with torch.set_grad_enabled(gradients):
            model(**inputs)
        first, *_, last = rows(handle)["vision"]
        assert last == handle.pruning["vision"].last.layers[-1].count_rows() < first


def test_what_counts_rows_counts_tokens():
    inputs, counted, seen = CASES["CLIPModel"].inputs(), [], []
    for capacity in ("exact", "upper_bound"):
        model, handle = patched("CLIPModel", capacity)
        counted.append(accounting.profile(model, inputs).total)
        linear = "vision_model.encoder.layers.1.mlp.fc2"
        with torch.no_grad(), hwp.collect_inputs(model, [linear]) as statistics:
            model(**inputs)
        seen.append(statistics[linear].weight_sum)
        assert handle.capacity == capacity
    assert counted[0] == counted[1] and seen[0] == seen[1] > 0


def test_capacity_is_checked():
    model = randomised(CASES["CLIPVisionModel"].build())
    with pytest.raises(ValueError, match='capacity must be "exact" or "upper_bound", got \'half\''):
        madtp.patch(model, CONFIG, capacity="half")
    published = madtp.CompressionConfig(alignment_tokens=8, alignment_dim=24, selection="batch_max")
    with pytest.raises(ValueError, match="capacity must be \"exact\" with selection 'batch_max', got 'upper_bound'"):
        madtp.patch(model, published, capacity="upper_bound")
    assert not hasattr(model, "madtp_handle")
    handle = madtp.patch(model, CONFIG)
    with pytest.raises(ValueError, match="capacity must be"):
        handle.capacity = "half"
    assert handle.capacity == "exact"


def test_packed_layers_leave_the_rows_without_a_token_alone():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 16))
    hwp.prune_one_shot(model, "2:4", ["0"])
    plain = model[0]
    hwp.pack(model)
    x, residual, num_rows = torch.randn(5, 32), torch.randn(5, 16), torch.tensor([3], dtype=torch.int32)
    with torch.no_grad():
        for y, expected in (
            (hwp.linear(model[0], x, num_rows), plain(x)),
            (hwp.residual_linear(model[0], x, residual, num_rows), plain(x) + residual),
        ):
            torch.testing.assert_close(y[:3], expected[:3])
            assert (y[3:] == 0).all()
        assert torch.equal(hwp.linear(plain, x, num_rows), plain(x))


def test_a_model_with_packed_layers_computes_what_exact_does():
    results = []
    for capacity in ("exact", "upper_bound"):
        model, handle = patched("CLIPVisionModel", capacity)
        linears = hwp.select_modules(model, "2:4", exclude=("madtp_guide",)).selected
        hwp.prune_one_shot(model, "2:4", linears)
        assert hwp.pack(model, epilogues=handle.epilogues)
        with torch.no_grad():
            results.append(model(**CASES["CLIPVisionModel"].inputs()).pooler_output)
    torch.testing.assert_close(*results, **CLOSE)
