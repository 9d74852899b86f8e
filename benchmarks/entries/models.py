# SPDX-License-Identifier: Apache-2.0
"""Whole models, end to end: Hugging Face's, and ours with dense weights, 2:4 weights, fewer tokens, and both.

Weights and images are random. What is pruned is then arbitrary, but not how much: each case looks for the temperature
at which its images take the multiply-adds asked for, and a result that misses them by more than 1 % is wrong.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import transformers as hf
from torch import Tensor, nn

import madtp
from benchmarks.entry import Case, Entry, Thunk, Unavailable
from madtp import hwp
from madtp.models import BlipForNLVR
from madtp.models.registry import family_of
from madtp.profiling.macs import counted_macs
from madtp.search import find_root

EAGER, SDPA = "Hugging Face eager", "Hugging Face SDPA"
MAC_TOLERANCE = 0.01
LOG_TAU = (-8.0, 16.0)  # searched, to base 2
ERROR = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # relative, of the output
VOCABULARY = 30524  # of BLIP
WEIGHT_STD = 0.05  # smaller ones make tokens so alike that the lowest temperature prunes more than is asked for


class Mode(NamedTuple):
    """How a model of ours is compressed. reduction: the share of the dense MACs that counted ones save; 0: none.
    bfloat16: what is not int8, instead of the dtype of the dense model. by_tokens: the share is of what the weights
    leave, so that tokens alone save it."""

    sparse: bool
    reduction: float
    int8: bool = False
    bfloat16: bool = False
    by_tokens: bool = False


MODES = {
    "madtp dense": Mode(False, 0.0),
    "madtp 2:4": Mode(True, 0.0),
    "madtp tokens, -50 % MACs": Mode(False, 0.5),
    "madtp tokens and 2:4, -70 % MACs": Mode(True, 0.7),
}


def _sizes(case: Case) -> dict[str, int]:
    width = case["width"]
    return {
        "hidden_size": width,
        "intermediate_size": case.get("mlp", 4 * width),
        "num_attention_heads": case.get("heads", width // 64),
        "num_hidden_layers": case["layers"],
    }


def _vision(case: Case) -> dict[str, int]:
    return _sizes(case) | {"image_size": case["pixels"], "patch_size": case["patch"]}


def _blip(case: Case) -> hf.BlipConfig:
    text = _sizes(case) | {"vocab_size": VOCABULARY, "encoder_hidden_size": case["width"]}
    return hf.BlipConfig(text_config=text, vision_config=_vision(case))


class Architecture(NamedTuple):
    build: Callable[[Case], nn.Module]
    output: str  # the field of the result that is compared
    images: int = 1  # of a sample
    text: bool = False
    answers: bool = False  # it has a decoder, which rates an answer


ARCHITECTURES = {
    "BLIP vision": Architecture(lambda case: hf.BlipVisionModel(_blip(case).vision_config), "pooler_output"),
    "CLIP vision": Architecture(lambda case: hf.CLIPVisionModel(hf.CLIPVisionConfig(**_vision(case))), "pooler_output"),
    "SigLIP vision": Architecture(
        lambda case: hf.SiglipVisionModel(hf.SiglipVisionConfig(**_vision(case))), "pooler_output"
    ),
    "BLIP VQA": Architecture(lambda case: hf.BlipForQuestionAnswering(_blip(case)), "loss", text=True, answers=True),
    "BLIP NLVR": Architecture(lambda case: BlipForNLVR(_blip(case)), "logits", images=2, text=True),
}
BLIP_BASE = {"pixels": 384, "patch": 16, "width": 768, "layers": 12}
CASES = [
    *({"model": "BLIP vision", **BLIP_BASE, "batch": batch} for batch in (1, 4, 8)),
    *({"model": "CLIP vision", **BLIP_BASE, "pixels": 224, "batch": batch} for batch in (1, 4)),
    *(
        {"model": "CLIP vision", "pixels": 336, "patch": 14, "width": 1024, "layers": 24, "batch": batch}
        for batch in (1, 4)
    ),
    *({"model": "BLIP VQA", **BLIP_BASE, "words": 20, "batch": batch} for batch in (1, 4)),
    *({"model": "BLIP NLVR", **BLIP_BASE, "words": 20, "batch": batch} for batch in (1, 2)),
]


class Models:
    """A random model in all its modes. Modes with the same weights share them."""

    def __init__(self, case: Case, device: torch.device):
        torch.manual_seed(0)
        self.case = dict(case)
        self.architecture = ARCHITECTURES[case["model"]]
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.plain = self.architecture.build(case).eval().requires_grad_(False).to(device, self.dtype)
        for weight in self.plain.parameters():
            if weight.ndim > 1:
                weight.normal_(std=WEIGHT_STD)
        if self.plain._supports_sdpa:
            self.plain.set_attn_implementation("eager")
        self.pruned = copy.deepcopy(self.plain)
        dense_modules = family_of(self.pruned).dense_modules
        self.linears = hwp.select_modules(self.pruned, "2:4", exclude=dense_modules).selected
        hwp.prune_one_shot(self.pruned, "2:4", self.linears)
        self.config = madtp.CompressionConfig(alignment_dim=min(768, case["width"]))
        self.references: dict[bool, tuple[dict[str, Tensor], Tensor]] = {}
        self.packed: dict[Mode, nn.Module] = {}  # by mode without its reduction
        self.log_tau: dict[Mode, float] = {}  # by mode: where the last search ended, and the next begins
        self.calibrated: dict[tuple[Mode, int], tuple[float, float]] = {}  # mode, batch -> tau, relative miss

    @functools.cached_property
    def sdpa(self) -> nn.Module:
        model = sharing_weights(self.plain)
        if not model._supports_sdpa:
            raise Unavailable(f"{type(self.plain).__name__} has none")
        model.set_attn_implementation("sdpa")
        return model

    def ours(self, mode: Mode) -> nn.Module:
        """Patched, with its Linears in the form asked for; one for all modes that have it."""
        form = mode._replace(reduction=0.0, by_tokens=False)
        if form not in self.packed:
            torch.manual_seed(0)  # the alignment tokens
            model = self.pruned if mode.sparse else self.plain
            model = copy.deepcopy(model).to(torch.bfloat16) if mode.bfloat16 else sharing_weights(model)
            madtp.patch(model, self.config)
            if mode.int8:
                hwp.pack(model, self.linears, dtype="int8")
            elif mode.sparse:
                hwp.pack(model)
            self.packed[form] = model
        return self.packed[form]

    @functools.cached_property
    def checksum(self) -> float:
        return sum(weight.double().abs().sum().item() for weight in self.plain.parameters())

    def expected(self, sparse: bool, tensors: dict[str, Tensor]) -> Tensor:
        """What Hugging Face computes, float32; kept for one input of each weights."""
        known = self.references.get(sparse)
        if known is None or known[0] is not tensors:
            output = self.run(self.pruned if sparse else self.plain, tensors).float()
            known = self.references[sparse] = tensors, output
        return known[1]

    def run(self, model: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
        with torch.inference_mode():
            return getattr(model(**tensors), self.architecture.output)

    def temperature(self, mode: Mode, tensors: dict[str, Tensor]) -> float:
        """At which a batch takes the MACs that the mode asks for. The first batch of its size decides."""
        batch = len(tensors["pixel_values"])
        if mode.reduction == 0:
            return 0.0
        if (mode, batch) not in self.calibrated:
            model = self.ours(mode)
            dense = model if mode.by_tokens else self.ours(mode._replace(sparse=False, int8=False))
            dense.madtp_handle.set_temperature(0)
            one = {key: value[:1] for key, value in tensors.items()}
            target = (1 - mode.reduction) * sum(counted_macs(dense, [one]).values())

            start = self.log_tau.get(mode, 0.0)

            def excess(shift: float) -> float:
                model.madtp_handle.set_temperature(2.0 ** (start + shift))
                return sum(counted_macs(model, [tensors]).values()) / target - 1

            low, high = (bound - start for bound in LOG_TAU)
            shift, miss = find_root(excess, low, high, tolerance=MAC_TOLERANCE / 2, slope=0.3)
            self.log_tau[mode] = start + shift
            self.calibrated[mode, batch] = 2.0 ** (start + shift), miss
        return self.calibrated[mode, batch][0]


class ModelInputs(NamedTuple):
    models: Models
    tensors: dict[str, Tensor]


def sharing_weights(model: nn.Module) -> nn.Module:
    shared = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


@functools.lru_cache(maxsize=1)
def _models(device: torch.device, **case) -> Models:
    return Models(case, device)


def model_inputs(case: Case, device: torch.device, seed: int) -> ModelInputs:
    models = _models(device, **{key: value for key, value in case.items() if key not in ("batch", "words")})
    architecture, generator = models.architecture, torch.Generator().manual_seed(seed)
    pixels, batch = case["pixels"], case["batch"]
    images = (batch, *([architecture.images] if architecture.images > 1 else []), 3, pixels, pixels)
    tensors = {"pixel_values": torch.randn(images, generator=generator).to(models.dtype)}
    if architecture.text:
        ids = torch.randint(1000, VOCABULARY - 2, (batch, case["words"]), generator=generator)
        tensors |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if architecture.answers:
        tensors["labels"] = torch.randint(1000, VOCABULARY - 2, (batch, 3), generator=generator)
    return ModelInputs(models, {name: tensor.to(device) for name, tensor in tensors.items()})


def eager(i: ModelInputs) -> Thunk:
    return lambda: i.models.run(i.models.plain, i.tensors)


def sdpa(i: ModelInputs) -> Thunk:
    model = i.models.sdpa
    return lambda: i.models.run(model, i.tensors)


def ours(mode: Mode) -> Callable[[ModelInputs], Thunk]:
    def prepare(i: ModelInputs) -> Thunk:
        model, tensors = i.models.ours(mode), i.tensors
        if mode.bfloat16:
            tensors = {name: x.bfloat16() if x.is_floating_point() else x for name, x in tensors.items()}
        temperature = i.models.temperature(mode, tensors)

        def run() -> Tensor:
            model.madtp_handle.set_temperature(temperature)
            return i.models.run(model, tensors)

        return run

    return prepare


def check(i: ModelInputs, result: Tensor, provider: str) -> None:
    """Without pruned tokens: what Hugging Face computes with the same weights. With: the MACs asked for."""
    check_mode(i, result, MODES.get(provider, Mode(False, 0.0)), ERROR[i.models.dtype])


def check_mode(i: ModelInputs, result: Tensor, mode: Mode, tolerance: float) -> None:
    if mode.reduction:
        miss = i.models.calibrated[mode, len(i.tensors["pixel_values"])][1]
        assert abs(miss) <= MAC_TOLERANCE, f"counted MACs miss the target by {miss:+.1%}"
        assert result.isfinite().all(), "the output is not finite"
        return
    expected = i.models.expected(mode.sparse, i.tensors)
    error = ((result.float() - expected).norm() / expected.norm()).item()
    assert error <= tolerance, f"relative error {error:.1e}"


def weight_bytes(case: Case, i: ModelInputs) -> int:
    return sum(p.nbytes for p in i.models.plain.parameters()) + sum(t.nbytes for t in i.tensors.values())


def dense_flops(case: Case, i: ModelInputs) -> int:
    model = i.models.ours(Mode(False, 0.0))
    with model.madtp_handle.dense():
        return int(2 * case["batch"] * sum(counted_macs(model, [i.tensors]).values()))


ENTRIES = (
    Entry(
        name="models",
        summary="whole models; the rate counts the FLOPs of the dense one",
        cases=CASES,
        inputs=model_inputs,
        providers={EAGER: eager, SDPA: sdpa} | {name: ours(mode) for name, mode in MODES.items()},
        baseline=EAGER,
        gate=check,
        bytes=weight_bytes,
        flops=dense_flops,
        parts=True,
    ),
)
