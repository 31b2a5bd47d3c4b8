"""The trainers of RLOO and of GRPO with its family."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastpref.objectives.advantages import Advantages, group_relative, leave_one_out, normalized_sum
from fastpref.objectives.surrogates import Surrogate
from fastpref.trainers.config import unsupported
from fastpref.trainers.rl import OnlineTrainer
from fastpref.trainers.rl_config import GRPOConfig, RLOOConfig


class RLOOTrainer(OnlineTrainer):
    """REINFORCE leave-one-out (Ahmadian et al. 2024), with the arguments of TRL 1.16's `RLOOTrainer`.

    Args:
        model: what to train: a name on the hub, a folder, a causal language model, or a PeftModel.
        reward_funcs: what rewards responses: functions with TRL's signature, models for sequence classification with
            one label or their names, or `RewardHead`s; one, or a list.
        args: an `RLOOConfig`; by default one with an `output_dir` named after the model.
        train_dataset: records with a `prompt`, as text or messages. Other columns go to the reward functions.
        eval_dataset: the same, or several by name.
        processing_class: the tokenizer, by default the model's.
        reward_processing_classes: tokenizers of reward models, by default their own.
        callbacks: as for `transformers.Trainer`.
        optimizers: as for `transformers.Trainer`.
        quantization_config: how to quantise a model that is given by name.
        peft_config: new adapters to train, instead of all weights.
        ref_model: the reference, by default the policy as it is before training.
        sampler: what samples responses, in place of the model's own `generate`; see
            `fastpref.trainers.rollouts.Sampler`.
        heldout_funcs: like `reward_funcs`, but only looked at (`heldout/NAME/mean` in the log): nothing is learnt from
            them, so they show a reward that is exploited.

    Raises:
        ValueError: an argument or a field of `args` is not supported, or a record is wrong. The message names it.
        TypeError: an argument is not of a type listed above.
    """

    config_class = RLOOConfig
    weighting = "rloo"

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: RLOOConfig | None = None, train_dataset: Any = None,
        eval_dataset: Any = None, processing_class: Any = None, reward_processing_classes: Any = None,
        callbacks: Any = None, optimizers: Any = (None, None), quantization_config: Any = None, peft_config: Any = None,
        *, ref_model: Any = None, sampler: Any = None, heldout_funcs: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(
            model, reward_funcs, args, train_dataset, eval_dataset, processing_class, reward_processing_classes,
            sampler, heldout_funcs, ref_model, callbacks=callbacks, optimizers=optimizers,
            quantization_config=quantization_config, peft_config=peft_config,
        )  # fmt: skip
        self.surrogate = Surrogate("rloo", "sum", self.args.epsilon, _high(self.args))

    def combined(self, rewards: Tensor) -> Tensor:
        total = super().combined(rewards)
        return total if self.args.reward_clip_range is None else total.clamp(*self.args.reward_clip_range)

    def advantages(self, total: Tensor, rewards: Tensor, repeats: int) -> Advantages:
        return leave_one_out(total, repeats, normalize=self.args.normalize_advantages)


class GRPOTrainer(OnlineTrainer):
    """GRPO and its family (DAPO, Dr. GRPO, GSPO, CISPO, SAPO, ...), with the arguments of TRL 1.16's `GRPOTrainer`.

    Arguments and errors as in `RLOOTrainer`, with a `GRPOConfig`. `tools`, `rollout_func` and `environment_factory` are
    not supported; want None.
    """

    config_class = GRPOConfig

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: GRPOConfig | None = None, train_dataset: Any = None,
        eval_dataset: Any = None, processing_class: Any = None, reward_processing_classes: Any = None,
        callbacks: Any = None, optimizers: Any = (None, None), quantization_config: Any = None, peft_config: Any = None,
        tools: Any = None, rollout_func: Any = None, environment_factory: Any = None, *, ref_model: Any = None,
        sampler: Any = None, heldout_funcs: Any = None,
    ) -> None:  # fmt: skip
        given = {"tools": tools, "rollout_func": rollout_func, "environment_factory": environment_factory}
        for name, value in given.items():
            if value is not None:
                raise unsupported(name, "one", "responses are single turns; want None, or a `sampler`")
        super().__init__(
            model, reward_funcs, args, train_dataset, eval_dataset, processing_class, reward_processing_classes,
            sampler, heldout_funcs, ref_model, callbacks=callbacks, optimizers=optimizers,
            quantization_config=quantization_config, peft_config=peft_config,
        )  # fmt: skip
        own = self.args
        self.weighting = own.loss_type
        self.surrogate = Surrogate(
            own.loss_type, own.importance_sampling_level, own.epsilon, _high(own), own.delta,
            (own.sapo_temperature_neg, own.sapo_temperature_pos),
            (own.vespo_k_pos, own.vespo_lambda_pos, own.vespo_k_neg, own.vespo_lambda_neg),
        )  # fmt: skip

    def advantages(self, total: Tensor, rewards: Tensor, repeats: int) -> Advantages:
        if self.args.multi_objective_aggregation == "normalize_then_sum":
            return normalized_sum(rewards, self.reward_weights.to(rewards.device), repeats)
        return group_relative(total, repeats, scale=self.args.scale_rewards)


def _high(args: Any) -> float:
    return args.epsilon if args.epsilon_high is None else args.epsilon_high
