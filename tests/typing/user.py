"""What a user writes, with every public name: `mypy --strict` must understand it (tests/typing/test_typing.py)."""

from __future__ import annotations

import torch
from torch import Tensor

import fastpref
from fastpref import models
from fastpref.data.collate import collate_pairs, tokenize_pairs
from fastpref.data.pairs import sample_pairs
from fastpref.data.shapes import shape_pairs
from fastpref.integrations.transformers import batch_loss, pair_batch, reference_logps
from fastpref.online import (
    Judging,
    PairRules,
    Sampling,
    Server,
    ServerError,
    ServerSampler,
    evaluate_policy,
    function_scorer,
    generate_from_server,
    judge_file,
    judge_scorer,
    make_pairs,
    reward_function,
    sample_responses,
)
from fastpref.trainers import (
    CPOConfig,
    CPOTrainer,
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    IPOConfig,
    IPOTrainer,
    KTOConfig,
    KTOTrainer,
    ORPOConfig,
    ORPOTrainer,
    PRMConfig,
    PRMTrainer,
    PromptTrees,
    ResponseLogps,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SimPOConfig,
    SimPOTrainer,
    StopOveroptimization,
)


def paired(hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor) -> Tensor:
    losses: list[fastpref.PairedLoss] = [
        fastpref.DPOLoss(beta=0.1, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5]),
        fastpref.IPOLoss(0.1),
    ]
    out: fastpref.PreferenceOutput = losses[0].from_hidden(hidden, weight, labels, ref_logps=ref_logps)
    total = out.loss + losses[1].from_logits(hidden @ weight.T, labels, ref_logps).loss
    free: list[fastpref.PairedLoss] = [fastpref.SimPOLoss(), fastpref.CPOLoss(), fastpref.ORPOLoss()]
    for loss in free:
        total = total + loss.from_hidden(hidden, weight, labels).loss
    logps = fastpref.sequence_logprobs(fastpref.linear_token_logprobs(hidden, weight, labels), labels)
    called: fastpref.PreferenceOutput = losses[0](*logps.chunk(2), *ref_logps.chunk(2))
    return total + called.margins.mean()


def unpaired(hidden: Tensor, weight: Tensor, labels: Tensor, desirable: Tensor, ref_logps: Tensor) -> Tensor:
    wrong = fastpref.mismatched_indices(4, 2)
    kl = fastpref.kto_kl(ref_logps[wrong], ref_logps)
    kl = fastpref.mismatched_kl_from_hidden(hidden, weight, labels, ref_logps)
    out: fastpref.UnpairedOutput = fastpref.KTOLoss().from_hidden(
        hidden, weight, labels, desirable, ref_logps=ref_logps, kl=kl
    )
    return out.loss + fastpref.BCOLoss().from_hidden(hidden, weight, labels, desirable, ref_logps=ref_logps).loss


