"""Vision-language models of every family, tiny and with random weights, each with a processor made from its config.

Processors cannot be downloaded here. With torchvision all are of transformers' own classes. Without it image processors
are the PIL ones, and what needs torchvision (video processors, Pixtral's and Llama 4's images) is left out or replaced.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, ProcessorMixin
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import is_torchvision_available

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


def transformers_class(family: str, module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"transformers.models.{family}.{module}_{family}"), name)


def image_processor(family: str, name: str, **options: Any) -> Any:
    """What transformers itself takes: one by torchvision where that is there, else one by PIL."""
    pil = not is_torchvision_available()
    module = "image_processing_pil" if pil else "image_processing"
    return transformers_class(family, module, f"{name}ImageProcessor{'Pil' * pil}")(**options)


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
    from transformers.models.llava.processing_llava import LlavaProcessor

    images = image_processor("clip", "CLIP", **CROPPED)
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


def with_video(processor: type, images: Any, text: Any, video: tuple[str, str], **attributes: Any) -> Any:
    """A processor of a class whose own constructor wants a video processor, too: `video` is its family and name.

    Without torchvision there is none, and the processor has the `attributes` that its constructor would give it.
    """
    if is_torchvision_available():
        own = transformers_class(video[0], "video_processing", f"{video[1]}VideoProcessor")()
        known = inspect.signature(processor).parameters.keys() - {"video_processor"}
        return processor(
            images, text, own, chat_template=text.chat_template, **{k: attributes[k] for k in known & attributes.keys()}
        )

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
    text = tokenizer("<|vision_start|><|image_pad|><|vision_end|>", QWEN)
    images = image_processor(
        "qwen2_vl", "Qwen2VL", patch_size=4, merge_size=2, temporal_patch_size=2,
        size={"shortest_edge": 64, "longest_edge": 512},
    )  # fmt: skip
    start, end, image, video = (text.convert_tokens_to_ids(token) for token in QWEN)
    patches = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3, "in_chans": 3}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    model = built(
        name, text_config={**TEXT, "rope_parameters": rope}, vision_config={**vision, **patches},
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
    )  # fmt: skip
    tokens = {"image_token": QWEN[2], "video_token": QWEN[3], "image_token_id": image, "video_token_id": video}
    kind = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[name]
    video = ("qwen3_vl", "Qwen3VL") if name == "qwen3_vl" else ("qwen2_vl", "Qwen2VL")
    processor = transformers_class(name, "processing", f"{kind}Processor")
    return model, with_video(processor, images, text, video, **tokens)


def llava_next() -> tuple[Any, Any]:
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

    grids = [[16, 32], [32, 16]]
    images = image_processor("llava_next", "LlavaNext", **CROPPED, image_grid_pinpoints=grids)
    return _llava("llava_next", LlavaNextProcessor, images, image_grid_pinpoints=grids)


IDEFICS = (
    "<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>",
    *(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)),
)  # fmt: skip
TILED = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}


def idefics3() -> tuple[Any, Any]:
    from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

    text = tokenizer("<image>", IDEFICS)
    images = image_processor("idefics3", "Idefics3", **TILED)
    processor = Idefics3Processor(images, text, image_seq_len=1, chat_template=text.chat_template)
    return _idefics("idefics3", processor), processor


def smolvlm() -> tuple[Any, Any]:
    from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor

    text = tokenizer("<image>", IDEFICS)
    images = image_processor("smolvlm", "SmolVLM", **TILED)
    names = ("image_token", "fake_image_token", "end_of_utterance_token", "global_image_token")
    tokens: dict[str, Any] = dict(zip(names, IDEFICS[:4], strict=True))
    tokens |= {"video_token": "<video>", "image_seq_len": 1}
    tokens["video_processor"] = SimpleNamespace(num_frames=1, fps=1, video_sampling={}, size={})
    tokens["image_token_id"] = text.convert_tokens_to_ids("<image>")
    processor = with_video(SmolVLMProcessor, images, text, ("smolvlm", "SmolVLM"), **tokens)
    return _idefics("smolvlm", processor), processor


def _idefics(name: str, processor: Any) -> Any:
    return built(
        name, text_config={"model_type": "llama", **TEXT}, vision_config=VISION, scale_factor=2,
        image_token_id=processor.image_token_id, pad_token_id=0,
    )  # fmt: skip


def gemma3() -> tuple[Any, Any]:
    from transformers.models.gemma3.processing_gemma3 import Gemma3Processor

    tokens = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<soft>"}
    text = tokenizer("<boi>", tuple(tokens.values()), **tokens)
    images = image_processor("gemma3", "Gemma3", size={"height": 16, "width": 16}, do_pan_and_scan=False)
    processor = Gemma3Processor(images, text, text.chat_template, image_seq_length=4)
    layers = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    model = built(
        "gemma3", text_config={**TEXT, **layers, "query_pre_attn_scalar": 8}, vision_config=VISION,
        mm_tokens_per_image=4, image_token_index=text.image_token_id, boi_token_index=text.boi_token_id,
        eoi_token_index=text.eoi_token_id,
    )  # fmt: skip
    return model, processor


@functools.cache
def mobilenet() -> str:
    """The name that timm knows a small tower of Gemma 3n's by: 4 blocks in place of 84."""
    try:
        import timm
        from timm.models._efficientnet_builder import decode_arch_def
    except (ImportError, RuntimeError) as error:  # a torchvision made for another torch raises the second
        pytest.skip(f"Gemma 3n needs timm: {error}")
    blocks = [["er_r1_k3_s2_e2_c8"], ["uir_r1_a3_k3_s2_e2_c8"], ["mqa_r1_k3_h2_s1_d4_c8", "uir_r1_a0_k0_s1_e2_c8"]]

    @timm.models.register_model
    def mobilenetv5_tiny_enc(pretrained: bool = False, **options: Any) -> Any:
        return timm.models.mobilenetv5.mobilenetv5_300m_enc(
            pretrained, block_args=decode_arch_def(blocks), stem_size=8, layer_scale_init_value=None,
            msfa_output_resolution=2, **options,
        )  # fmt: skip

    return mobilenetv5_tiny_enc.__name__


