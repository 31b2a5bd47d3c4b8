"""Responses of which parts are not the policy's: losses and gradients against naive fp64 log-probs, a sequence at a
time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support_data import dataset
from support_trainers import config, tiny
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpref import trainers

PROMPT, COMMON = [5, 6, 7, 8], [9, 10]
PAIRS: list[dict[str, Any]] = [  # holes at the ends and inside, and in what both responses begin with
    {"prompt_ids": PROMPT, "chosen_ids": [*COMMON, 11, 12, 13, 14], "rejected_ids": [*COMMON, 15, 16],
     "chosen_mask": [1, 0, 0, 1, 1, 0], "rejected_mask": [0, 1, 0, 1]},
    {"prompt_ids": PROMPT[:2], "chosen_ids": [20, 21, 22], "rejected_ids": [23, 24, 25, 26, 27],
     "chosen_mask": [0, 0, 1], "rejected_mask": [1, 1, 1, 1, 1]},
    {"prompt_ids": PROMPT[:1], "chosen_ids": [30, 31], "rejected_ids": [30, 31, 32],
     "chosen_mask": [1, 1], "rejected_mask": [1, 0, 1]},
]  # fmt: skip
SINGLES = [
    {"prompt_ids": p["prompt_ids"], "completion_ids": p[f"{side}_ids"], "completion_mask": p[f"{side}_mask"],
     "label": side == "chosen"} for p in PAIRS[:2] for side in ("chosen", "rejected")
]  # fmt: skip


def logps(model: Any, prompt: list[int], ids: list[int], mask: list[int]) -> Tensor:
    """Of the scored tokens of one response."""
    whole = torch.tensor([prompt + ids])
    of_all = model(whole).logits[0, :-1].log_softmax(-1).gather(1, whole[0, 1:, None])[:, 0]
    return of_all[len(prompt) - 1 :][torch.tensor(mask, dtype=torch.bool)]


def both(model: Any, pair: dict[str, Any]) -> list[Tensor]:
    return [logps(model, pair["prompt_ids"], pair[f"{s}_ids"], pair[f"{s}_mask"]) for s in ("chosen", "rejected")]


def dpo(model: Any, reference: Any) -> Tensor:
    losses = []
    for pair in PAIRS:
        (chosen, rejected), (ref_chosen, ref_rejected) = both(model, pair), both(reference, pair)
        ratio = (chosen - ref_chosen).sum() - (rejected - ref_rejected).sum()
        losses.append(-logsigmoid(0.1 * ratio))
    return torch.stack(losses).mean()


def ipo(model: Any, reference: Any) -> Tensor:
    losses = []
    for pair in PAIRS:
        (chosen, rejected), (ref_chosen, ref_rejected) = both(model, pair), both(reference, pair)
        losses.append(((chosen - ref_chosen).mean() - (rejected - ref_rejected).mean() - 1 / (2 * 0.1)) ** 2)
    return torch.stack(losses).mean()


def nll(model: Any) -> Tensor:
    return -torch.cat([both(model, pair)[0] for pair in PAIRS]).mean()


def cpo(model: Any, reference: Any) -> Tensor:
    sums = [[side.sum() for side in both(model, pair)] for pair in PAIRS]
    return torch.stack([-logsigmoid(0.1 * (chosen - rejected)) for chosen, rejected in sums]).mean() + nll(model)


def simpo(model: Any, reference: Any) -> Tensor:
    means = [[side.mean() for side in both(model, pair)] for pair in PAIRS]
    return torch.stack([-logsigmoid(2.0 * (chosen - rejected) - 0.5) for chosen, rejected in means]).mean()


def odds_ratio(model: Any) -> Tensor:
    means = [[side.mean() for side in both(model, pair)] for pair in PAIRS]
    odds = [[m - torch.log1p(-m.exp()) for m in two] for two in means]
    return torch.stack([-0.1 * logsigmoid(chosen - rejected) for chosen, rejected in odds]).mean()


def orpo(model: Any, reference: Any) -> Tensor:
    """The NLL is of the chosen prompts, too: holes of the response are out of it."""
    tokens = []
    for pair in PAIRS:
        rest = pair["prompt_ids"][1:]
        ids, mask = rest + pair["chosen_ids"], [1] * len(rest) + pair["chosen_mask"]
        tokens.append(logps(model, pair["prompt_ids"][:1], ids, mask))
    return -torch.cat(tokens).mean() + odds_ratio(model)


def orpo_assistant_only(model: Any, reference: Any) -> Tensor:
    return nll(model) + odds_ratio(model)


def kto(model: Any, reference: Any) -> Tensor:
    def ratio(prompt: dict[str, Any], response: dict[str, Any]) -> Tensor:
        given = (prompt["prompt_ids"], response["completion_ids"], response["completion_mask"])
        return (logps(model, *given) - logps(reference, *given)).sum()

    z0 = torch.stack([ratio(e, SINGLES[i - 1]) for i, e in enumerate(SINGLES)]).mean().clamp(min=0).detach()
    ratios = [(ratio(e, e) - z0) * (1 if e["label"] else -1) for e in SINGLES]
    return torch.stack([1 - torch.sigmoid(0.1 * r) for r in ratios]).mean()


CASES = {
    "dpo, shared, from the cache": ("DPO", dpo, {"layout": "shared"}),
    "dpo, packed": ("DPO", dpo, {"layout": "packed", "precompute_ref_log_probs": False}),
    "dpo, padded, in parts": ("DPO", dpo, {"layout": "padded", "token_budget": 24}),
    "ipo": ("IPO", ipo, {}),
    "cpo": ("CPO", cpo, {}),
    "cpo, in parts": ("CPO", cpo, {"token_budget": 12}),
    "simpo": ("SimPO", simpo, {"layout": "packed"}),
    "orpo": ("ORPO", orpo, {}),
    "orpo, padded": ("ORPO", orpo, {"layout": "padded"}),
    "orpo, the assistant's alone": ("ORPO", orpo_assistant_only, {"assistant_only_loss": True}),
    "kto": ("KTO", kto, {}),
    "kto, padded": ("KTO", kto, {"layout": "padded", "precompute_ref_log_probs": False}),
}


def trainer_of(name: str, tmp_path: Any, records: list[dict[str, Any]], **options: Any) -> Any:
    model, tokenizer = tiny()
    config_class, trainer_class = (getattr(trainers, f"{name}{kind}") for kind in ("Config", "Trainer"))
    more: dict[str, Any] = {}
    if name in ("DPO", "IPO", "KTO"):
        more = {"ref_model": tiny(1)[0].double()}
        options = {"reference_cache": str(tmp_path / "cache")} | options
    args = config(config_class, tmp_path, statistics="every", **options)
    return trainer_class(
        model=model.double(), args=args, train_dataset=dataset(*records), eval_dataset=dataset(*records),
        processing_class=tokenizer, **more,
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_masked_tokens_are_not_scored(case, tmp_path) -> None:
    name, naive, options = CASES[case]
    trainer = trainer_of(name, tmp_path, SINGLES if name == "KTO" else PAIRS, **options)
    model, reference = trainer.model, tiny(1)[0].double()
    batch = next(iter(trainer.get_train_dataloader())) if name == "KTO" else None
    batch = batch or trainer.data_collator(trainer.train_dataset.to_list())
    found = trainer.compute_loss(model, batch)
    with torch.no_grad():
        naive(reference, reference)  # the references are not the policy
    wanted = naive(model, reference)
    cached = name in ("DPO", "IPO", "KTO") and options.get("precompute_ref_log_probs", True)  # in fp32
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6 if cached else 1e-9)
    weight = model.get_input_embeddings().weight
    ours, theirs = (torch.autograd.grad(loss, weight)[0] for loss in (found, wanted))
    assert float((ours - theirs).abs().max()) <= 1e-6 * float(theirs.abs().max())
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(float(wanted.detach()), rel=1e-5)
    if name in ("CPO", "ORPO"):
        assert math.isfinite(metrics["eval_nll_loss"])
    if name == "CPO":
        assert metrics["eval_nll_loss"] == pytest.approx(float(nll(model).detach()), rel=1e-5)


def test_another_mask_is_another_reference(tmp_path) -> None:
    """The cache of reference log-probs is known by the masks, too."""
    other = [{**pair, "chosen_mask": [1] * len(pair["chosen_ids"])} for pair in PAIRS]
    reference = tiny(1)[0].double()
    for records in (PAIRS, other, PAIRS):
        trainer = trainer_of("DPO", tmp_path, records)
        wanted = [float(both(reference, pair)[0].detach().sum()) for pair in records]
        assert list(trainer.train_dataset["ref_chosen_logps"]) == pytest.approx(wanted, rel=1e-5)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_only_scored_rows_reach_the_head(tmp_path) -> None:
    trainer = trainer_of("SimPO", tmp_path, PAIRS)
    (part,) = trainer.data_collator(trainer.train_dataset.to_list())["parts"]
    scored = [sum(pair[f"{side}_mask"]) for side in ("chosen", "rejected") for pair in PAIRS]
    assert part["cu_seqlens"].diff().tolist() == scored
    assert len(part["rows"]) == sum(scored) and (part["labels"] >= 0).all()
    assert part["chosen_rows"] == sum(scored[:3])
