"""Data that TRL's CPO and ORPO tokenised, by TRL's names: as if it came as texts."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from support_trainers import config, tiny

from fastpref import trainers
from fastpref.data import encode, formats, tokenize

LABELS = {"chosen_labels": [-100, -100, 4, 5], "rejected_labels": [-100, 7, 8]}
SEQUENCES = {"prompt_input_ids": [1], "chosen_input_ids": [1, 2, 4, 5], "rejected_input_ids": [1, 7, 8]}


def rows(record: dict, kind: str = "reference_free", streamed: bool = False) -> list[dict]:
    dataset = Dataset.from_list([record])
    dataset = formats.paired(dataset.to_iterable_dataset() if streamed else dataset)
    return list(getattr(tokenize, f"tokenize_{kind}")(dataset, None, max_length=None))


@pytest.mark.parametrize("streamed", [False, True], ids=["dataset", "stream"])
def test_labels_say_where_each_context_ends(streamed) -> None:
    (found,) = rows(SEQUENCES | LABELS, streamed=streamed)
    columns = ("prompt_ids", "chosen_ids", "rejected_ids", "chosen_skip", "rejected_skip")
    assert [found[name] for name in columns] == [[1], [2, 4, 5], [7, 8], 1, 0]
    (again,) = rows(found)  # our own names, once more
    assert [again[name] for name in columns] == [found[name] for name in columns]
    (paired,) = rows(SEQUENCES | LABELS, "paired")  # in DPO a response begins where the shorter prompt ends
    assert [paired[name] for name in columns[:3]] == [[1], [2, 4, 5], [7, 8]]
    (whole,) = rows(SEQUENCES | LABELS, "reward")
    assert (whole["chosen_ids"], whole["rejected_ids"]) == ([1, 2, 4, 5], [1, 7, 8])


def test_without_labels_they_are_responses_as_in_older_dpo() -> None:
    for kind in ("reference_free", "paired"):
        (found,) = rows(SEQUENCES, kind)
        assert [found[f"{name}_ids"] for name in ("prompt", "chosen", "rejected")] == [[1], [1, 2, 4, 5], [1, 7, 8]]


def test_texts_beside_them_still_make_single_responses() -> None:
    texts = {"prompt": "The sky is", "chosen": " blue.", "rejected": " red."}
    singles = formats.unpaired(Dataset.from_list([texts | SEQUENCES | LABELS]))
    prompt, responses, _ = encode.part(singles[0], ("completion",), tiny()[1])
    assert prompt == tiny()[1]("The sky is")["input_ids"] and len(responses) == 1


def test_labels_with_holes_are_refused() -> None:
    message = r"record 1: chosen_labels: got \[-100, 2, -100, 5\], want -100 in the context, then chosen_input_ids"
    with pytest.raises(ValueError, match=message):
        rows(SEQUENCES | LABELS | {"chosen_labels": [-100, 2, -100, 5]})


@pytest.mark.parametrize("method", ["CPO", "ORPO"])
def test_what_trl_prepared_trains_as_its_texts(method, tmp_path) -> None:
    trl_hosts = pytest.importorskip("tests.trl_hosts")
    prepared = trl_hosts.build(method.lower(), tmp_path).train_dataset
    assert {"prompt_input_ids", "chosen_input_ids", "chosen_labels", "rejected_labels"} <= set(prepared.column_names)
    tokens = prepared.remove_columns(["prompt", "chosen", "rejected"])
    found = []
    for dataset in (trl_hosts.dataset("dpo"), prepared, tokens):
        args = config(getattr(trainers, f"{method}Config"), tmp_path)
        model, tokenizer = trl_hosts.models.tiny(trl_hosts.TEXTS)
        torch.manual_seed(0)
        trainer = getattr(trainers, f"{method}Trainer")(model, args, None, dataset, processing_class=tokenizer)
        found.append((list(trainer.train_dataset), trainer.evaluate(dataset)["eval_loss"]))
    assert found[0] == found[1] == found[2]


def test_reward_models_want_whole_sequences(tmp_path) -> None:
    from transformers import AutoModelForSequenceClassification

    model, tokenizer = tiny()
    model.config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(model.config)
    args = config(trainers.RewardConfig, tmp_path)
    with pytest.raises(ValueError, match="train_dataset: got prompt_input_ids, want chosen_ids and rejected_ids as wh"):
        trainers.RewardTrainer(model, args, None, Dataset.from_list([SEQUENCES]), processing_class=tokenizer)
