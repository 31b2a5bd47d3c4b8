import pytest
import torch

from fastpref.data.collators import PairCollator, RewardCollator, StepCollator, UnpairedCollator
from fastpref.data.packing import LAYOUTS, Scored, TokenCounter, in_order, pack, split_by_tokens
from fastpref.models.segments import Segment

PAIR = [Scored([3, 4, 5, 6, 7], 3), Scored([3, 4, 5, 8, 9, 2], 3)]


def flat(batch):
    return batch["input_ids"].flatten()


def test_a_pair_runs_its_prompt_once():
    batch = pack(PAIR, "shared")
    assert batch["input_ids"].tolist() == [[3, 4, 5, 6, 7, 8, 9, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 4, 5]]
    assert batch["fastpref_segments"].table == (Segment(0, 5), Segment(5, 8, ((0, 3),)))
    assert batch["rows"].tolist() == [2, 3, 2, 5, 6]  # the last prompt row scores both first tokens
    assert batch["labels"].tolist() == [6, 7, 8, 9, 2]
    assert batch["cu_seqlens"].tolist() == [0, 2, 5]
    assert batch["last_rows"].tolist() == [4, 7]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_and_labels_mean_the_same_in_every_layout(layout):
    groups = [PAIR, [Scored([3, 4], 1), Scored([3, 4], 1)], [Scored([9], 1), Scored([10, 11, 12], 0)]]
    batch = pack(in_order(groups), layout, pad_token_id=0)
    assert batch["labels"].tolist() == [6, 7, 4, 8, 9, 2, 4, 11, 12]
    assert batch["cu_seqlens"].tolist() == [0, 2, 3, 3, 6, 7, 9]
    assert flat(batch)[batch["rows"]].tolist() == [5, 6, 3, 5, 8, 9, 3, 10, 11]  # each row's token, before its label
    assert flat(batch)[batch["last_rows"]].tolist() == [7, 4, 9, 2, 4, 12]
    wanted = flat(batch).numel() if layout == "padded" else batch["input_ids"].shape[1]
    assert TokenCounter(groups, layout)(0, len(groups)) == wanted


def test_responses_that_begin_alike_share_that_too():
    batch = pack([Scored([1, 2, 3, 4], 2), Scored([1, 2, 3, 5], 2)], "shared")
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5]]
    assert batch["rows"].tolist() == [1, 2, 1, 2]


def test_a_response_that_is_a_beginning_of_the_other_has_no_rows_of_its_own():
    batch = pack([Scored([1, 2, 3, 4], 2), Scored([1, 2, 3], 2)], "shared")
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4]]
    assert batch["fastpref_segments"].table == (Segment(0, 4),)
    assert batch["last_rows"].tolist() == [3, 2]


def test_kept_rows_have_no_label():
    batch = pack([Scored([1, 2, 3], 2, kept=1), Scored([1, 2, 4], 2)], "shared")
    assert batch["labels"].tolist() == [-100, 3, 4]
    assert batch["rows"].tolist() == [0, 1, 1]


def test_parts_stay_within_the_budget_and_keep_the_order():
    groups = [[Scored(list(range(n)), 1)] for n in (4, 4, 9, 1, 2, 3)]
    assert split_by_tokens(groups, "packed", None) == [range(6)]
    assert split_by_tokens(groups, "packed", 8) == [range(2), range(2, 3), range(3, 6)]


EXAMPLES = [
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6], "ref_chosen_logps": -1.0,
     "ref_rejected_logps": -2.0},
    {"prompt_ids": [7], "chosen_ids": [8], "rejected_ids": [9, 9, 9], "ref_chosen_logps": -3.0,
     "ref_rejected_logps": -4.0},
]  # fmt: skip


def test_pairs():
    batch = PairCollator(layout="shared", ours=True)(EXAMPLES)
    (part,) = batch["parts"]
    assert batch["index"].shape == (2,)
    assert part["ref_logps"].tolist() == [-1, -3, -2, -4]
    assert (part["examples"], part["tokens"], part["chosen_rows"]) == (2, 5 + 4 + 2 + 4, 3)
    assert part["labels"].tolist() == [4, 5, 8, 6, 9, 9, 9]


