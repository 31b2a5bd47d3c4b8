"""The trainers' configurations: the fields and defaults of TRL 1.16, and those that fastpref adds."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available

from fastpref.common import checks
from fastpref.data.packing import LAYOUTS

STATISTICS_WHEN = ("logging", "every", "never")


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A field with a default and the help text of `fastpref train`."""
    return field(default=default, metadata={"help": help, **metadata})


def list_option(default: Callable[[], list], help: str) -> Any:
    """The same for a field whose default is a list."""
    return field(default_factory=default, metadata={"help": help})


def unsupported(name: str, got: Any, reason: str) -> ValueError:
    """The error for a value that fastpref does not support. It names the field and the reason."""
    return ValueError(f"{name}: got {got!r}, which fastpref does not support: {reason}")


@dataclass
class PreferenceConfig(TrainingArguments):
    """The fields that all methods share.

    Fields that are not listed here are those of `transformers.TrainingArguments`.

    Raises:
        ValueError: a field has a value that is not possible, or that fastpref does not support. The message names it.
    """

    logging_steps: float = option(10, "Log every so many update steps, or share of them.")
    gradient_checkpointing: bool = option(True, "Recompute activations in the backward: less memory, more time.")
    bf16: bool | None = option(  # type: ignore[assignment]
        None, "bf16 autocast. By default on where the device has it, unless fp16 is on; else training is in fp32."
    )
    logging_nan_inf_filter: bool = option(False, "Log the mean of other losses where one is NaN, and go on.")
    report_to: list[str] | str | None = option("none", "Where to report logs to, besides the console and files.")
    model_init_kwargs: dict[str, Any] | str | None = option(None, "For from_pretrained, when the model is a path.")
    trust_remote_code: bool = option(False, "Run Python code that comes with a model or tokenizer.")
    router_aux_loss_coef: float | None = option(
        None, "Mixture-of-experts models: weight of the load-balancing loss (default: the model's own, as in TRL)."
    )
    disable_dropout: bool = option(True, "Switch dropout off, in the policy and its reference.")
    dataset_num_proc: int | None = option(None, "Processes that prepare the data.")
    max_length: int | None = option(1024, "Tokens in a sequence; longer ones are cut at the end (None: never).")
    truncation_mode: str = option("keep_start", "Only 'keep_start'.")
    responses_as_written: bool = option(
        False,
        "A response is its text's tokens and EOS after the prompt's chat template, as it was sampled: for reasoning "
        "models, whose templates leave the reasoning out. Otherwise it goes through the template, as in TRL.",
    )
    padding_free: bool = option(True, "Kept for TRL's scripts: batches have no padding (see layout).")
    pad_to_multiple_of: int | str | None = option("auto", "Kept for TRL's scripts: masked padding has no effect.")
    pad_token: str | None = option(None, "Used for padding, instead of the tokenizer's.")
    activation_offloading: bool = option(False, "Keep activations in CPU memory between forward and backward.")
    layout: str = option(
        "auto",
        "How sequences are packed: 'shared' (or 'tree') runs what sequences begin with in common once, 'packed' has no "
        "padding, 'padded' is as in TRL. 'auto' is the first of them that gives this model's own hidden states.",
        choices=["auto", "tree", *LAYOUTS],
    )
    token_budget: int | None = option(
        None, "Most tokens of one forward and backward. A batch that has more is run in parts, with the same result."
    )
    group_by_prompt: bool = option(
        False,
        "Bring a prompt's examples into one batch, where it and the responses that they share run once. Prompts are "
        "shuffled instead of examples.",
    )
    keep_freed_memory: bool = option(
        True,
        "On a CPU: tell glibc to keep freed memory for this process (up to 9 percent faster on 2 cores).",
    )
    statistics: str = option(
        "logging",
        "When the entropy, mean logits and token accuracy are measured: 'logging' (the steps that log, and all of an "
        "evaluation), 'every' step, or 'never'.",
        choices=list(STATISTICS_WHEN),
    )

    def __post_init__(self) -> None:
        self._choose_precision()
        if isinstance(self.model_init_kwargs, str):
            self.model_init_kwargs = json.loads(self.model_init_kwargs)
        super().__post_init__()
        checks.choice("layout", self.layout, ("auto", "tree", *LAYOUTS))
        self.layout = "shared" if self.layout == "tree" else self.layout
        checks.choice("statistics", self.statistics, STATISTICS_WHEN)
        checks.choice("truncation_mode", self.truncation_mode, ("keep_start",))
        for name in ("max_length", "token_budget"):
            if getattr(self, name) is not None:
                checks.positive(name, getattr(self, name))
        if self.group_by_prompt and self.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                f"group_by_prompt: got True with train_sampling_strategy {self.train_sampling_strategy!r}, want "
                "'random' or 'sequential'"
            )
        if self.batch_eval_metrics:
            raise unsupported("batch_eval_metrics", True, "`compute_metrics` is called once, with all scores")
        if self.include_for_metrics:
            raise unsupported("include_for_metrics", self.include_for_metrics, "`compute_metrics` gets scores alone")
        if self.use_liger_kernel:
            self.liger_kernel_config = _layer_kernels(self.liger_kernel_config)
        if self.label_smoothing_factor:
            raise unsupported(
                "label_smoothing_factor", self.label_smoothing_factor,
                "it smooths a cross-entropy's labels; want 0.0, or `label_smoothing` where the method has it",
            )  # fmt: skip
        if isinstance(self.pad_to_multiple_of, str):
            text = self.pad_to_multiple_of.lower()
            self.pad_to_multiple_of = None if text in ("auto", "none", "null") else int(text)

    def refuse_changed(self, reasons: Mapping[str, str]) -> None:
        """Refuses values of fields that are there for TRL's scripts alone; `reasons` says why, by the field's name.

        Raises:
            ValueError: one of them is not at its default.
        """
        known = type(self).__dataclass_fields__
        for name, reason in reasons.items():
            if name in known and getattr(self, name) != known[name].default:
                raise unsupported(name, getattr(self, name), reason)

    def _choose_precision(self) -> None:
        """bf16 unless said otherwise; fp32 with a warning where the device has no bf16.

        fp16 on a CPU is fp32 with a warning, too: Accelerate would ignore it in silence.
        """
        fallback = "there is no accelerator that has it; training is in fp32"
        if self.fp16 and not self.bf16 and (self.use_cpu or not torch.accelerator.is_available()):
            self.fp16 = self.bf16 = False
            warnings.warn(f"fp16: {fallback}", stacklevel=1)  # one place, so that Python says it once
        if self.bf16 is None:
            has_it = self.use_cpu or is_torch_bf16_gpu_available() or is_torch_xla_available()
            self.bf16 = not self.fp16 and has_it
            if not (self.fp16 or has_it):
                warnings.warn(f"bf16: {fallback}", stacklevel=1)


