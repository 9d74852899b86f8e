# SPDX-License-Identifier: Apache-2.0
"""A question about an image, answered with all image tokens and with some: what the scripts of two decoders share."""

import argparse
import contextlib
import time

import torch
from PIL import Image, ImageDraw
from transformers import AutoProcessor

import madtp
from madtp.dtp.keep_rules import RULES


def parser(description: str, model: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default=model, help="a folder, or an id on the Hugging Face Hub")
    made.add_argument("--image", help="a file; without it a red square is drawn")
    made.add_argument("--question", default="What is the color of the shape?")
    made.add_argument("--keep", default="0.25", help="of each image: a share such as 0.25, or a count such as 64")
    made.add_argument("--rule", default="divprune", choices=[n for n, e in RULES.items() if not e.needs_importance])
    made.add_argument("--new-tokens", type=int, default=64)
    made.add_argument("--dtype", default="auto", help="of the weights: auto, bfloat16, float32")
    return made


def drawn() -> Image.Image:
    image = Image.new("RGB", (336, 336), "white")
    ImageDraw.Draw(image).rectangle((96, 96, 240, 240), fill="red")
    return image


@torch.no_grad()
def answer(kind, options: argparse.Namespace) -> None:
    """Loads a model of the class and says what it answers, dense and pruned, on how many tokens and in what time."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    model = kind.from_pretrained(options.model, dtype=options.dtype).to(device).eval()
    processor = AutoProcessor.from_pretrained(options.model)
    image = Image.open(options.image).convert("RGB") if options.image else drawn()
    content = [{"type": "image", "image": image}, {"type": "text", "text": options.question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(device, model.dtype)
    amount = float(options.keep) if "." in options.keep else int(options.keep)
    handle = madtp.patch(model, keep={"projector": madtp.Keep(amount, rule=options.rule)})
    print(f"image tokens left: {sum(handle.counts(**inputs)['projector'])}")
    length = inputs["input_ids"].shape[1]
    for name, context in (("dense", handle.dense()), ("pruned", contextlib.nullcontext())):
        with context:
            begin = time.perf_counter()
            out = model.generate(**inputs, max_new_tokens=options.new_tokens, do_sample=False)
            seconds = time.perf_counter() - begin
        text = processor.batch_decode(out[:, length:], skip_special_tokens=True)[0].strip()
        print(f"{name}: {seconds:.1f} s: {text}")
    print(handle.explain())
