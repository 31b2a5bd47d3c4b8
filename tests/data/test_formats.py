"""Every accepted record format becomes TRL's with an explicit prompt."""

from __future__ import annotations

from typing import Any

import pytest
from support_data import assistant, dataset, user

from fastpref.data import formats

datasets = pytest.importorskip("datasets", reason="needs `pip install 'fastpref[train]'`")


def turn(who: str, text: str) -> dict[str, str]:
    return {"from": who, "value": text}


SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = [SYSTEM, user("Two?"), assistant("Two."), user("And two?")]
PAIR = {"prompt": ASKED, "chosen": [assistant("Four.")], "rejected": [assistant("Five.")]}
TURNS = [turn("system", "Be brief."), turn("human", "Two?"), turn("gpt", "Two."), turn("human", "And two?")]
TEXTS = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
SAME_PAIR = {
    "explicit": PAIR,
    "implicit": {side: ASKED + PAIR[side] for side in ("chosen", "rejected")},
    "a question beside whole talks": {"prompt": "And two?"} | {s: ASKED + PAIR[s] for s in ("chosen", "rejected")},
    "messages and texts": {"prompt": ASKED, "chosen": "Four.", "rejected": "Five."},
    "llama-factory": {"conversations": TURNS, "chosen": turn("gpt", "Four."), "rejected": turn("gpt", "Five.")},
    "llama-factory, lists": {
        "conversations": TURNS, "chosen": [turn("gpt", "Four.")], "rejected": [turn("gpt", "Five.")],
    },
    "llama-factory, texts": {"conversations": TURNS, "chosen": "Four.", "rejected": "Five."},
    "llama-factory, system": {
        "system": "Be brief.", "conversations": TURNS[1:], "chosen": "Four.", "rejected": "Five.",
    },
    "messages": {"messages": ASKED, "chosen": assistant("Four."), "rejected": assistant("Five.")},
    "alpaca": {
        "instruction": "And", "input": "two?", "system": "Be brief.", "history": [["Two?", "Two."]],
        "chosen": "Four.", "rejected": "Five.",
    },
}  # fmt: skip


def forms(*records: dict[str, Any]) -> list[Any]:
    """The records as a data set, as a stream of it, and as a stream that does not know its columns."""
    stored = dataset(*records)
    return [stored, stored.to_iterable_dataset(), datasets.IterableDataset.from_generator(lambda: iter(records))]


@pytest.mark.parametrize("name", SAME_PAIR)
def test_pairs(name) -> None:
    wanted = PAIR | {"prompt": [SYSTEM, *ASKED[1:3], user("And\ntwo?")]} if name == "alpaca" else PAIR
    for given in forms(SAME_PAIR[name], SAME_PAIR[name]):
        assert list(formats.paired(given)) == [wanted, wanted]
    (only, _) = formats.prompts(dataset(SAME_PAIR[name], SAME_PAIR[name]))
    assert only == {"prompt": wanted["prompt"]}


def test_other_columns_pass_through() -> None:
    more = {"margin": 0.5, "tools": "[]", "chat_template_kwargs": {"enable_thinking": False}, "source": "web"}
    for name in ("explicit", "llama-factory"):
        assert list(formats.paired(dataset(SAME_PAIR[name] | more))) == [PAIR | more]
    found = list(formats.unpaired(dataset(PAIR | more)))
    assert [{k: e[k] for k in more} for e in found] == [more, more]


def test_texts_part_before_the_space_at_their_first_difference() -> None:
    def parted(chosen: str, rejected: str) -> tuple[str, ...]:
        (found,) = formats.paired(dataset({"chosen": chosen, "rejected": rejected}))
        return found["prompt"], found["chosen"], found["rejected"]

    assert parted("The sky is blue.", "The sky is green.") == ("The sky is", " blue.", " green.")
    assert parted("The sky", "The skin") == ("The sk", "y", "in")
    assert parted("same", "same") == ("sam", "e", "e")
    assert parted("same", "same, and more") == ("sam", "e", "e, and more")
    assert parted("", "more") == ("", "", "more")
    assert parted("a b ", "other") == ("", "a b ", "other")


def test_implicit_prompts_are_trls() -> None:
    trl = pytest.importorskip("trl", reason="needs `pip install 'fastpref[test]'` (TRL 1.16)")
    texts = ["The sky is blue.", "The sky is green.", "The sky", "A  b", "A  c", "same", "same, and more", "The sk y"]
    pairs = [{"chosen": a, "rejected": b} for a in texts for b in texts if a and b]
    assert list(formats.paired(dataset(*pairs))) == [trl.extract_prompt(pair) for pair in pairs]
    talks = [{"chosen": ASKED[:n], "rejected": [*ASKED[:m], user("x")]} for n in (2, 3, 4) for m in (2, 3, 4)]
    assert list(formats.paired(dataset(*talks))) == [trl.extract_prompt(talk) for talk in talks]


def test_single_responses() -> None:
    wanted = {"prompt": ASKED, "completion": [assistant("Four.")], "label": True}
    same = [
        wanted,
        {"messages": [*ASKED, assistant("Four.")], "label": True},
        {"conversations": [*TURNS, turn("gpt", "Four.")], "label": True},
    ]
    for record in same:
        for given in forms(record):
            assert list(formats.unpaired(given)) == [wanted]
        assert list(formats.prompts(dataset(record))) == [{"prompt": ASKED}]
    with pytest.raises(ValueError, match=r"record 1: messages: got a last one of role 'user', want 'assistant'"):
        formats.unpaired(dataset({"messages": ASKED, "label": True}))


