"""Reward models: the Bradley-Terry loss, and a scalar head on any transformers backbone."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastpref import ops, reference
from fastpref.common import checks
from fastpref.common.precision import widened
from fastpref.models import adapters, inner_model
from fastpref.models.vision import config_of, with_images
from fastpref.objectives.lists import check_group, check_ranks, list_objective
from fastpref.ops.common import encode
from fastpref.ops.reward import sequence_count

# method of `from_rankings` -> name in the specification
RANKING_METHODS = {"pairs": "all_pairs"} | {name: name for name in ("plackett_luce", "rao_kupper", "davidson")}


class RewardOutput(NamedTuple):
    """What `BradleyTerryLoss` returns: `loss` is 0-d and differentiable, the rest is detached, one for each pair.

    All stays on the device, so there is no host sync. `margins` are chosen minus rejected rewards, and `accuracies` 1
    where that is above 0, else 0.
    """

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    margins: Tensor
    accuracies: Tensor


def _head(hidden: Tensor, head_weight: Tensor, head_bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The head's weight as `[d]` and its bias as `[1]`. Any float dtypes go together, since the product is in fp32."""
    checks.tensor("hidden", hidden, dtypes=checks.FLOATS)
    checks.tensor("head_weight", head_weight, dtypes=checks.FLOATS)
    d = hidden.shape[-1] if hidden.ndim else 0
    if tuple(head_weight.shape) not in ((d,), (1, d)):
        raise ValueError(
            f"head_weight: got shape {tuple(head_weight.shape)}, want {(1, d)} or {(d,)} (hidden is {d} wide)"
        )
    checks.same_device("head_weight", head_weight, "hidden", hidden)
    if head_bias is not None:
        checks.tensor("head_bias", head_bias, dtypes=checks.FLOATS)
        if head_bias.numel() != 1:
            raise ValueError(f"head_bias: got shape {tuple(head_bias.shape)}, want (1,)")
        checks.same_device("head_bias", head_bias, "hidden", hidden)
        head_bias = head_bias.reshape(1)
    return head_weight.reshape(-1), head_bias


def _last_rows(hidden: Tensor, last_index: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, str]:
    """(index, layout) of the rows that score the sequences. Layouts as in `fastpref_kernels.row_scores`."""
    if (last_index is None) == (cu_seqlens is None):
        got = "neither" if last_index is None else "both"
        raise ValueError(f"last_index, cu_seqlens: got {got}, want one of them")
    if cu_seqlens is not None:
        name, index, layout = "cu_seqlens", cu_seqlens, "edges"
    else:
        assert last_index is not None
        name, index, layout = "last_index", last_index, "positions" if hidden.ndim == 3 else "rows"
    checks.tensor(name, index, dtypes=checks.INTEGERS, ndim=(1,))
    checks.same_device(name, index, "hidden", hidden)
    if hidden.ndim not in (2, 3) or (layout == "edges" and hidden.ndim != 2):
        want = "packed rows [N, d]" if layout == "edges" else "[S, T, d] or packed rows [N, d]"
        raise ValueError(f"hidden: got shape {tuple(hidden.shape)} with {name}, want {want}")
    if layout == "positions":
        checks.shape(name, index, hidden.shape[:1], "one position per sequence of hidden")
    return index, layout


def row_rewards(hidden: Tensor, head_weight: Tensor, last_index: Tensor, head_bias: Tensor | None = None) -> Tensor:
    """The rewards `[S]` of sequences that end at `last_index` `[S]`; arguments as in `BradleyTerryLoss.from_hidden`."""
    weight, bias = _head(hidden, head_weight, head_bias)
    return torch.ops.fastpref.row_scores(hidden, weight, bias, *_last_rows(hidden, last_index, None))


