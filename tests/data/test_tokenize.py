"""Token ids against TRL's own preparation of the same records, and against expectations written down here."""

from __future__ import annotations

import json
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
from support_data import assistant, user

from fastpref import models
from fastpref.data import formats, tokenize

datasets = pytest.importorskip("datasets", reason="needs `pip install 'fastpref[train]'`")

WORDS = "The sky is blue. The sun is in the sea. Say hello world, hello there. Two and two? Four. <tools>[]</tools>"
# the generation header ends in what the finished conversation does not have, as Gemma 4's and DeepSeek's do
THINKING = models.CHATML.replace("<|im_start|>assistant\n' }}", "<|im_start|>assistant\n<think></think>' }}")
TOOLS = "{% if tools %}{{ 'Tools: ' + tools | tojson + '\n' }}{% endif %}{% if loud %}{{ 'LOUD\n' }}{% endif %}"
NAMES = ("plain", "bos", "tools")


def make(name: str) -> Any:
    _, tokenizer = models.tiny([WORDS] * 20)
    if name == "bos":
        from tokenizers.processors import TemplateProcessing

        tokenizer.add_special_tokens({"bos_token": "<s>"})
        bos = [("<s>", tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", "<s> $A $B", bos)
        tokenizer.chat_template = "{{ bos_token }}" + models.CHATML
    if name == "tools":
        tokenizer.chat_template = TOOLS + THINKING
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return {name: make(name) for name in NAMES}


TEXTS = [
    {"prompt": "The sky is", "chosen": " blue.", "rejected": " in the sea.", "margin": 0.5},
    {"prompt": "Say ", "chosen": "hello world", "rejected": " hello there", "margin": -1.0},  # " hello" merges
    {"prompt": "Two and two?", "chosen": " Four.<|im_end|>", "rejected": "", "margin": 2.0},
    {"prompt": "The sun is in the sea. " * 6, "chosen": "hello", "rejected": "there", "margin": 0.0},
    {"prompt": "", "chosen": "hello world", "rejected": "Four.", "margin": 0.0},
]
TALKS = [
    {"prompt": [user("Two and two?")], "chosen": [assistant("Four.")], "rejected": [assistant("The sky is blue.")]},
    {
        "prompt": [{"role": "system", "content": "Say hello."}, user("hello"), assistant("hello world"), user("?")],
        "chosen": [assistant("The sun."), user("Two?"), assistant("Four.")],
        "rejected": [assistant("The sun is in the sea. " * 5)],
    },
    {"prompt": [user("The sky is blue. " * 12)], "chosen": [assistant("a")], "rejected": [assistant("b")]},
]
TOOL = {"type": "function", "function": {"name": "add", "description": "Two and two."}}
DATA = {
    "texts": TEXTS,
    "talks": TALKS,
    "implicit texts": [{side: e["prompt"] + e[side] for side in ("chosen", "rejected")} for e in TEXTS],
    "implicit talks": [{side: e["prompt"] + e[side] for side in ("chosen", "rejected")} for e in TALKS],
    "tools": [e | {"tools": json.dumps([TOOL]), "chat_template_kwargs": {"loud": True}} for e in TALKS],
}
each_tokenizer = pytest.mark.parametrize("name", NAMES)
each_format = pytest.mark.parametrize("data", DATA)
each_length = pytest.mark.parametrize("cut", [False, True])


def dataset(records: list[dict[str, Any]]) -> Any:
    return datasets.Dataset.from_list(records)


def pairs(data: str) -> Any:
    return formats.paired(dataset(DATA[data]))


def longest(function: Any, data: str, tokenizer: Any, column: str = "prompt_ids") -> int:
    return max(map(len, function(pairs(data), tokenizer, max_length=None)[column]))


def trl_module(name: str) -> Any:
    return pytest.importorskip(f"trl.{name}", reason="needs `pip install 'fastpref[test]'` (TRL 1.16)")


def trl_args(max_length: int | None, **more: Any) -> Any:
    return SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode="keep_start", **more)


def sequences(batch: dict[str, Any], prefix: str = "") -> list[tuple[list[int], list[int]]]:
    """(context, scored tokens) of every row of a batch of TRL's."""
    found = []
    for ids, attended, scored in zip(
        batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"], batch[f"{prefix}completion_mask"], strict=True
    ):
        n = int(attended.sum())
        context = n - int(scored.sum())
        assert scored[:n].tolist() == [0] * context + [1] * (n - context)
        found.append((ids[:context].tolist(), ids[context:n].tolist()))
    return found


@each_tokenizer
@each_format
@each_length
def test_pairs_are_those_of_trls_dpo_trainer(tokenizers, name, data, cut) -> None:
    trl = trl_module("trainer.dpo_trainer")
    tokenizer = tokenizers[name]
    max_length = longest(tokenize.tokenize_paired, data, tokenizer) if cut else None
    theirs = trl.DPOTrainer._prepare_dataset(
        SimpleNamespace(_tokenizer=tokenizer), dataset(DATA[data]), tokenizer, trl_args(max_length), "train"
    )
    batch = trl.DataCollatorForPreference(tokenizer.pad_token_id, max_length)(list(theirs))
    ours = tokenize.tokenize_paired(pairs(data), tokenizer, max_length=max_length)
    assert len(ours) == len(theirs) > 0
    assert cut == (len(ours) < len(DATA[data]))
    wanted = [(e["prompt_ids"], e[f"{side}_ids"]) for side in ("chosen", "rejected") for e in ours]
    assert sequences(batch) == wanted


@each_tokenizer
@each_format
@each_length
def test_responses_are_those_of_trls_kto_trainer(tokenizers, name, data, cut) -> None:
    trl = trl_module("trainer.kto_trainer")
    tokenizer = tokenizers[name]
    max_length = longest(tokenize.tokenize_paired, data, tokenizer) if cut else None
    known = SimpleNamespace(_tokenizer=tokenizer, calculate_KL=True, desirable_weight=1.0, undesirable_weight=1.0)
    args = trl_args(max_length, per_device_train_batch_size=2)
    theirs = trl.KTOTrainer._prepare_dataset(known, dataset(DATA[data]), tokenizer, args, "train")
    batch = trl.DataCollatorForUnpairedPreference(tokenizer.pad_token_id, max_length)(list(theirs))
    ours = tokenize.tokenize_unpaired(
        formats.unpaired(dataset(DATA[data])), tokenizer, max_length=max_length, block_size=2
    )
    assert sequences(batch) == [(e["prompt_ids"], e["completion_ids"]) for e in ours]
    assert sequences(batch, "KL_") == [(e["prompt_ids"], e["kl_completion_ids"]) for e in ours]
    assert batch["label"].tolist() == list(ours["label"])
    assert ours["kl_completion_ids"][1] != ours["completion_ids"][1]


@each_tokenizer
@each_format
@each_length
def test_whole_sequences_are_those_of_trls_reward_trainer(tokenizers, name, data, cut) -> None:
    trl = trl_module("trainer.reward_trainer")
    tokenizer = tokenizers[name]
    max_length = longest(tokenize.tokenize_reward, data, tokenizer, "chosen_ids") - 1 if cut else None
    theirs = trl.RewardTrainer._prepare_dataset(None, dataset(DATA[data]), tokenizer, trl_args(max_length), "train")
    ours = tokenize.tokenize_reward(pairs(data), tokenizer, max_length=max_length)
    for column in ("chosen_ids", "rejected_ids"):
        assert list(ours[column]) == list(theirs[column])
    assert len(ours) > 0 and cut == (len(ours) < len(DATA[data]))


@each_tokenizer
@pytest.mark.parametrize("data", [data for data in DATA if data != "tools"])
@each_length
def test_pairs_are_those_of_trls_cpo_and_orpo_trainers(tokenizers, name, data, cut) -> None:
    tokenizer = tokenizers[name]
    max_length = longest(tokenize.tokenize_reference_free, data, tokenizer) if cut else 1000
    ours = tokenize.tokenize_reference_free(pairs(data), tokenizer, max_length=max_length)
    for method in ("cpo", "orpo"):
        trl = trl_module(f"experimental.{method}.{method}_trainer")
        trainer = object.__new__(getattr(trl, f"{method.upper()}Trainer"))
        trainer.__dict__.update(is_encoder_decoder=False, processing_class=tokenizer, max_length=max_length)
        records = dataset(DATA[data]).map(trl.maybe_extract_prompt)
        records = records.map(trl.maybe_apply_chat_template, fn_kwargs={"processing_class": tokenizer})
        theirs = [trainer.tokenize_row(record) for record in records]
        scored = [row for row in theirs if all(max(row[f"{side}_labels"]) >= 0 for side in ("chosen", "rejected"))]
        assert len(ours) == len(scored) > 0
        assert cut == (len(ours) < len(theirs))
        for row, example in zip(scored, ours, strict=True):
            for side in ("chosen", "rejected"):
                ids = example["prompt_ids"] + example[f"{side}_ids"]
                context = len(example["prompt_ids"]) + example[f"{side}_skip"]
                assert row[f"{side}_input_ids"] == ids
                assert row[f"{side}_labels"] == [-100] * context + ids[context:]


def test_cpos_template_gets_tools(tokenizers) -> None:
    tokenizer = tokenizers["tools"]
    ours = tokenize.tokenize_reference_free(pairs("tools"), tokenizer, max_length=None)
    assert tokenizer.decode(ours[0]["prompt_ids"]).startswith(f"Tools: {json.dumps([TOOL])}\nLOUD\n<|im_start|>user")


def test_responses_without_mismatched_ones(tokenizers) -> None:
    found = tokenize.tokenize_unpaired(
        formats.unpaired(dataset(TALKS)), tokenizers["plain"], max_length=60, block_size=None
    )
    assert found.column_names == ["prompt_ids", "completion_ids", "label", "length"]
    assert [len(e["prompt_ids"] + e["completion_ids"]) for e in found] == list(found["length"]) == [27, 60, 29, 60]


def test_cut_pairs(tokenizers) -> None:
    tokenizer = tokenizers["plain"]
    prompt = tokenizer.encode("<|im_start|>user\nTwo and two?<|im_end|>\n<|im_start|>assistant\n")
    chosen, rejected = (tokenizer.encode(f"{text}<|im_end|>\n") for text in ("Four.", "The sky is blue."))
    length = len(prompt) + len(chosen) + len(rejected)
    expected = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "length": length}
    assert tokenize.tokenize_paired(pairs("talks"), tokenizer, max_length=None)[0] == expected
    room = 2
    cut = tokenize.tokenize_paired(pairs("talks"), tokenizer, max_length=len(prompt) + room)
    assert cut[0] == expected | {
        "chosen_ids": chosen[:room], "rejected_ids": rejected[:room], "length": len(prompt) + 2 * room,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"max_length: got 3, want more: 3 of 3 records"):
        tokenize.tokenize_paired(pairs("talks"), tokenizer, max_length=3)


