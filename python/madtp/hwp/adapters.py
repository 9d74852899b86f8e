# SPDX-License-Identifier: Apache-2.0
"""LoRA of peft while a model trains, merged in the end: what is large trains by what is small. Needs peft.

Source: LoRA (Hu et al., ICLR 2022, arXiv 2106.09685).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

MERGED = "madtp_merged"  # of a module whose product goes into another's weight in the end, and is not counted


def require_peft() -> None:
    """Raises ImportError where it is not installed."""
    try:
        import peft  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError("peft is needed for lora_rank: pip install peft", name="peft") from error


class Adapters:
    """LoRA on Linears of a model, in place, beside its own weights, which are frozen; `merge` takes it off again.

    Args:
        frozen: names of modules whose other parameters are not trained either; what is outside of them is as it was.
        names: of the Linears, all inside of `frozen`.
        rank: of each adapter; what it adds is scaled by 2, alpha being twice the rank.
    """

    def __init__(self, model: nn.Module, frozen: Iterable[str], names: Iterable[str], rank: int):
        require_peft()
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel

        self.model = model
        self._trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
        config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=sorted(names))
        self._tuner: Any = LoraModel(model, {"default": config}, "default")
        del model.peft_config  # by which transformers would save adapters alone
        inside = {parameter for name in frozen for parameter in model.get_submodule(name).parameters()}
        for parameter, trained in self._trained.items():
            parameter.requires_grad_(trained and parameter not in inside)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and ".lora_" in name:
                setattr(module, MERGED, True)

    def merge(self) -> None:
        """Adds what was learned to the weights, puts the Linears back, and lets what was trained before be so again."""
        self._tuner.merge_and_unload()
        for parameter, trained in self._trained.items():
            parameter.requires_grad_(trained)


def has_adapters(model: nn.Module) -> bool:
    """Whether `Adapters` are on a model."""
    return any(hasattr(module, MERGED) for module in model.modules())
