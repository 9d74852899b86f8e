# SPDX-License-Identifier: Apache-2.0
"""Which models are known: `FAMILIES` has a row for each class, `towers.TOWERS` one for each encoder inside of them."""

import transformers as hf
from torch import nn

from madtp.models import blip, blip2, blip_nlvr
from madtp.models.blip_nlvr import BlipForNLVR
from madtp.models.family import Family

DUAL = {"vision": "vision_model", "text": "text_model"}
DECODER = {"decoder": ("text_decoder",)}
DECODER_MASKS = {"text_decoder.bert.encoder.layer.*.crossattention.self": blip.MaskedCrossAttention}

FAMILIES = (
    Family(
        {"vision": "vision_model", "text": "text_encoder"},
        hf.BlipForQuestionAnswering,
        others=DECODER,
        dense_modules=("text_decoder",),
        compressed=blip.BlipForQuestionAnswering,
        mixins=DECODER_MASKS,
    ),
    Family(
        {"vision": "vision_model"},
        hf.BlipForConditionalGeneration,
        others=DECODER,
        dense_modules=("text_decoder.cls",),
        compressed=blip.BlipForConditionalGeneration,
        mixins=DECODER_MASKS,
    ),
    Family(
        {"vision": "vision_model", "text": "text_encoder"},
        hf.BlipForImageTextRetrieval,
        dense_modules=("vision_proj", "text_proj", "itm_head"),
        compressed=blip.BlipForImageTextRetrieval,
    ),
    Family(
        {"vision": "vision_model", "text": ("text_encoder", blip_nlvr.TEXT)},
        BlipForNLVR,
        dense_modules=("classifier",),
        compressed=blip_nlvr.RaggedBlipForNLVR,
        images_per_text=2,
    ),
    *(
        Family(DUAL, source, dense_modules=("visual_projection", "text_projection"))
        for source in (hf.CLIPModel, hf.VisionTextDualEncoderModel)
    ),
    Family(DUAL, hf.SiglipModel),
    *(
        Family(
            {"vision": "vision_model"},
            source,
            others={"qformer": ("qformer",), "language": ("language_model",)},
            dense_modules=("qformer", "language_model", "language_projection"),
            mixins={"qformer": blip2.RaggedQFormer},
        )
        for source in (hf.Blip2Model, hf.Blip2ForConditionalGeneration)
    ),
    Family(
        {"vision": "vision_model"},
        hf.Blip2ForImageTextRetrieval,
        others={"qformer": ("qformer",)},
        dense_modules=("qformer", "vision_projection", "text_projection", "itm_head"),
        mixins={"qformer": blip2.RaggedQFormer},
    ),
    Family({"vision": "vit"}, hf.ViTForImageClassification, dense_modules=("classifier",)),
    Family({"vision": "dinov2"}, hf.Dinov2ForImageClassification, dense_modules=("classifier",)),
    *(
        Family({"text": "bert"}, source, dense_modules=("classifier",))
        for source in (hf.BertForSequenceClassification, hf.BertForTokenClassification)
    ),
    Family({"text": "bert"}, hf.BertForMaskedLM, dense_modules=("cls",)),
    *(
        Family({"vision": ""}, source)
        for source in (hf.CLIPVisionModel, hf.SiglipVisionModel, hf.ViTModel, hf.Dinov2Model, hf.BlipVisionModel)
    ),
    *(Family({"text": ""}, source) for source in (hf.CLIPTextModel, hf.SiglipTextModel, hf.BertModel)),
)


def family_of(model: nn.Module) -> Family | None:
    """The row of `FAMILIES` for a model; of a patched one too."""
    return next((family for family in FAMILIES if family.source and isinstance(model, family.source)), None)