def test_dropped_pairs_are_counted(tokenizers, caplog) -> None:
    assert len(tokenize.tokenize_paired(pairs("talks"), tokenizers["plain"], max_length=60, name="eval")) == 2
    assert "eval: left out, 1 of 3 records do not fit max_length=60" in caplog.text


def test_prompts_that_are_no_prefix_are_counted(tokenizers, caplog) -> None:
    found = tokenize.tokenize_paired(pairs("talks"), tokenizers["tools"], max_length=None)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("train: the prompt's tokens are not a prefix of prompt and response in 3 of 3 records")
    assert "(number 1, 2, 3)" in message
    assert tokenizers["tools"].decode(found[0]["prompt_ids"]).endswith("<|im_start|>assistant\n")


def test_a_merge_with_one_response_only_is_skipped_context(tokenizers) -> None:
    tokenizer = tokenizers["plain"]
    pair = tokenize.tokenize_reference_free(pairs("texts"), tokenizer, max_length=None)[1]
    assert tokenizer.decode(pair["prompt_ids"]) == "Say"
    assert [tokenizer.decode([i]) for i in pair["chosen_ids"]] == [" hello", " world", "<|im_end|>"]
    assert tokenizer.decode(pair["rejected_ids"]) == "  hello there<|im_end|>"
    assert tokenizer.decode(pair["rejected_ids"][:1]) == " "
    assert (pair["chosen_skip"], pair["rejected_skip"]) == (0, 1)


