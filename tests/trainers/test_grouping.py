"""`group_by_prompt` brings a prompt's examples into one batch, and changes nothing else about an update."""

import pytest
import torch
from datasets import Dataset

from fastpref.trainers import DPOConfig, DPOTrainer
from fastpref.trainers.grouping import PromptSampler, in_batches, prompts_of, seed_of
from tests.support_trainers import config, furthest, pairs, run, tiny, train, weights
from tests.trainers.test_trees import all_pairs


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_batches_hold_whole_groups_where_they_fit():
    groups = [[0, 1, 2], [3, 4], [5, 6, 7], [8], [9, 10, 11, 12, 13, 14]]
    assert list(in_batches(groups, 4)) == [0, 1, 2, 8, 3, 4, 13, 14, 5, 6, 7, 9, 10, 11, 12]
    assert list(in_batches([[0, 1, 2]] * 2, 2)) == [0, 1, 2, 2, 0, 1]  # cut, but nothing is lost


def test_every_epoch_has_another_order_and_all_ranks_the_same():
    epoch = [0]
    one, other = (PromptSampler("aabbccdd", 2, 7, lambda: epoch[0]) for _ in range(2))
    orders = []
    for epoch[0] in range(3):
        orders.append(list(one))
        assert orders[-1] == list(other) and sorted(orders[-1]) == list(range(8)) and len(one) == 8
        assert all(b == a + 1 for a, b in zip(orders[-1][::2], orders[-1][1::2], strict=True))
    assert len(set(map(tuple, orders))) > 1
    assert list(PromptSampler("abab", 2, None, lambda: 0)) == [0, 2, 1, 3]


def test_a_data_seed_of_0_is_a_seed(tmp_path):
    assert seed_of(config(DPOConfig, tmp_path, seed=7)) == 7
    assert seed_of(config(DPOConfig, tmp_path, seed=7, data_seed=0)) == 0
    assert seed_of(config(DPOConfig, tmp_path, seed=7, train_sampling_strategy="sequential")) is None


def test_prompts_are_told_apart_by_their_token_ids():
    data = Dataset.from_list([{"prompt_ids": ids, "x": 1} for ids in ([1, 2], [1], [1, 2], [])])
    found = prompts_of(data)
    assert found[0] == found[2] and len(set(found)) == 3


SCATTERED = [0, 3, 1, 4, 2, 5]  # the pairs of two prompts in turn


@pytest.mark.parametrize("method", ["dpo", "cpo"])
def test_a_grouped_epoch_has_the_examples_of_one_update_in_trees(method, tmp_path):
    """The same update where one update sees all, however accumulated; and fewer tokens run."""
    data = all_pairs().select(SCATTERED)
    options = {"max_steps": 1, "max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 0.05, "statistics": "never"}
    options |= {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    tokens, found = {}, {}
    for grouped in (False, True):
        trainer, log = run(method, tmp_path / str(grouped), data, group_by_prompt=grouped, seed=3, **options)
        batches = list(trainer.get_train_dataloader())
        tokens[grouped] = sum(part["input_ids"].numel() for batch in batches for part in batch["parts"])
        found[grouped] = weights(trainer), log[0]["loss"]
    assert furthest(found[True][0], found[False][0]) < 2e-6
    assert found[True][1] == pytest.approx(found[False][1], rel=1e-6)
    assert tokens[True] < tokens[False]


def test_a_run_resumed_inside_of_its_second_epoch_goes_on_in_the_same_order(tmp_path):
    options = {"per_device_train_batch_size": 3, "max_steps": 8, "save_strategy": "steps", "save_steps": 6}
    seen = []

    class Noting(DPOTrainer):
        def part_loss(self, part, items):
            seen.append(part["input_ids"].tolist())
            return super().part_loss(part, items)

    def made():
        model, tokenizer = tiny()
        args = config(DPOConfig, tmp_path, group_by_prompt=True, statistics="never", **options)
        return Noting(model=model, args=args, train_dataset=all_pairs(4), processing_class=tokenizer)

    train(made())
    assert len(seen) == 8 and seen[:4] != seen[4:]
    train(made(), resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-6"))
    assert seen[8:] == seen[6:8]


@pytest.mark.parametrize("method", ["reward", "prm"])
def test_rows_of_whole_sequences_know_their_prompts(method, tmp_path):
    from fastpref.data import formats, tokenize

    _, tokenizer = tiny()
    if method == "reward":
        data = tokenize.tokenize_reward(formats.paired(all_pairs()), tokenizer, max_length=None, prompts=True)
        wanted = 3
    else:
        rows = [{"prompt": p, "completions": ["a", f"b{i}"], "labels": [True, False]} for p in "pq" for i in range(2)]
        data = tokenize.tokenize_stepwise(Dataset.from_list(rows), tokenizer, max_length=None, prompts=True)
        wanted = 2
    found = prompts_of(data)
    assert len(set(found)) == 2 and found == sorted(found, key=found.index) and found.count(found[0]) == wanted


def test_what_cannot_be_grouped_is_refused(tmp_path):
    model, tokenizer = tiny()
    with pytest.raises(ValueError, match="group_by_prompt: got True with an IterableDataset"):
        DPOTrainer(model, args=config(DPOConfig, tmp_path, group_by_prompt=True),
                   train_dataset=pairs().to_iterable_dataset(), processing_class=tokenizer)  # fmt: skip
    with pytest.raises(ValueError, match="group_by_prompt: got True with train_sampling_strategy 'group_by_length'"):
        config(DPOConfig, tmp_path, group_by_prompt=True, train_sampling_strategy="group_by_length")


def test_a_prompts_examples_are_one_part_of_a_token_budget(tmp_path):
    trainer, _ = run("dpo", tmp_path, all_pairs(), layout="tree", token_budget=10**6, statistics="never", max_steps=1,
                     per_device_train_batch_size=6)  # fmt: skip
    collator, examples = trainer.data_collator, trainer.train_dataset.to_list()
    nodes = [collator.part(some)["input_ids"].numel() for some in (examples[:3], examples[3:], examples)]
    assert sum(nodes[:2]) >= nodes[2] > max(nodes[:2])
    collator.token_budget = max(nodes[:2])  # of nodes: separate sequences would have far more tokens
    assert [len(some) for some in collator.split(examples)] == [3, 3]
    assert torch.equal(collator.part(examples[:3])["labels"], collator(examples)["parts"][0]["labels"])