def lists(hidden: Tensor, weight: Tensor, labels: Tensor, ranks: Tensor, ref_logps: Tensor) -> Tensor:
    loss = fastpref.ListDPOLoss(beta=0.1, loss_type="davidson", nu=1.0)
    out: fastpref.ListOutput = loss.from_hidden(hidden, weight, labels, ranks, ref_logps=ref_logps, sizes=[4, 3])
    called: fastpref.ListOutput = loss(ref_logps, ref_logps, ranks, ranks // 4)
    total = called.loss + out.margins + out.accuracies
    return total + loss.from_logits(hidden @ weight.T, labels, ranks, ref_logps, sizes=[7]).loss


def rewards(hidden: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    head = fastpref.RewardHead(models.tiny(["a few words"])[0].model)
    out: fastpref.RewardOutput = fastpref.BradleyTerryLoss(0.01).from_hidden(hidden, weight, ends)
    steps: fastpref.ProcessRewardOutput = fastpref.ProcessRewardLoss().from_hidden(hidden, weight, ends)
    score = fastpref.aggregate_steps(torch.rand(2, 3), method="product")
    normalized: Tensor = fastpref.RewardNormalizer("running", clip=5.0)(out.chosen_rewards)
    return out.loss + steps.loss + score.sum() + normalized.sum() + sum(p.sum() for p in head.parameters())


def divergences(logits: Tensor, ref: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logps, mask = fastpref.token_logprobs(logits, labels), labels != -100
    statistics: fastpref.TokenStatistics = fastpref.token_statistics(logits, labels)
    fused: fastpref.TokenStatistics = fastpref.linear_token_statistics(hidden, weight, labels)
    sampled = fastpref.kl_estimate(logps, logps.detach(), "k3")
    exact: Tensor = fastpref.token_kl(logits, ref)
    without_logits: fastpref.TokenKL = fastpref.linear_token_kl(hidden, weight, hidden, weight)
    beta = fastpref.FixedKLController(0.1).beta + fastpref.AdaptiveKLController(0.1, 6.0, 10_000).update(5.0, 8)
    shaped: Tensor = fastpref.kl_penalized_rewards(ref[:, 0, 0], logps, logps, mask, beta)
    both: fastpref.PenalizedRewards = fastpref.kl_penalized_rewards(
        ref[:, 0, 0], logps, logps, mask, 0.1, return_sums=True
    )
    out: fastpref.PolicyOutput = fastpref.PolicyGradientLoss(0.2).from_hidden(hidden, weight, labels, both.sums)
    values = (sampled, exact, without_logits.kl, shaped, out.loss, fused.logps, statistics.logps)
    return torch.stack([value.mean() for value in values]).sum()


def settings(hidden: Tensor, weight: Tensor, labels: Tensor) -> str:
    fastpref.set_backend("portable")
    return fastpref.explain(hidden, weight, labels) + fastpref.__version__


def loop() -> None:
    model, processor = models.tiny_vision(seed=0)
    DPOTrainer(model, args=None, train_dataset=shape_pairs(2), processing_class=processor)
    model, tokenizer = models.tiny(["a few words"])
    pairs = tokenize_pairs(sample_pairs()[0], tokenizer, max_length=64)
    batch = pair_batch(pairs[:2], tokenizer.pad_token_id)
    batch["ref_logps"] = reference_logps(model, batch)
    batch_loss(fastpref.DPOLoss(), model, batch).loss.backward()
    collate_pairs(pairs[:2], 0).to("cpu")
    hidden, head = models.hidden_and_head(model, batch["input_ids"])
    models.output_head(model).logits(hidden)
    fastpref.linear_token_logprobs(hidden, head.weight, batch["shift_labels"], head.bias, **head.options())


def online() -> None:
    model, tokenizer = models.tiny(["a few words"])
    found = list(sample_responses(model, tokenizer, ["Once"], Sampling(k=2, max_new_tokens=4)))
    scorer = function_scorer(lambda prompt, responses: [float(len(r)) for r in responses])
    pairs, report = make_pairs(
        [{"prompt": "Once", "responses": [r.text for r in found[0]], "scores": [1.0, 2.0]}], PairRules(how="best-worst")
    )
    print(evaluate_policy(model, tokenizer, pairs)["accuracy"], report, scorer)


def served() -> list[str]:
    server = Server("http://localhost:8000", model="mine", kind="vllm", concurrency=8)
    try:
        done: int = generate_from_server(server, [{"prompt": "Once"}], "out.jsonl", Sampling(k=2))
        answers = ServerSampler(server, ids=True, logps=True)([[1, 2]], Sampling(k=2), [(done, 0)])
        report = judge_file(server, [{"prompt": "Once", "responses": ["a", "b"]}], "out.jsonl", Judging(how="grades"))
        reward = reward_function(judge_scorer(server), "judge")
    except ServerError:
        return []
    print(report["unparsable"], reward(["Once", "Once"], [" upon", " more"]))
    return [answer.text for answer in answers if answer.ids and answer.logps]


def sampled(model: torch.nn.Module) -> float:
    found = ResponseLogps(*PromptTrees(model)([[1, 2]] * 2, [[3], [4, 5]], entropy=True))
    loss_fn = fastpref.PolicyGradientLoss()
    return float(loss_fn(found.logps, found.labels, torch.ones(2), cu_seqlens=found.cu_seqlens).loss)


def train(folder: str) -> None:
    DPOTrainer(folder, args=DPOConfig(folder, beta=0.1, loss_type=["ipo"])).train()
    IPOTrainer(folder, args=IPOConfig(folder)).train()
    KTOTrainer(folder, args=KTOConfig(folder)).train()
    ORPOTrainer(folder, args=ORPOConfig(folder)).train()
    CPOTrainer(folder, args=CPOConfig(folder)).train()
    SimPOTrainer(folder, args=SimPOConfig(folder)).train()
    DistillationTrainer(folder, folder, args=DistillationConfig(folder, beta=0.5, lmbda=0.5)).train()
    RewardTrainer(folder, args=RewardConfig(folder)).train()
    PRMTrainer(folder, args=PRMConfig(folder)).train()
    RLOOTrainer(folder, folder, args=RLOOConfig(folder, kl_estimator="exact"),
                callbacks=[StopOveroptimization(max_kl=8.0)]).train()  # fmt: skip
    GRPOTrainer(folder, [folder], args=GRPOConfig(folder, loss_type="cispo")).train()
