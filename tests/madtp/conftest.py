import pytest
import torch
from transformers import BlipConfig, BlipForQuestionAnswering


def tiny_blip(seed: int = 0) -> BlipForQuestionAnswering:
    """A BLIP of two layers a branch: 17 image tokens, 32 channels."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 2}
    text = shape | {"encoder_hidden_size": 32, "vocab_size": 20, "max_position_embeddings": 16}
    text |= {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    text |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "label_smoothing": 0.0}
    vision = shape | {"image_size": 16, "patch_size": 4, "initializer_range": 0.3}
    model = BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=vision, projection_dim=32))
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


@pytest.fixture
def blip():
    return tiny_blip()


@pytest.fixture
def batch():
    return tiny_batch()