def _layer_kernels(config: dict[str, bool] | None) -> dict[str, bool]:
    """The configuration of Liger's kernels, with those off that would compute a loss from labels.

    The loss is fastpref's, and its trainers give the model no labels.
    """
    losses = ("fused_linear_cross_entropy", "cross_entropy")
    given = [name for name in losses if (config or {}).get(name)]
    if given:
        raise unsupported("liger_kernel_config", {given[0]: True}, "it replaces the forward whose loss is fastpref's")
    warnings.warn(
        "use_liger_kernel: Liger's kernels of layers are used; its cross-entropy is off, the loss is fastpref's",
        stacklevel=4,
    )
    return {**(config or {}), **dict.fromkeys(losses, False)}


@dataclass
class PolicyConfig(PreferenceConfig):
    """The fields of methods that train a language model."""

    assistant_only_loss: bool = option(
        False, "Of a response's messages score the assistant's alone: no tool outputs, no later turns of the user."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.assistant_only_loss and self.responses_as_written:
            raise ValueError(
                "responses_as_written: got True with assistant_only_loss, want one of them: such a response is one "
                "message"
            )

    def tokenizing(self, name: str) -> dict[str, Any]:
        """What it says of how the data set `name` is tokenised: arguments of the functions of `fastpref.data`."""
        return {
            "max_length": self.max_length, "num_proc": self.dataset_num_proc, "name": name,
            "responses_as_written": self.responses_as_written, "assistant_only_loss": self.assistant_only_loss,
        }  # fmt: skip


@dataclass
class ReferenceConfig(PolicyConfig):
    """The fields of methods with a reference model."""

    learning_rate: float = option(1e-6, "Peak learning rate.")
    beta: float = option(0.1, "Strength of the KL constraint: rewards are beta * (logp - ref_logp).")
    precompute_ref_log_probs: bool | None = option(
        None,
        "Compute the reference's log-probs before training and keep them on disk. By default wherever it can be done "
        "and training passes over the data at least once.",
        nargs="?",
        const=True,
    )
    precompute_ref_batch_size: int | None = option(None, "Kept for TRL's scripts; see reference_tokens.")
    reference_tokens: int = option(8192, "Tokens of one forward of the reference when its log-probs are precomputed.")
    reference_cache: str | None = option(
        None, "Folder of the reference log-probs (default: fastpref/reference in the user's cache folder)."
    )
    sync_ref_model: bool = option(False, "TR-DPO: move the reference towards the policy every ref_model_sync_steps.")
    ref_model_mixup_alpha: float = option(0.6, "TR-DPO: reference = alpha * policy + (1 - alpha) * reference.")
    ref_model_sync_steps: int = option(512, "TR-DPO: steps between two updates of the reference.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ValueError(
                "precompute_ref_log_probs: got True with sync_ref_model, want False: the reference changes in training"
            )


@dataclass
class DPOConfig(ReferenceConfig):
    """The fields of TRL 1.16's `DPOConfig`. `label_smoothing` acts on `sigmoid` too (cDPO); see `fastpref.DPOLoss`."""

    loss_type: list[str] = list_option(
        lambda: ["sigmoid"],
        "One of the 15 loss types, or several for a mixture. For rankings: plackett_luce, all_pairs, rao_kupper or "
        "davidson; the last two learn from ties.",
    )
    loss_weights: list[float] | None = option(None, "One for each loss type (default: 1.0).")
    label_smoothing: float = option(0.0, "Probability that a pair's labels are flipped.")
    f_divergence_type: str = option("reverse_kl", "reverse_kl, forward_kl, js_divergence or alpha_divergence.")
    f_alpha_divergence_coef: float = option(0.5, "Alpha of alpha_divergence.")
    discopop_tau: float = option(0.05, "Temperature of discopop.")
    ld_alpha: float | None = option(None, "LD-DPO's weight of the tokens beyond the shorter response's length.")
    use_weighting: bool = option(False, "WPO: weigh each pair by the policy's confidence in it.")
    nu: float | None = option(None, "How likely ties are, for rao_kupper (default: 3) and davidson (default: 1).")

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        super().__post_init__()


@dataclass
class IPOConfig(ReferenceConfig):
    """Identity preference optimisation (Azar et al. 2023).

    `length_normalize=True` is the form in TRL and in the authors' code.
    """

    length_normalize: bool = option(True, "Divide each log-ratio by its number of tokens.")


@dataclass
class KTOConfig(ReferenceConfig):
    """The fields of TRL 1.16's `KTOConfig`."""

    train_sampling_strategy: str = option("sequential", "KTO's mismatched pairs are made within batches of the data.")
    loss_type: str = option("kto", "kto or apo_zero_unpaired.", choices=["kto", "apo_zero_unpaired"])
    desirable_weight: float = option(1.0, "Weight of desirable responses.")
    undesirable_weight: float = option(1.0, "Weight of undesirable responses.")


@dataclass
class ReferenceFreeConfig(PolicyConfig):
    """The fields of methods without a reference model."""

    learning_rate: float = option(1e-6, "Peak learning rate.")
    max_completion_length: int | None = option(None, "Kept for TRL's scripts: encoder-decoder models only.")
    generate_during_eval: bool = option(False, "Not supported.")
    is_encoder_decoder: bool | None = option(None, "Not supported.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.generate_during_eval:
            raise unsupported("generate_during_eval", True, "use `fastpref generate`")
        if self.is_encoder_decoder:
            raise unsupported("is_encoder_decoder", True, "want a causal language model")


@dataclass
class CPOConfig(ReferenceFreeConfig):
    """The fields of TRL 1.16's `CPOConfig`: CPO, and SimPO as `loss_type="simpo", cpo_alpha=0.0`."""

    beta: float = option(0.1, "Scale of the log-probs.")
    label_smoothing: float = option(0.0, "Probability that a pair's labels are flipped.")
    loss_type: str = option("sigmoid", "sigmoid, hinge, ipo, simpo or alphapo.")
    cpo_alpha: float = option(1.0, "Weight of the chosen responses' NLL.")
    simpo_gamma: float = option(0.5, "Target margin of simpo.")
    alpha: float = option(0.0, "AlphaPO's reward shape; 0 is log p.")

    def __post_init__(self) -> None:
        if self.loss_type == "alphapo":
            self.loss_type, self.cpo_alpha = "simpo", 0.0
        super().__post_init__()


@dataclass
class SimPOConfig(ReferenceFreeConfig):
    """SimPO by its own name, with the paper's defaults (arXiv 2405.14734)."""

    beta: float = option(2.0, "Scale of the mean log-probs.")
    simpo_gamma: float = option(0.5, "Target reward margin.")
    label_smoothing: float = option(0.0, "Probability that a pair's labels are flipped.")


@dataclass
class ORPOConfig(ReferenceFreeConfig):
    """The fields of TRL 1.16's `ORPOConfig`."""

    beta: float = option(0.1, "Weight of the odds-ratio term.")
    padding_value: int | None = option(None, "Kept for TRL's scripts: masked padding has no effect.")


@dataclass
class RewardConfig(PreferenceConfig):
    """The fields of TRL 1.16's `RewardConfig`."""

    learning_rate: float = option(1e-4, "Peak learning rate.")
    chat_template_path: str | None = option(None, "A Jinja file, or a tokenizer's folder, with the chat template.")
    eos_token: str | None = option(None, "Used in place of the tokenizer's.")
    center_rewards_coefficient: float | None = option(None, "Weight of the squared sum of a pair's rewards.")
    ranking_loss: str = option(
        "pairs",
        "Of rankings: all their pairs, plackett_luce, rao_kupper or davidson; the last two learn from ties.",
        choices=["pairs", "plackett_luce", "rao_kupper", "davidson"],
    )
    nu: float | None = option(None, "How likely ties are, for rao_kupper (default: 3) and davidson (default: 1).")


@dataclass
class PRMConfig(PreferenceConfig):
    """The fields of the `PRMConfig` of TRL 1.13, the last version that had one."""

    learning_rate: float = option(1e-5, "Peak learning rate.")
    max_completion_length: int | None = option(None, "Tokens of the completion, all steps together.")
    max_prompt_length: int | None = option(None, "Tokens of the prompt; the last ones are kept.")
    step_separator: str = option("\n", "What ends a step: its last token is the one that is labelled.")
    train_on_last_step_only: bool = option(False, "Only the last step has a label.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.responses_as_written:
            raise unsupported("responses_as_written", True, "steps are texts, which no chat template changes")
