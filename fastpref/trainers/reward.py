"""Trainers of reward models: from preference pairs (Bradley-Terry), and from labelled steps (process rewards)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastpref.data import formats, ranked, tokenize
from fastpref.data.collators import ListCollator, PackedCollator, RewardCollator, StepCollator
from fastpref.models.adapters import active_module
from fastpref.objectives.lists import list_objective
from fastpref.objectives.process_reward import ProcessRewardLoss
from fastpref.objectives.reward import RANKING_METHODS, BradleyTerryLoss, RewardOutput, row_rewards
from fastpref.reference import TIE_MODELS, Comparisons
from fastpref.trainers.base import Items, PreferenceTrainer
from fastpref.trainers.config import PreferenceConfig, PRMConfig, RewardConfig, unsupported
from fastpref.trainers.forward import hidden_rows
from fastpref.trainers.lists import any_ranked
from fastpref.trainers.loading import given_args, load_model, load_tokenizer, wrap_peft
from fastpref.trainers.metrics import HIGHEST, LOWEST


class _HeadTrainer(PreferenceTrainer):
    """Trains a backbone with a small head named `score` on its last hidden states."""

    kind: str

    def __init__(
        self, model: Any, args: PreferenceConfig, collator: PackedCollator, train_dataset: Any, eval_dataset: Any,
        processing_class: Any, auto_class: Any, labels: int, peft_config: Any = None, quantization_config: Any = None,
        **options: Any,
    ) -> None:  # fmt: skip
        from transformers import set_seed

        if isinstance(model, str):
            set_seed(args.seed)  # the head is made of random numbers
        given = model
        model = load_model(model, args, auto_class, quantization_config, **_labels(model, labels))
        if getattr(model.config, "num_labels", None) != labels:
            raise ValueError(
                f"model: got num_labels={model.config.num_labels}, want {labels} ({self.kind} require "
                f"`num_labels={labels}`: from_pretrained(..., num_labels={labels}))"
            )
        processing_class = load_tokenizer(processing_class, model, args, given)
        model = wrap_peft(model, peft_config, args)
        super().__init__(model, args, collator, train_dataset, eval_dataset, processing_class, **options)
        self.score_head()

    def score_head(self) -> nn.Linear:
        """The head in use. With adapters, the trained copy of it."""
        head: Any = active_module(getattr(self.inner, "score", None))
        if not isinstance(head, nn.Linear) or type(head) is not nn.Linear:
            raise unsupported(
                "model", type(self.inner).__name__, f"its head `score` is {type(head).__name__}, want a plain nn.Linear"
            )
        return head


def _labels(model: Any, labels: int) -> dict[str, Any]:
    return {"num_labels": labels} if isinstance(model, str) else {}


class RewardTrainer(_HeadTrainer):
    """Trains a reward model on pairs, with the arguments of TRL 1.16's `RewardTrainer`.

    A reward is formed in fp32 from a sequence's last real token, whatever pads it.

    Args:
        model: a name, a folder, or a model for sequence classification with one label.
        args: a `RewardConfig`; by default one with an `output_dir` named after the model.
        data_collator: not supported; want None.
        train_dataset: pairs, with a `margin` or without, in any format of `fastpref.data.formats`; or rankings in one
            of `fastpref.data.ranked`, by the configuration's `ranking_loss`.
        eval_dataset: the same, or several by name.
        processing_class: the tokenizer, by default the model's.
        compute_metrics: called with `predictions`, the rewards `[N, 2]` of chosen and rejected responses in the order
            of the data, and `label_ids`, zeros `[N]`: the index of the better one. Not
            with rankings.
        options: more of `DPOTrainer`'s arguments, such as `peft_config` and `callbacks`.

    Raises:
        ValueError: the model has another number of labels, or an argument or a record is wrong. The message names it.
        TypeError: an argument is not of a type listed above.
    """

    config_class = RewardConfig
    kind = "reward models"
    gives_scores = True
    reads_images = True
    signature_columns: tuple[str, ...] = ("chosen_ids", "rejected_ids", "margin")

    def __init__(
        self, model: Any, args: RewardConfig | None = None, data_collator: Any = None, train_dataset: Any = None,
        eval_dataset: Any = None, processing_class: Any = None, **options: Any,
    ) -> None:  # fmt: skip
        from transformers import AutoModelForSequenceClassification

        args = given_args(args, RewardConfig, model, "Reward")
        self.loss_fn = BradleyTerryLoss(args.center_rewards_coefficient or 0.0)
        self.on_lists = args.ranking_loss in TIE_MODELS or any_ranked(train_dataset, eval_dataset)
        list_objective(RANKING_METHODS[args.ranking_loss], 1.0, args.nu)  # refuses a wrong nu
        self.reads_images = not self.on_lists
        if self.on_lists:
            self.signature_columns = ("prompt_ids", "list_ids", "list_sizes", "ranks")
            if options.get("compute_metrics") is not None:
                raise unsupported("compute_metrics", options["compute_metrics"], "rankings have no pair of scores")
        collator = ListCollator(whole=True) if self.on_lists else RewardCollator()
        super().__init__(
            model, args, collator, train_dataset, eval_dataset, processing_class,
            AutoModelForSequenceClassification, 1, data_collator=data_collator, **options,
        )  # fmt: skip

    def prepare_dataset(self, dataset: Any, name: str, args: Any) -> Any:
        columns = set(formats.column_names(dataset))
        if (prompts := columns & {"prompt_ids", "prompt_input_ids"}) and not (
            self.on_lists or "chosen_labels" in columns
        ):
            raise ValueError(
                f"{name}_dataset: got {prompts.pop()}, want chosen_ids and rejected_ids as whole sequences"
            )
        tokenizer = self.tokenizer_in_use
        if args.eos_token is not None:
            if args.eos_token not in tokenizer.get_vocab():
                raise ValueError(f"eos_token: got {args.eos_token!r}, which is not in the tokenizer's vocabulary")
            tokenizer.eos_token = args.eos_token
        if args.chat_template_path is not None:
            tokenizer.chat_template = _chat_template(args.chat_template_path)
        if self.on_lists:
            if "margin" in columns:
                warnings.warn(f"margin: in {name}_dataset, but not read: losses of rankings have none", stacklevel=4)
            return ranked.tokenize_ranked_whole(
                ranked.ranked(dataset), tokenizer, max_length=args.max_length, ties=args.ranking_loss in TIE_MODELS,
                num_proc=args.dataset_num_proc, name=name, responses_as_written=args.responses_as_written,
            )  # fmt: skip
        return tokenize.tokenize_reward(
            self.pictured(formats.paired(dataset), formats.PAIR, args, name, whole=True), tokenizer,
            max_length=args.max_length, num_proc=args.dataset_num_proc, name=name,
            responses_as_written=args.responses_as_written, prompts=args.group_by_prompt,
        )  # fmt: skip

    def part_loss(self, part: Mapping[str, Any], items: Items) -> Tensor:
        hidden, head = hidden_rows(self.inner, part), self.score_head()
        if self.on_lists:
            out, rewards = self._of_lists(hidden, head, part)
        else:
            out = self.loss_fn.from_hidden(hidden, head.weight, part["last_rows"], part.get("margin"), head.bias)
            rewards = torch.cat([out.chosen_rewards, out.rejected_rewards])
        self.metrics.add_extreme("min_reward", rewards.min(), LOWEST)
        self.metrics.add_extreme("max_reward", rewards.max(), HIGHEST)
        self.metrics.add_mean("mean_reward", rewards)
        self.metrics.add_mean("accuracy", out.accuracies)
        self.metrics.add_mean("margin", out.chosen_rewards - out.rejected_rewards)
        self.add_loss(out.loss * part["examples"], part["examples"])
        if not self.on_lists:
            self.keep_scores(out)
        self.count_tokens(part)
        return out.loss

    def _of_lists(self, hidden: Tensor, head: nn.Linear, part: Mapping[str, Any]) -> tuple[RewardOutput, Tensor]:
        """(loss and measures of a part's pairs of different ranks, the rewards of all its responses)."""
        rewards = row_rewards(hidden, head.weight, part["last_rows"], head.bias)
        out = self.loss_fn.from_rankings(
            rewards, part["ranks"], part["group"], self.args.ranking_loss, self.args.nu,
            compared=Comparisons(**part["compared"]),
        )  # fmt: skip
        return out, rewards.detach()

    def keep_scores(self, out: RewardOutput) -> None:
        """In an evaluation, keeps the rewards for `compute_metrics`."""
        if not self.model.training:
            self.metrics.keep("scores", torch.stack([out.chosen_rewards, out.rejected_rewards], 1))


def _chat_template(path: str) -> str:
    from pathlib import Path

    if path.endswith((".j2", ".jinja")):
        return Path(path).read_text(encoding="utf-8")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path).chat_template


