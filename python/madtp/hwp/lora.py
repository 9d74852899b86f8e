# SPDX-License-Identifier: Apache-2.0
"""LoRA of peft on packed layers. Nothing else of this package needs peft.

Source: LoRA (Hu et al., ICLR 2022, arXiv 2106.09685).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor

from madtp.hwp.packed_linear import PackedLinear

if TYPE_CHECKING:
    from peft import LoraConfig


def support_packed(config: LoraConfig) -> LoraConfig:
    """The config, with which peft puts LoRA on packed layers as well as on plain ones; returns it.

    >>> model = get_peft_model(model, support_packed(LoraConfig(target_modules=["fc1", "fc2"])))

    peft does not save this: `PeftModel.from_pretrained` needs `config=support_packed(LoraConfig.from_pretrained(...))`.
    Adapters cannot be merged into packed weights; `unpack` makes the layers plain, which can.
    """
    config._register_custom_module({PackedLinear: PackedLora})
    return config


class PackedLora(LoraLinear):
    """LoRA on a packed layer: scale * activation(x W^T + bias + x A^T B^T), with what the layer has taken over."""

    def _get_in_out_features(self, module):
        return module.in_features, module.out_features

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        layer = self.get_base_layer()
        if not isinstance(layer, PackedLinear):  # unpacked since
            return super().forward(x, *args, **kwargs)
        return layer.finish(super().forward(x, *args, epilogue=False, **kwargs))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        if isinstance(self.get_base_layer(), PackedLinear):
            raise ValueError("LoRA must not be merged into a packed layer, its weight is final: unpack first")
        super().merge(safe_merge, adapter_names)

    def unmerge(self) -> None:
        if self.merged and isinstance(self.get_base_layer(), PackedLinear):
            raise ValueError("LoRA must not be taken out of a packed layer, its weight is final: unpack first")
        super().unmerge()
