# SPDX-License-Identifier: Apache-2.0
"""`madtp.seam_pareto`: what settings of the seams cost, against what they do to the answers."""

import json

import pytest
import torch
from vlm_families import PAD, make_vlm, vlm_batch

import madtp
from madtp.models.vision_seam import NAME as VISION

KEEPS = [
    {VISION: 0.5},
    {"projector": madtp.Keep(4, rule="uniform")},
    {"prefill": {1: 0.5, 2: 2}},
    {VISION: 0.5, "projector": 4},
]


@pytest.fixture(scope="module")
def llava():
    model = make_vlm("LLaVA")
    return model, vlm_batch("LLaVA", model)


def divergence(dense, pruned):
    """In float64, of rows of logits."""
    p, q = (logits.double().softmax(-1) for logits in (dense, pruned))
    return float((p * (p / q).log()).sum(-1).mean())


def by_keep(found):
    return {json.dumps(point.keep, default=str): point for point in found.points}


def test_points_are_predicted_costs_and_measured_harm(llava):
    model, inputs = llava
    model.train()
    kind, mode = type(model), [module.training for module in model.modules()]
    found = madtp.seam_pareto(model, [inputs], keeps=KEEPS)
    assert type(model) is kind and not hasattr(model, "madtp_handle")
    assert [module.training for module in model.modules()] == mode
    model.eval()
    dense, points = madtp.prompt_cost(model, **inputs).first_token, by_keep(found)
    assert len(found.points) == len(KEEPS) + 1
    with torch.no_grad():
        whole = model(**inputs).logits[:, -1]
        for keep in KEEPS:
            point = points[json.dumps(keep, default=str)]
            assert point.macs_share == madtp.prompt_cost(model, keep, **inputs).first_token / dense
            handle = madtp.patch(model, keep=keep)
            assert point.divergence == pytest.approx(divergence(whole, model(**inputs).logits[:, -1]), rel=1e-3)
            handle.remove()
    assert (points["{}"].macs_share, points["{}"].divergence, points["{}"].dominated) == (1, 0, False)


@pytest.mark.parametrize(
    ("keep", "decides"),
    [
        ({VISION: madtp.Keep(temperature=2.0)}, "temperature 2 at 'vision'"),
        ({"prefill": {1: 0.5, 2: madtp.Keep(mass=0.5)}}, "mass 0.5 at 'prefill'"),
    ],
)
def test_settings_must_have_a_cost_that_is_known_before(llava, keep, decides):
    model, inputs = llava
    with pytest.raises(ValueError, match=f"^keeps must be of shares and counts, .*, got {decides}$"):
        madtp.seam_pareto(model, [inputs], keeps=[{VISION: 0.5}, keep])


def test_the_front_is_what_nothing_beats(llava):
    model, inputs = llava
    found = madtp.seam_pareto(model, [inputs], shares=(1, 0.25))
    assert len(found.points) == 8 and [p.macs_share for p in found.points] == sorted(p.macs_share for p in found.points)
    assert {seam for point in found.points for seam in point.keep} == {VISION, "projector", "prefill"}
    assert all(point.keep["prefill"] == {2: 0.25} for point in found.points if "prefill" in point.keep)
    for point in found.points:
        better = [
            other
            for other in found.points
            if other.macs_share <= point.macs_share
            and other.divergence <= point.divergence
            and (other.macs_share < point.macs_share or other.divergence < point.divergence)
        ]
        assert point.dominated == bool(better)
    assert found.front == tuple(point for point in found.points if not point.dominated)
    assert found.front[-1].keep == {}


@pytest.mark.parametrize("right", [False, True])
def test_labels_say_which_answers_are_compared(llava, right):
    model, _ = llava
    inputs = vlm_batch("LLaVA", model, right=right)
    ids = inputs["input_ids"]
    labels = torch.full_like(ids, -100)
    for row, real in enumerate(ids != PAD):
        labels[row, real.nonzero().flatten()[-3:]] = 20  # the last of each sample's words
    keep = {"projector": 0.25}
    point = madtp.seam_pareto(model, [inputs | {"labels": labels}], keeps=[keep]).points[0]
    asked = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))
    with torch.no_grad():
        whole = model(**inputs).logits[asked]
        handle = madtp.patch(model, keep=keep)
        short, columns = model(**inputs).logits, handle.columns
        handle.remove()
    short = torch.stack([short[row, columns[row].tolist().index(place)] for row, place in asked.nonzero().tolist()])
    assert len(short) == 6 and point.divergence == pytest.approx(divergence(whole, short), rel=1e-3)


def test_several_batches_are_one_set(llava):
    model, inputs = llava
    one = madtp.seam_pareto(model, [inputs], keeps=KEEPS[:1]).points[0]
    other = vlm_batch("LLaVA", model, seed=2)
    two = madtp.seam_pareto(model, [inputs, other], keeps=KEEPS[:1]).points[0]
    second = madtp.seam_pareto(model, [other], keeps=KEEPS[:1]).points[0]
    assert two.divergence == pytest.approx((one.divergence + second.divergence) / 2)
    assert two.macs_share == pytest.approx(one.macs_share)


def test_tables_and_files(llava, tmp_path):
    model, inputs = llava
    found = madtp.seam_pareto(model, [inputs], keeps=KEEPS)
    lines = str(found).splitlines()
    assert lines[0].split() == [VISION, "projector", "prefill", "MACs", "divergence", "front"]
    assert any(line.split()[:2] == ["all", "uniform"] for line in lines) and any(
        "1: 0.5, 2: 2" in line for line in lines
    )
    assert lines[-1].split()[:4] == ["all", "all", "all", "1.000"]
    found.save(tmp_path / "seams" / "points.json")
    rows = json.loads((tmp_path / "seams" / "points.json").read_text())
    assert [row["macs_share"] for row in rows] == [point.macs_share for point in found.points]
    assert rows[-1]["keep"] == {} and {"amount": 0.5, "mass": None, "rule": "received"} in [
        row["keep"].get(VISION) for row in rows
    ]


def test_what_is_refused(llava):
    model, inputs = llava
    with pytest.raises(ValueError, match="batches must hold a calibration prompt, got none"):
        madtp.seam_pareto(model, [])
    with pytest.raises(ValueError, match="batches must be a sequence of mappings, got one mapping"):
        madtp.seam_pareto(model, inputs)
    nothing = torch.full_like(inputs["input_ids"], -100)
    with pytest.raises(ValueError, match="labels must ask for a token, got none but -100"):
        madtp.seam_pareto(model, [inputs | {"labels": nothing}], keeps=[{"vision": 0.5}])
    with pytest.raises(ValueError, match="batches must have images, got one with input_ids alone"):
        madtp.seam_pareto(model, [{"input_ids": inputs["input_ids"]}])
    with pytest.raises(ValueError, match=r"shares must be in \(0, 1\], got 1.5"):
        madtp.seam_pareto(model, [inputs], shares=(0.5, 1.5))
    labels = torch.zeros_like(inputs["input_ids"])
    with pytest.raises(ValueError, match="labels must ask for no token that comes after one of an image"):
        madtp.seam_pareto(model, [inputs | {"labels": labels}], keeps=KEEPS[:1])
    assert not hasattr(model, "madtp_handle")
    handle = madtp.patch(model, keep={"projector": 0.5})
    with pytest.raises(ValueError, match="model must not be patched already"):
        madtp.seam_pareto(model, [inputs])
    handle.remove()
