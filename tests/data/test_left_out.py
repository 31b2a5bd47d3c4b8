"""Records that are left out are counted, and columns of numbers are whole."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import IterableDataset
from support_data import dataset
from support_trainers import QUIET, tiny, train

from fastpref import trainers
from fastpref.data import files, formats, tokenize
from fastpref.data.collators import RewardCollator
from fastpref.online.records import write_records

IDS = {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5, 6]}
LONG = IDS | {"prompt_ids": [1] * 20}


def stream(*records: dict[str, Any]) -> Any:
    return IterableDataset.from_generator(lambda: iter(records))


def test_a_stream_counts_what_it_leaves_out(tmp_path, caplog) -> None:
    """It dropped records without a word."""
    records = [LONG, IDS, IDS, LONG, IDS, IDS]
    model, tokenizer = tiny()
    options = QUIET | {"max_length": 8, "max_steps": 3, "per_device_train_batch_size": 2}
    trainer = trainers.DPOTrainer(
        model=model, args=trainers.DPOConfig(str(tmp_path), precompute_ref_log_probs=False, **options),
        train_dataset=stream(*records), eval_dataset=stream(*records[:2]), processing_class=tokenizer,
    )  # fmt: skip
    caplog.clear()
    train(trainer)
    said = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert "train: left out, 1 of 1 records so far do not fit max_length=8 (number 1)" in said
    assert "train: left out, 2 of 6 records do not fit max_length=8 (number 1, 4)" in said
    caplog.clear()
    trainer.evaluate()
    assert "eval: left out, 1 of 2 records do not fit max_length=8 (number 1)" in caplog.text
    caplog.clear()
    trainer.evaluate(stream(*records[:3]))  # it was not said of those that came late
    assert "eval: left out, 1 of 3 records do not fit max_length=8 (number 1)" in caplog.text


def test_numbers_of_what_is_left_out_of_a_data_set(caplog) -> None:
    for function in (tokenize.tokenize_paired, tokenize.tokenize_reference_free):
        caplog.clear()
        found = function(dataset(IDS, *[LONG] * 8, IDS), None, max_length=8)
        assert len(found) == 2 and "remarks" not in found.column_names and "record" not in found.column_names
        assert "train: left out, 8 of 10 records do not fit max_length=8 (number 2, 3, 4, 5, 6, ...)" in caplog.text


REWARD = {"chosen_ids": [3, 4], "rejected_ids": [5, 6]}


@pytest.mark.parametrize("margins", [[None, 1.0], [1.0, None], [1.0, float("nan")], [1.0, float("inf")]], ids=str)
@pytest.mark.parametrize("form", [dataset, stream])
def test_margins_in_some_records_only(margins, form) -> None:
    """[None, 1.0] was no margin, [1.0, None] a TypeError in the middle of training."""
    records = form(*({**REWARD, "margin": margin} for margin in margins))
    with pytest.raises(ValueError, match=r"record 2: margin: got (1\.0|None|nan|inf), want a (finite )?number"):
        list(tokenize.tokenize_reward(records, None, max_length=None))
    collator = RewardCollator()
    if margins[1] is None or margins[0] is None:
        with pytest.raises(ValueError, match=r"margin: got None beside 1\.0, want all or none"):
            collator.extras([{"margin": margin} for margin in margins])


def test_margins_that_are_missing_far_from_the_others(monkeypatch) -> None:
    monkeypatch.setattr(tokenize, "BATCH", 2)
    long = {"chosen_ids": [1] * 9, "rejected_ids": [2], "margin": 1.0}
    records = dataset(long, *[REWARD | {"margin": 1.0}] * 3, *[REWARD | {"margin": None}] * 2)
    with pytest.raises(ValueError, match=r"record 5: margin: got None, want a number in every record or in none"):
        tokenize.tokenize_reward(records, None, max_length=4)


def test_files_with_margins_and_without(tmp_path) -> None:
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    write_records(tmp_path / "1.jsonl", [pair | {"margin": 0.5}])
    write_records(tmp_path / "2.jsonl", [pair])
    records = formats.paired(files.load_records([tmp_path / "1.jsonl", tmp_path / "2.jsonl"]))
    _, tokenizer = tiny()
    with pytest.raises(ValueError, match=r"record 2: margin: got None, .* were files with and without read together"):
        tokenize.tokenize_reward(records, tokenizer, max_length=None)


def test_reference_columns_of_none_are_none() -> None:
    columns = {"ref_chosen_logps": None, "ref_rejected_logps": None}
    found = tokenize.tokenize_paired(dataset(IDS | columns, IDS | columns), None, max_length=None)
    assert not set(columns) & set(found.column_names)
    with pytest.raises(ValueError, match=r"record 2: ref_chosen_logps: got None"):
        tokenize.tokenize_paired(dataset(IDS | {"ref_chosen_logps": -1.0}, IDS | columns), None, max_length=None)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_response_of_no_tokens_is_not_too_long(side) -> None:
    """In ORPO and SimPO it `did not fit max_length`."""
    with pytest.raises(ValueError, match=f"record 2: {side}: got a response of no tokens, want at least 1"):
        tokenize.tokenize_reference_free(dataset(IDS, IDS | {f"{side}_ids": []}), None, max_length=None)
    _, tokenizer = tiny()
    record = {"prompt": "Two?", "chosen": "a", "rejected": "b"} | {side: ""}
    for given in (record, {"prompt": [{"role": "user", "content": "a"}], "chosen": "", "rejected": ""}):
        (row,) = tokenize.tokenize_reference_free(formats.paired(dataset(given)), tokenizer, max_length=50)
        assert tokenizer.decode(row[f"{side}_ids"]).strip().endswith("<|im_end|>")
