# SPDX-License-Identifier: Apache-2.0
"""Makes "madtp" a quant_method of transformers, so that its own `from_pretrained` gives a patched model.

Importing this module registers the two classes. It is imported in the midst of transformers' own import, so what knows
of models is imported when a model is there.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from madtp.patching.names import QUANT_METHOD, WEIGHTS_FIELD

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPLITS = ("auto", "balanced", "balanced_low_0", "sequential")  # device maps that could split a model


@register_quantization_config(QUANT_METHOD)
class MadtpQuantizationConfig(QuantizationConfigMixin):
    """The `quantization_config` of a config.json, as it stands there; `patching.state.Settings` reads it."""

    def __init__(self, **values: Any):
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # an enum of those that transformers brings
        self.values = values

    def to_dict(self) -> dict[str, Any]:
        return {**copy.deepcopy(self.values), "quant_method": QUANT_METHOD}


@register_quantizer(QUANT_METHOD)
class MadtpQuantizer(HfQuantizer):
    """Patches the empty model, puts empty packed layers in their places, and lets transformers load what they hold.

    Afterwards nothing of it stays: the model is as `madtp.patch` and `hwp.pack` leave one.
    """

    requires_calibration = True  # there is nothing to make of a model that was not saved so: `madtp.patch` does it

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        check_device_map(device_map)

    def update_attn_implementation(self, config: Any) -> Any:
        """Forgets the note in place of a file of weights, which is for who has no madtp.

        Not about attention: it is what sees the config before the weights are looked for.
        """
        for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
            if part is not None:
                vars(part).pop(WEIGHTS_FIELD, None)
        return config

    update_tp_plan = update_attn_implementation  # what sees it in transformers 5.17

    def update_device_map(self, device_map: Any) -> Any:
        if isinstance(device_map, str) and device_map in SPLITS:
            return {"": torch.accelerator.current_device_index() if torch.accelerator.is_available() else "cpu"}
        if isinstance(device_map, Mapping):  # whatever it names: what is ours goes there too
            return {"": next(iter(device_map.values()))}
        return device_map

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        from madtp.patching import loading

        loading.prepare(model, self.quantization_config.to_dict(), checkpoint_files)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        from madtp.patching import loading

        self.remove_quantization_config(model)
        del model.is_quantized
        for module in model.modules():
            if (config := getattr(module, "config", None)) is not None:
                vars(config).pop("_is_quantized", None)
        loading.finish(model, self.quantization_config.to_dict())

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def check_device_map(device_map: Any) -> None:
    """Raises ValueError for one that splits the model: a patched tower calls the parts of its blocks itself."""
    devices = {str(device) for device in device_map.values()} if isinstance(device_map, Mapping) else set()
    if len(devices) > 1 or "disk" in devices:
        raise ValueError(f"device_map must put a patched model on one device, got {', '.join(sorted(devices))}")