class BradleyTerryLoss(nn.Module):
    """`mean(-log sigmoid(r_w - r_l - margin)) + center_coefficient * mean((r_w + r_l)^2)`.

    The reward model's loss of InstructGPT (arXiv 2203.02155, eq. 1), with the margin of Llama 2 (arXiv 2307.09288,
    eq. 2) and the centring of Eisenstein et al. (arXiv 2312.09244). Results are fp32, or fp64 if an input is.

    Args:
        center_coefficient: weight of the term that keeps rewards around 0, at least 0.

    All ways to call it raise `ValueError` or `TypeError` for a wrong shape, dtype, device or option.
    """

    def __init__(self, center_coefficient: float = 0.0) -> None:
        super().__init__()
        checks.within("center_coefficient", center_coefficient, 0.0, float("inf"))
        self.center_coefficient = float(center_coefficient)

    def extra_repr(self) -> str:
        return f"center_coefficient={self.center_coefficient}"

    def _margin(self, margin: Tensor | None, pairs: int, like: Tensor) -> Tensor | None:
        if margin is None:
            return None
        checks.tensor("margin", margin, dtypes=(*checks.INTEGERS, *checks.FLOATS))
        checks.shape("margin", margin, (pairs,), "one per pair")
        checks.same_device("margin", margin, "the rewards", like)
        return margin.detach().to(torch.float64 if like.dtype == torch.float64 else torch.float32)

    def forward(self, chosen_rewards: Tensor, rejected_rewards: Tensor, margin: Tensor | None = None) -> RewardOutput:
        """From rewards, each `[B]`. `margin` `[B]`, a constant, is by how much the chosen one should win at least."""
        checks.tensor("chosen_rewards", chosen_rewards, dtypes=checks.FLOATS, ndim=(1,))
        checks.tensor("rejected_rewards", rejected_rewards, dtypes=checks.FLOATS)
        pairs = chosen_rewards.shape[0]
        if pairs == 0:
            raise ValueError("chosen_rewards: got no pairs, want at least 1")
        checks.shape("rejected_rewards", rejected_rewards, (pairs,), "as many as chosen_rewards")
        checks.same_device("rejected_rewards", rejected_rewards, "chosen_rewards", chosen_rewards)
        rewards = widened(torch.cat([chosen_rewards, rejected_rewards]))
        margin = self._margin(margin, pairs, rewards)
        loss, metrics, _ = torch.ops.fastpref.bradley_terry(rewards, margin, self.center_coefficient)
        return RewardOutput(loss, *metrics.unbind(0))

    def from_hidden(
        self,
        hidden: Tensor,
        head_weight: Tensor,
        last_index: Tensor | None = None,
        margin: Tensor | None = None,
        head_bias: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> RewardOutput:
        """From the backbone's hidden states of `[B chosen; B rejected]` and the head's weight `[1, d]` or `[d]`.

        Args:
            hidden: `[2B, T, d]`, or packed `[N, d]`. Any strides. It is read only where a sequence ends.
            last_index: `[2B]`, where the last real token is: its position in a padded sequence, or its row among
                packed ones. Tokens are never compared with a pad id, which may also end a sequence.
            margin: `[B]`, a constant, as in `forward`.
            head_bias: `[1]` or None.
            cu_seqlens: `[2B + 1]` in place of `last_index`, for packed sequences that end where the next one begins.

        The product is in fp32 whatever the dtypes. Two launches forward, one backward.
        """
        weight, bias = _head(hidden, head_weight, head_bias)
        index, layout = _last_rows(hidden, last_index, cu_seqlens)
        sequences = sequence_count(index, layout)
        if sequences < 2 or sequences % 2:
            raise ValueError(
                f"{'cu_seqlens' if layout == 'edges' else 'last_index'}: got {sequences} sequences, want an even "
                "number, at least 2 ([B chosen; B rejected])"
            )
        wide = next((t for t in (hidden, weight, bias) if t is not None and t.dtype == torch.float64), hidden)
        margin = self._margin(margin, sequences // 2, wide)
        loss, metrics, _ = torch.ops.fastpref.linear_bradley_terry(
            hidden, weight, bias, index, margin, layout, self.center_coefficient
        )
        return RewardOutput(loss, *metrics.unbind(0))

    def from_rankings(
        self, rewards: Tensor, ranks: Tensor, group: Tensor, method: str = "pairs", nu: float | None = None, *,
        compared: reference.Comparisons | None = None,
    ) -> RewardOutput:  # fmt: skip
        """From several responses to each prompt. All tensors are `[n]`, in any order.

        Args:
            ranks: lower is better, equal is a tie. Only their order within a group counts.
            group: which prompt a response answers: integers, not necessarily consecutive.
            method: `"pairs"` takes all pairs of a group with weight 1 / C(k, 2) each, as InstructGPT does (arXiv
                2203.02155, eq. 1). Responses of equal rank are not compared. `"plackett_luce"`, `"rao_kupper"` and
                `"davidson"` are as in `ListDPOLoss`, with rewards in place of its scores.
            nu: of the last two, as in `ListDPOLoss`.
            compared: the pairs of different ranks, if they are known: `fastpref.reference.comparisons(ranks, group)`.

        The loss is the mean over groups. A group with nothing to compare does not count. The rewards, margins and
        accuracies of the output are those of all pairs of different ranks. One host sync finds them
        if they are not given.
        """
        checks.choice("method", method, tuple(RANKING_METHODS))
        objective = list_objective(RANKING_METHODS[method], 1.0, nu)
        checks.tensor("rewards", rewards, dtypes=checks.FLOATS, ndim=(1,))
        if rewards.shape[0] == 0:
            raise ValueError("rewards: got no responses, want at least 1")
        check_ranks(ranks, rewards.shape[0], "rewards", rewards)
        check_group(group, rewards.shape[0], "rewards", rewards)
        rewards = widened(rewards)
        loss, *_ = torch.ops.fastpref.list_loss(rewards, None, None, None, ranks, group, encode(objective), -100)
        compared = reference.comparisons(ranks, group) if compared is None else compared
        if self.center_coefficient:
            loss = loss + reference.ranking_center(rewards, compared, self.center_coefficient)
        values = rewards.detach()
        return RewardOutput(loss, *reference.reward_metrics(values[compared.winners], values[compared.losers]))


class RewardHead(nn.Module):
    """A transformers backbone with a `[d] -> 1` head, in the layout of `AutoModelForSequenceClassification`.

    The head's product is in fp32, and reads the last real token of each sequence only. The attention mask tells where
    that is (padding on either side), or explicit positions, or `cu_seqlens`. The state dict has transformers' own keys
    (`score.weight`).

    Args:
        backbone: a transformers model without its head.
        score: the head, with one output. By default a new one is made, as transformers does.

    Raises:
        ValueError: `score` has several outputs.
    """

    def __init__(self, backbone: nn.Module, score: nn.Linear | None = None) -> None:
        super().__init__()
        config: Any = backbone.config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        if score is None:
            like = next(backbone.parameters())
            score = nn.Linear(text.hidden_size, 1, bias=False, dtype=like.dtype, device=like.device)
            nn.init.normal_(score.weight, std=getattr(text, "initializer_range", 0.02))
        if score.out_features != 1:
            raise ValueError(f"score: got {score.out_features} outputs, want 1")
        # under the name that transformers gives it ("model", "transformer"), so that the state dict is the same
        self._backbone_name = getattr(backbone, "base_model_prefix", "") or "model"
        self.add_module(self._backbone_name, backbone)
        self.score = score
        config.num_labels = 1

    @property
    def backbone(self) -> nn.Module:
        """The model below the head."""
        found = self._modules.get(self._backbone_name)  # Mamba's name for it is this property's
        if found is None:
            raise AttributeError("backbone")
        return found

    base_model = backbone  # as transformers calls it

    @property
    def config(self) -> Any:
        """The backbone's transformers configuration."""
        return self.backbone.config

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's."""
        backbone: Any = self.backbone
        return backbone.get_input_embeddings()

    def set_attn_implementation(self, name: str) -> None:
        """As the method of transformers' models."""
        backbone: Any = self.backbone
        backbone.set_attn_implementation(name)

    @classmethod
    def from_causal_lm(cls, model: nn.Module) -> RewardHead:
        """A new head on the backbone of a language model, which is shared, not copied.

        Raises:
            TypeError: the model has no backbone (`base_model`).
        """
        backbone: Any = getattr(model, "base_model", model)
        if backbone is model:
            raise TypeError(f"model: got {type(model).__name__}, want a model with a backbone (base_model)")
        return cls(backbone)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **kwargs: Any) -> RewardHead:
        """Load a folder or hub id that `AutoModelForSequenceClassification` reads, with `num_labels == 1`.

        It may be an adapter with its head. The adapter then stays in the backbone's layers, so that rewards are those
        of training. `kwargs` go to transformers' `from_pretrained`.

        Raises:
            ValueError: the model has several labels, or its head is not named `score`.
        """
        from transformers import AutoModelForSequenceClassification

        adapter = adapters.adapter_config(path)
        base = path if adapter is None else adapter.base_model_name_or_path
        config = kwargs.pop("config", None) or config_of(base)
        if adapter is not None and "score" in (adapter.modules_to_save or ()):
            config.num_labels = 1
        if config.num_labels != 1:
            raise ValueError(
                f"{os.fspath(path)}: got a model with num_labels={config.num_labels}, want 1, as a reward model has"
            )
        model = inner_model(adapters.load(AutoModelForSequenceClassification, path, config=config, **kwargs))
        score = adapters.active_module(getattr(model, "score", None))
        if not isinstance(score, nn.Linear):
            raise ValueError(f"{os.fspath(path)}: got {type(model).__name__}, want a model whose head is named score")
        found = cls(model.base_model, score)
        if adapter is not None:
            found.peft_config = model.peft_config
        return found

    def save_pretrained(self, path: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write a folder that `AutoModelForSequenceClassification` and `RewardHead` load.

        Raises:
            ValueError: there are adapters in the layers.
        """
        from transformers import AutoModelForSequenceClassification

        if adapters.own_names(self):
            raise ValueError(
                f"{type(self).__name__}: got adapters in its layers, want them merged by PEFT before saving"
            )
        with torch.device("meta"):  # its class and its layout, with our parameters
            model = with_images(AutoModelForSequenceClassification, None, config=self.config).from_config(self.config)
        setattr(model, self._backbone_name, self.backbone)
        model.score = self.score
        model.save_pretrained(path, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        last_index: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Rewards `[S]` in fp32 of `[S, T]` tokens, or of packed tokens `[1, N]` with `cu_seqlens` `[S + 1]`.

        `last_index` `[S]` are positions of last tokens. Without a mask, `last_index` or `cu_seqlens` every sequence
        ends at T - 1. Packed tokens get position ids that restart at each sequence, unless `position_ids` is given.
        By them transformers keeps the sequences apart.
        """
        if getattr(self.config, "use_cache", False):
            kwargs.setdefault("use_cache", False)
        if cu_seqlens is not None and kwargs.get("position_ids") is None:
            tokens = kwargs["inputs_embeds"] if input_ids is None else input_ids
            if tokens.shape[0] != 1:
                raise ValueError(f"input_ids: got shape {tuple(tokens.shape)} with cu_seqlens, want packed [1, N]")
            kwargs["position_ids"] = _restarting(cu_seqlens, tokens.shape[1])
        output = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        hidden = output.last_hidden_state
        if cu_seqlens is not None:
            hidden = hidden.squeeze(0)
        elif last_index is None:
            last_index = _ends(attention_mask, hidden)
        return self.score_rows(hidden, last_index, cu_seqlens)

    def score_rows(self, hidden: Tensor, last_index: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Rewards `[S]` in fp32 of hidden states `[S, T, d]`, or `[N, d]` with `last_index` or `cu_seqlens`."""
        weight, bias = _head(hidden, self.score.weight, self.score.bias)
        index, layout = _last_rows(hidden, last_index, cu_seqlens)
        return torch.ops.fastpref.row_scores(hidden, weight, bias, index, layout)


def _ends(attention_mask: Tensor | None, hidden: Tensor) -> Tensor:
    """Where each sequence ends `[S]`: the rightmost position that the mask lets through."""
    sequences, length = hidden.shape[:2]
    positions = torch.arange(length, device=hidden.device)
    if attention_mask is None:
        return positions[-1:].expand(sequences)
    checks.shape("attention_mask", attention_mask, (sequences, length), "one per token")
    return torch.where(attention_mask != 0, positions, -1).amax(1)


def _restarting(cu_seqlens: Tensor, rows: int) -> Tensor:
    positions = torch.arange(rows, device=cu_seqlens.device)
    starts = cu_seqlens[torch.searchsorted(cu_seqlens, positions, right=True) - 1]
    return (positions - starts)[None]


# `ops` registers the operators that torch.ops.fastpref finds.
_ = ops
