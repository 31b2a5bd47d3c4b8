"""Training on ranked responses: DPO and reward models, against a loop over the model's own log-probs."""

from __future__ import annotations

import logging

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from support_lists import naive_loss
from support_trainers import config, pairs, tiny, train, weights

from fastpref.data import ranked
from fastpref.data.pairs import sample_pairs
from fastpref.trainers import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

SCORES = ([3.0, 1.0, 2.0], [0.5, 0.5], [1, 9, 9, 4], [7], [2, 2, 2], [5.0, 6.0, None])


def lists(number: int = 4, as_ranks: bool = False) -> Dataset:
    """Prompts with 3, 2, 4, ... responses; the texts are those of the sample's pairs."""
    source = sample_pairs()[0]
    texts = [message["content"] for pair in source for side in pair[1:3] for message in side]
    rows, begin = [], 0
    for i in range(number):
        scores = SCORES[:3][i % 3]
        k = len(scores)
        row = {"prompt": source[i].prompt, "responses": texts[begin : begin + k]}
        rows.append(row | ({"ranks": [-s for s in scores]} if as_ranks else {"scores": scores}))
        begin += k
    return Dataset.from_list(rows)


def trainer_of(tmp_path, dataset, cls=DPOTrainer, peft_config=None, eval_dataset=None, **options):
    model, tokenizer = tiny()
    if cls is RewardTrainer:
        from transformers import AutoModelForSequenceClassification

        model.save_pretrained(tmp_path / "model")
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=1)
        model.config.pad_token_id = tokenizer.pad_token_id
    options = {"reference_cache": str(tmp_path / "cache")} | options if cls is DPOTrainer else options
    args = config(RewardConfig if cls is RewardTrainer else DPOConfig, tmp_path, **options)
    extra = {} if peft_config is None else {"peft_config": peft_config}
    return cls(
        model=model, args=args, train_dataset=dataset, eval_dataset=eval_dataset, processing_class=tokenizer, **extra
    )


def sequences_of(trainer):
    """(prompt's and response's ids, prompt's length) of every response, its rank, and its list."""
    found, ranks, group = [], [], []
    for i, row in enumerate(trainer.train_dataset):
        begin = 0
        for size, rank in zip(row["list_sizes"], row["ranks"], strict=True):
            ids = row["list_ids"][begin : begin + size]
            found.append((row["prompt_ids"] + ids, len(row["prompt_ids"])))
            ranks.append(rank)
            group.append(i)
            begin += size
    return found, ranks, group


@torch.no_grad()
def alone(model, ids, first):
    logits = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(logits[t - 1, ids[t]].item() for t in range(max(1, first), len(ids)))


@pytest.mark.parametrize("loss", ["plackett_luce", "all_pairs", "rao_kupper", "davidson"])
def test_evaluation_is_a_loop_over_the_model_s_own_log_probs(tmp_path, loss):
    """After steps in parts of a few tokens; the second list is a tie, which only models of ties train on."""
    options = {"loss_type": loss, "beta": 0.5, "token_budget": 150, "learning_rate": 3e-3}
    trainer = trainer_of(tmp_path, lists(5), eval_dataset=lists(5), **options)
    reference = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    assert len(trainer.train_dataset) == (5 if loss in ("rao_kupper", "davidson") else 3)
    train(trainer)
    found, ranks, group = sequences_of(trainer)
    policy = [alone(trainer.model, *sequence) for sequence in found]
    got = trainer.evaluate()
    trained = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.model.load_state_dict(reference)
    refs = [alone(trainer.model, *sequence) for sequence in found]
    trainer.model.load_state_dict(trained)
    scores = [0.5 * (a - b) for a, b in zip(policy, refs, strict=True)]
    want = naive_loss(loss, scores, ranks, group, trainer.loss_fn.objective.nu)
    assert got["eval_loss"] == pytest.approx(want, rel=2e-5)
    assert got["eval_rewards/margins"] == pytest.approx(got["eval_rewards/chosen"] - got["eval_rewards/rejected"])
    trainer.args.per_device_eval_batch_size = 1
    assert trainer.evaluate()["eval_loss"] == pytest.approx(got["eval_loss"], rel=2e-6)


def test_the_update_does_not_depend_on_batches_and_parts(tmp_path):
    """Three lists at once; one by one, accumulated; and in parts."""
    runs = []
    for i, options in enumerate((
        {"per_device_train_batch_size": 3},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3},
        {"per_device_train_batch_size": 3, "token_budget": 60},
    )):  # fmt: skip
        trainer = trainer_of(tmp_path / str(i), lists(5), loss_type="plackett_luce", max_steps=2, **options)
        losses = [entry["loss"] for entry in train(trainer)]
        runs.append((losses, weights(trainer)))
    for losses, trained in runs[1:]:
        assert losses == pytest.approx(runs[0][0], rel=1e-5)
        assert max(float((trained[n] - w).abs().max()) for n, w in runs[0][1].items()) < 2e-5


