# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from tiny_models import tiny_batch, tiny_blip
from vlm_families import make_vlm, vlm_batch

from madtp.data import easy_vqa, emoji_icons
from madtp.profiling import timing


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch):
    """A time is the median of two rounds where a test does not say of how many: no test asserts how long it is."""
    for function in (timing.medians, timing.time_per_sample, timing.time_per_layer):
        monkeypatch.setitem(function.__kwdefaults__, "rounds", 2)


@pytest.fixture
def blip():
    return tiny_blip()


@pytest.fixture
def batch():
    return tiny_batch()


@pytest.fixture
def llava():
    """A tiny decoder that reads images, and a prompt batch for it."""
    model = make_vlm("LLaVA")
    return model, vlm_batch("LLaVA", model)


@pytest.fixture
def without_gradients():
    with torch.no_grad():
        yield


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
