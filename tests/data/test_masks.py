"""Which tokens of a response are scored: by the template's markers, by turns, by a mask in the data."""

from __future__ import annotations

from typing import Any

import pytest
from support_data import assistant, dataset, user

from fastpref import models
from fastpref.data import formats, tokenize
from fastpref.online import evaluate_policy

MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORGETTING = (  # the content of all but the last message is left out
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if loop.last %}{{ m['content'] }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# as Qwen3's, whose last turn has reasoning, if empty; and as Phi's, which end a conversation with EOS
THINKING_LAST = models.CHATML.replace(
    "message['content'] +",
    "('<think></think>' if loop.last and message['role'] == 'assistant' else '') + message['content'] +",
)
ENDING = models.CHATML.replace("{% endif %}", "{% else %}{{ '<|endoftext|>' }}{% endif %}")
MIXING = (  # as Gemma 4's: the tool's answer stands before what the assistant said when it called
    "{% for m in messages %}{% if m['role'] != 'tool' %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if loop.nextitem and loop.nextitem['role'] == 'tool' %}{{ loop.nextitem['content'] }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALL, SUM, WRONG = "Call add two and two.", "It is four.", "It is five."


def tool(text: str) -> dict[str, str]:
    return {"role": "tool", "content": text}


TALK = {
    "prompt": [user("Two and two?"), assistant("Wait."), user("Well?")],
    "chosen": [assistant(CALL), tool("four"), assistant(SUM), user("Sure?"), assistant("Yes.")],
    "rejected": [assistant(CALL), tool("five"), assistant(WRONG)],
}


@pytest.fixture(scope="module")
def policy() -> tuple[Any, Any]:
    texts = [m["content"] for messages in TALK.values() for m in messages] + ["system user assistant tool"]
    return models.tiny(texts * 3)


@pytest.fixture(params=["marked", "by turns"])
def tokenizer(policy, request, monkeypatch) -> Any:
    monkeypatch.setattr(policy[1], "chat_template", MARKED if request.param == "marked" else models.CHATML)
    policy[1].end = "" if request.param == "marked" else "\n"  # of what is scored of a turn
    return policy[1]


def scored(tokenizer: Any, ids: list[int], mask: list[int]) -> list[str]:
    """The runs of scored tokens, as texts."""
    assert len(ids) == len(mask)
    runs: list[list[int]] = []
    for i, (token, on) in enumerate(zip(ids, mask, strict=True)):
        if on and i and mask[i - 1]:
            runs[-1].append(token)
        elif on:
            runs.append([token])
    return [tokenizer.decode(run) for run in runs]


def turns(tokenizer: Any, *texts: str) -> list[str]:
    return [f"{text}<|im_end|>{tokenizer.end}" for text in texts]


@pytest.mark.parametrize("kind", ["paired", "reference_free"])
def test_the_assistants_tokens_of_pairs(tokenizer, kind) -> None:
    function = getattr(tokenize, f"tokenize_{kind}")
    given = formats.paired(dataset(TALK))
    (row,) = function(given, tokenizer, max_length=None, assistant_only_loss=True)
    (plain,) = function(given, tokenizer, max_length=None)
    assert {name: row[name] for name in plain} == plain and set(row) - set(plain) == {"chosen_mask", "rejected_mask"}
    wanted = {"chosen": turns(tokenizer, CALL, SUM, "Yes."), "rejected": turns(tokenizer, CALL, WRONG)}
    if kind == "reference_free":  # TRL's end it with EOS, which counts as what it follows
        wanted = {side: [*runs[:-1], runs[-1] + "<|im_end|>" * bool(tokenizer.end)] for side, runs in wanted.items()}
    for side, runs in wanted.items():
        assert scored(tokenizer, row[f"{side}_ids"], row[f"{side}_mask"]) == runs
    room = len(row["prompt_ids"]) + 3
    (cut,) = function(given, tokenizer, max_length=room, assistant_only_loss=True)
    for side in ("chosen", "rejected"):
        assert cut[f"{side}_ids"] == row[f"{side}_ids"][:3] and cut[f"{side}_mask"] == row[f"{side}_mask"][:3]


def test_mismatched_completions_keep_their_masks(tokenizer) -> None:
    found = tokenize.tokenize_unpaired(
        formats.unpaired(dataset(TALK)), tokenizer, max_length=None, block_size=2, assistant_only_loss=True
    )
    texts = [turns(tokenizer, CALL, SUM, "Yes."), turns(tokenizer, CALL, WRONG)]
    for name, wanted in (("completion", texts), ("kl_completion", texts[::-1])):
        assert [scored(tokenizer, e[f"{name}_ids"], e[f"{name}_mask"]) for e in found] == wanted


def test_evaluation_scores_the_assistants_tokens(policy, tokenizer) -> None:
    import torch

    model = policy[0].double().eval()
    ids = tokenize.tokenize_paired(dataset(TALK), tokenizer, max_length=None, assistant_only_loss=True)[0]
    found = evaluate_policy(model, tokenizer, [TALK], assistant_only_loss=True)["logps"]
    for side in ("chosen", "rejected"):
        whole = torch.tensor([ids["prompt_ids"] + ids[f"{side}_ids"]])
        logps = model(whole).logits[0, :-1].log_softmax(-1).gather(1, whole[0, 1:, None])[:, 0]
        kept = logps[len(ids["prompt_ids"]) - 1 :][torch.tensor(ids[f"{side}_mask"], dtype=torch.bool)]
        assert found[side]["sum"] == pytest.approx(float(kept.sum().detach()), rel=1e-9)
        assert found[side]["per_token"] == pytest.approx(float(kept.mean().detach()), rel=1e-9)


@pytest.mark.parametrize(
    ("template", "begin", "end"), [(THINKING_LAST, "<think></think>", ""), (ENDING, "", "<|endoftext|>")]
)
def test_turns_that_are_rendered_otherwise_when_they_are_the_last(template, begin, end, policy, monkeypatch) -> None:
    monkeypatch.setattr(policy[1], "chat_template", template)
    (row,) = tokenize.tokenize_paired(dataset(TALK), policy[1], max_length=None, assistant_only_loss=True)
    runs = [f"{text}<|im_end|>\n" for text in (CALL, SUM, "Yes.")]
    runs[-1] = begin + runs[-1] + end
    assert scored(policy[1], row["chosen_ids"], row["chosen_mask"]) == runs


@pytest.mark.parametrize("template", [FORGETTING, MIXING])
def test_templates_that_mix_messages_need_markers(template, policy, monkeypatch) -> None:
    monkeypatch.setattr(policy[1], "chat_template", template)
    with pytest.raises(ValueError, match=r"record 1: assistant_only_loss: got a chat template without .* message 4 of"):
        tokenize.tokenize_paired(dataset(TALK), policy[1], max_length=None, assistant_only_loss=True)


IDS = {"prompt_ids": [1, 2], "chosen_ids": [3, 4, 5], "rejected_ids": [6, 7]}
MASKS = {"chosen_mask": [0, 1, 1], "rejected_mask": [1, 0]}


def test_masks_in_the_data() -> None:
    for function in (tokenize.tokenize_paired, tokenize.tokenize_reference_free):
        found = function(dataset(IDS | MASKS), None, max_length=4)[0]
        assert found["chosen_ids"] == [3, 4] and found["chosen_mask"] == [0, 1]
        assert found["rejected_mask"] == [1, 0]
        # with room for one token, nothing of the chosen one is scored: the pair is left out
        with pytest.raises(ValueError, match=r"max_length: got 3, want more: 1 of 1 records"):
            function(dataset(IDS | MASKS), None, max_length=3)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (IDS | MASKS | {"chosen_mask": [1, 1]}, r"record 1: chosen_mask: got 2 values, want 0 or 1 for each of 3"),
        (IDS | MASKS | {"chosen_mask": [1, 2, 1]}, r"record 1: chosen_mask: got \[1, 2, 1\], want 0 or 1 for each of"),
        (IDS | MASKS | {"chosen_mask": None}, r"record 1: chosen_mask: got None, want 0 or 1"),
        (IDS | MASKS | {"rejected_mask": [0, 0]}, r"record 1: rejected: got no token that is scored"),
        (IDS | {"chosen_mask": [1, 1, 1]}, r"chosen_mask: got one beside .*, want .*rejected_mask: masks are of token"),
        (TALK | MASKS, r"chosen_mask: got one beside chosen, prompt, rejected, want chosen_ids, rejected_ids"),
    ],
)  # fmt: skip
def test_masks_that_are_none(record, message, policy) -> None:
    with pytest.raises(ValueError, match=message):
        tokenize.tokenize_paired(dataset(record), policy[1], max_length=None)


def test_what_has_no_turns(policy) -> None:
    for record, message in (
        (IDS, "chosen_mask: got none with assistant_only_loss"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "assistant_only_loss: got texts, want messages"),
        (TALK | {"chosen": [tool("four")]}, "chosen: got no token that is scored"),
    ):
        for kind in ("paired", "reference_free"):
            with pytest.raises(ValueError, match=f"record 1: {message}"):
                function = getattr(tokenize, f"tokenize_{kind}")
                function(dataset(record), policy[1], max_length=None, assistant_only_loss=True)
