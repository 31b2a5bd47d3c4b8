"""The configurations of online reinforcement: the fields and defaults of TRL 1.16, and those that fastpref adds."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

from fastpref.common import checks
from fastpref.objectives.normalize import METHODS as NORMALIZERS
from fastpref.objectives.surrogates import LEVELS, LOSS_TYPES
from fastpref.trainers.config import PreferenceConfig, option, unsupported

KL_PLACEMENTS = {"reward": ("k1", "exact"), "loss": ("k2", "k3", "exact")}
SAMPLER_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
TEXT_DICTS = ("chat_template_kwargs", "generation_kwargs", "transformers_continuous_batching_config")
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
OWN_SAMPLER = "responses are sampled by fastpref or by the trainer's `sampler`"
# field of TRL -> why nothing but its default is possible
REFUSED = {
    "group_by_prompt": "a prompt's samples are made together already",
    "use_vllm": "give the trainer a `sampler`, such as an OpenAI-compatible server",
    "vllm_mode": OWN_SAMPLER, "vllm_model_impl": OWN_SAMPLER, "vllm_enable_sleep_mode": OWN_SAMPLER,
    "vllm_structured_outputs_regex": OWN_SAMPLER, "vllm_server_base_url": OWN_SAMPLER, "vllm_server_host": OWN_SAMPLER,
    "vllm_server_port": OWN_SAMPLER, "vllm_server_timeout": OWN_SAMPLER, "vllm_group_port": OWN_SAMPLER,
    "vllm_gpu_memory_utilization": OWN_SAMPLER, "vllm_max_model_length": OWN_SAMPLER,
    "vllm_tensor_parallel_size": OWN_SAMPLER, "use_transformers_continuous_batching": OWN_SAMPLER,
    "transformers_continuous_batching_config": OWN_SAMPLER, "use_transformers_paged": OWN_SAMPLER,
    "cache_implementation": "keys and values of a prompt are computed once for its samples",
    "generation_kwargs": "want temperature, top_p, top_k, min_p and repetition_penalty",
    "cast_lm_head_to_fp32": "log-probs of half precision are corrected in fp32 as it is",
    "use_adaptive_entropy": "want a fixed `entropy_coef`",
    "max_tool_calling_iterations": "there are no tool calls",
    "log_completions_hub_repo": "completions are printed, and written to completions.jsonl",
    "max_length": "a prompt is never cut; want `max_completion_length`",
    "auto_find_batch_size": "a generation batch holds whole groups of `num_generations`",
}  # fmt: skip


@dataclass
class OnlineConfig(PreferenceConfig):
    """The fields that online methods share: how to sample, how to reward, where the KL goes."""

    method: ClassVar[str]

    learning_rate: float = option(1e-6, "Peak learning rate.")
    remove_unused_columns: bool = option(False, "Keep from reward functions the columns beside the prompt.")
    max_length: int | None = option(None, "Not supported: a prompt is never cut. See max_completion_length.")
    num_generations: int = option(8, "Responses sampled to each prompt.")
    num_generations_eval: int | None = option(None, "The same in evaluations (default: num_generations).")
    max_completion_length: int = option(512, "Tokens of a response.")
    shuffle_dataset: bool | None = option(True, "Take prompts in another order in each epoch.")
    ds3_gather_for_generation: bool = option(True, "Kept for TRL's scripts.")
    generation_batch_size: int | None = option(None, "Responses sampled at once, over all ranks.")
    steps_per_generation: int | None = option(
        None, "Batches that one round of sampling is split into (default: gradient_accumulation_steps)."
    )
    temperature: float = option(1.0, "Of the softmax that is sampled from, and of all log-probs.")
    top_p: float = option(1.0, "Nucleus; 1 is everything.")
    top_k: int = option(0, "Most likely tokens to sample from; 0 is everything.")
    min_p: float | None = option(None, "Least probability of a token, relative to the most likely one.")
    repetition_penalty: float = option(1.0, "1 is none.")
    chat_template_kwargs: dict[str, Any] | str | None = option(None, "More arguments of the chat template.")
    beta: float = option(0.0, "Weight of the KL to the reference.")
    num_iterations: int = option(1, "Passes over the samples of one round (mu of GRPO).")
    epsilon: float = option(0.2, "Clip range of the ratio to the sampling policy.")
    epsilon_high: float | None = option(None, "Its upper end, if it is another (DAPO); the limit itself for cispo.")
    reward_weights: list[float] | None = option(None, "One for each reward function (default: 1.0).")
    mask_truncated_completions: bool = option(False, "Do not learn from responses that did not end.")
    sync_ref_model: bool = option(False, "Move the reference towards the policy every ref_model_sync_steps.")
    ref_model_mixup_alpha: float = option(0.6, "reference = alpha * policy + (1 - alpha) * reference.")
    ref_model_sync_steps: int = option(512, "Steps between two updates of the reference.")
    log_completions: bool = option(False, "Print responses with their rewards, and write them to completions.jsonl.")
    num_completions_to_print: int | None = option(None, "How many of them (default: all).")
    log_unique_prompts: bool = option(False, "Of these, one to each prompt.")
    log_multimodal: bool = option(True, "Kept for TRL's scripts.")
    vllm_importance_sampling_correction: bool = option(
        True, "Correct for what differs between a `sampler`'s log-probs and the trainer's."
    )
    vllm_importance_sampling_mode: str = option("sequence_mask", f"One of {', '.join(SAMPLER_MODES)}.")
    vllm_importance_sampling_clip_max: float | None = option(3.0, "Upper end of that ratio.")
    vllm_importance_sampling_clip_min: float | None = option(None, "Lower end of that ratio.")
    # fastpref's own
    kl_placement: str | None = option(
        None,
        "Where the KL goes: the 'reward' or the 'loss' (default: as in TRL, reward for RLOO, loss for GRPO).",
    )
    kl_estimator: str | None = option(
        None,
        "'exact' over the vocabulary; or k1 in the reward, k2 or k3 in the loss (default: k1 there, k3 here).",
    )
    use_bias_correction_kl: bool = option(True, "Weight k2 and k3 by the ratio to the sampling policy.")
    kl_target: float | None = option(
        None, "Steer beta towards this exact KL of a response, in nats (Ziegler et al. 2019). Default: beta is fixed."
    )
    kl_horizon: float = option(10_000, "Responses over which a KL that is a fifth off changes beta by a fifth.")
    track_kl: bool = option(False, "Measure the exact KL of each response (kl/exact in the log), also with beta 0.")
    reward_normalizer: str | None = option(
        None, "Normalise the weighted sum of rewards before the KL: running, batch, ema or percentile."
    )
    reward_clip: float | None = option(None, "Bound on the absolute value of normalised rewards.")
    # TRL's, not supported
    use_vllm: bool = option(False, "Not supported.")
    vllm_mode: str = option("colocate", "Not supported.")
    vllm_model_impl: str = option("vllm", "Not supported.")
    vllm_enable_sleep_mode: bool = option(False, "Not supported.")
    vllm_structured_outputs_regex: str | None = option(None, "Not supported.")
    vllm_server_base_url: str | None = option(None, "Not supported.")
    vllm_server_host: str = option("0.0.0.0", "Not supported.")
    vllm_server_port: int = option(8000, "Not supported.")
    vllm_server_timeout: float = option(240.0, "Not supported.")
    vllm_group_port: int = option(51216, "Not supported.")
    vllm_gpu_memory_utilization: float = option(0.3, "Not supported.")
    vllm_max_model_length: int | None = option(None, "Not supported.")
    vllm_tensor_parallel_size: int = option(1, "Not supported.")
    generation_kwargs: dict[str, Any] | str | None = option(None, "Not supported.")
    cache_implementation: str | None = option(None, "Not supported.")
    use_transformers_continuous_batching: bool = option(False, "Not supported.")
    transformers_continuous_batching_config: dict[str, Any] | str | None = option(None, "Not supported.")
    use_transformers_paged: bool = option(False, "Not supported.")

    def __post_init__(self) -> None:
        for name in TEXT_DICTS:
            if isinstance(getattr(self, name), str):
                setattr(self, name, json.loads(getattr(self, name)))
        super().__post_init__()
        self.refuse_changed(REFUSED)
        accelerator: Any = self.accelerator_config
        if self.world_size > 1 and not accelerator.even_batches:
            raise unsupported("even_batches", False, "ranks reward and compare their responses together")
        self._check_numbers()
        self._split_generation()
        self._place_kl()
        mode, low, high = (self.vllm_importance_sampling_mode, self.vllm_importance_sampling_clip_min,
                           self.vllm_importance_sampling_clip_max)  # fmt: skip
        checks.choice("vllm_importance_sampling_mode", mode, SAMPLER_MODES)
        if None not in (low, high) and low >= high:  # type: ignore[operator]
            raise ValueError(f"vllm_importance_sampling_clip_min: got {low}, want less than the maximum, {high}")
        if low is None and high is None and mode.endswith("truncate"):
            raise ValueError(f"vllm_importance_sampling_clip_max: got None with {mode!r}, want a minimum or a maximum")

    def _check_numbers(self) -> None:
        for name in ("max_completion_length", "temperature", "top_p", "repetition_penalty", "num_iterations"):
            checks.positive(name, getattr(self, name))
        for name in ("beta", "epsilon", "top_k", "entropy_coef"):
            checks.within(name, getattr(self, name, 0), 0, math.inf)
        if self.num_generations < 2:
            raise ValueError(
                f"num_generations: got {self.num_generations}, want at least 2: advantages compare a prompt's samples"
            )
        if self.sync_ref_model and not self.needs_reference:
            raise ValueError("sync_ref_model: got True with beta 0, want False: there is no reference")
        if self.reward_normalizer is not None:
            checks.choice("reward_normalizer", self.reward_normalizer, NORMALIZERS)
        if self.reward_clip is not None and self.reward_normalizer is None:
            raise ValueError("reward_clip: got one without reward_normalizer, want both")

    def _split_generation(self) -> None:
        """Fills in `generation_batch_size` or `steps_per_generation`, whichever is missing.

        A configuration that was saved has both.
        """
        together, steps = self.per_device_train_batch_size * self.world_size, self.steps_per_generation
        if self.generation_batch_size is None:
            steps = self.gradient_accumulation_steps if steps is None else steps
            self.generation_batch_size = together * steps
        elif self.generation_batch_size % together:
            raise ValueError(f"generation_batch_size: got {self.generation_batch_size}, want a multiple of {together}")
        elif steps is not None and steps * together != self.generation_batch_size:
            raise ValueError(
                f"generation_batch_size: got {self.generation_batch_size} beside steps_per_generation {steps}, want one"
            )
        self.steps_per_generation = self.generation_batch_size // together
        if self.generation_batch_size % self.num_generations:
            raise ValueError(
                f"num_generations: got {self.num_generations}, want a divisor of the generation batch, "
                f"{self.generation_batch_size} responses"
            )
        together, number = self.per_device_eval_batch_size * self.world_size, self.eval_generations
        if self.eval_strategy != "no" and together % number:
            raise ValueError(f"num_generations_eval: got {number}, want a divisor of an evaluation's batch, {together}")

    def _place_kl(self) -> None:
        self.kl_placement = self.kl_placement or ("reward" if self.method == "rloo" else "loss")
        checks.choice("kl_placement", self.kl_placement, KL_PLACEMENTS)
        self.kl_estimator = self.kl_estimator or {"reward": "k1", "loss": "k3"}[self.kl_placement]
        if self.kl_estimator not in KL_PLACEMENTS[self.kl_placement]:
            reason = "; as a loss, the gradient of k1 is 0 on average" if self.kl_estimator == "k1" else ""
            raise ValueError(
                f"kl_estimator: got {self.kl_estimator!r} in the {self.kl_placement}, want one of "
                f"{', '.join(KL_PLACEMENTS[self.kl_placement])}{reason}"
            )
        if self.kl_target is not None:
            checks.positive("kl_target", self.kl_target)
            checks.positive("kl_horizon", self.kl_horizon)
            if not self.beta:
                raise ValueError("kl_target: got one with beta 0, want the beta to begin with")

    @property
    def eval_generations(self) -> int:
        """Responses to each prompt in an evaluation."""
        return self.num_generations_eval or self.num_generations

    @property
    def needs_reference(self) -> bool:
        """Whether the reference model takes part."""
        return self.beta > 0 or self.measures_kl

    @property
    def measures_kl(self) -> bool:
        """Whether the exact KL of samples is measured, without a gradient."""
        in_reward = self.beta > 0 and (self.kl_placement, self.kl_estimator) == ("reward", "exact")
        return self.track_kl or self.kl_target is not None or in_reward


@dataclass
class RLOOConfig(OnlineConfig):
    """The fields of TRL 1.16's `RLOOConfig`."""

    method: ClassVar[str] = "rloo"

    num_generations: int = option(2, "Responses sampled to each prompt.")
    beta: float = option(0.05, "Weight of the KL to the reference.")
    normalize_advantages: bool = option(False, "Bring advantages to mean 0 and standard deviation 1.")
    reward_clip_range: list[float] | None = option(None, "Clip rewards to this range, before the KL.")


