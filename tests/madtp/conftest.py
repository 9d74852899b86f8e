import pytest
import torch
from transformers import BlipConfig, BlipForQuestionAnswering

from madtp.tasks import easy_vqa, emoji_icons


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


@pytest.fixture
def drawn(monkeypatch):
    """EasyVqa of 24 drawn images of a square, six questions each: what runs on it needs no data set."""
    colors = {"red": (255, 0, 0), "blue": (0, 0, 255), "black": (0, 0, 0), "green": (0, 255, 0)}

    def read(split, limit, cache):
        generator = torch.Generator().manual_seed(len(split))
        images = torch.full((24, 3, 64, 64), 240, dtype=torch.uint8)
        questions = []
        for image in range(24):
            top, left = torch.randint(40, (2,), generator=generator).tolist()
            color = list(colors)[image % 4]
            images[image, :, top : top + 20, left : left + 20] = torch.tensor(colors[color])[:, None, None]
            questions.append(("what is the color of the shape?", color, image))
            questions.append(("what shape is in the image?", "rectangle", image))
            for other in colors:
                questions.append((f"is there a {other} shape?", "yes" if other == color else "no", image))
        return images, questions[:limit]

    monkeypatch.setattr(easy_vqa, "_read", read)


SUBGROUPS = ("animal-bird", "animal-mammal", "food-fruit", "food-vegetable", "tool", "heart")


@pytest.fixture
def few_emoji(monkeypatch, tmp_path):
    """Emoji of 120 made-up things, 20 of a kind, that every vendor draws as a disc: no data set, no SVG renderer."""

    def read(cache):
        records, drawings = [], {vendor: {} for vendor in emoji_icons.ICONS}
        for i in range(120):
            subgroup = SUBGROUPS[i % len(SUBGROUPS)]
            name = f"{subgroup.split('-')[-1]}{i}"
            records.append({"hexcode": f"{i:04X}-FE0F", "label": name, "tags": [name, "small", "round", "odd"]})
            records[-1]["subgroup"] = subgroup
            for shade, codes in enumerate(drawings.values()):
                codes[f"{i:04x}"] = f"{40 * (i % len(SUBGROUPS))} {40 * shade}"
        return records, drawings

    def render(svg, side):
        red, green = map(int, svg.split())
        along = torch.linspace(-1, 1, side)
        inside = along[:, None] ** 2 + along[None, :] ** 2 < 1
        return torch.stack([torch.full((side, side), value) for value in (red, green, 250)] + [255 * inside], -1).byte()

    monkeypatch.setattr(emoji_icons, "_read", read)
    monkeypatch.setattr(emoji_icons, "render", render)
    return emoji_icons.Emoji(tmp_path / "cache")