def test_mismatched_completions_rotate_within_blocks_and_are_cut_after_their_new_prompt(tokenizers) -> None:
    records = [{"prompt_ids": [0] * p, "completion_ids": [p] * 6, "label": p % 2} for p in (1, 2, 9, 3, 4, 5)]
    found = tokenize.tokenize_unpaired(dataset(records), None, max_length=8, block_size=2)
    assert [len(e["prompt_ids"]) for e in found] == [1, 2, 3, 4, 5]
    assert list(found["completion_ids"]) == [[1] * 6, [2] * 6, [3] * 5, [4] * 4, [5] * 3]
    assert list(found["kl_completion_ids"]) == [[2] * 6, [1] * 6, [4] * 5, [3] * 4, [5] * 3]
    assert list(found["label"]) == [True, False, True, False, True]
    assert list(found["length"]) == [1 + 12, 2 + 12, 3 + 10, 4 + 8, 5 + 6]


def test_blocks_do_not_depend_on_the_batches_of_map(monkeypatch) -> None:
    records = dataset([{"prompt_ids": [0], "completion_ids": [i], "label": True} for i in range(20)])
    monkeypatch.setattr(tokenize, "BATCH", 7)
    found = tokenize.tokenize_unpaired(records, None, max_length=None, block_size=3)
    assert [i for (i,) in found["kl_completion_ids"]] == [
        2,
        0,
        1,
        5,
        3,
        4,
        8,
        6,
        7,
        11,
        9,
        10,
        14,
        12,
        13,
        17,
        15,
        16,
        19,
        18,
    ]


