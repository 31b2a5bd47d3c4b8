"""What stands around a model: PEFT, DDP, FSDP, DeepSpeed, and parameters that are sharded over ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn


def is_peft(model: Any) -> bool:
    """Is it a `PeftModel`?"""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def inner_model(model: Any) -> Any:
    """The transformers model inside a `PeftModel`, or the model itself. PEFT's adapters stay in its layers."""
    return model.get_base_model() if is_peft(model) else model


def unwrapped(model: Any) -> Any:
    """The model itself, without DDP, FSDP or DeepSpeed around it."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model


def run_inside(wrapped: nn.Module, accelerator: Any, function: Callable[[Any], Any]) -> Any:
    """Return `function(bare model)`, called as if it were the model's forward.

    So the hooks of what wraps the model (DDP, FSDP, DeepSpeed) run around all of it. Accelerate's autocast does too: it
    is part of the forward that `function` replaces. Without an accelerator (None) there are only the hooks.

    If a wrapper went through `torch.compile`, another forward was compiled. What it wraps then runs uncompiled.
    """
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


def keep_arithmetic(model: nn.Module, for_good: bool = False) -> None:
    """Let layers of bitsandbytes compute in evaluation mode as they do in training.

    It holds until the next call of `model.train` or `model.eval`, and from now on if `for_good`.

    On a CPU their evaluation mode has another arithmetic: products of integers, or, with AVX512-BF16, weights that are
    packed anew. Packed weights would stay packed in a training whose gradients do not pass through them. Asking for the
    state dict unpacks them.
    """
    modules: Iterable[Any] = model.modules()
    for layer in modules:
        if type(layer).__module__.startswith("bitsandbytes"):
            layer.state_dict()
            layer.train()
            if for_good:
                layer.train = _stay


def _stay(mode: bool = True) -> None:
    """Stands in place of a layer's `train`, and does nothing."""


@contextlib.contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """For a `with` block, modules that `Module.compile` compiled in place run as written.

    It is for trials with hooks, which would otherwise be compiled in.
    """
    compiled = {m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl is not None}
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode for a `with` block, afterwards in the mode that it was in.

    Quantised layers compute as in training (see `keep_arithmetic`).
    """
    training = model.training
    model.eval()
    keep_arithmetic(model)
    try:
        yield
    finally:
        model.train(training)


def whole(parameter: Any) -> Tensor:
    """The whole of a parameter that FSDP or DeepSpeed has sharded over ranks. Gradients go back to the shards."""
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
    """Shard the parameters again. After a forward without a backward FSDP2 leaves those of its root whole."""
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if hasattr(module, "reshard"):
            module.reshard()


def is_sharded(model: nn.Module) -> bool:
    """Has FSDP2 or DeepSpeed's stage 3 sharded the model's parameters?"""
    return any(hasattr(p, "full_tensor") or hasattr(p, "ds_id") for p in model.parameters())


def sharded_like(parameter: Any, value: Tensor) -> Tensor:
    """A value that all ranks have, sharded as `parameter` is if that is a DTensor; else the value itself."""
    if not hasattr(parameter, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def has_parameters(model: Any) -> bool:
    """Are the values of all parameters here? Not on the meta device, nor if they were sharded when they were made."""
    return not any(p.device.type == "meta" or p.numel() == 0 for p in model.parameters())
