"""A tiny vision-language model with random weights, for examples and tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

IMAGE = "<image>"
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer(special: Sequence[str], **options: Any) -> Any:
    """A tokenizer whose tokens are the `special` ones, then bytes. `options` are those of `PreTrainedTokenizerFast`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces.decoder = decoders.ByteLevel()
    pieces.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=pieces, **options)


def tiny_vision(seed: int = 0) -> tuple[Any, Any]:
    """(a LLaVA with two layers of text and two of vision, its processor), made in a second.

    Its tokens are bytes. Pictures become 28 x 28 pixels and 16 tokens. `seed` decides the weights; the global random
    state stays as it was.
    """
    from transformers import CLIPImageProcessorPil, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", IMAGE]
    tokenizer = byte_tokenizer(special, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    size = {"height": 28, "width": 28}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size=size, crop_size=size), tokenizer, patch_size=7,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip
    text = {
        "model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2,
    }  # fmt: skip
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 7, "projection_dim": 32,
    }  # fmt: skip
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=special.index(IMAGE))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlavaForConditionalGeneration(config), processor
