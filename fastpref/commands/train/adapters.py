"""Adapters and quantised weights in `fastpref train`: new adapters, and those of a folder that go on training."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from fastpref.trainers.config import PreferenceConfig

ALL_LINEAR = "all-linear"
RANK = 16  # TRL's


@dataclass
class AdapterOptions:
    """The options, named as in TRL's `ModelConfig`."""

    use_peft: bool = field(default=False, metadata={"help": f"Train LoRA adapters, of rank {RANK} without --lora_r."})
    lora_r: int | None = field(
        default=None, metadata={"help": "Train LoRA adapters of this rank, instead of all weights."}
    )
    lora_alpha: int | None = field(default=None, metadata={"help": "LoRA's scale (default: twice the rank)."})
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA's dropout."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": f"Layers with adapters (default: {ALL_LINEAR}, without heads)."}
    )
    lora_modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Layers that are trained whole beside the adapters.", "aliases": ["--modules_to_save"]},
    )
    use_rslora: bool = field(default=False, metadata={"help": "Rank-stabilised: scale by alpha / sqrt(r)."})
    use_dora: bool = field(default=False, metadata={"help": "DoRA: magnitudes and directions apart."})
    load_in_4bit: bool = field(default=False, metadata={"help": "QLoRA: the base model's layers in 4 bits."})
    load_in_8bit: bool = field(default=False, metadata={"help": "The base model's layers in 8 bits."})
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"help": "Of 4 bits.", "choices": ["nf4", "fp4"]})
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "Of 4 bits: quantise the scales, too."})


LORA = {  # options as LoraConfig has them
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_modules_to_save": "modules_to_save",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}


def checked(options: AdapterOptions) -> None:
    """The options, once they are checked.

    Raises:
        ValueError: an option's value is not possible, or two options exclude each other.
    """
    if options.lora_r is not None and options.lora_r < 1:
        raise ValueError(f"lora_r: got {options.lora_r}, want at least 1")
    if options.load_in_4bit and options.load_in_8bit:
        raise ValueError("load_in_8bit: got one beside load_in_4bit, want one of them")
    if not options.load_in_4bit and (options.use_bnb_nested_quant or options.bnb_4bit_quant_type != "nf4"):
        raise ValueError("load_in_4bit: got none beside its other options, want it with them")


def lora(options: AdapterOptions, task: str, going_on: Any | None) -> Any | None:
    """PEFT's configuration of new adapters.

    None if all weights train, or if the model already has adapters (`going_on` is their configuration).

    Raises:
        ValueError: options are for adapters that do not exist or differ from the model's, or quantised weights would
            have to train.
        ImportError: PEFT is not installed.
    """
    given = {f.name: getattr(options, f.name) for f in fields(options) if f.name in LORA}
    given = {name: value for name, value in given.items() if value}
    if going_on is not None:
        _agree(given, going_on)
        return None
    if options.lora_r is None and not options.use_peft:
        if given:
            raise ValueError(
                f"lora_r: got none beside other LoRA options ({', '.join(given)}), want the adapters' rank"
            )
        if options.load_in_4bit or options.load_in_8bit:
            name = "load_in_4bit" if options.load_in_4bit else "load_in_8bit"
            raise ValueError(f"{name}: got it without adapters, want lora_r: quantised weights do not train")
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError(f"{error}; run `pip install 'fastpref[peft]'`") from error
    rank = options.lora_r or RANK
    made = {"r": rank, "lora_alpha": 2 * rank} | {LORA[name]: value for name, value in given.items()}
    if options.lora_target_modules in (None, [ALL_LINEAR]):
        made["target_modules"] = ALL_LINEAR
        if task != "CAUSAL_LM":  # PEFT itself leaves out the output head, not score heads
            made["exclude_modules"] = ["score"]
    return LoraConfig(task_type=task, **made)


def _agree(given: dict[str, Any], going_on: Any) -> None:
    for name, value in given.items():
        now = getattr(going_on, LORA[name], None)
        agrees = value == now
        if name == "lora_target_modules":  # all of them are a list by now
            agrees = value == [ALL_LINEAR] or set(value) == set(now or ())
        if name == "lora_modules_to_save":  # PEFT adds heads
            agrees = set(value) <= set(now or ())
        if not agrees:
            raise ValueError(
                f"{name}: got {value!r} with a model that is an adapter with {now!r}, which goes on training; want "
                "the same, or this option left out, or a base model"
            )


def quantization(options: AdapterOptions, args: PreferenceConfig) -> Any | None:
    """The configuration of bitsandbytes, which computes in the precision of the run. None where nothing is quantised.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    if not (options.load_in_4bit or options.load_in_8bit):
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("No module named 'bitsandbytes'; run `pip install 'fastpref[quantized]'`")
    from transformers import BitsAndBytesConfig

    if options.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=options.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=options.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32,
    )


def describe(name: str, config: Any, has_reference: bool) -> str:
    """What is said once of a folder's adapter."""
    rank = f", r = {config.r}" if hasattr(config, "r") else ""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    reference = "; the reference is the policy as it is now, with the adapter" if has_reference else ""
    return f"Going on with the adapter in {name} ({kind}{rank}) of {config.base_model_name_or_path}{reference}"