def gemma3n() -> tuple[Any, Any]:
    """Half of its text layers take the keys of the other half."""
    tower = mobilenet()
    from transformers.models.gemma3n.feature_extraction_gemma3n import Gemma3nAudioFeatureExtractor
    from transformers.models.gemma3n.processing_gemma3n import Gemma3nProcessor

    at_the_end = {"eoi_token": "<eoi>", "image_token": "<soft>", "eoa_token": "<eoa>", "audio_token": "<heard>"}
    roles = {"boi_token": "<boi>", "boa_token": "<boa>", **at_the_end}
    text = tokenizer("<soft>", ("<boi>", "<boa>"), **roles)
    images = image_processor("siglip", "Siglip", size={"height": 16, "width": 16})
    processor = Gemma3nProcessor(
        Gemma3nAudioFeatureExtractor(), images, text, text.chat_template, image_seq_length=4, audio_seq_length=1
    )
    ids = {f"{role}_id": text.convert_tokens_to_ids(token) for role, token in roles.items()}
    seen, heard = ids["eoi_token_id"], ids["eoa_token_id"]  # where the tokens of images and sounds begin
    sound = {"hidden_size": 16, "conf_num_attention_heads": 2, "conf_num_hidden_layers": 1, "input_feat_size": 16}
    more = {
        "vocab_size": len(text), "vocab_size_per_layer_input": seen, "hidden_size_per_layer_input": 8,
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 16,
        "num_kv_shared_layers": 2, "laurel_rank": 4, "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0],
    }  # fmt: skip
    model = built(
        "gemma3n", text_config={**TEXT, **more},
        vision_config={"architecture": tower, "vocab_size": 2, "vocab_offset": seen},
        audio_config={**sound, "sscp_conv_channel_size": (4, 4), "vocab_size": 2, "vocab_offset": heard},
        vision_soft_tokens_per_image=4, audio_soft_tokens_per_image=1, **ids,
    )  # fmt: skip
    for layer in model.model.language_model.layers:  # zero at first, and with it all that is told to each layer
        torch.nn.init.ones_(layer.altup.correct_output_scale)
    return model, processor


def internvl() -> tuple[Any, Any]:
    from transformers.models.internvl.processing_internvl import InternVLProcessor

    names = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>")
    roles = ("start_image_token", "end_image_token", "context_image_token", "video_token")
    text = tokenizer("<IMG_CONTEXT>", names, **dict(zip(roles, names, strict=True)))
    images = image_processor("got_ocr2", "GotOcr2", size={"height": 16, "width": 16}, max_patches=2)
    ids = dict(zip(("start", "end", "image"), text.convert_tokens_to_ids(list(names[:3])), strict=True))
    processor = with_video(
        InternVLProcessor, images, text, ("internvl", "InternVL"), image_seq_length=1,
        start_image_token="<img>", end_image_token="</img>",
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
    images = image_processor("pixtral", "Pixtral", patch_size={"height": 8, "width": 8}, size={"longest_edge": 32})
    processor = Pixtral(images, text, text.chat_template)
    if is_torchvision_available():
        own = transformers_class("pixtral", "processing", "PixtralProcessor")
        processor = own(images, text, patch_size=4, spatial_merge_size=2, chat_template=text.chat_template)
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
            found["pixel_values"] = torch.as_tensor(np.stack(found["pixel_values"])).bfloat16()
            found["aspect_ratios"] = [[1, 1]] * len(found["pixel_values"])
            return found

    text = tokenizer("<|image|>", LLAMA4)
    size = {"height": 16, "width": 16}
    if is_torchvision_available():
        images = image_processor("llama4", "Llama4", size=size, max_patches=2)
    else:
        images = OneTile(size=size, do_center_crop=False)
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
    try:
        model(input_ids=torch.tensor([[1, 2]]))
    except AttributeError as error:  # transformers 5.24 asks the output of its text model for images
        pytest.skip(f"transformers' own forward of Llama 4 fails: {error}")
    return model, processor


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    made.__name__: made
    for made in (
        gemma3, gemma3n, idefics3, internvl, llama4, llava, llava_next, mistral3, qwen2_5_vl, qwen2_vl, qwen3_vl,
        smolvlm,
    )
}  # fmt: skip
