"""What stands around a model: PEFT's adapters, DDP, FSDP, DeepSpeed, and parameters that are shared out over ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn


def is_peft(model: Any) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def inner_model(model: Any) -> Any:
    """The transformers model itself, adapters of PEFT inside its layers."""
    return model.get_base_model() if is_peft(model) else model


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


def keep_arithmetic(model: nn.Module, for_good: bool = False) -> None:
    """Layers of bitsandbytes compute as in training, in evaluation mode, too (from now on, if `for_good`).

    On a CPU their evaluation mode is another arithmetic: products of integers, or, with AVX512-BF16, weights that are
    packed anew, and that stay so in a training without gradients through them; to save them is to unpack them.
    """
    modules: Iterable[Any] = model.modules()
    for layer in modules:
        if type(layer).__module__.startswith("bitsandbytes"):
            layer.state_dict()
            layer.train()
            if for_good:
                layer.train = _stay


def _stay(mode: bool = True) -> None:
    """In place of a layer's `train`."""


@contextlib.contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Modules that `Module.compile` compiled in place run as written: for trials, whose hooks would be compiled in."""
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
    """In evaluation mode, and afterwards in the mode that it was in; quantised layers compute as in training."""
    training = model.training
    model.eval()
    keep_arithmetic(model)
    try:
        yield
    finally:
        model.train(training)


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


def has_parameters(model: Any) -> bool:
    """Are their values here? Not on the meta device, nor where they were sharded as they were made."""
    return not any(p.device.type == "meta" or p.numel() == 0 for p in model.parameters())
