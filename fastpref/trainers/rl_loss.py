"""The losses of samples: surrogates of ratios, the KL wherever it goes, corrections for another sampler. No logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref import kl_estimate, linear_token_kl, linear_token_statistics, models
from fastpref.common.segments import segment_sums
from fastpref.objectives.kl import TokenKL
from fastpref.objectives.surrogates import (
    BatchSize,
    Surrogate,
    Surrogates,
    off_policy_kept,
    sampler_log_ratio,
    sampler_ratios,
    spread,
    surrogates,
    token_weights,
)
from fastpref.trainers import rl_metrics
from fastpref.trainers.base import Items
from fastpref.trainers.config import unsupported
from fastpref.trainers.forward import by_sequence, head_hidden, head_labels, to_device
from fastpref.trainers.metrics import HIGHEST, LOWEST
from fastpref.trainers.policy import ReferencedTrainer
from fastpref.trainers.rollouts import RolloutCollator, Sample, Samples


class ReferenceRows(NamedTuple):
    """The reference's side of an exact KL: hidden states `[M, d]` of the scored rows, and its head."""

    hidden: Tensor
    head: models.Head


class SampleLosses(ReferencedTrainer):
    """How samples are measured before an update, and what their loss is in it."""

    data_collator: RolloutCollator
    controller: Any
    sampler: Any
    surrogate: Surrogate
    weighting: str  # a loss type, or rloo
    reference_columns = ()
    hashed_columns = ()

    @property
    def beta(self) -> float:
        """The weight of the KL now."""
        return self.controller.beta

    @property
    def corrects(self) -> bool:
        """Whether a sampler's log-probs are compared with the trainer's."""
        return self.sampler is not None and self.args.vllm_importance_sampling_correction

    @property
    def exact_in_loss(self) -> bool:
        """Whether the exact KL has a gradient of its own; see `part_loss`."""
        return bool(self.beta) and self.args.kl_estimator == "exact"

    def _precomputes(self) -> bool:
        return not self.args.needs_reference  # without one, no copy is kept

    def with_reference(self, dataset: Any, name: str) -> Any:
        return dataset

    def ready_for_evaluation(self, dataset: Any) -> Any:
        return dataset

    # before an update

    def measure(self, batches: Sequence[Sequence[Sample]], training: bool) -> dict[str, Tensor]:
        """Log-probs before the update, by policy and reference, and the exact KL: whichever of them will be needed.

        The samples keep them. Returns what is logged of them.
        """
        args = self.args
        estimates = self.beta > 0 and args.kl_estimator != "exact"
        several = args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations) != 0
        old = self.corrects or (training and several) or (estimates and args.kl_placement == "reward")
        if not (old or estimates or args.measures_kl):
            return {}
        found = _Measured(args.measures_kl, args.measures_kl or (old and estimates))
        for batch in batches:
            for part in self.data_collator.samples(batch):
                self._measure_part(to_device(part, args.device), old, estimates, found)
        if args.world_size > 1:
            found.sums = self.accelerator.reduce(found.sums, "sum")
        logged = found.means(args.kl_placement == "reward")
        if self.corrects:
            none = torch.zeros(0)
            logged |= rl_metrics.sampler_metrics(
                torch.cat([none, *found.differences]), torch.cat([none, *found.ratios])
            )
        return logged

    @torch.no_grad()
    def _measure_part(self, part: dict[str, Any], old: bool, ref: bool, found: _Measured) -> None:
        samples: Samples = part["samples"]
        if not len(part["rows"]):
            for sample in samples.samples:
                sample.old_logps = sample.ref_logps = sample.kl = torch.zeros(0)
            return
        if self.args.measures_kl:
            rows = self._reference_rows(part)
            both = self.inside(self.model, lambda: self._exact_kl(part, head_hidden(self.inner, part), rows))
            self._keep(samples, part, old_logps=both.logps, ref_logps=both.ref_logps, kl=both.kl)
        else:
            heat = self.args.temperature
            if old:
                logps = self.inside(self.model, lambda: self.token_logps(self.inner, part, heat))
                self._keep(samples, part, old_logps=logps)
            if ref:
                with self.reference.model() as reference:
                    wrapped = self.model if self.reference.own is None else reference
                    inner = models.inner_model(reference)
                    ref_logps = self.inside(wrapped, lambda: self.token_logps(inner, part, heat))
                    self._keep(samples, part, ref_logps=ref_logps)
        found.add(samples.samples)
        if self.corrects:
            self._note_sampler(samples, part, found)

    def _keep(self, samples: Samples, part: Mapping[str, Any], **values: Tensor | None) -> None:
        for name, value in values.items():
            assert value is not None
            for sample, own in zip(samples.samples, value.cpu().split(part["sizes"]), strict=True):
                setattr(sample, name, own.clone())

    def _note_sampler(self, samples: Samples, part: Mapping[str, Any], found: _Measured) -> None:
        old, theirs = (samples.joined(name, "cpu") for name in ("old_logps", "sampler_logps"))
        if old is None or theirs is None:
            raise ValueError(
                "sampler: got responses without log-probs, want them for every token, or "
                "vllm_importance_sampling_correction=False"
            )
        found.differences.append(old - theirs)
        found.ratios.append(self._sampler_ratios(old, theirs, part["cu_seqlens"].diff().cpu()))

    def _sampler_ratios(self, old: Tensor, theirs: Tensor, sizes: Tensor) -> Tensor:
        args = self.args
        return sampler_ratios(
            old, theirs, sizes, args.vllm_importance_sampling_mode, args.vllm_importance_sampling_clip_min,
            args.vllm_importance_sampling_clip_max,
        )  # fmt: skip

    def _options(self, part: Mapping[str, Any], head: models.Head) -> dict[str, Any]:
        return {"temperature": self.args.temperature, "scored_rows": head_labels(part)[1], **head.options()}

    def _reference_rows(self, part: dict[str, Any]) -> ReferenceRows:
        with self.reference.model() as reference:
            inner = models.inner_model(reference)
            wrapped = self.model if self.reference.own is None else reference
            hidden = self.inside(wrapped, lambda: head_hidden(inner, part))
            head = models.read_head(inner)
            if self.reference.own is None and head.weight.requires_grad:  # trained values come back after this block
                head = head._replace(weight=head.weight.detach().clone())
        return ReferenceRows(hidden, head)

    def _exact_kl(self, part: Mapping[str, Any], hidden: Tensor, rows: ReferenceRows) -> TokenKL:
        head = self.head()
        if rows.head.options() != head.options():
            raise unsupported("ref_model", rows.head.options(), f"its logits are not transformed as the policy's, "
                              f"{head.options()}")  # fmt: skip
        found = linear_token_kl(
            hidden, head.weight, rows.hidden, rows.head.weight, head_labels(part)[0], head.bias, rows.head.bias,
            **self._options(part, head),
        )  # fmt: skip
        values: list[Any] = [by_sequence(value, part) for value in found if value is not None]
        return TokenKL(*values)

    # an update

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The loss of a part or a batch. Its tokens' weights already are those of the whole update."""
        if return_outputs or "parts" in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.before_part(model, inputs)
        return self.inside(model, lambda: self.part_loss(inputs, num_items_in_batch))

    def before_part(self, model: Any, part: dict[str, Any]) -> None:
        if self.exact_in_loss:
            part["reference_rows"] = self._reference_rows(part)

    def part_loss(self, part: Mapping[str, Any], items: Items) -> Tensor:
        """The weighted sum over a part's tokens.

        A KL that is exact has a gradient of its own wherever it is placed. In the reward it depends on the policy in
        two ways: by which responses are sampled, which the advantages see, and by the distributions that are compared,
        which no sampled reward shows. The second is a term of the loss.
        """
        samples: Samples = part["samples"]
        batch: BatchSize = part["batch"]
        (hidden, balance), head, device = self.scored(part), self.head(), part["labels"].device
        sizes, number = part["cu_seqlens"].diff().long(), len(part["labels"])
        wanted = ("entropy",) if self._wants_entropy() else ()
        tokens = linear_token_statistics(
            hidden, head.weight, head_labels(part)[0], head.bias, wanted, **self._options(part, head)
        )
        logps, old = by_sequence(tokens.logps, part), samples.joined("old_logps", device)
        entropy = None if tokens.entropy is None else by_sequence(tokens.entropy, part)
        advantages = spread(samples.each("advantage", device), sizes, number)
        theirs = samples.joined("sampler_logps", device) if self.corrects else None
        ratios = None if theirs is None or old is None else self._sampler_ratios(old, theirs, sizes)
        of_sampler = None
        if ratios is not None and self.surrogate.loss_type == "vespo":
            of_sampler = sampler_log_ratio(ratios, sizes, self.args.vllm_importance_sampling_mode)
        found = surrogates(logps, old, advantages, sizes, self.surrogate, of_sampler)
        losses = found.losses
        if ratios is not None and of_sampler is None:
            losses = losses * ratios
        kept = self._kept_tokens(logps, old, theirs, entropy, advantages, sizes)
        losses = losses if kept is None else losses * kept
        weights = token_weights(sizes, number, self.weighting, batch, logps.dtype)
        loss = (losses * weights).sum()
        loss = loss + self._kl_term(part, hidden, logps, found.ratio, sizes, batch, weights)
        policy_loss = loss.detach()
        loss = loss + self._entropy_term(entropy, kept, batch)
        if balance is not None:
            loss = loss + balance * (len(samples.samples) / batch.sequences / batch.batches)
        self._add_update_metrics(found, entropy, sizes, policy_loss * batch.batches)
        self.add_loss(loss.detach() * batch.sequences, len(samples.samples))
        return loss

    def _wants_entropy(self) -> bool:
        return self.measuring() or bool(getattr(self.args, "entropy_coef", 0)) or self._quantile < 1

    @property
    def _quantile(self) -> float:
        return getattr(self.args, "top_entropy_quantile", 1.0)

    def _kept_tokens(
        self, logps: Tensor, old: Tensor | None, theirs: Tensor | None, entropy: Tensor | None, advantages: Tensor,
        sizes: Tensor,
    ) -> Tensor | None:  # fmt: skip
        """1 for tokens that are learnt from, 0 for others, or None for all."""
        kept, threshold = None, getattr(self.args, "off_policy_mask_threshold", None)
        if threshold is not None:
            before = theirs if theirs is not None else logps.detach() if old is None else old
            kept = off_policy_kept(logps, before, advantages, sizes, threshold)
        if self._quantile < 1:
            assert entropy is not None
            own = every = entropy.detach()
            if self.args.world_size > 1:
                every = self.accelerator.gather(self.accelerator.pad_across_processes(own, dim=0, pad_index=-1))
            every = every.masked_fill(every < 0, torch.nan)  # no entropy is
            limit = torch.nanquantile(every, 1 - self._quantile) if len(every) else torch.zeros((), device=own.device)
            surprising = (own >= limit).to(own.dtype)
            kept = surprising if kept is None else kept * surprising
        return kept

    def _kl_term(
        self, part: Mapping[str, Any], hidden: Tensor, logps: Tensor, ratio: Tensor, sizes: Tensor, batch: BatchSize,
        weights: Tensor,
    ) -> Tensor | float:  # fmt: skip
        """The KL as a term of the loss."""
        if not self.beta or (self.args.kl_placement == "reward" and not self.exact_in_loss):
            return 0.0
        samples: Samples = part["samples"]
        if self.exact_in_loss:
            kl = self._exact_kl(part, hidden, part["reference_rows"]).kl
        else:
            reference = samples.joined("ref_logps", logps.device)
            assert reference is not None
            kl = kl_estimate(logps, reference, self.args.kl_estimator)
            if self.args.use_bias_correction_kl:
                kl = kl * (ratio.detach() if self.args.kl_estimator == "k2" else ratio)
        if self.args.kl_placement == "loss":
            self.metrics.add("kl", kl.sum(), len(kl))
        else:  # it weighs what the same penalty weighs in the advantages
            kl = kl * spread(samples.each("slope", logps.device), sizes, len(kl))
        if self.weighting == "rloo":  # the KL of a sequence is a sum over its tokens
            return self.beta * kl.sum() / (batch.sequences * batch.batches)
        return self.beta * (kl * weights).sum()

    def _entropy_term(self, entropy: Tensor | None, kept: Tensor | None, batch: BatchSize) -> Tensor | float:
        coefficient = getattr(self.args, "entropy_coef", 0.0)
        if not coefficient or entropy is None:
            return 0.0
        self.metrics.add("entropy_coef", torch.full((), coefficient, device=entropy.device))
        if kept is None or self._quantile == 1:
            return -coefficient * entropy.sum() / (max(1, batch.tokens) * batch.batches)
        return -coefficient * (entropy * kept).sum() / (kept.sum().clamp(min=1) * batch.batches)

    def _add_update_metrics(
        self, found: Surrogates, entropy: Tensor | None, sizes: Tensor, policy_loss: Tensor
    ) -> None:
        metrics, number = self.metrics, len(found.losses)
        if entropy is not None:
            metrics.add("entropy", entropy.detach().sum(), number)
        kind = self.surrogate.loss_type
        if getattr(self.args, "entropy_coef", 0.0):
            metrics.add("policy_loss", policy_loss)
        if kind == "vespo" and found.phi is not None:
            phi = _sequence_means(found.phi, sizes).masked_fill(sizes == 0, 1.0)
            metrics.add("vespo/phi_seq_mean", phi.sum(), len(phi))
        if kind == "cispo":
            metrics.add("cispo_clip_ratio", found.high.float().sum(), number)
        if kind in ("cispo", "vespo", "sapo"):
            return
        per_sequence = self.surrogate.level != "token"
        for side, clipped in (("low", found.low), ("high", found.high), ("region", found.low | found.high)):
            means = _sequence_means(clipped.float(), sizes)
            values = means if per_sequence else clipped.float()
            metrics.add(f"clip_ratio/{side}_mean", values.sum(), len(values))
            if side != "region" and len(sizes):
                name, extreme, value = ("low_min", LOWEST, means.min()) if side == "low" else (
                    "high_max", HIGHEST, means.max())  # fmt: skip
                metrics.add_extreme(f"clip_ratio/{name}", value, extreme)


