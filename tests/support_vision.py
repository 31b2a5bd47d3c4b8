"""Vision-language models of every family, tiny and with random weights, each with a processor made from its config.

Processors cannot be downloaded here. Their image processors are the PIL ones, which need no torchvision; so does no
video processor, which is why the Qwen processors are made without one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, ProcessorMixin
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fastpref.models.small_vision import byte_tokenizer

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
    return byte_tokenizer(
        [*SPECIAL, *more], pad_token="<pad>", eos_token="</s>", extra_special_tokens=roles,
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

    images = CLIPImageProcessorPil(**CROPPED)
    return _llava("llava", LlavaProcessor, images, vision_feature_layer=-2)


CROPPED = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}


def _llava(name: str, processor_class: Any, images: Any, **more: Any) -> tuple[Any, Any]:
    text = tokenizer("<image>", ("<image>",))
    processor = processor_class(
        images, text, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=text.chat_template,
    )  # fmt: skip
    model = built(
        name, text_config={"model_type": "llama", **TEXT},
        vision_config={"model_type": "clip_vision_model", **VISION, "projection_dim": 16},
        image_token_index=processor.image_token_id, **more,
    )  # fmt: skip
    return model, processor


QWEN = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def without_video(processor: type, images: Any, text: Any, **attributes: Any) -> Any:
    """A processor of a class whose own constructor wants a video processor, too, which needs torchvision."""

    class Processor(processor):  # type: ignore[valid-type, misc]
        def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str, **values: Any) -> None:
            for name, value in values.items():
                setattr(self, name, value)
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    return Processor(images, text, text.chat_template, **attributes)


def qwen2_vl() -> tuple[Any, Any]:
    return _qwen("qwen2_vl", {"embed_dim": 16, "hidden_size": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2})


def qwen2_5_vl() -> tuple[Any, Any]:
    vision = {"hidden_size": 16, "out_hidden_size": 32, "depth": 2, "num_heads": 2, "intermediate_size": 24}
    return _qwen("qwen2_5_vl", vision | {"window_size": 16, "fullatt_block_indexes": [1]})


def qwen3_vl() -> tuple[Any, Any]:
    vision = {"hidden_size": 16, "out_hidden_size": 32, "depth": 2, "num_heads": 2, "intermediate_size": 24}
    return _qwen("qwen3_vl", vision | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]})


def _qwen(name: str, vision: dict[str, Any]) -> tuple[Any, Any]:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor

    text = tokenizer("<|vision_start|><|image_pad|><|vision_end|>", QWEN)
    images = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 512}
    )
    start, end, image, video = (text.convert_tokens_to_ids(token) for token in QWEN)
    patches = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3, "in_chans": 3}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    model = built(
        name, text_config={**TEXT, "rope_parameters": rope}, vision_config={**vision, **patches},
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
    )  # fmt: skip
    tokens = {"image_token": QWEN[2], "video_token": QWEN[3], "image_token_id": image, "video_token_id": video}
    return model, without_video(Qwen2VLProcessor, images, text, **tokens)


def llava_next() -> tuple[Any, Any]:
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

    grids = [[16, 32], [32, 16]]
    images = LlavaNextImageProcessorPil(**CROPPED, image_grid_pinpoints=grids)
    return _llava("llava_next", LlavaNextProcessor, images, image_grid_pinpoints=grids)


IDEFICS = (
    "<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>",
    *(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)),
)  # fmt: skip


def idefics3() -> tuple[Any, Any]:
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

    text = tokenizer("<image>", IDEFICS)
    images = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    processor = Idefics3Processor(images, text, image_seq_len=1, chat_template=text.chat_template)
    return _idefics("idefics3", processor), processor


def smolvlm() -> tuple[Any, Any]:
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
    from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor

    text = tokenizer("<image>", IDEFICS)
    images = SmolVLMImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    names = ("image_token", "fake_image_token", "end_of_utterance_token", "global_image_token")
    tokens: dict[str, Any] = dict(zip(names, IDEFICS[:4], strict=True))
    tokens |= {"video_token": "<video>", "image_seq_len": 1}
    tokens["video_processor"] = SimpleNamespace(num_frames=1, fps=1, video_sampling={}, size={})
    tokens["image_token_id"] = text.convert_tokens_to_ids("<image>")
    processor = without_video(SmolVLMProcessor, images, text, **tokens)
    return _idefics("smolvlm", processor), processor


def _idefics(name: str, processor: Any) -> Any:
    return built(
        name, text_config={"model_type": "llama", **TEXT}, vision_config=VISION, scale_factor=2,
        image_token_id=processor.image_token_id, pad_token_id=0,
    )  # fmt: skip


def gemma3() -> tuple[Any, Any]:
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
    from transformers.models.gemma3.processing_gemma3 import Gemma3Processor

    tokens = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<soft>"}
    text = tokenizer("<boi>", tuple(tokens.values()), **tokens)
    images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16}, do_pan_and_scan=False)
    processor = Gemma3Processor(images, text, text.chat_template, image_seq_length=4)
    layers = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    model = built(
        "gemma3", text_config={**TEXT, **layers, "query_pre_attn_scalar": 8}, vision_config=VISION,
        mm_tokens_per_image=4, image_token_index=text.image_token_id, boi_token_index=text.boi_token_id,
        eoi_token_index=text.eoi_token_id,
    )  # fmt: skip
    return model, processor


def internvl() -> tuple[Any, Any]:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
    from transformers.models.internvl.processing_internvl import InternVLProcessor

    names = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>")
    text = tokenizer("<IMG_CONTEXT>", names)
    images = GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}, max_patches=2)
    ids = dict(zip(("start", "end", "image"), text.convert_tokens_to_ids(list(names[:3])), strict=True))
    processor = without_video(
        InternVLProcessor, images, text, image_seq_length=1, start_image_token="<img>", end_image_token="</img>",
        start_image_token_id=ids["start"], end_image_token_id=ids["end"], image_token="<IMG_CONTEXT>",
        video_token="<video>", image_token_id=ids["image"],
        multimodal_pattern=re.compile("(?P<image><IMG_CONTEXT>)|(?P<video><video>)"),
    )  # fmt: skip
    model = built(
        "internvl", text_config={"model_type": "qwen2", **TEXT},
        vision_config={**VISION, "image_size": [16, 16], "patch_size": [8, 8], "use_mean_pooling": True},
        image_token_id=ids["image"], image_seq_length=1, downsample_ratio=0.5,
    )  # fmt: skip
    return model, processor


def mistral3() -> tuple[Any, Any]:
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

    class Pixtral(ProcessorMixin):  # transformers' own needs torchvision
        image_token = "[IMG]"

        def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str) -> None:
            self.image_token_id = tokenizer.convert_tokens_to_ids("[IMG]")
            super().__init__(image_processor, tokenizer, chat_template=chat_template)

        def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
            height, width = image_inputs["image_sizes"][image_idx]
            rows = ["[IMG]" * (int(width) // 8)] * (int(height) // 8)
            return "[IMG_BREAK]".join(rows) + "[IMG_END]"

    text = tokenizer("[IMG]", ("[IMG]", "[IMG_BREAK]", "[IMG_END]"))
    images = PixtralImageProcessorPil(patch_size={"height": 8, "width": 8}, size={"longest_edge": 32})
    processor = Pixtral(images, text, text.chat_template)
    model = built(
        "mistral3", text_config={"model_type": "mistral", **TEXT, "sliding_window": None},
        vision_config={"model_type": "pixtral", **VISION, "patch_size": 4, "image_size": 32, "head_dim": 8},
        image_token_index=processor.image_token_id, spatial_merge_size=2,
    )  # fmt: skip
    return model, processor


LLAMA4 = ("<|image|>", "<|image_start|>", "<|image_end|>", "<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>")


def llama4() -> tuple[Any, Any]:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llama4.processing_llama4 import Llama4Processor

    class OneTile(CLIPImageProcessorPil):  # transformers' own needs torchvision
        def preprocess(self, *args: Any, **kwargs: Any) -> Any:
            found = super().preprocess(*args, **kwargs)
            found["aspect_ratios"] = [[1, 1]] * len(found["pixel_values"])
            return found

    text = tokenizer("<|image|>", LLAMA4)
    images = OneTile(size={"height": 16, "width": 16}, do_center_crop=False)
    processor = Llama4Processor(images, text, patch_size=4, pixel_shuffle_ratio=0.5, chat_template=text.chat_template)
    vision = {
        **VISION, "patch_size": 4, "intermediate_size": 64, "vision_output_dim": 24, "projector_input_dim": 24,
        "projector_output_dim": 24,
    }  # fmt: skip
    more = {"intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 16}
    model = built(
        "llama4", text_config={**TEXT, **more}, vision_config=vision,
        image_token_index=text.convert_tokens_to_ids("<|patch|>"), boi_token_index=5, eoi_token_index=6,
    )  # fmt: skip
    return model, processor


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    made.__name__: made
    for made in (
        gemma3, idefics3, internvl, llama4, llava, llava_next, mistral3, qwen2_5_vl, qwen2_vl, qwen3_vl, smolvlm,
    )
}  # fmt: skip


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