def test_two_responses_are_dpo_on_pairs(tmp_path):
    """The same tokens, losses and metrics, from pairs and from lists of two."""
    data = pairs(6)
    two = data.map(
        lambda row: {"responses": [row["rejected"], row["chosen"]], "ranks": [1, 0]},
        remove_columns=["chosen", "rejected"],
    )
    cases = (("pairs", data, "sigmoid"), ("lists", two, "plackett_luce"), ("both", data, "all_pairs"))
    runs = [train(trainer_of(tmp_path / name, rows, loss_type=loss)) for name, rows, loss in cases]
    names = ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "logps/chosen", "entropy")
    for run in runs[1:]:
        for got, want in zip(run, runs[0], strict=True):
            assert {n: got[n] for n in names} == pytest.approx({n: want[n] for n in names}, rel=2e-4, abs=1e-6)


def test_lora_in_bf16_twice_on_one_object_with_a_last_batch_of_one(tmp_path):
    """The default precision and checkpointing; the reference is the model without its adapter, before and after."""
    options = {"bf16": True, "gradient_checkpointing": True, "per_device_train_batch_size": 2, "max_steps": -1}
    peft = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = trainer_of(
        tmp_path, lists(9), peft_config=peft, loss_type="davidson", num_train_epochs=1, learning_rate=1e-2, **options
    )
    assert len(trainer.train_dataset) % 2 == 1
    before = trainer.train_dataset["ref_logps"][:]
    first, second = train(trainer), train(trainer)
    assert all(torch.tensor([e["loss"] for e in run]).isfinite().all() for run in (first, second))
    assert trainer.train_dataset["ref_logps"][:] == before and len(before[0]) == 3
    measured = trainer.evaluate(lists(9))
    assert measured["eval_rewards/accuracies"] > 0.7 and measured["eval_rewards/margins"] > 0


def test_reference_log_probs_of_lists_come_from_the_cache(tmp_path, monkeypatch):
    first = trainer_of(tmp_path, lists(5), loss_type="all_pairs")
    monkeypatch.setattr(DPOTrainer, "reference_logps", None)
    again = trainer_of(tmp_path, lists(5), loss_type="plackett_luce")
    assert again.train_dataset["ref_logps"][:] == first.train_dataset["ref_logps"][:]
    assert [len(x) for x in again.train_dataset["ref_logps"]] == [len(x) for x in again.train_dataset["ranks"]]


