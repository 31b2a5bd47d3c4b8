"""Makes ready what a trainer is given: model, tokenizer, adapters. Refuses what cannot be trained."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fastpref.data.collators import PackedCollator
from fastpref.data.images import tokenizer_of
from fastpref.models import adapters, inner_model, is_peft, vision
from fastpref.trainers.config import PreferenceConfig, unsupported

FACTORS = re.compile(r"lora_(embedding_)?[AB]\.")
NOISE = ("drop", "jitter")  # in the names of its rates


def check_datasets(train_dataset: Any, eval_dataset: Any, group_by_prompt: bool = False) -> None:
    """Refuses data that a trainer cannot read.

    Raises:
        ValueError: there is nothing to train on, or prompts cannot be grouped.
        TypeError: `train_dataset` is several data sets, or something is no data set.
    """
    if train_dataset is None:
        raise ValueError("train_dataset: got None, want a Dataset or IterableDataset (`train_dataset` is required)")
    if isinstance(train_dataset, Mapping):
        raise TypeError(
            f"train_dataset: got {type(train_dataset).__name__} of {', '.join(map(str, train_dataset))}; want one of "
            "them (`train_dataset` must be a `Dataset` or `IterableDataset`)"
        )
    for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
        for one in dataset.values() if isinstance(dataset, Mapping) else [dataset]:
            if one is not None and not hasattr(one, "map"):
                raise TypeError(f"{name}: got {type(one).__name__}, want a datasets.Dataset or IterableDataset")
    if group_by_prompt and not hasattr(train_dataset, "select"):
        raise ValueError(
            "group_by_prompt: got True with an IterableDataset, want False or a Dataset: a stream's prompts are not "
            "known before it has been read"
        )


def hand_out_whole(args: PreferenceConfig) -> None:
    """Sets how Accelerate hands batches out: whole, and copied while the device works on the one before.

    Raises:
        ValueError: `dispatch_batches` is on.
    """
    how: Any = args.accelerator_config
    if how.dispatch_batches:
        raise unsupported("dispatch_batches", True, "a packed batch cannot be cut into ranks' shares")
    how.dispatch_batches = False
    if args.dataloader_pin_memory:
        how.non_blocking = True


def check_parallel(args: PreferenceConfig, *, deepspeed: bool, fsdp: bool) -> None:
    """Refuses what the chosen way to use several devices cannot do.

    Raises:
        ValueError: names the field of `args`.
    """
    if args.token_budget is not None and deepspeed:
        raise unsupported("token_budget", args.token_budget, "DeepSpeed would take a step for every part")
    if args.token_budget is not None and fsdp:
        reason = "FSDP gathers weights in every part, and the ranks have different numbers of parts"
        raise unsupported("token_budget", args.token_budget, reason)
    if args.n_gpu > 1:
        raise unsupported("nn.DataParallel", f"{args.n_gpu} GPUs in one process", "launch with torchrun")
    if args.torch_compile and (fsdp or deepspeed):
        raise unsupported("torch_compile", True, "want no FSDP or DeepSpeed with it")


def is_zero3(accelerator: Any) -> bool:
    """Whether DeepSpeed shards the parameters (stage 3)."""
    return getattr(getattr(accelerator.state, "deepspeed_plugin", None), "zero_stage", 0) == 3


@contextlib.contextmanager
def said_of(argument: str) -> Iterator[None]:
    """Errors about a `dataset`, in a `with` block, say which argument it was."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("dataset"):
            raise
        raise ValueError(argument + str(error).removeprefix("dataset")) from None


def check_limits(collator: PackedCollator, vocabulary: int, train_dataset: Any, eval_dataset: Any) -> None:
    """Checks every record before training against the model's positions and vocabulary.

    Done only where the model's positions end, or where the tokenizer knows more tokens than the model. Streams are
    checked batch by batch instead.

    Raises:
        ValueError: a record is too long, or has a token without an embedding.
    """
    limits = collator.limits
    if limits is None or (limits.positions is None and (limits.tokens is None or vocabulary <= limits.tokens)):
        return
    evaluated = eval_dataset if isinstance(eval_dataset, Mapping) else {"eval_dataset": eval_dataset}
    for name, dataset in {"train_dataset": train_dataset, **evaluated}.items():
        for number, example in enumerate(dataset if hasattr(dataset, "select") else (), 1):
            (group,) = collator.groups([example])
            limits.check((s.ids for s in group), f"a sequence in record {number} of {name}")


