"""Vision-language models of every family, tiny and with random weights, each with a processor made from its config.

Processors cannot be downloaded here. Their image processors are the PIL ones, which need no torchvision; so does no
video processor, which is why the Qwen processors are made without one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image, ImageDraw
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

TEMPLATE = (
    "{% for message in messages %}{{ '<s>' + message['role'] + ':' }}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ IMAGE }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
)
SPECIAL = ("<pad>", "<s>", "</s>")
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 320, "max_position_embeddings": 2048, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "attention_dropout": 0.0,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8, "num_channels": 3,
}  # fmt: skip


def tokenizer(image: str, more: tuple[str, ...] = (), **roles: str) -> Any:
    """Bytes as tokens, and one for each special token. `image` stands for an image in the chat template."""
    names = [*SPECIAL, *more]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*names, *alphabet])}, merges=[]))
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces.decoder = decoders.ByteLevel()
    pieces.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces, pad_token="<pad>", eos_token="</s>", extra_special_tokens=roles,
        chat_template=TEMPLATE.replace("IMAGE", f"'{image}'"),
    )  # fmt: skip


def built(name: str, seed: int = 0, **options: Any) -> Any:
    config = CONFIG_MAPPING[name](**options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():  # large enough for one token to matter to another
                if parameter.dim() > 1:
                    parameter.normal_(std=0.2 if parameter.shape[-1] <= 48 else 0.05)
    return model.eval()


def llava() -> tuple[Any, Any]:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.processing_llava import LlavaProcessor

    text = tokenizer("<image>", ("<image>",))
    size = {"shortest_edge": 16}
    images = CLIPImageProcessorPil(size=size, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        images, text, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=text.chat_template,
    )  # fmt: skip
    model = built(
        "llava", text_config={"model_type": "llama", **TEXT},
        vision_config={"model_type": "clip_vision_model", **VISION, "projection_dim": 16},
        image_token_index=text.convert_tokens_to_ids("<image>"), vision_feature_layer=-2,
    )  # fmt: skip
    return model, processor


QWEN = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def qwen2_vl() -> tuple[Any, Any]:
    return _qwen("qwen2_vl", {"embed_dim": 16, "hidden_size": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2})


def _qwen(name: str, vision: dict[str, Any], **text_options: Any) -> tuple[Any, Any]:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor

    class Processor(Qwen2VLProcessor):
        def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str) -> None:
            self.image_token, self.video_token = QWEN[2:]
            self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(QWEN[2:])
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    text = tokenizer("<|vision_start|><|image_pad|><|vision_end|>", QWEN)
    images = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 512}
    )
    start, end, image, video = (text.convert_tokens_to_ids(token) for token in QWEN)
    patches = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3, "in_chans": 3}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    model = built(
        name, text_config={**TEXT, "rope_parameters": rope, **text_options}, vision_config={**vision, **patches},
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
    )  # fmt: skip
    return model, Processor(images, text, text.chat_template)


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {"llava": llava, "qwen2_vl": qwen2_vl}


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
