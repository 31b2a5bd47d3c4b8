"""A tiny model of every architecture that `AutoModelForCausalLM` knows, by the names that sizes have in configs."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ARCHITECTURES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
SIZES = {  # the first pattern that a name matches; a size is never enlarged
    r"vocab_size": 97,
    r"max_position_embeddings|n_positions|n_ctx|max_seq_len": 128,
    r"num_hidden_layers|n_layers?|num_layers|decoder_layers|encoder_layers": 2,
    r"hidden_size|n_embd|d_model|dim|word_embed_proj_dim|embedding_size|emb_dim|lru_width|mamba_d_ssm": 32,
    r"num_key_value_heads|num_kv_heads|swa_num_key_value_heads|num_global_key_value_heads": 2,
    r"(swa_|decoder_|encoder_)?(num_)?(attention_)?heads?|n_heads?|(mamba_)?n(um)?_heads|n_mamba_heads": 4,
    r"linear_num_.*_heads|index_n_heads|rotary_dim|index_topk|mamba_dt_rank": 4,
    r"mamba_d_head|mamba_head_dim|mamba_headdim": 16,
    r"(.*_)?head_dims?|d_kv|kv_channels|.*_rank|mamba_d_state|(ssm_)?state_size|(mamba_)?chunk_size": 8,
    r".*ffn_dim|n_inner|d_ff|.*intermediate_size|intermediate_size_mlp|.*ffn_hidden_size": 48,
    r"n_routed_experts|num_experts|num_local_experts|moe_num_experts": 4,
    r"num_experts_per_tok|moe_topk|moe_k|num_experts_per_token|top_k_experts": 2,
    r"n_group|topk_group|first_k_dense_replace": 1,
    r"sliding_window|attention_window_size|attention_chunk_size": 5,
    r"pad_token_id": 0,
    r"bos_token_id": 1,
    r"eos_token_id": 2,
}
_LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8,
           "qk_rope_head_dim": 8, "v_head_dim": 8}  # fmt: skip
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "topk_group": 1, "n_group": 1, "n_shared_experts": 1}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2}
_SHORT_CONV = {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}
MORE: dict[str, dict[str, Any]] = {
    **{name: {**_LATENT, "head_dim": 8} for name in ("axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite",
                                                      "glm_moe_dsa", "kimi_linear", "bailing_hybrid", "youtu")},
    "deepseek_v2": {**_LATENT, **_EXPERTS, "head_dim": 8}, "dots1": _EXPERTS,
    "minicpm3": {**_LATENT, "dim_model_base": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 5},
    **{name: {"head_dim": 8} for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8}, "nemotron_h": {**_HYBRID, "n_groups": 1},
    "granitemoehybrid": _HYBRID, "lfm2": _SHORT_CONV, "lfm2_moe": _SHORT_CONV,
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1}, "bamba": {"attn_layer_indices": [1]},
    "zamba": {"num_hidden_layers": 4, "layer_types": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 4, "layer_types": ["linear_attention", "hybrid"] * 2, "num_mem_blocks": 1},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8},
    "gemma3n_text": {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0], "intermediate_size": 48, "altup_num_inputs": 2,
        "vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8,
    },
}  # fmt: skip
LARGEST = 8_000_000  # parameters


def tiny_config(architecture: str, **more: Any) -> Any:
    cls = CONFIG_MAPPING[architecture]
    default = cls()
    own: dict[str, Any] = {}
    for name in set(default.to_dict()) | set(inspect.signature(cls.__init__).parameters):
        value, size = getattr(default, name, None), _size(name)
        if size is None or isinstance(value, bool) or not isinstance(value, int) or _is_derived(cls, name):
            continue
        own[name] = size if "token_id" in name or value <= 0 else min(size, value)
    types = list(dict.fromkeys(getattr(default, "layer_types", None) or ()))
    if types and not _is_derived(cls, (cls.attribute_map or {}).get("layer_types", "layer_types")):
        own["layer_types"] = types if len(types) > 1 else types * 2
        own["num_hidden_layers"] = len(own["layer_types"])
    return cls(**{**own, **MORE.get(architecture, {}), **more})


def _size(name: str) -> int | None:
    return next((size for pattern, size in SIZES.items() if re.fullmatch(pattern, name)), None)


def _is_derived(cls: type, name: str) -> bool:
    found = [c.__dict__[name] for c in cls.__mro__ if isinstance(c.__dict__.get(name), property)]
    return any(p.fset is None for p in found)


def tiny_model(architecture: str, scale: float = 1.0, **more: Any) -> nn.Module:
    """In evaluation mode, its matrices' random weights `scale` times as large as transformers draws them.

    Raises:
        ValueError: it does not get small.
    """
    config = tiny_config(architecture, **more)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    if config.get_text_config() is not config:
        raise ValueError(f"{architecture}: got a config of several parts")
    with torch.device("meta"):
        number = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
    if number > LARGEST:
        raise ValueError(f"{architecture}: got {number} parameters")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2 and not name.endswith("output_scale"):
                continue
            if not parameter.any():  # experts, routers, and what Gemma 3n tells each layer, which start at zero
                parameter.normal_(std=0.02)
            parameter.mul_(scale)
    return model