def test_pairs_in_parts():
    parts = PairCollator(layout="shared", token_budget=6)(EXAMPLES)["parts"]
    assert [part["examples"] for part in parts] == [1, 1]
    assert "fastpref_segments" not in parts[0]  # `ours` is off


def test_scored_prompts_have_labels_of_their_own():
    (part,) = PairCollator(layout="shared", score_prompts=True)(EXAMPLES[:1])["parts"]
    assert part["labels"].tolist() == [-100, -100, 4, 5, 6]
    assert part["prompt_labels"].tolist() == [2, 3, 4, 5, 6]


def test_tokens_left_out_of_the_score():
    (part,) = PairCollator(layout="padded")([EXAMPLES[0] | {"chosen_skip": 1, "rejected_skip": 0}])["parts"]
    assert part["labels"].tolist() == [5, 6]


def test_rewards():
    (part,) = RewardCollator(layout="shared", ours=True)(
        [{"chosen_ids": [1, 2, 3], "rejected_ids": [1, 2, 4, 5], "margin": 0.5}]
    )["parts"]
    assert flat(part)[part["last_rows"]].tolist() == [3, 5]
    assert part["margin"].tolist() == [0.5]


def test_steps_of_a_chain_that_several_solutions_begin_with():
    chain = {"input_ids": [1, 2, 3, 4], "labels": [-100, 0, -100, 1]}
    other = {"input_ids": [1, 2, 5, 6, 7], "labels": [-100, 0, -100, -100, 1]}
    (part,) = StepCollator(layout="shared")([chain, other, chain])["parts"]
    assert part["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert flat(part)[part["step_rows"]].tolist() == [2, 4, 2, 7, 2, 4]
    assert part["step_labels"].tolist() == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_steps(layout):
    examples = [
        {"input_ids": [1, 2, 3, 4], "labels": [-100, 0, -100, 1]},
        {"input_ids": [5, 6], "labels": [-100, 1]},
    ]
    (part,) = StepCollator(layout=layout)(examples)["parts"]
    assert flat(part)[part["step_rows"]].tolist() == [2, 4, 6]
    assert part["step_labels"].tolist() == [0, 1, 1]


def test_unpaired_examples_and_their_mismatched_completions():
    examples = [
        {"prompt_ids": [1, 2], "completion_ids": [3], "label": True, "kl_completion_ids": [6, 7]},
        {"prompt_ids": [5], "completion_ids": [6, 7], "label": False, "kl_completion_ids": [3]},
    ]
    collator = UnpairedCollator(layout="shared", ours=True)
    batch = collator(examples)
    (part,), (kl_part,) = batch["parts"], batch["kl_parts"]
    assert part["desirable"].tolist() == [True, False]
    assert part["labels"].tolist() == [3, 6, 7]
    assert kl_part["labels"].tolist() == [6, 7, 3]
    both = collator.reference_part(examples)
    assert both["labels"].tolist() == [3, 6, 7, 6, 7, 3]
    assert both["input_ids"].tolist() == [[1, 2, 3, 6, 7, 5, 6, 7, 3]]
    assert torch.equal(both["cu_seqlens"], torch.tensor([0, 1, 3, 5, 6]))


def test_mismatched_completions_keep_within_the_token_budget():
    """They were split like the completions, which may be shorter."""
    sizes = [(1, 9), (1, 9), (9, 1), (9, 1)]
    examples = [
        {"prompt_ids": [1 + i], "completion_ids": [9] * own, "label": True, "kl_completion_ids": [9] * other}
        for i, (own, other) in enumerate(sizes)
    ]
    for layout in LAYOUTS:
        batch = UnpairedCollator(layout=layout, ours=True, token_budget=12)(examples)
        for parts in (batch["parts"], batch["kl_parts"]):
            assert max(part["input_ids"].numel() for part in parts) <= 12
            assert sum(part["examples"] for part in parts) == len(examples)
        assert torch.cat([part["labels"] for part in batch["kl_parts"]]).tolist() == [9] * 20
