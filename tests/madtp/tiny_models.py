# SPDX-License-Identifier: Apache-2.0
"""Tiny transformers models with random weights, their inputs, and the ragged calls they make."""

import torch
import transformers as hf
from torch.utils._python_dispatch import TorchDispatchMode

SHAPE = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "num_hidden_layers": 2}
IMAGE = SHAPE | {"image_size": 16, "patch_size": 4}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
RIGHT = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]])
LEFT = RIGHT.flip(1)


class Calls(TorchDispatchMode):
    """The arguments of every varlen_attention that runs."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.madtp.varlen_attention.default:
            self.seen.append(args)
        return function(*args, **(kwargs or {}))


def build(kind, config, seed=0):
    torch.manual_seed(seed)
    config._attn_implementation = "eager"
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def tokens(mask=RIGHT, seed=1, vocabulary=40):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, vocabulary, mask.shape, generator=generator)


def images():
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def llama(**options):
    config = SHAPE | {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 40} | options
    return build(hf.LlamaForCausalLM, hf.LlamaConfig(**config, bos_token_id=1, eos_token_id=None, pad_token_id=0))


def bert(**options):
    return build(hf.BertForMaskedLM, hf.BertConfig(**SHAPE, **NO_DROPOUT, vocab_size=40, **options))


def bart():
    shape = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 40, "dropout": 0.0}
    shape |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    return build(hf.BartForConditionalGeneration, hf.BartConfig(**shape, max_position_embeddings=32))


def bart_inputs(target_length=5):
    target = torch.ones(3, target_length, dtype=torch.long)
    target[1, 3:] = 0
    return {
        "input_ids": tokens(),
        "attention_mask": RIGHT,
        "decoder_input_ids": tokens(target, seed=2),
        "decoder_attention_mask": target,
    }


def text_inputs(mask):
    return {"input_ids": tokens(mask), "attention_mask": mask}


def run(model, inputs, implementation):
    """Real outputs' values and the gradients of a sum over them, with the ragged calls."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    with Calls() as calls:
        output = model(**inputs)
    return (output.logits if "logits" in output else output.last_hidden_state), calls.seen


def tiny_blip(seed: int = 0) -> hf.BlipForQuestionAnswering:
    """A BLIP of two layers a branch: 17 image tokens, 32 channels."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 2}
    text = shape | {"encoder_hidden_size": 32, "vocab_size": 20, "max_position_embeddings": 16}
    text |= {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    text |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "label_smoothing": 0.0}
    vision = shape | {"image_size": 16, "patch_size": 4, "initializer_range": 0.3}
    model = hf.BlipForQuestionAnswering(hf.BlipConfig(text_config=text, vision_config=vision, projection_dim=32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def tiny_batch(questions: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(questions, 9, dtype=torch.long)
    mask[1, 6:] = 0
    mask[2, 3:] = 0
    return {
        "pixel_values": torch.randn(questions, 3, 16, 16, generator=generator),
        "input_ids": torch.randint(4, 20, (questions, 9), generator=generator) * mask,
        "attention_mask": mask,
        "labels": torch.tensor([[2, 7, 3]]).repeat(questions, 1),
    }
