"""What a trainer is given, made ready: model, tokenizer, adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastpref.models import inner_model, is_peft
from fastpref.trainers.config import PreferenceConfig, unsupported


def load_model(model: Any, args: PreferenceConfig, auto_class: Any, quantization_config: Any = None, **options: Any):
    """A model from a path or a hub id, in fp32 unless `model_init_kwargs` says otherwise; a model as it is."""
    if not isinstance(model, str):
        if quantization_config is not None:
            raise ValueError("quantization_config: got one with a loaded model, want it only with a model's name")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got {type(model).__name__}, want a model's name or a transformers model")
        return model
    kwargs: dict[str, Any] = {**(args.model_init_kwargs or {}), **options}  # type: ignore[dict-item]
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    kwargs.setdefault("dtype", torch.float32)
    if isinstance(kwargs["dtype"], str) and kwargs["dtype"] != "auto":
        kwargs["dtype"] = getattr(torch, kwargs["dtype"])
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    return auto_class.from_pretrained(model, **kwargs)


def load_tokenizer(processing_class: Any, model: Any, args: PreferenceConfig) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    if processing_class is None:
        name = model.config._name_or_path
        if not name:
            raise ValueError("processing_class: got None with a model that came from no folder, want its tokenizer")
        processing_class = AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise unsupported("processing_class", type(processing_class).__name__, "want a tokenizer (no images)")
    if args.pad_token is not None:
        if args.pad_token not in processing_class.get_vocab():
            raise ValueError(f"pad_token: got {args.pad_token!r}, which is not in the tokenizer's vocabulary")
        processing_class.pad_token = args.pad_token
    if processing_class.pad_token is None:
        processing_class.pad_token = processing_class.eos_token
    model.config.get_text_config().pad_token_id = processing_class.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = processing_class.pad_token_id
    return processing_class


def wrap_peft(model: Any, peft_config: Any, args: PreferenceConfig) -> Any:
    """The model with its adapters, if there are any."""
    if peft_config is not None:
        from peft import PeftConfig, get_peft_model

        if not isinstance(peft_config, PeftConfig):
            raise TypeError(f"peft_config: got {type(peft_config).__name__}, want a peft.PeftConfig")
        if is_peft(model):
            raise ValueError("peft_config: got one with a model that has adapters, want merge_and_unload() first")
        model = get_peft_model(model, peft_config)
    if not is_peft(model):
        return model
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        raise unsupported("peft_config", "prompt learning", "want adapters inside the layers, such as LoRA")
    if args.gradient_checkpointing:
        model.enable_input_require_grads()
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        # bf16 adapters, as in QLoRA (arXiv 2305.14314, section 3); DoRA's magnitudes would not move in bf16 (TRL #7268)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    return model


def refuse_router_loss(model: Any, args: PreferenceConfig) -> None:
    """A load-balancing loss over packed prompts would not be TRL's, and none at all must be the user's choice."""
    config = inner_model(model).config.get_text_config()
    own = getattr(config, "router_aux_loss_coef", 0.0) if hasattr(config, "output_router_logits") else 0.0
    coef = own if args.router_aux_loss_coef is None else args.router_aux_loss_coef
    if coef:
        raise unsupported("router_aux_loss_coef", coef, "want 0.0: experts are trained without a load-balancing loss")


def disable_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
