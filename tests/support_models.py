"""Tiny models of the families that are tested, with random weights."""

from __future__ import annotations

import transformers
from support import DEVICE
from torch import nn

SMALL = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
# class prefix -> what its tiny config has beyond SMALL, so that every transform of the logits does something
FAMILIES = {
    "Llama": {"tie_word_embeddings": True},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Mistral": {"sliding_window": 4},
    "Mixtral": EXPERTS,
    "Gemma": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8},
    "Gemma3": {"head_dim": 8, "final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8},
    "Phi": {},  # its head has a bias
    "Phi3": {},
    "Cohere": {"logit_scale": 0.25},
    "Cohere2": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 3.0},
    "GraniteMoe": {"logits_scaling": 3.0, **EXPERTS},
    "FalconH1": {"lm_head_multiplier": 0.4, **MAMBA},
    "MiniCPM3": {"dim_model_base": 8, "num_key_value_heads": 4, **LATENT},
    "HyperCLOVAX": {"logits_scaling": 0.2},
    "NanoChat": {"final_logit_softcapping": 0.5},
    "GPT2": {},
    "GPTNeoX": {},
    "SmolLM3": {},
    "Olmo": {},
    "Olmo2": {},
    "Olmo3": {},
}
RECENT = ("MiniCPM3", "HyperCLOVAX", "NanoChat", "Olmo3")  # later than transformers 5.10


def model_of(family: str, **options) -> nn.Module:
    """A tiny model with random weights, a head bias included, and logits of size 1."""
    suffix = "Text" if family == "Gemma3" else ""
    config = getattr(transformers, f"{family}{suffix}Config")(**{**SMALL, **FAMILIES[family], **options})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    layer = model.get_output_embeddings()
    nn.init.normal_(layer.weight, std=0.3)
    if layer.bias is not None:
        nn.init.normal_(layer.bias, std=0.3)
    return model.to(DEVICE)