def test_pairs_become_two_responses_ordered_as_trl_does() -> None:
    trl = pytest.importorskip("trl", reason="needs `pip install 'fastpref[test]'` (TRL 1.16)")
    records = dataset(*({"prompt": f"{i}", "chosen": f"{i} yes", "rejected": f"{i} no"} for i in range(1003)))
    found = formats.unpaired(records)
    assert list(found) == list(trl.unpair_preference_dataset(records))
    assert found[999] == {"prompt": "999", "completion": "999 yes", "label": True}
    assert found[1000] == {"prompt": "0", "completion": "0 no", "label": False}
    assert list(formats.unpaired(records, num_proc=2)) == list(found)
    assert list(formats.unpaired(records.to_iterable_dataset())) == list(found)


def test_prompts_of_talks_end_before_the_answer_to_come() -> None:
    for record in ({"messages": ASKED}, {"messages": [*ASKED, assistant("Four.")]}, {"conversations": TURNS}):
        assert list(formats.prompts(dataset(record))) == [{"prompt": ASKED}]
    assert list(formats.prompts(dataset({"instruction": "Two?", "output": "x"}))) == [{"prompt": [user("Two?")]}]
    assert list(formats.prompts(dataset(TEXTS))) == [{"prompt": "The sky is"}]
    assert list(formats.prompts(dataset({"prompt": "The sky is", "source": 1}))) == [{"prompt": "The sky is"}]


def test_token_ids_pass() -> None:
    ids = [1, 2]
    pair = dataset({"prompt_ids": ids, "chosen_ids": ids, "rejected_ids": ids})
    assert formats.paired(pair) is pair
    legacy = formats.paired(dataset({"chosen_input_ids": ids, "rejected_input_ids": [3], "margin": 1.0}))
    assert list(legacy) == [{"chosen_ids": ids, "rejected_ids": [3], "margin": 1.0}]
    single = dataset({"prompt_ids": ids, "completion_ids": ids, "label": True})
    assert formats.unpaired(single) is single
    steps = dataset({"input_ids": ids, "labels": ids})
    assert formats.stepwise(steps) is steps
    steps = dataset({"prompt": "a", "completions": ["b"], "labels": [True]})
    assert formats.stepwise(steps) is steps


@pytest.mark.parametrize("name", ["paired", "unpaired", "stepwise", "prompts"])
def test_columns_that_are_not_understood(name) -> None:
    some = {
        "paired": r"want one of: prompt, chosen, rejected \| chosen, rejected \| conversations, chosen, rejected",
        "unpaired": r"want one of: prompt, completion, label \| messages, label",
        "stepwise": r"want one of: prompt, completions, labels \| input_ids, labels",
        "prompts": r"want one of: prompt \| messages",
    }
    with pytest.raises(ValueError, match=rf"dataset: got columns better, text; {some[name]}"):
        getattr(formats, name)(dataset({"text": "a", "better": "b"}))
    with pytest.raises(ValueError, match=r"dataset: got no records, want at least 1"):
        getattr(formats, name)(dataset())
    with pytest.raises(TypeError, match=r"dataset: got list, want a datasets\.Dataset or IterableDataset"):
        getattr(formats, name)([TEXTS])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"conversations": [turn("robot", "a")], "chosen": "b"}, r"conversations: got a turn from .robot., want"),
        ({"conversations": [], "chosen": "b"}, r"conversations: got \[\], want a list of turns"),
        ({"conversations": ["a"], "chosen": "b"}, r"conversations: got str, want turns \{\"from\", \"value\"\}"),
        ({"conversations": TURNS, "chosen": []}, r"chosen: got no messages, want at least 1"),
        ({"conversations": TURNS, "chosen": None}, r"chosen: got NoneType, want turns"),
        ({"chosen": None}, r"chosen: got NoneType, want a text or a list of messages"),
    ],
)  # fmt: skip
def test_wrong_records_are_named(record, message) -> None:
    with pytest.raises(ValueError, match=f"dataset, record 1: {message}"):
        formats.paired(dataset(record | {"rejected": "c"}))


def test_a_copy_of_the_conversation_was_taken_for_the_prompt() -> None:
    """UltraFeedback binarized: `messages` is the chosen conversation, `prompt` the text of its question."""
    record = {"prompt": "Two?", "messages": [user("Two?"), assistant("Four.")],
              "chosen": [user("Two?"), assistant("Four.")], "rejected": [user("Two?"), assistant("Five.")]}  # fmt: skip
    wanted = {"prompt": [user("Two?")], "chosen": [assistant("Four.")], "rejected": [assistant("Five.")]}
    without = {name: value for name, value in record.items() if name != "prompt"}
    for given in (record, without):
        assert list(formats.paired(dataset(given))) == [wanted]
        assert list(formats.prompts(dataset(given))) == [{"prompt": wanted["prompt"]}]
    texts = {"prompt": "Two?", "messages": record["messages"], "chosen": "Four.", "rejected": "Five."}
    (found,) = formats.paired(dataset(texts))
    assert {name: found[name] for name in wanted} == {name: texts[name] for name in wanted}
