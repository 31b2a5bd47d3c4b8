"""TRL 1.16's `DPOTrainer`, `KTOTrainer` and `RewardTrainer` with the losses of `fastpref.trainers`.

    from fastpref.integrations.trl import DPOTrainer  # was: from trl import DPOTrainer

They are real subclasses. Configurations, data preparation, collators, callbacks, metrics and checkpoints stay TRL's.
What changes:

- Batches are packed without padding, and a pair's prompt runs once, where the model can run that.
- The head's products are those of `fastpref.objectives`.
- Metrics stay on the device until they are logged.

Import them from `fastpref.integrations.trl`, which checks TRL's version first.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import trl
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from fastpref import models
from fastpref.data.batches import pad_id
from fastpref.data.images import tokenizer_of
from fastpref.data.vision import Vision
from fastpref.integrations.trl_batches import KEY, PackingCollator, PackingUnpaired
from fastpref.integrations.trl_vision import COLLATORS, PackingPictures, PackingUnpairedPictures
from fastpref.models import evaluating, is_peft, run_inside
from fastpref.objectives.paired import DPOLoss
from fastpref.objectives.unpaired import KTOLoss, kto_kl
from fastpref.trainers import paired, reward, unpaired
from fastpref.trainers.base import Items, PreferenceTrainer
from fastpref.trainers.forward import to_device
from fastpref.trainers.layout import choose_layout
from fastpref.trainers.metrics import MetricSums
from fastpref.trainers.policy import PolicyTrainer
from fastpref.trainers.reference import ready_reference
from fastpref.trainers.vision import vision_of

SMOOTHED = frozenset(("exo_pair", "robust", "aot", "aot_unpaired"))  # by TRL; it leaves `sigmoid` as it is
REPLACED = ("_compute_loss", "compute_ref_log_probs")
EXTREMES = {"min_reward": Tensor.amin, "max_reward": Tensor.amax}  # over ranks


_Trainer: Any = object  # a class of TRL's comes after it


class _Packed(_Trainer):
    """What the trainers share. A batch's loss and metrics come from `part_loss`, borrowed from fastpref's trainers."""

    # When entropies and the like are measured. 'logging': on the step that logs. 'every': on every step, at the price
    # of one more product, for means over the steps between two logs as in TRL. 'never': not at all.
    statistics: str = "logging"
    collator_class: type[PackingCollator] = PackingCollator
    pictures_class: type[PackingCollator] = PackingPictures
    count_tokens: Any = PreferenceTrainer.count_tokens
    inner: Any = PreferenceTrainer.inner
    derived_metrics: Any = PreferenceTrainer.derived_metrics
    measuring: Any = PreferenceTrainer.measuring

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pack_batches()

    def _left_to_trl(self, *_: Any) -> None:
        """Does nothing. fastpref's trainers sum an evaluation over all its data here; TRL takes means over batches."""

    add_loss = add_loss_terms = keep_responses = keep_scores = keep_routes = _left_to_trl

    def _pack_batches(self: Any) -> None:
        if self.packing is not None:
            self.data_collator = self.packing
            self.accelerator.dataloader_config.dispatch_batches = False  # which would cut packed batches into rows

    @functools.cached_property
    def _steps(self) -> list[tuple[str, list[str], Tensor]]:
        """(mode, names, their sums and counts) of each batch since the last log."""
        return []

    @functools.cached_property
    def packing(self: Any) -> PackingCollator | None:
        """How batches are packed. None, with a warning, where TRL's own code has to run.

        It is made when first asked for: precomputing a reference needs it inside of TRL's constructor.
        """
        try:
            self._refuse()
            self._prepare_loss()
            vision = self._vision()
            layout, ours = choose_layout(self.inner, "auto", vision)
        except ValueError as error:
            warnings.warn(f"{type(self).__name__} computes losses as TRL does, without fastpref: {error}", stacklevel=4)
            return None
        pad = pad_id(tokenizer_of(self.processing_class), self.inner)
        cls = self.collator_class if vision is None else self.pictures_class
        packing = cls(pad, layout, ours, collator=self.data_collator, vision=vision)
        packing.limits = models.limits(self.inner)
        packing.count_copies = getattr(self, "aux_loss_enabled", False)
        if getattr(self, "ref_model", None) is not None:
            reference = self.accelerator.unwrap_model(self.ref_model)
            ready_reference(getattr(reference, "_orig_mod", reference), packing, False)
        if self.args.torch_compile:
            models.compile_backbone(self.inner, self.accelerator, self.args)
        return packing

    def _refuse(self: Any) -> None:
        for name in ("is_fsdp_enabled", "is_deepspeed_enabled", "use_liger_kernel"):
            if getattr(self, name, False):
                raise ValueError(f"{name.removeprefix('_')}: got True, want False")
        if self.args.accelerator_config.dispatch_batches:
            raise ValueError("dispatch_batches: got True, want False: a packed batch cannot be cut into ranks' shares")
        if getattr(self, "aux_loss_enabled", False) and not hasattr(self, "router_aux_loss_coef"):
            raise ValueError("aux_loss_enabled: got True from an older TRL, want at least 1.16")
        if len(set((getattr(self.model, "hf_device_map", None) or {"": 0}).values())) > 1:
            raise ValueError("device_map: got several devices, want the whole model on one")

    def _vision(self: Any) -> Vision | None:
        """What makes images ready, if the data have any.

        Raises:
            ValueError: another collator than TRL's own makes the batches, or something wants their logits.
        """
        if not getattr(self, "_is_vision_dataset", False):
            return None
        if trl.__version__.startswith("1.8."):
            raise ValueError("images: got some under TRL 1.8, whose collators differ; want TRL 1.16")
        if type(self.data_collator).__name__ not in COLLATORS:
            raise ValueError(f"data_collator: got {type(self.data_collator).__name__} with images, want TRL's own")
        if self.compute_metrics is not None:
            raise ValueError("compute_metrics: got one with images, want None: it takes logits of TRL's batches")
        found = vision_of(self.inner, self.processing_class)
        if found is None:
            raise ValueError(f"model: got {type(self.inner).__name__}, which takes no images")
        found.seen = True
        return found

    def _prepare_loss(self: Any) -> None:
        """Sets `loss_fn`.

        Raises:
            ValueError: fastpref has no loss that equals TRL's, or the model's head is not known.
        """
        raise NotImplementedError

    # the loss of a batch

    def _part(self: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        if KEY in inputs:
            return dict(inputs[KEY])
        return to_device(self.packing.packed(inputs), self.accelerator.device)  # not through our collator

    def _before(self: Any, model: Any, inputs: Mapping[str, Any], part: dict[str, Any]) -> None:
        """A hook, called before a batch's forward: for what its loss needs from outside of that forward."""

    def _packed_loss(self: Any, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        part, self.metrics = self._part(inputs), MetricSums()
        self._before(model, inputs, part)
        loss = run_inside(model, self.accelerator, lambda bare: self.part_loss(part, Items(part["examples"], 0)))
        self._steps.append(("train" if self.model.training else "eval", *self.metrics.take()))
        return loss

    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        self._read_metrics()
        super().log(logs, *args, **kwargs)

    def _read_metrics(self: Any) -> None:
        """Notes the steps' metrics of all ranks where TRL would have noted them.

        That takes one collective and one copy to the host.
        """
        steps, self._steps = self._steps, []
        if not steps:
            return
        sums = self.accelerator.gather(torch.cat([found for *_, found in steps])[None]).cpu()
        for (mode, names, _), by_name in zip(steps, sums.split([len(names) for _, names, _ in steps], 1), strict=True):
            found = {}
            for name, by_rank in zip(names, by_name.unbind(1), strict=True):
                total, count = by_rank.sum(0).tolist()
                if name == "num_tokens":
                    self._total_train_tokens += int(total) // getattr(self, "_tp_size", 1)
                elif name in EXTREMES:
                    found[name] = EXTREMES[name](by_rank[:, 0]).item()
                elif count:
                    found[name] = total / count
            for name, value in self.derived_metrics(found).items():
                self._metrics[mode][name].append(value)
            self._metrics[mode]["num_tokens"] = [self._total_train_tokens]


class _Policy(_Packed):
    """The trainers with a language model's head and a reference."""

    head: Any = PolicyTrainer.head
    add_token_metrics: Any = PolicyTrainer.add_token_metrics
    measured: Any = PolicyTrainer.measured
    scored: Any = PolicyTrainer.scored
    token_logps: Any = PolicyTrainer.token_logps
    reference_logps: Any
    _references: Any

    def _compute_loss(self: Any, model: Any, inputs: Mapping[str, Any], return_outputs: bool) -> Any:
        if self.packing is None or return_outputs:  # the outputs are logits
            return super()._compute_loss(model, _padded(inputs), return_outputs)
        return self._packed_loss(model, inputs)

    def compute_ref_log_probs(self: Any, *args: Any) -> Any:
        """The reference's log-probs of a batch, the last argument. TRL 1.16 gives the model before it."""
        *model, inputs = args
        if self.packing is None:
            return super().compute_ref_log_probs(*model, _padded(inputs))
        return self._references(self._part(inputs), *model)

    def _reference(self: Any, part: dict[str, Any], model: Any = None) -> Tensor:
        """The log-probs of a part's sequences by `ref_model`, or by the policy without its adapters, as in TRL."""
        if model is None:
            model = self.model if self.ref_model is None else self.ref_model
        adapter: Any = contextlib.nullcontext()
        if self.ref_model is None and is_peft(self.model):
            policy = self.accelerator.unwrap_model(self.model)
            adapter = use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None)
        unchecked = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        with torch.no_grad(), unchecked, adapter, evaluating(model):
            return run_inside(model, self.accelerator, lambda bare: self.reference_logps(bare, part))


def _padded(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name != KEY}


class PackedDPO(_Policy):
    """DPO's part. `label_smoothing` leaves `sigmoid` alone, as in TRL."""

    part_loss: Any = paired.PairTraining.part_loss
    loss_options: Any = paired.PairTraining.loss_options
    add_pair_metrics: Any = paired.PairTraining.add_pair_metrics
    add_method_metrics: Any = paired.PairTraining.add_method_metrics
    reference_logps: Any = paired.DPOTrainer.reference_logps
    _denominator: Any = paired.PairTraining._denominator

    def _prepare_loss(self: Any) -> None:
        losses, smoothing = set(self.loss_types), self.label_smoothing
        if smoothing and "sigmoid" in losses and losses & SMOOTHED:
            raise ValueError(
                f"label_smoothing: got {smoothing} with {self.loss_types}, want 0.0: TRL smooths only some"
            )
        if losses & {"ipo", "sigmoid_norm"} and trl.__version__.startswith("1.8.") and not self._reverse_kl():
            # its divergences lack additive constants, which divided by two lengths do not cancel
            raise ValueError(f"f_divergence_type: got {self.f_divergence_type} with loss_type {self.loss_types}")
        if self.args.truncation_mode == "keep_end" and losses & {"ipo", "sigmoid_norm"}:  # TRL counts one token more
            raise ValueError(f"truncation_mode: got 'keep_end' with loss_type {self.loss_types}, want 'keep_start'")
        self.loss_fn = DPOLoss(
            self.beta, self.loss_types, smoothing if losses & SMOOTHED else 0.0, self.f_divergence_type,
            f_alpha_divergence_coef=self.f_alpha_divergence_coef, loss_weights=self.loss_weights,
            discopop_tau=self.args.discopop_tau, ld_alpha=self.ld_alpha, use_weighting=self.use_weighting,
        )  # fmt: skip
        models.output_head(self.accelerator.unwrap_model(self.model))

    def _reverse_kl(self: Any) -> bool:
        return str(getattr(self.f_divergence_type, "value", self.f_divergence_type)) == "reverse_kl"

    def _references(self: Any, part: dict[str, Any], *model: Any) -> tuple[Tensor, ...]:
        return self._reference(part, *model).chunk(2)

    def _before(self: Any, model: Any, inputs: Mapping[str, Any], part: dict[str, Any]) -> None:
        if self.precompute_ref_logps:
            part["ref_logps"] = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        else:
            part["ref_logps"] = torch.cat(self._references(part))


class PackedKTO(_Policy):
    """KTO's part. The reference scores matched and mismatched completions at once."""

    collator_class = PackingUnpaired
    pictures_class = PackingUnpairedPictures
    part_loss: Any = unpaired.KTOTrainer.part_loss
    reference_logps: Any = unpaired.KTOTrainer.reference_logps
    _add_class_metrics: Any = unpaired.KTOTrainer._add_class_metrics

    def _prepare_loss(self: Any) -> None:
        self.loss_fn = KTOLoss(self.beta, self.desirable_weight, self.undesirable_weight, self.loss_type)
        models.output_head(self.accelerator.unwrap_model(self.model))

    def derived_metrics(self: Any, found: dict[str, float]) -> dict[str, float]:
        found.pop("mean_token_accuracy", None)  # our trainer's, not TRL's
        return unpaired.KTOTrainer.derived_metrics(self, found)

    def _references(self: Any, part: dict[str, Any], *model: Any) -> tuple[Tensor, Tensor | None]:
        logps = self._reference(part["reference_part"], *model)
        return logps.chunk(2) if self.calculate_KL else (logps, None)

    def _before(self: Any, model: Any, inputs: Mapping[str, Any], part: dict[str, Any]) -> None:
        if self.precompute_ref_logps:
            part["ref_logps"], mismatched = inputs["ref_logps"], inputs.get("ref_KL_logps")
        else:
            part["ref_logps"], mismatched = self._references(part)
        kl = torch.zeros((), device=self.accelerator.device)
        if self.calculate_KL:
            assert mismatched is not None
            with torch.no_grad():
                logps = run_inside(model, self.accelerator, lambda bare: self.reference_logps(bare, part["kl_part"]))
            kl = kto_kl(logps, mismatched)
        part["kl"] = kl
        self.metrics.add("kl", kl)


class PackedReward(_Packed):
    """The reward model's part, with the head of a model for sequence classification."""

    on_lists = False
    part_loss: Any = reward.RewardTrainer.part_loss
    score_head: Any = reward.RewardTrainer.score_head

    def _prepare_loss(self: Any) -> None:
        self.loss_fn = reward.BradleyTerryLoss(self.args.center_rewards_coefficient or 0.0)
        models.backbone(self.accelerator.unwrap_model(self.model))
        self.score_head()

    def _before(self: Any, model: Any, inputs: Mapping[str, Any], part: dict[str, Any]) -> None:
        if "margin" in inputs:
            part["margin"] = inputs["margin"]

    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.packing is None or return_outputs:
            return super().compute_loss(model, _padded(inputs), return_outputs, num_items_in_batch)
        return self._packed_loss(model, inputs)

    def prediction_step(
        self: Any, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        if not prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with torch.no_grad(), self.compute_loss_context_manager():  # Trainer would ask for outputs and drop them
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None


class DPOTrainer(PackedDPO, trl.DPOTrainer):
    """`trl.DPOTrainer` with `fastpref.DPOLoss`."""


class KTOTrainer(PackedKTO, trl.KTOTrainer):
    """`trl.KTOTrainer` with `fastpref.KTOLoss`."""


class RewardTrainer(PackedReward, trl.RewardTrainer):
    """`trl.RewardTrainer` with `fastpref.BradleyTerryLoss`. Rewards are formed in fp32."""


def packed(init: Any, mixin: type[_Packed]) -> Any:
    """A constructor of a TRL class, or of a class derived from it, that makes its trainer a `mixin` too.

    The trainer's own class changes before TRL's constructor runs, which may already ask for reference log-probs. A
    class that has its own version of a method that we would replace keeps it, and TRL's code.
    """

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(self, mixin):  # ours, which packs its batches itself
            return init(self, *args, **kwargs)
        cls = type(self)
        owner = next(c for c in cls.__mro__ if c.__dict__.get("__init__") is __init__)
        replaced = [name for name in REPLACED if getattr(cls, name, None) is not getattr(owner, name, None)]
        if replaced:
            warnings.warn(f"{cls.__name__} has its own {', '.join(replaced)}, and is not packed", stacklevel=2)
            return init(self, *args, **kwargs)
        self.__class__ = type(cls.__name__, (mixin, cls), {"__module__": cls.__module__, "statistics": "every"})
        init(self, *args, **kwargs)
        self._pack_batches()

    return __init__
