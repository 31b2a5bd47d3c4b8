"""Chat templates that refuse, leave out or change what they are given."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support_data import assistant, dataset, user

from fastpref import models
from fastpref.data import formats, tokenize
from fastpref.data.template import template_options, without_none
from fastpref.online import evaluate_policy, make_pairs, sample_responses
from fastpref.online.sequences import sequences_of

NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
# as DeepSeek-R1's and Qwen3's: the header opens the reasoning, and the finished conversation has none
REASONING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'].split('</think>')[-1] }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>' }}{% endif %}"
)
WITH_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + models.CHATML
GOOD = {"prompt": [user("Two?")], "chosen": [assistant("Two.")], "rejected": [assistant("Three.")]}
KINDS = ("paired", "reward", "reference_free")


@pytest.fixture(scope="module")
def policy() -> tuple[Any, Any]:
    return models.tiny(["Two? Two. Three. Because so it is. <think></think> system user assistant"] * 3)


@pytest.fixture
def tokenizer(policy, monkeypatch) -> Any:
    def of(template: str) -> Any:
        monkeypatch.setattr(policy[1], "chat_template", template)
        return policy[1]

    return of


def tokenized(kind: str, tokenizer: Any, *records: dict[str, Any], **options: Any) -> Any:
    given = formats.unpaired(dataset(*records)) if kind == "unpaired" else formats.paired(dataset(*records))
    more = {"block_size": None} if kind == "unpaired" else {}
    return getattr(tokenize, f"tokenize_{kind}")(given, tokenizer, max_length=None, **more, **options)


@pytest.mark.parametrize("kind", [*KINDS, "unpaired"])
def test_refusals_name_the_record(kind, tokenizer) -> None:
    """They were tracebacks of Jinja without the record's number."""
    system = GOOD | {"prompt": [{"role": "system", "content": "Be brief."}, user("Two?")]}
    with pytest.raises(ValueError, match=r"record 2: messages: got system, user.* refuses: System role not supported"):
        tokenized(kind, tokenizer(NO_SYSTEM + models.CHATML), GOOD, system)
    empty = GOOD | {"chosen": [{"role": "assistant", "content": None}]}
    with pytest.raises(ValueError, match=r"record 2: messages\[1\]: got content None of role 'assistant', want a text"):
        tokenized(kind, tokenizer(models.CHATML), GOOD, empty)


def test_refusals_in_evaluation_and_scores(policy, tokenizer) -> None:
    tokenizer(NO_SYSTEM + models.CHATML)
    prompt = [{"role": "system", "content": "Be brief."}, user("Two?")]
    with pytest.raises(ValueError, match=r"pairs, record 2: messages: got system, user"):
        evaluate_policy(*policy, [GOOD, GOOD | {"prompt": prompt}])
    with pytest.raises(ValueError, match=r"prompts\[1\]: messages: got system, user"):
        list(sample_responses(*policy, [GOOD["prompt"], prompt]))
    with pytest.raises(ValueError, match=r"messages: got system, user"):
        sequences_of({"prompt": prompt, "responses": ["a"]}, policy[1])


def test_arrow_filled_tools_with_none(tokenizer) -> None:
    """The tools of one record reached the template with keys of another's, which were null."""
    tools: list[dict[str, Any]] = [
        {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"type": "int"}}}}},
        {"type": "function", "function": {"name": "now", "parameters": {"properties": {"zone": {"enum": ["a"]}}}}},
    ]
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    records = [GOOD | {"tools": [tool]} for tool in tools]
    records[0] = records[0] | {"prompt": [user("Two?"), {"role": "assistant", "tool_calls": calls}, user("And?")]}
    stored = dataset(*records)
    assert stored[0]["tools"][0]["function"]["parameters"]["properties"]["zone"] is None
    template = WITH_TOOLS.replace("message['content']", "(message['content'] or message | tojson)")
    rows = tokenized("paired", tokenizer(template), *records)
    for row, record, tool in zip(rows, records, tools, strict=True):
        text = tokenizer(template).decode(row["prompt_ids"])
        assert text.startswith(json.dumps([tool])) and "null" not in text
        assert without_none(record) == record
    given = json.dumps([{"default": None}])  # JSON has what was written in it
    assert template_options({"tools": given})["tools"] == [{"default": None}]


REASONED = {
    "prompt": [user("Two?")],
    "chosen": [assistant("Because.</think>Two.")],
    "rejected": [assistant("so it is</think>Two.")],
}