def refuse_options(options: dict[str, Any], gives_scores: bool) -> None:
    """Removes from `options` what the trainers cannot use.

    Raises:
        ValueError: one of them is given.
    """
    reasons = {
        "data_collator": "batches are packed by fastpref; want None, and what it would add in the data",
        "preprocess_logits_for_metrics": "there are no logits; want None",
        "compute_loss_func": "the loss is the trainer's; want None",
    }
    if not gives_scores:
        reasons["compute_metrics"] = "there are no logits; want None, a metric that is logged, or a callback"
    for name, reason in reasons.items():
        if options.pop(name, None) is not None:
            raise unsupported(name, "one", reason)


def given_args(args: Any, config_class: type[PreferenceConfig], model: Any, method: str) -> Any:
    """The configuration, by default one whose `output_dir` is named after model and method.

    Raises:
        TypeError: `args` is not a `config_class`.
    """
    if args is None:
        name = model if isinstance(model, str) else model.config._name_or_path
        return config_class(output_dir=f"{str(name).rstrip('/').split('/')[-1] or 'model'}-{method}")
    if not isinstance(args, config_class):
        raise TypeError(f"args: got {type(args).__name__}, want {config_class.__module__}.{config_class.__name__}")
    return args


def load_model(model: Any, args: PreferenceConfig, auto_class: Any, quantization_config: Any = None, **options: Any):
    """A model from a path or a hub id, or the model itself if it is one.

    It is loaded in fp32 unless `model_init_kwargs` says otherwise. From an adapter's folder comes the base model with
    the adapter, which goes on training.

    Raises:
        ValueError: `quantization_config` beside a model that is already loaded.
        TypeError: `model` is neither a name nor a model.
    """
    if not isinstance(model, str):
        if quantization_config is not None:
            raise ValueError("quantization_config: got one with a loaded model, want it only with a model's name")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got {type(model).__name__}, want a model's name or a transformers model")
        if args.model_init_kwargs:
            warnings.warn("model_init_kwargs: not used, since the model is already loaded", stacklevel=4)
        return model
    kwargs: dict[str, Any] = {**(args.model_init_kwargs or {}), **options}  # type: ignore[dict-item]
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    kwargs = with_dtype(kwargs, torch.float32, "model_init_kwargs")
    return adapters.load(auto_class, model, trainable=True, **kwargs)


def with_dtype(kwargs: Mapping[str, Any], default: Any, name: str) -> dict[str, Any]:
    """Arguments of `from_pretrained` with a `dtype`, which may have come by its name or as `torch_dtype`.

    Raises:
        ValueError: there is no such dtype. `name` says whose arguments they are.
    """
    found = dict(kwargs)
    given = found.pop("torch_dtype", default)
    dtype = found.setdefault("dtype", given)
    if isinstance(dtype, str) and dtype != "auto":
        found["dtype"] = getattr(torch, dtype.removeprefix("torch."), None)
        if not isinstance(found["dtype"], torch.dtype):
            raise ValueError(f"{name}: got a dtype of {dtype!r}, want 'auto', 'float32', 'bfloat16' or 'float16'")
    return found


def load_tokenizer(processing_class: Any, model: Any, args: PreferenceConfig, given: Any = None) -> Any:
    """The tokenizer, with a pad token, or the processor that has it. By default that of the model.

    Args:
        processing_class: a tokenizer, a processor, or None.
        model: the loaded model.
        args: the configuration, for `pad_token` and `trust_remote_code`.
        given: what the user gave the trainer as model: with a name, its tokenizer is read.

    Raises:
        ValueError: no tokenizer can be found, it is not one, or `pad_token` is not in its vocabulary.
    """
    from transformers import PreTrainedTokenizerBase

    if processing_class is None:
        name = adapters.tokenizer_source(given) if isinstance(given, str) else model.config._name_or_path
        if not name:
            raise ValueError("processing_class: got None with a model that came from no folder, want its tokenizer")
        processing_class = vision.processing_class(model, name, trust_remote_code=args.trust_remote_code)
    tokenizer = tokenizer_of(processing_class)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise unsupported("processing_class", type(processing_class).__name__, "want a tokenizer or a processor")
    if args.pad_token is not None:
        if args.pad_token not in tokenizer.get_vocab():
            raise ValueError(f"pad_token: got {args.pad_token!r}, which is not in the tokenizer's vocabulary")
        tokenizer.pad_token = args.pad_token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return processing_class