def test_a_pair_loss_takes_all_pairs_of_rankings_or_says_what_it_wants(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "fastpref"):
        trainer = trainer_of(tmp_path, lists(5))
    assert trainer.loss_fn.objective.loss == "all_pairs"
    assert "'sigmoid' on rankings is 'all_pairs'" in caplog.text
    assert "left out, 2 of 5 lists have nothing to compare" in caplog.text
    for options, message in (
        ({"loss_type": ["ipo"]}, "loss_type: got .*'ipo'.* with rankings, want one of plackett_luce"),
        ({"loss_type": ["davidson", "sft"]}, "loss_type: got .*, want a loss on lists alone"),
        ({"label_smoothing": 0.1}, "label_smoothing: got 0.1 with loss_type 'all_pairs', want 0.0"),
        ({"loss_type": ["sigmoid"], "nu": 2.0}, "nu: got 2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer_of(tmp_path, lists(5), **options)


@pytest.mark.parametrize("method", ["pairs", "plackett_luce", "rao_kupper", "davidson"])
def test_a_reward_model_from_rankings(tmp_path, method):
    trainer = trainer_of(tmp_path, lists(5, as_ranks=True), RewardTrainer, ranking_loss=method, max_steps=2)
    train(trainer)
    found, ranks, group = sequences_of(trainer)
    with torch.no_grad():
        rewards = [trainer.model(input_ids=torch.tensor([ids])).logits.item() for ids, _ in found]
    got = trainer.evaluate(lists(5))
    name, nu = {"pairs": "all_pairs"}.get(method, method), {"rao_kupper": 3.0}.get(method, 1.0)
    assert got["eval_loss"] == pytest.approx(naive_loss(name, rewards, ranks, group, nu), rel=2e-5)
    assert got["eval_max_reward"] == pytest.approx(max(rewards), rel=1e-4)


def test_margins_were_passed_over_where_pairs_are_rankings(tmp_path):
    data = pairs(4).add_column("margin", [1.0] * 4)
    with pytest.warns(UserWarning, match="margin: in train_dataset, but not read: losses of rankings have none"):
        trainer_of(tmp_path, data, RewardTrainer, ranking_loss="davidson")


def test_reference_log_probs_of_pairs_were_passed_over_in_a_loss_of_lists(tmp_path):
    data = pairs(4).add_column("ref_chosen_logps", [-1.0] * 4)
    with pytest.warns(UserWarning, match="ref_chosen_logps: in train_dataset, but not read: a list's are ref_logps"):
        trainer_of(tmp_path, data, loss_type="plackett_luce")


RECORDS = [
    ({"responses": ["a", "b"], "scores": [1.0, None]}, "record 1: scores: got none for response 2 of 2"),
    ({"responses": ["a", "b"], "ranks": [1, 2, 3]}, "record 1: ranks: got ranks .*want 2 numbers, one per response"),
    ({"responses": ["a", 7], "ranks": [1, 2]}, "record 1: response 2: got"),
    ({"responses": [], "ranks": []}, "record 1: responses: got .*, want a list of at least 1"),
]


@pytest.mark.parametrize(("wrong", "message"), RECORDS, ids=[m[:30] for _, m in RECORDS])
def test_errors_name_the_record(wrong, message):
    stream = IterableDataset.from_generator(lambda: iter([{"prompt": "Why?", **wrong}]))
    with pytest.raises(ValueError, match=message):
        list(ranked.ranked(stream))


def test_scores_of_judges_and_ties_of_pairs_as_ranks():
    judged = Dataset.from_list([
        {"prompt": "Why?", "responses": ["a", "b", "c"], "scores": {"x": [1, 2, 3], "y": [3, 2, 0]}},
        {"prompt": "How?", "responses": ["a", "b"], "scores": {"x": [1, 2], "y": None}},
    ])  # fmt: skip
    assert ranked.ranked(judged)["ranks"][:] == [[0, 0, 1], [1, 0]]
    tied = Dataset.from_list([{"prompt": "Why?", "chosen": "a", "rejected": "b", "tied": t} for t in (True, False)])
    assert ranked.ranked(tied)["ranks"][:] == [[0, 0], [0, 1]]
    talk = Dataset.from_list([{"prompt": [{"role": "user", "content": "Why?"}], "responses": ["a"], "ranks": [1]}])
    assert ranked.ranked(talk)[0]["responses"] == [[{"role": "assistant", "content": "a"}]]


def test_a_list_s_tokens_are_those_of_its_pairs():
    """Whatever number of responses, and as they were sampled."""
    from fastpref.data.tokenize import tokenize_paired

    _, tokenizer = tiny()
    row = pairs(1)[0]
    both = [row["chosen"][0]["content"], row["rejected"][0]["content"]]
    data = Dataset.from_list([{"prompt": row["prompt"], "responses": [*both, "More."], "ranks": [0, 1, 1]}])
    for options in ({}, {"responses_as_written": True}):
        found = ranked.tokenize_ranked(ranked.ranked(data), tokenizer, max_length=60, ties=True, **options)[0]
        pair = tokenize_paired(pairs(1), tokenizer, max_length=60, **options)[0]
        n = found["list_sizes"]
        assert found["prompt_ids"] == pair["prompt_ids"] and found["list_ids"][: n[0]] == pair["chosen_ids"]
        assert found["list_ids"][n[0] : n[0] + n[1]] == pair["rejected_ids"]


def test_a_stream_of_lists(tmp_path):
    """The reference runs in every step; what cannot be compared is passed over."""
    trainer = trainer_of(tmp_path, lists(9).to_iterable_dataset(), loss_type="all_pairs", max_steps=2)
    streamed = train(trainer)
    known = train(trainer_of(tmp_path / "known", lists(9), loss_type="all_pairs", max_steps=2,
                             train_sampling_strategy="sequential"))  # fmt: skip
    assert [e["loss"] for e in streamed] == pytest.approx([e["loss"] for e in known], rel=1e-5)


def test_all_pairs_is_what_trl_s_trainer_gives_on_the_pairs(tmp_path):
    """A list of four and its six pairs, with a reference that is another model."""
    trl = pytest.importorskip("trl")
    row = lists(3)[2]  # scores 1, 9, 9, 4 -> all different
    row["scores"] = [1, 9, 8, 4]
    prompt, texts = row["prompt"], row["responses"]
    best_first = [texts[i] for i in (1, 2, 3, 0)]
    made = [
        {"prompt": prompt, "chosen": [{"role": "assistant", "content": best_first[i]}],
         "rejected": [{"role": "assistant", "content": best_first[j]}]}
        for i in range(4) for j in range(i + 1, 4)
    ]  # fmt: skip
    (policy, tokenizer), (other, _) = tiny(), tiny(seed=1)
    common = {"beta": 0.5, "max_length": 512, "per_device_eval_batch_size": 6}
    args = trl.DPOConfig(output_dir=str(tmp_path / "trl"), report_to="none", bf16=False, use_cpu=True, **common)
    theirs = trl.DPOTrainer(
        model=policy, ref_model=other, args=args, train_dataset=Dataset.from_list(made),
        eval_dataset=Dataset.from_list(made), processing_class=tokenizer,
    ).evaluate()  # fmt: skip
    (policy, _), (other, _) = tiny(), tiny(seed=1)
    args = config(DPOConfig, tmp_path, loss_type="all_pairs", reference_cache=str(tmp_path / "cache"), **common)
    ours = DPOTrainer(
        model=policy, ref_model=other, args=args, train_dataset=Dataset.from_list([row]),
        eval_dataset=Dataset.from_list([row]), processing_class=tokenizer,
    ).evaluate()  # fmt: skip
    assert abs(theirs["eval_loss"] - 0.6931) > 0.01
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-5)
    assert ours["eval_rewards/accuracies"] == pytest.approx(theirs["eval_rewards/accuracies"])