@pytest.mark.parametrize("kind", [*KINDS, "unpaired"])
def test_responses_as_they_were_written(kind, tokenizer) -> None:
    template = tokenizer(REASONING)

    def text(side: str) -> str:
        return REASONED[side][0]["content"] + "<|im_end|>"

    prompt = "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n<think>"
    row = tokenized(kind, template, REASONED, responses_as_written=True)[0]
    begin = template.decode(row.get("prompt_ids", []))
    names = ["completion"] if kind == "unpaired" else ["chosen", "rejected"]
    for name, side in zip(names, ("chosen", "rejected"), strict=False):
        assert begin + template.decode(row[f"{name}_ids"]) == prompt + text(side)
    # character by character, as it may have been sampled, and one that was cut: it has no EOS
    ids = {s: [i for char in REASONED[s][0]["content"] for i in template.encode(char)] for s in ("chosen", "rejected")}
    ids["chosen"].append(template.eos_token_id)
    sampled = {f"{side}_response_ids": tokens for side, tokens in ids.items()}
    row = tokenized(kind, template, REASONED | sampled, responses_as_written=True)[0]
    for name, side in zip(names, ("chosen", "rejected"), strict=False):
        assert row[f"{name}_ids"][-len(ids[side]) :] == ids[side]
    with pytest.raises(ValueError, match=r"record 1: .*_response_ids: got tokens of .*, want this tokenizer's"):
        others = {"chosen_response_ids": [5, 6], "rejected_response_ids": [5, 6]}
        tokenized(kind, template, REASONED | others, responses_as_written=True)


def test_odd_records_are_counted_once(tokenizer, caplog) -> None:
    template, records = tokenizer(REASONING), [GOOD, REASONED, REASONED | {"rejected": GOOD["rejected"]}] * 3
    for kind, same in (("paired", 3), ("reward", 3), ("reference_free", 3)):
        for _ in range(2):  # the second time from the cache of `datasets`, where there is one
            caplog.clear()
            tokenized(kind, template, *records)
            messages = [record.getMessage() for record in caplog.records]
            (altered,) = [m for m in messages if "leaves out or changes what the assistant wrote" in m]
            assert "in 6 of 9 records (number 2, 3, 5, 6, 8, ...)" in altered and "responses_as_written" in altered
            (alike,) = [m for m in messages if "same tokens in chosen and rejected" in m]
            assert f"{same} of 9 records (number 2, 5, 8)" in alike
    caplog.clear()
    tokenized("paired", template, *records, responses_as_written=True)
    assert not caplog.records


def test_odd_pairs_are_counted_in_evaluation(policy, tokenizer, caplog) -> None:
    tokenizer(REASONING)
    plain = evaluate_policy(*policy, [REASONED])
    assert "evaluation: the chat template leaves out or changes what the assistant wrote in 1 of 1" in caplog.text
    assert plain["ties"] == 1 and evaluate_policy(*policy, [REASONED], responses_as_written=True)["ties"] == 0


@pytest.mark.parametrize("response", [
    [assistant("a"), user("b"), assistant("c")],
    [{"role": "assistant", "content": "a", "reasoning_content": "b"}],
    [{"role": "assistant", "content": [{"type": "text", "text": "a"}]}],
])  # fmt: skip
def test_what_is_not_one_text_cannot_be_as_written(response, tokenizer) -> None:
    record = GOOD | {"chosen": response, "rejected": response}
    with pytest.raises(ValueError, match=r"record 1: chosen: got messages of .*responses_as_written, want one of the"):
        tokenize.tokenize_paired(dataset(record), tokenizer(models.CHATML), max_length=None, responses_as_written=True)


def test_pairs_pass_sampled_tokens_on() -> None:
    record = {
        "prompt": "Two?",
        "responses": ["a", "b", "c"],
        "response_ids": [[1], [2], [3]],
        "scores": [0.0, 2.0, 1.0],
    }
    (pair,), _ = make_pairs([record])
    assert (pair["chosen_response_ids"], pair["rejected_response_ids"]) == ([2], [1])
    assert "response_ids" not in pair


def test_reasoning_that_is_opened_twice_is_told(tokenizer, caplog) -> None:
    opened = GOOD | {"chosen": [assistant("<think>so</think>Two.")]}
    tokenized("paired", tokenizer(REASONING), GOOD, opened, responses_as_written=True)
    assert "in 1 of 2 records (number 2) the generation header opens the reasoning" in caplog.text
