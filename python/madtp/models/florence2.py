# SPDX-License-Identifier: Apache-2.0
"""Florence-2 (Xiao et al., CVPR 2024): an encoder reads prompt and image, so its prompt is shortened before it encodes.

Its positions are counted, not given: those of a pruned prompt have no gaps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from madtp.models.prompt import find_placeholders, has_images
from madtp.models.pruned_prompt import PrunedPrompt


class PrunedFlorence2(PrunedPrompt):
    """Mixed into the class with the language head."""

    def _run_pruned(self, run, kwargs: dict[str, Any]):
        labels = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith(("decoder_", "labels"))}
        input_ids, kwargs = self._shortened(kwargs.pop("input_ids"), kwargs)
        output = kwargs.pop("mm_encoder_outputs")["image"]
        embeds: Tensor = self.get_input_embeddings()(input_ids)  # type: ignore[operator]
        rows = torch.cat(list(output.pooler_output)).to(embeds)
        placeholders = find_placeholders(input_ids, self.config, "image")
        embeds = embeds.masked_scatter(placeholders[..., None], rows)
        return run(inputs_embeds=embeds, **kwargs, **labels)

    def _maybe_prepare_encoder_kwargs_for_generation(self, inputs_tensor, model_kwargs, *args, **kwargs):
        here = self.madtp_projector.here
        if here.calls and not here.dense and has_images(model_kwargs) and model_kwargs.get("encoder_outputs") is None:
            self._check_prompt(inputs_tensor, model_kwargs)
            inputs_tensor, model_kwargs = self._shortened(inputs_tensor, model_kwargs)
            here.calls[-1] = here.record
        return super()._maybe_prepare_encoder_kwargs_for_generation(  # type: ignore[misc]
            inputs_tensor, model_kwargs, *args, **kwargs
        )

    def _shortened(self, input_ids: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        kwargs = self._encoded(kwargs)
        tensors = self._tensors(kwargs)
        input_ids, kwargs, _ = self._prune(input_ids, kwargs)
        self._join(kwargs, tensors)
        return input_ids, kwargs
