"""TRL's own trainers on fastpref's operators, by one line in a script.

    import fastpref.integrations.trl as fast_trl

    fast_trl.patch()  # once, before trainers are built

From then on TRL's unmodified trainers compute their losses with fastpref:

- `DPOTrainer` and `KTOTrainer` (TRL 1.16 and 1.8) run packed batches, like the subclasses below.
- `SFTTrainer`, `GRPOTrainer` and `RLOOTrainer` (TRL 1.16) take their log-probs, entropies and other token statistics
  from `fastpref.linear_token_statistics`. So do DPO and KTO there where packing is not possible.
- `CPOTrainer`, `ORPOTrainer` and `OnlineDPOTrainer` form no logits.

Arguments, losses, metrics and checkpoints stay TRL's. Without a patch, subclasses do the same for one script:

    from fastpref.integrations.trl import DPOTrainer  # was: from trl import DPOTrainer

`DPOTrainer`, `KTOTrainer` and `RewardTrainer` here are subclasses of TRL 1.16's; see
`fastpref.integrations.trl_trainers`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref import models
from fastpref.integrations import trl_0_24
from fastpref.integrations import trl_forwards as forwards
from fastpref.objectives.tokens import linear_token_statistics

# TRL's names of the statistics, in the order of its results -> ours
STATISTICS = {
    "entropy": "entropy", "log_sum_sq_probs": "log_sum_sq", "mean_logits": "mean_logit", "is_top1": "is_top1",
}  # fmt: skip
ARGUMENTS = (
    "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping", "logit_scale",
    "outputs",
)  # fmt: skip


class TokenLogProbs:
    """Stands in for `trl.kernels.ChunkedLogProbFunction`, with its arguments and its five results."""

    @staticmethod
    def apply(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, chunk_size: int,
        final_logit_softcapping: float | None = None, logit_scale: float = 1.0,
        outputs: tuple[str, ...] = tuple(STATISTICS),
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """(log-probs, entropy, log_sum_sq_probs, mean_logits, is_top1) of hidden `[N, d]`: each `[N]`, or None if not
        asked for.

        Log-probs and entropy are differentiable. `chunk_size` is TRL's and has no effect here.
        """
        if hasattr(weight, "ds_id"):  # DeepSpeed's stage 3 frees what it gathered before the backward needs it
            weight, bias = weight.clone(), None if bias is None else bias.clone()
        if not torch.is_autocast_enabled(hidden.device.type):
            weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        found = linear_token_statistics(
            hidden, weight, targets, bias, tuple(ours for name, ours in STATISTICS.items() if name in outputs),
            temperature=temperature, logit_scale=logit_scale, softcap=final_logit_softcapping,
        )  # fmt: skip
        return found.logps, *(getattr(found, ours) for ours in STATISTICS.values())


class Patch(NamedTuple):
    """One replacement: of `module.name` or `module.class.name`, by what `replacement` makes of the original."""

    module: str
    name: str
    replacement: Callable[[Any], Any]

    def owner(self) -> tuple[Any, str]:
        *path, name = self.name.split(".")
        owner = import_module(self.module)
        for part in path:
            owner = getattr(owner, part)
        return owner, name


def _instead(value: Any) -> Callable[[Any], Any]:
    return lambda original: value


def _verifying(init: Callable) -> Callable:
    """A trainer's constructor that also checks whether its models' heads are known. If not, TRL's code runs."""

    @functools.wraps(init)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        try:
            for model in (self.model, getattr(self, "ref_model", None)):
                if model is not None:
                    models.output_head(self.accelerator.unwrap_model(model))
            self._fastpref = forwards.supported(self)
        except (ValueError, RuntimeError) as error:  # or its head is on another device than its hidden states
            self._fastpref = False
            warnings.warn(f"{type(self).__name__} builds logits, as without fastpref: {error}", stacklevel=2)

    return __init__


def _where_verified(ours: Callable) -> Callable[[Callable], Callable]:
    """Uses our method for trainers built under the patch that can take it, and the original for all others."""

    def replace(original: Callable) -> Callable:
        @functools.wraps(original)
        def method(self, *args: Any, **kwargs: Any) -> Any:
            known = getattr(self, "_fastpref", False) and forwards.text_only(kwargs, args)
            return (ours if known else original)(self, *args, **kwargs)

        return method

    return replace


def _packed(mixin: str) -> Callable[[Any], Any]:
    """A constructor whose trainers take their losses from `fastpref.integrations.trl_trainers`."""

    def replace(init: Callable) -> Callable:
        trainers = import_module("fastpref.integrations.trl_trainers")
        return trainers.packed(init, getattr(trainers, mixin))

    return replace


