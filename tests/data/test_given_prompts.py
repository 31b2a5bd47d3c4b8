"""Prompts and responses given in different forms: none is lost, none is asked twice, a missing one is an error."""

from __future__ import annotations

from typing import Any

import pytest
from support_data import assistant, dataset, user

from fastpref import models
from fastpref.data import files, formats, tokenize
from fastpref.online import evaluate_policy

SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION, GOOD, BAD = "Two and two?", [assistant("Four.")], [assistant("Five.")]
ASKED = [user(QUESTION)]
RECORDS = {  # the same question and answers
    "a text, answers as messages": {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD},
    "a text, whole conversations": {"prompt": QUESTION, "chosen": ASKED + GOOD, "rejected": ASKED + BAD},
    "messages, answers as texts": {"prompt": ASKED, "chosen": "Four.", "rejected": "Five."},
    "messages, whole conversations": {"prompt": ASKED, "chosen": ASKED + GOOD, "rejected": ASKED + BAD},
    "turns, answers as turns": {
        "prompt": [{"from": "human", "value": QUESTION}],
        "chosen": [{"from": "gpt", "value": "Four."}],
        "rejected": [{"from": "gpt", "value": "Five."}],
    },
}
WANTED = {"prompt": ASKED, "chosen": GOOD, "rejected": BAD}


@pytest.fixture(scope="module")
def policy() -> tuple[Any, Any]:
    return models.tiny([QUESTION, "Four. Five. system user assistant"])


@pytest.mark.parametrize("form", RECORDS)
def test_a_prompt_was_lost_or_asked_twice(form, policy) -> None:
    """A text prompt beside answers as messages was lost; messages beside whole conversations were asked twice."""
    record, tokenizer = RECORDS[form], policy[1]
    assert list(formats.paired(dataset(record))) == [WANTED]
    assert list(formats.prompts(dataset(record))) == [{"prompt": ASKED}]
    single = {"prompt": record["prompt"], "completion": record["chosen"], "label": True}
    assert list(formats.unpaired(dataset(single))) == [{"prompt": ASKED, "completion": GOOD, "label": True}]
    rewards = tokenize.tokenize_reward(formats.paired(dataset(record)), tokenizer, max_length=None)
    text = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\nFour.<|im_end|>\n"
    assert tokenizer.decode(rewards[0]["chosen_ids"]) == text


def test_whole_conversations_may_begin_before_the_prompt() -> None:
    talks = {"chosen": [SYSTEM, *ASKED, *GOOD], "rejected": [SYSTEM, *ASKED, *BAD]}
    for prompt in (QUESTION, ASKED):
        assert list(formats.paired(dataset({"prompt": prompt} | talks))) == [WANTED | {"prompt": [SYSTEM, *ASKED]}]
    going_on = {"prompt": [*ASKED, *GOOD], "chosen": [user("Sure?"), *GOOD], "rejected": [user("Really?"), *BAD]}
    assert list(formats.paired(dataset(going_on))) == [going_on]


@pytest.mark.parametrize("prompt", ["Another question?", [user("Another question?")]])
def test_conversations_of_another_question_are_refused(prompt) -> None:
    wrong = {"prompt": prompt, "chosen": ASKED + GOOD, "rejected": ASKED + BAD}
    right = wrong | {"prompt": QUESTION if isinstance(prompt, str) else ASKED}
    with pytest.raises(ValueError, match=r"record 2: chosen: got a conversation that begins with .*'Two and two\?'"):
        formats.paired(dataset(right, wrong))
    single = {"prompt": prompt, "completion": ASKED + GOOD, "label": True}
    with pytest.raises(ValueError, match=r"record 1: completion: got a conversation that begins with"):
        formats.unpaired(dataset(single))


TEXTS = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}


@pytest.mark.parametrize("record", [WANTED, TEXTS], ids=["messages", "texts"])
@pytest.mark.parametrize("name", ["prompt", "chosen", "rejected"])
def test_none_trained_without_a_prompt(record, name, policy) -> None:
    """A prompt of None went unnoticed into reward models."""
    records = dataset(record, record | {name: None})
    with pytest.raises(ValueError, match=rf"record 2: {name}: got None, want a text or messages"):
        formats.paired(records)
    with pytest.raises(ValueError, match=r"record 2: .*got (None|.*NoneType|.*None)"):
        tokenize.tokenize_reward(records, policy[1], max_length=None)
    with pytest.raises(ValueError, match=r"pairs, record 2: "):
        evaluate_policy(*policy, [record, record | {name: None}])
    single = {"prompt": record["prompt"], "completion": record["chosen"], "label": True}
    name = "prompt" if name == "prompt" else "completion"
    with pytest.raises(ValueError, match=rf"record 2: {name}: got None"):
        formats.unpaired(dataset(single, single | {name: None}))


def test_other_formats_without_a_prompt(policy) -> None:
    with pytest.raises(ValueError, match=r"record 2: instruction: got None, want a text"):
        formats.paired(dataset(*({"instruction": q, "chosen": "a", "rejected": "b"} for q in ("Two?", None))))
    steps = {"prompt": "Two?", "completions": ["a", "b"], "labels": [True, False]}
    for name, message in (
        ("prompt", "prompt: got NoneType, want a text"),
        ("completions", "completions: got None, want a list of texts"),
        ("labels", "labels: got None, want one for each of 2 completions"),
    ):
        with pytest.raises(ValueError, match=f"record 2: {message}"):
            tokenize.tokenize_stepwise(dataset(steps, steps | {name: None}), policy[1], max_length=None)
    with pytest.raises(ValueError, match=r"record 1: labels: got \[True, None\], want True or False"):
        tokenize.tokenize_stepwise(dataset(steps | {"labels": [True, None]}), policy[1], max_length=None)


def test_na_in_a_table_is_a_text(tmp_path) -> None:
    (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected,margin\nNA,None,null,0.5\nSay it,nan,,\n")
    first, second = files.load_records(tmp_path / "pairs.csv")
    assert first == {"prompt": "NA", "chosen": "None", "rejected": "null", "margin": 0.5}
    assert second == {"prompt": "Say it", "chosen": "nan", "rejected": None, "margin": None}
