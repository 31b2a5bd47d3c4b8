"""All pairs of a prompt's responses in one batch: one tree, and the update of separate sequences."""

import itertools

import pytest
import torch
from datasets import Dataset

from fastpref import linear_token_statistics
from fastpref.data.collators import PairCollator
from fastpref.data.pairs import sample_pairs
from fastpref.trainers import policy
from tests.support_trainers import furthest, run, weights


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def all_pairs(prompts: int = 2, responses: int = 3) -> Dataset:
    """Every pair of some responses to each prompt. The first is the better one."""
    found = sample_pairs()[0]
    texts = [getattr(pair, side) for pair in found[:responses] for side in ("chosen", "rejected")][:responses]
    return Dataset.from_list(
        [
            {"prompt": pair.prompt, "chosen": chosen, "rejected": rejected}
            for pair in found[:prompts]
            for chosen, rejected in itertools.combinations(texts, 2)
        ]
    )


ONE_STEP = {
    "per_device_train_batch_size": 6, "max_steps": 1, "max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 0.05
}  # fmt: skip


@pytest.mark.parametrize(
    "method, options",
    [
        ("dpo", {"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.5, "statistics": "never"}),
        ("dpo", {"use_weighting": True, "statistics": "every"}),
        ("dpo", {"loss_type": ["aot"], "statistics": "never", "precompute_ref_log_probs": False}),
        ("orpo", {"statistics": "every"}),
        ("orpo", {"statistics": "never"}),
        ("cpo", {"statistics": "never", "token_budget": 160}),
    ],
)
def test_an_update_of_a_tree_is_that_of_separate_sequences(method, options, tmp_path):
    found = {}
    for layout in ("shared", "padded"):
        given = {name: value for name, value in options.items() if layout == "shared" or name != "token_budget"}
        found[layout] = run(method, tmp_path / layout, all_pairs(), layout=layout, **(ONE_STEP | given))
    (tree, log), (padded, wanted) = found.values()
    for one, other in zip(log, wanted, strict=True):
        for name in other.keys() - {"train_runtime"}:
            assert one[name] == pytest.approx(other[name], rel=2e-5, abs=2e-6), name
    assert furthest(weights(tree), weights(padded)) < 2e-6


def test_the_head_gets_each_node_once_for_each_target(tmp_path, monkeypatch):
    seen = []

    def noted(hidden, *args, **kwargs):
        seen.append(hidden.shape[0])
        return linear_token_statistics(hidden, *args, **kwargs)

    monkeypatch.setattr(policy, "linear_token_statistics", noted)
    trainer, _ = run("cpo", tmp_path, all_pairs(), layout="shared", **ONE_STEP)
    examples = trainer.train_dataset.to_list()
    responses = [(e["prompt_ids"], e[side]) for e in examples for side in ("chosen_ids", "rejected_ids")]
    scored = {(*prompt, *response[: n + 1]) for prompt, response in responses for n in range(len(response))}
    assert seen == [len(scored)]
    nodes = {path[: n + 1] for path in scored for n in range(len(path))}
    (part,) = PairCollator(layout="shared")(examples)["parts"]
    assert part["input_ids"].numel() == len(nodes)
    assert part["tokens"] == sum(
        2 * len(e["prompt_ids"]) + len(e["chosen_ids"]) + len(e["rejected_ids"]) for e in examples
    )


def test_gradients_of_shared_rows_are_added_up_in_one_order():
    from fastpref.common.gather import take_rows

    torch.manual_seed(0)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([4, 0, 0, 2, 4, 4, 1])
    assert torch.equal(take_rows(x, index), x[index])
    assert torch.autograd.gradcheck(lambda x: take_rows(x, index), x)
    many = torch.zeros(1, dtype=torch.bfloat16, requires_grad=True)
    take_rows(many, torch.zeros(1000, dtype=torch.long)).sum().backward()
    assert many.grad.item() == 1000  # in bf16 a sum of ones stays at 256