def _paired(home: str, **trainers: tuple[str, str, Callable]) -> list[Patch]:
    """Patches of trainers that build logits. Each is given as name -> (module, method, our method)."""
    found = []
    for trainer, (module, method, ours) in trainers.items():
        found.append(Patch(f"{home}.{module}", f"{trainer}.__init__", _verifying))
        found.append(Patch(f"{home}.{module}", f"{trainer}.{method}", _where_verified(ours)))
    return found


FUSED_HEAD = [
    Patch("trl.trainer.utils", "_ChunkedLogProbFunction", _instead(TokenLogProbs)),
    # on a CPU, too, only positions with a label are scored
    Patch("trl.trainer.utils", "_use_triton", _instead(lambda device: True)),
]
EXPERIMENTAL = _paired(
    "trl.experimental",
    CPOTrainer=("cpo.cpo_trainer", "concatenated_forward", forwards.cpo_concatenated_forward),
    ORPOTrainer=("orpo.orpo_trainer", "concatenated_forward", forwards.orpo_concatenated_forward),
    OnlineDPOTrainer=("online_dpo.online_dpo_trainer", "_forward", forwards.online_dpo_forward),
)
TRL_0_24 = _paired(
    "trl.trainer",
    DPOTrainer=("dpo_trainer", "concatenated_forward", trl_0_24.concatenated_forward),
    CPOTrainer=("cpo_trainer", "concatenated_forward", forwards.cpo_concatenated_forward),
    ORPOTrainer=("orpo_trainer", "concatenated_forward", forwards.orpo_concatenated_forward),
    OnlineDPOTrainer=("online_dpo_trainer", "_forward", forwards.online_dpo_forward),
)
PACKED = [
    Patch("trl.trainer.dpo_trainer", "DPOTrainer.__init__", _packed("PackedDPO")),
    Patch("trl.trainer.kto_trainer", "KTOTrainer.__init__", _packed("PackedKTO")),
]
TRAINERS = {"1.16": ("DPOTrainer", "KTOTrainer", "RewardTrainer")}
VERSIONS = {"0.24": TRL_0_24, "1.8": PACKED + EXPERIMENTAL, "1.16": FUSED_HEAD + PACKED + EXPERIMENTAL}

_originals: list[tuple[Any, str, Any]] = []


def patches() -> list[Patch]:
    """The patches for the TRL that is installed.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: fastpref was not tried with this version.
    """
    version, known = _installed(VERSIONS)
    if known[0] is FUSED_HEAD[0]:
        fused = import_module("trl.kernels").ChunkedLogProbFunction.forward
        arguments = tuple(inspect.signature(fused).parameters)[1:]
        if arguments != ARGUMENTS:
            raise RuntimeError(f"trl: got version {version} whose fused head takes {arguments}, want {ARGUMENTS}")
    return known


def _installed(versions: Mapping[str, Any]) -> tuple[str, Any]:
    """(TRL's version, what `versions` has for it)."""
    try:
        version = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError("fastpref.integrations.trl: TRL is not installed; run `pip install trl==1.16.0`") from error
    known = versions.get(".".join(version.split(".")[:2]))
    if known is None:
        raise RuntimeError(f"trl: got version {version}, which fastpref does not know; want {_listed(versions)}")
    return version, known


def __getattr__(name: str) -> Any:
    """Gives the subclasses of TRL's trainers. TRL is imported only when one of them is asked for."""
    if name not in TRAINERS["1.16"]:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _installed(TRAINERS)
    return getattr(import_module("fastpref.integrations.trl_trainers"), name)


def _listed(versions: Any) -> str:
    return ", ".join(f"{v}.x" for v in versions)


def patch() -> None:
    """Puts fastpref's operators under TRL's trainers, for those that are built from now on. A second call does nothing.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: fastpref does not know this version of TRL. Nothing is changed.
    """
    if _originals:
        return
    found = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*trl.experimental")
        for entry in patches():
            owner, name = entry.owner()
            original = inspect.getattr_static(owner, name)
            found.append((owner, name, original, entry.replacement(original)))
    for owner, name, original, replacement in found:
        _originals.append((owner, name, original))
        setattr(owner, name, replacement)


def unpatch() -> None:
    """Leaves TRL as it was.

    Trainers that exist go back to their original methods, too. Only packed DPO and KTO trainers do not: their class was
    changed when they were built.
    """
    while _originals:
        setattr(*_originals.pop())


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """`patch()` for the time of a `with` block. A patch that was there before stays."""
    before = bool(_originals)
    patch()
    try:
        yield
    finally:
        if not before:
            unpatch()