def wrap_peft(model: Any, peft_config: Any, args: PreferenceConfig, half_factors: bool = True) -> Any:
    """The model, with new adapters if there is a `peft_config`. Adapters that it has are made ready to train.

    With `half_factors` the low-rank factors on a quantised model train in bf16; else they stay as they are.

    Raises:
        TypeError: `peft_config` is not a `peft.PeftConfig`.
        ValueError: the model already has adapters, or they are of a kind that is not supported. Or it is a base model
            in which an earlier run left its adapters: they alone would train, and it could not be saved.
    """
    if peft_config is not None:
        from peft import PeftConfig, get_peft_model

        if not isinstance(peft_config, PeftConfig):
            raise TypeError(f"peft_config: got {type(peft_config).__name__}, want a peft.PeftConfig")
        if is_peft(model) or getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError(
                "peft_config: got one with a model that has adapters, want None to go on with them, or "
                "merge_and_unload() first"
            )
        if peft_config.task_type == "CAUSAL_LM" and not hasattr(model, "prepare_inputs_for_generation"):
            raise ValueError(
                f"peft_config: got task_type 'CAUSAL_LM' with {type(model).__name__}, want 'SEQ_CLS' for rewards, "
                "'TOKEN_CLS' for those of steps"
            )
        adapters.take_out(model)
        model = get_peft_model(model, peft_config)
    if not is_peft(model):
        _refuse_remains(model)
        return model
    _refuse_other_adapters(model.peft_config.values())
    if args.gradient_checkpointing:
        model.enable_input_require_grads()
    if half_factors and is_quantised(model):
        # Low-rank factors train in bf16, as in QLoRA (arXiv 2305.14314, section 3). Modules that are trained whole and
        # DoRA's magnitudes would not move in bf16 (TRL #7268).
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and FACTORS.search(name):
                parameter.data = parameter.data.to(torch.bfloat16)
    return model


def is_quantised(model: Any) -> bool:
    """Whether the model was loaded in 4 or 8 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def _refuse_remains(model: Any) -> None:
    if hasattr(model, "peft_config") and not getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "model: got one with an earlier run's adapters in its layers, which cannot be saved without them; want "
            "its PeftModel (trainer.model) to go on with them, a peft_config for new ones, or the model loaded anew"
        )


def _refuse_other_adapters(configs: Iterable[Any]) -> None:
    if any(config.is_prompt_learning for config in configs):
        raise unsupported("peft_config", "prompt learning", "want adapters inside the layers, such as LoRA")
    if any(config.peft_type == "ADALORA" for config in configs):
        reason = "it allots its ranks in a loop of its own, with a term in the loss; want another, such as LoRA"
        raise unsupported("peft_config", "AdaLoRA", reason)


def refuse_frozen(model: nn.Module) -> None:
    """Refuses a model in which nothing trains: such a run would end as a success.

    Raises:
        ValueError: no parameter requires a gradient.
    """
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    hint = "parameters with requires_grad: model.requires_grad_(True), where PEFT's merge_and_unload left it frozen"
    if hasattr(model, "peft_config"):
        hint = "an adapter to train: its folder's name, or PeftModel.from_pretrained(..., is_trainable=True)"
    raise ValueError(f"model: got {type(inner_model(model)).__name__} with nothing that trains, want {hint}")


def disable_dropout(model: nn.Module) -> None:
    """Switches off all dropout and router noise of a model, in training mode too.

    That covers dropout modules, and rates that attention, activations or whole layers keep as numbers: any attribute of
    a module or config with "drop" or "jitter" in its name. The config says 0 afterwards.
    """
    configs: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        _without_noise(module)
        for value in vars(module).values():
            _find_configs(value, configs)
    for config in configs.values():
        _without_noise(config)


def _without_noise(owner: Any) -> None:
    for name, value in list(vars(owner).items()):
        if isinstance(value, float) and value and any(word in name for word in NOISE):
            setattr(owner, name, 0.0)


def _find_configs(value: Any, found: dict[int, Any]) -> None:
    from transformers import PretrainedConfig

    if isinstance(value, PretrainedConfig) and id(value) not in found:
        found[id(value)] = value
        for part in vars(value).values():
            _find_configs(part, found)