@dataclass
class GRPOConfig(OnlineConfig):
    """The fields of TRL 1.16's `GRPOConfig`."""

    method: ClassVar[str] = "grpo"

    loss_type: str = option("dapo", f"One of {', '.join(LOSS_TYPES)}.", choices=list(LOSS_TYPES))
    importance_sampling_level: str = option(
        "token", "Ratios of tokens, or of whole sequences (GSPO).", choices=["token", "sequence"]
    )
    scale_rewards: str = option("group", "Divide advantages by the standard deviation of: group, batch, none.")
    multi_objective_aggregation: str = option("sum_then_normalize", "Or normalize_then_sum (GDPO).")
    delta: float | None = option(None, "Upper end of the ratio where the advantage is negative (INTELLECT-2).")
    top_entropy_quantile: float = option(1.0, "Learn from this share of the tokens, those of highest entropy.")
    entropy_coef: float = option(0.0, "Weight of an entropy bonus.")
    off_policy_mask_threshold: float | None = option(
        None, "Leave out bad responses that moved away from the sampling policy by more than this (DeepSeek-V3.2)."
    )
    sapo_temperature_neg: float = option(1.05, "SAPO's temperature of tokens with negative advantage.")
    sapo_temperature_pos: float = option(1.0, "And of the others.")
    vespo_k_pos: float = option(2.0, "VESPO's power of the ratio where the advantage is not negative.")
    vespo_lambda_pos: float = option(3.0, "VESPO's decay there.")
    vespo_k_neg: float = option(3.0, "VESPO's power where it is negative.")
    vespo_lambda_neg: float = option(2.0, "VESPO's decay there.")
    use_adaptive_entropy: bool = option(False, "Not supported.")
    entropy_coef_min: float = option(0.0, "Kept for TRL's scripts.")
    entropy_coef_max: float = option(1.0, "Kept for TRL's scripts.")
    entropy_coef_delta: float = option(0.005, "Kept for TRL's scripts.")
    entropy_target: float = option(0.2, "Kept for TRL's scripts.")
    vllm_importance_sampling_cap: float | None = option(None, "TRL's older name of vllm_importance_sampling_clip_max.")
    cast_lm_head_to_fp32: bool = option(False, "Not supported.")
    max_tool_calling_iterations: int | None = option(None, "Not supported.")
    log_completions_hub_repo: str | None = option(None, "Not supported.")

    def __post_init__(self) -> None:
        given = self.scale_rewards
        self.scale_rewards = {"True": "group", "False": "none"}.get(str(given), given)
        if self.vllm_importance_sampling_cap is not None:
            warnings.warn("vllm_importance_sampling_cap: TRL 2 has it as vllm_importance_sampling_clip_max alone",
                          FutureWarning, stacklevel=3)  # fmt: skip
            self.vllm_importance_sampling_clip_max = self.vllm_importance_sampling_cap
        super().__post_init__()
        checks.choice("loss_type", self.loss_type, LOSS_TYPES)
        checks.choice("importance_sampling_level", self.importance_sampling_level, LEVELS[:2])
        checks.choice("scale_rewards", self.scale_rewards, ("group", "batch", "none"))
        checks.choice("multi_objective_aggregation", self.multi_objective_aggregation, AGGREGATIONS)
        checks.within("top_entropy_quantile", self.top_entropy_quantile, 0, 1, closed=True)
        if self.top_entropy_quantile < 1 and self.token_budget is not None:
            raise ValueError("token_budget: got one with top_entropy_quantile below 1, want None: it ranks a batch")
        if self.multi_objective_aggregation == "normalize_then_sum":
            if self.kl_placement == "reward" and self.beta:
                raise unsupported("kl_placement", "reward", "normalize_then_sum normalises each reward apart")
            if self.reward_normalizer is not None:
                raise unsupported("reward_normalizer", self.reward_normalizer, "normalize_then_sum normalises already")