STEPS = {"prompt": "Two and two?", "completions": ["Four.", "The sky is blue.", ""], "labels": [True, False, True]}


@pytest.mark.parametrize("name", ["plain", "bos"])
def test_step_labels_are_where_separators_end(tokenizers, name) -> None:
    tokenizer = tokenizers[name]

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    prompt = ([tokenizer.bos_token_id] if name == "bos" else []) + ids("Two and two?")
    steps = [ids(text) + ids("\n") for text in STEPS["completions"]]
    assert [len(step) for step in steps][-1] == 1
    labels = [[-100] * (len(step) - 1) + [label] for step, label in zip(steps, (1, 0, 1), strict=True)]
    whole_ids = [*prompt, *chain(*steps)]
    whole_labels = [-100] * len(prompt) + [*chain(*labels)]

    def found(**options: Any) -> dict[str, Any]:
        data = formats.stepwise(dataset([STEPS]))
        return tokenize.tokenize_stepwise(data, tokenizer, **{"max_length": None} | options)[0]

    n, size = len(prompt), len(whole_ids)
    assert found() == {"input_ids": whole_ids, "labels": whole_labels, "length": size}
    assert found(max_length=n + len(steps[0]))["labels"] == [-100] * n + labels[0]
    assert found(max_prompt_length=1, max_completion_length=2)["input_ids"] == prompt[-1:] + whole_ids[n : n + 2]
    assert found(max_prompt_length=0)["input_ids"] == whole_ids[n:]
    assert found(train_on_last_step_only=True)["labels"] == [-100] * (size - 1) + [1]


@pytest.mark.parametrize("kind", ["paired", "reward", "reference_free"])
def test_streams_hold_what_data_sets_hold(tokenizers, kind) -> None:
    function = getattr(tokenize, f"tokenize_{kind}")
    records = dataset(DATA["implicit talks"])
    stored = function(formats.paired(records), tokenizers["plain"], max_length=60)
    stream = function(formats.paired(records.to_iterable_dataset()), tokenizers["plain"], max_length=60)
    assert list(stream) == list(stored)


def test_streamed_responses(tokenizers) -> None:
    def found(records: Any) -> list[dict[str, Any]]:
        return list(
            tokenize.tokenize_unpaired(formats.unpaired(records), tokenizers["plain"], max_length=60, block_size=2)
        )

    records = dataset(DATA["talks"])
    assert found(records.to_iterable_dataset()) == found(records)
    steps = dataset([STEPS])
    stream = tokenize.tokenize_stepwise(steps.to_iterable_dataset(), tokenizers["plain"], max_length=None)
    assert list(stream) == list(tokenize.tokenize_stepwise(steps, tokenizers["plain"], max_length=None))