class _Measured:
    """Sums of what is measured before an update: the exact KL, the sampled one, or both.

    Which of them is not read off the samples: a rank may have none that is learnt from.
    """

    def __init__(self, exact: bool, estimated: bool) -> None:
        self.sums = torch.zeros(4)  # exact KL, estimates, tokens, samples
        self.exact, self.estimated = exact, estimated
        self.differences: list[Tensor] = []
        self.ratios: list[Tensor] = []

    def add(self, samples: Sequence[Sample]) -> None:
        for sample in samples:
            exact = sampled = 0.0
            if sample.kl is not None:
                exact = float(sample.kl.sum())
            if sample.old_logps is not None and sample.ref_logps is not None:
                sampled = float((sample.old_logps - sample.ref_logps).sum())
            self.sums += torch.tensor([exact, sampled, sample.tokens, 1.0])

    def means(self, in_reward: bool) -> dict[str, Tensor]:
        """`kl/exact` and `kl/sampled` are of a response, in nats. `kl` is of a token, as TRL's RLOO logs it."""
        exact, sampled, tokens, samples = self.sums
        found = {"kl/exact": exact / samples} if self.exact else {}
        if self.estimated:
            found["kl/sampled"] = sampled / samples
            if in_reward:
                found["kl"] = sampled / tokens.clamp(min=1)
        return found


def _sequence_means(values: Tensor, sizes: Tensor) -> Tensor:
    return (segment_sums(values, sizes) / sizes.clamp(min=1)).float()