class PRMTrainer(_HeadTrainer):
    """Trains a process reward model: it classifies the last token of every step as right or wrong.

    Arguments as in the `PRMTrainer` of TRL 1.13, the last version that had one.

    Args:
        model: a name, a folder, or a model for token classification with two labels.
        args: a `PRMConfig`; by default one with an `output_dir` named after the model.
        data_collator: not supported; want None.
        train_dataset: records with `prompt`, `completions` (the steps) and `labels` (whether each is right).
        eval_dataset: the same, or several by name.
        processing_class: the tokenizer, by default the model's.
        options: more of `DPOTrainer`'s arguments, such as `peft_config` and `callbacks`.

    Raises:
        ValueError: the model has another number of labels, or an argument or a record is wrong. The message names it.
        TypeError: an argument is not of a type listed above.
    """

    config_class = PRMConfig
    kind = "process reward models"
    signature_columns = ("input_ids", "labels")

    def __init__(
        self, model: Any = None, args: PRMConfig | None = None, data_collator: Any = None, train_dataset: Any = None,
        eval_dataset: Any = None, processing_class: Any = None, **options: Any,
    ) -> None:  # fmt: skip
        from transformers import AutoModelForTokenClassification

        args = given_args(args, PRMConfig, model, "PRM")
        self.loss_fn = ProcessRewardLoss()
        super().__init__(
            model, args, StepCollator(), train_dataset, eval_dataset, processing_class,
            AutoModelForTokenClassification, 2, data_collator=data_collator, **options,
        )  # fmt: skip

    def prepare_dataset(self, dataset: Any, name: str, args: Any) -> Any:
        return tokenize.tokenize_stepwise(
            formats.stepwise(dataset), self.tokenizer_in_use, max_length=args.max_length,
            max_prompt_length=args.max_prompt_length, max_completion_length=args.max_completion_length,
            step_separator=args.step_separator,
            train_on_last_step_only=args.train_on_last_step_only and name == "train",
            num_proc=args.dataset_num_proc, name=name, prompts=args.group_by_prompt,
        )  # fmt: skip

    def nll_tokens(self, part: Mapping[str, Any]) -> int:
        return len(part["step_rows"])

    def part_loss(self, part: Mapping[str, Any], items: Items) -> Tensor:
        hidden, head = hidden_rows(self.inner, part), self.score_head()
        steps = len(part["step_rows"])
        out = self.loss_fn.from_hidden(hidden, head.weight, part["step_labels"], part["step_rows"], head.bias)
        self.metrics.add("accuracy", out.accuracies.sum(), float(steps))
        self.add_loss(out.loss * steps, float(steps))
        self.count_tokens(part)
        # the mean is over steps, and a part is weighted by its share of examples
        tokens = items.tokens_tensor(part["examples"], hidden.device)
        return out.loss * (steps / tokens.clamp(min=1e-9))