def test_only_named_columns_are_left_with_numbers_that_trainers_read(tokenizers) -> None:
    records = pairs("texts").map(lambda e: {"ref_chosen_logps": -1.5, "ref_rejected_logps": -2.5, "source": "a"})
    some = records.map(lambda e: {"margin": None if e["margin"] else 1.0})  # which only reward models read
    found = tokenize.tokenize_paired(some, tokenizers["plain"], max_length=30)
    ids = ["prompt_ids", "chosen_ids", "rejected_ids"]
    assert found.column_names == [*ids, "ref_chosen_logps", "ref_rejected_logps", "length"]
    assert len(found) == 4  # the fourth is too long
    assert tokenize.tokenize_reward(records, tokenizers["plain"], max_length=None)[1]["margin"] == -1.0


def test_the_length_of_whole_sequences_counts_their_common_beginning_once() -> None:
    found = tokenize.tokenize_reward(
        dataset([{"chosen_ids": [1, 2, 3], "rejected_ids": [1, 2, 4, 5], "margin": None}]), None, max_length=4
    )
    assert found[0] == {"chosen_ids": [1, 2, 3], "rejected_ids": [1, 2, 4, 5], "margin": None, "length": 5}


def test_token_ids_are_cut_and_left_out_too() -> None:
    rows = [{"prompt_ids": [0] * n, "chosen_ids": [1, 2, 3], "rejected_ids": [4]} for n in (2, 5)]
    for function in (tokenize.tokenize_paired, tokenize.tokenize_reference_free):
        (found,) = function(formats.paired(dataset(rows)), None, max_length=4)
        assert found["chosen_ids"] == [1, 2] and found["rejected_ids"] == [4] and found["length"] == 5
        assert found.get("chosen_skip", 0) == 0
    with pytest.raises(ValueError, match=r"record 1: prompt_ids: got none beside chosen_ids, rejected_ids"):
        tokenize.tokenize_paired(dataset([{"chosen_ids": [1], "rejected_ids": [2]}]), None, max_length=4)


def test_bad_records_are_named(tokenizers) -> None:
    tokenizer = tokenizers["plain"]
    missing = dataset([*TALKS, {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": None}])
    with pytest.raises(ValueError, match=r"record 4: prompt, chosen, rejected: got list, list, None, want all of them"):
        tokenize.tokenize_paired(missing, tokenizer, max_length=None)
    different = [{"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]}]
    found = formats.paired(dataset(different))
    with pytest.raises(ValueError, match=r"record 1: prompt, chosen, rejected: got \[\], list, list"):
        tokenize.tokenize_paired(found, tokenizer, max_length=None)
    assert len(tokenize.tokenize_reward(found, tokenizer, max_length=None)) == 1
    with pytest.raises(ValueError, match=r"record 1: label: got None, want True or False"):
        unlabelled = dataset([{"prompt_ids": [1], "completion_ids": [2], "label": None}])
        tokenize.tokenize_unpaired(unlabelled, None, max_length=None, block_size=None)
    with pytest.raises(ValueError, match=r"record 1: labels: got 2, want one for each of 3 completions"):
        tokenize.tokenize_stepwise(dataset([STEPS | {"labels": [True, False]}]), tokenizer, max_length=None)
    with pytest.raises(ValueError, match=r"record 1: completions: got a step of no tokens"):
        tokenize.tokenize_stepwise(dataset([STEPS]), tokenizer, max_length=None, step_separator="")


def test_a_second_preparation_comes_from_the_cache(tokenizers, tmp_path, monkeypatch) -> None:
    dataset(TALKS).save_to_disk(str(tmp_path))
    tokenizer = tokenizers["plain"]

    def prepared(max_length: int) -> Any:
        records = formats.paired(datasets.load_from_disk(str(tmp_path)))
        return tokenize.tokenize_paired(records, tokenizer, max_length=max_length)

    first = prepared(60)
    assert first.cache_files and prepared(60).cache_files == first.cache_files
    assert prepared(50).cache_files != first.cache_files
    monkeypatch.setattr(tokenize, "__version__", "another")
    assert prepared(60).cache_files != first.cache_files


def test_processes_give_what_one_gives(tokenizers) -> None:
    one, two = (
        tokenize.tokenize_unpaired(
            formats.unpaired(dataset(TALKS), num_proc=n), tokenizers["plain"], max_length=60, block_size=2, num_proc=n
        )
        for n in (None, 2)
    )
    assert one.to_list() == two.to_list()
