"""PEFT's adapters: loading them from their folders, and getting back the model as it was before training.

A folder with `adapter_config.json` names its base model. Wherever fastpref takes a model's name, it takes such a
folder too.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastpref.models.vision import with_images
from fastpref.models.wrappers import is_peft, reshard, sharded_like

TASKS = {
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
}
BASES = ("base_layer", "original_module")  # what PEFT's layers stand around
OF_WRAPPERS = re.compile(r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")  # in parameters' names


def adapter_config(name: str | os.PathLike[str]) -> Any | None:
    """PEFT's configuration if `name` (a folder or a hub id) is an adapter's; else None.

    Raises:
        ImportError: it is an adapter's, and PEFT is not installed.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    if not os.path.isdir(name) and importlib.util.find_spec("peft") is None:
        return None  # no look at the hub for what could not be loaded
    found = find_adapter_config_file(os.fspath(name))
    if found is None:
        return None
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise ImportError(f"{name} is an adapter: {error}; run `pip install 'fastpref[peft]'`") from error
    return PeftConfig.from_pretrained(os.fspath(name))


def load(auto_class: Any, name: str | os.PathLike[str], *, trainable: bool = False, **kwargs: Any) -> Any:
    """`auto_class.from_pretrained(name)`, which may be an adapter's name.

    Of an adapter it is a `PeftModel` around the base model that the adapter's configuration names. With `trainable`
    the adapter goes on training, else it is frozen.

    Raises:
        ValueError: the adapter is for another task than the class, or its base model is not there.
        ImportError: it is an adapter, and PEFT is not installed.
    """
    config = adapter_config(name)
    if config is None:
        return with_images(auto_class, name, **kwargs).from_pretrained(name, **kwargs)
    from peft import PeftModel

    base, task = config.base_model_name_or_path, TASKS[auto_class.__name__]
    if config.task_type not in (None, task):
        raise ValueError(
            f"model: got {os.fspath(name)}, an adapter for {config.task_type}, want one for {task}, or the adapter "
            "merged into its base model (PEFT's merge_and_unload)"
        )
    if not base or ((Path(base).is_absolute() or base.startswith(".")) and not Path(base).is_dir()):
        raise ValueError(
            f"model: got {os.fspath(name)}, an adapter of {base!r}, which is no folder; want its base model under "
            "base_model_name_or_path in adapter_config.json"
        )
    if config.revision is not None:
        kwargs.setdefault("revision", config.revision)
    with _quiet(bool(getattr(config, "modules_to_save", None))):
        model = with_images(auto_class, base, **kwargs).from_pretrained(base, **kwargs)
    # for inference in the model's dtype; what trains is kept in fp32
    return PeftModel.from_pretrained(model, os.fspath(name), is_trainable=trainable, autocast_adapter_dtype=trainable)


@contextlib.contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    """If `quiet`, without transformers' report of weights that the base model lacks: they come with the adapter."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    try:
        if quiet:
            logging.set_verbosity_error()
        yield
    finally:
        logging.set_verbosity(level)


def tokenizer_source(name: str | os.PathLike[str]) -> str:
    """The folder or hub id of a model's tokenizer. An adapter that was saved without one has its base model's."""
    config = None if (Path(name) / "tokenizer_config.json").is_file() else adapter_config(name)
    return os.fspath(name) if config is None else config.base_model_name_or_path


def active_module(layer: Any) -> Any:
    """The layer itself, or the copy in use if PEFT trains a copy of it (`modules_to_save`)."""
    copies = getattr(layer, "modules_to_save", None)
    return layer if copies is None else copies[layer.active_adapters[0]]


def describe(model: Any) -> str:
    """The configurations of the active adapters as JSON. With the weights they decide all that adapters do."""
    found = {}
    for name in model.active_adapters if is_peft(model) else getattr(model, "peft_config", {}):
        config = model.peft_config[name].to_dict()
        for where in ("base_model_name_or_path", "revision", "inference_mode"):
            config.pop(where, None)
        found[name] = config
    return json.dumps(found, sort_keys=True, default=_sorted)


def _sorted(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def take_out(model: Any) -> None:
    """Take out the adapters that an earlier run left in the layers of a model that is no `PeftModel` itself.

    New adapters belong on the base model. A warning says what was done. Without such adapters nothing happens.

    Raises:
        ValueError: they changed the base model's weights.
    """
    if not hasattr(model, "peft_config"):
        return
    for config in model.peft_config.values():
        if initialised_from_weights(config):
            raise ValueError(
                f"model: got one whose weights an earlier run's adapters changed ({config.init_lora_weights}), want it "
                "loaded anew"
            )
    for path, layer in list(_layers(model)):
        base = next(getattr(layer, name) for name in BASES if hasattr(layer, name))
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, base)
    del model.peft_config
    warnings.warn(
        "model: had the adapters of an earlier run in its layers; they were taken out, and new ones start on the base "
        "model", stacklevel=4,
    )  # fmt: skip


def initialised_from_weights(config: Any) -> bool:
    """Did the adapter change the base model's weights when it was made?

    PiSSA and its kin move a part of the base weights into the fresh adapter. Without it the model is another one.
    """
    how = getattr(config, "init_lora_weights", True)
    return isinstance(how, str) and how.lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga"))


def own_names(model: Any) -> set[str]:
    """The names in the state dict that adapters brought. All others are the base model's."""
    found: set[str] = set()
    for path, module in _layers(model):
        names = (name for name in module.state_dict() if not name.startswith(BASES))
        found.update(f"{path}.{name}" for name in names)
    return found


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    if importlib.util.find_spec("peft") is None:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            yield path, module


@contextlib.contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """The model without its adapters, for a `with` block.

    Afterwards the same adapters are active, and the same parameters require gradients. PEFT by itself would turn on
    the gradients of all active adapters.
    """
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


class Snapshot:
    """A copy of the parameters that train, as they are now. `restored` puts it back for a forward.

    Args:
        model: with its final parameter names. It may be sharded later (FSDP2).
        outside: copy only what is not the adapters' own (biases, norms). That is what stays changed when adapters are
            off.
    """

    def __init__(self, model: Any, *, outside: bool) -> None:
        self._model = model
        self._left_out = own_names(model) if outside else set()
        self._values: dict[str, Tensor] = {}
        self.extend()

    def extend(self) -> None:
        """Add the parameters that have been set to train since."""
        for name, parameter in self._model.named_parameters():
            name = OF_WRAPPERS.sub("", name)
            if parameter.requires_grad and name not in self._values and name not in self._left_out:
                self._values[name] = parameter.detach().clone()

    def __len__(self) -> int:
        return len(self._values)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """The model as it was, for a `with` block. Bit for bit: values are exchanged, none is computed."""
        if not self._values:
            yield
            return
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        reshard(self._model)
        for name, parameter in self._model.named_parameters():
            name = OF_WRAPPERS.sub("", name)
            if name not in self._values:
                continue
            # not an update: what autograd saved of the parameter is what it will be again
            now = parameter.data
            kept = self._placed(name, now)
            was = now.clone()
            now.copy_(kept)
            kept.copy_(was)

    def _placed(self, name: str, like: Tensor) -> Tensor:
        """The copied value on the parameter's device, in its dtype and with its sharding.

        It was taken before training, when the parameter may have been elsewhere.
        """
        value = self._values[name].to(like.device, like.dtype)
        if type(value) is not type(like):
            value = sharded_like(like, value)
        self._values[name] = value
        return value
