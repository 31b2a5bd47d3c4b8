"""Pairs about small pictures, and what a vision-language model makes of them one sequence at a time."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image, ImageDraw

from tests.support_vision_families import FAMILIES

__all__ = ["FAMILIES", "one_sequence", "own_logps", "picture", "records"]


def picture(number: int, size: tuple[int, int] = (20, 16)) -> Image.Image:
    """A small picture, another one for each number."""
    image = Image.new("RGB", size, (37 * number % 256, 91 * number % 256, 200))
    ImageDraw.Draw(image).ellipse(
        (number % 5, 2, 8 + number % 7, 12), fill=(255 - 40 * number % 256, 20 * number % 256, 9)
    )
    return image


def records(number: int = 6) -> list[dict[str, Any]]:
    """Pairs about pictures of several sizes. Every third has two pictures, the fourth none."""
    found = []
    for i in range(number):
        count = 0 if i == 3 else 2 if i % 3 == 2 else 1
        found.append({
            "images": [picture(i + 7 * k, (16 + 4 * (i % 3), 16 + 8 * k)) for k in range(count)],
            "prompt": [{"role": "user", "content": f"What is in it, {i}?"}],
            "chosen": [{"role": "assistant", "content": "A circle" + "!" * (i % 4)}],
            "rejected": [{"role": "assistant", "content": "Nothing" if i % 2 else "A red square, I think"}],
        })  # fmt: skip
    return found


def one_sequence(processor: Any, record: dict[str, Any], side: str) -> tuple[dict[str, Any], int]:
    """(a model's inputs of one response after its prompt, the prompt's tokens), by the processor alone."""
    images = record["images"]
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": record["prompt"][0]["content"]}]
    asked = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    options = {"return_tensors": "pt", "add_special_tokens": False}
    inputs = dict(processor(text=[asked], **({"images": [images]} if images else {}), **options))
    told = f"{record[side][0]['content']}</s>"
    response = processor.tokenizer(told, **options)["input_ids"]
    prompt = inputs["input_ids"].shape[1]
    inputs["input_ids"] = ids = torch.cat([inputs["input_ids"], response], 1)
    inputs["attention_mask"] = torch.ones_like(ids)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], torch.zeros_like(response)], 1)
    if "pixel_values" in inputs:  # Llama 4's are bf16
        inputs["pixel_values"] = inputs["pixel_values"].float()
    return inputs, prompt


@torch.no_grad()
def own_logps(model: Any, processor: Any, record: dict[str, Any], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probs of the prompt's text tokens, of the response's), from the model's own logits of one sequence alone."""
    inputs, prompt = one_sequence(processor, record, side)
    ids = inputs["input_ids"]
    logps = model(**inputs, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    logps = logps.gather(1, ids[0, 1:, None])[:, 0]
    image = torch.isin(ids[0, 1:prompt], torch.tensor([processor.image_token_id]))
    return logps[: prompt - 1][~image], logps[prompt - 1 :]
