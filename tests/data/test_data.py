"""Pairs read from JSON lines, tokenized, cut, shifted and padded."""

from __future__ import annotations

import json

import pytest
import torch

from fastpref import linear_token_logprobs, models
from fastpref.data.collate import collate_pairs, tokenize_pair, tokenize_pairs
from fastpref.data.pairs import Pair, read_pairs, sample_pairs


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SHORT = Pair([user("Name a colour.")], [assistant("Red.")], [assistant("A colour is what light does, so: several.")])
TURNS = Pair(
    [{"role": "system", "content": "Be brief."}, user("Two and two?"), assistant("Four."), user("And two more?")],
    [assistant("Six.")],
    [assistant("Seven, I think.")],
)
GOOD_LINE = json.dumps(TURNS._asdict())


@pytest.fixture(scope="module")
def tiny():
    return models.tiny(["Name a colour. Two and two? Four. And two more?"])


def test_token_logprobs_are_those_of_the_models_own_logits(tiny) -> None:
    """Padding, the shift and the mask together: each sequence alone, through the model's own head, says the same."""
    model, tokenizer = tiny
    model = model.double()
    pairs = [tokenize_pair(pair, tokenizer) for pair in (SHORT, TURNS)]
    batch = collate_pairs(pairs, tokenizer.pad_token_id)
    with torch.no_grad():
        hidden = models.hidden_states(model, batch.input_ids, batch.attention_mask)
        found = linear_token_logprobs(hidden, model.lm_head.weight, batch.labels)
        sequences = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
        for row, (prompt, completion) in enumerate(sequences):
            ids = torch.tensor([prompt + completion])
            logps = model(input_ids=ids).logits[0].log_softmax(-1)
            first = len(prompt)
            wanted = logps[first - 1 : -1].gather(-1, ids[0, first:, None])[:, 0]
            assert wanted.numel() == len(completion) > 0
            torch.testing.assert_close(found[row, first - 1 : ids.numel() - 1], wanted, rtol=1e-9, atol=1e-9)
            others = torch.ones(found.shape[1], dtype=torch.bool)
            others[first - 1 : ids.numel() - 1] = False
            assert (found[row, others] == 0).all()
    model.float()


def test_only_the_last_turn_is_scored_with_what_closes_it(tiny) -> None:
    _, tokenizer = tiny
    pair = tokenize_pair(TURNS, tokenizer)
    assert tokenizer.decode(pair.chosen) == "Six.<|im_end|>\n"
    assert tokenizer.decode(pair.rejected) == "Seven, I think.<|im_end|>\n"
    assert tokenizer.decode(pair.prompt) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nTwo and two?<|im_end|>\n"
        "<|im_start|>assistant\nFour.<|im_end|>\n<|im_start|>user\nAnd two more?<|im_end|>\n<|im_start|>assistant\n"
    )
    batch = collate_pairs([pair], tokenizer.pad_token_id)
    for row, completion in enumerate((pair.chosen, pair.rejected)):
        scored = batch.labels[row] != -100
        assert batch.labels[row, scored].tolist() == completion
        assert int(scored.nonzero()[0]) == len(pair.prompt) - 1  # the prompt's last token scores the first


def test_prompt_ends_where_the_generation_header_leaves_the_sequence(tiny, monkeypatch) -> None:
    _, tokenizer = tiny
    header = "{{ '<|im_start|>assistant\n' }}"
    template = tokenizer.chat_template.replace(header, "{{ '<|im_start|>assistant\n<think>' }}")
    assert template != tokenizer.chat_template
    monkeypatch.setattr(tokenizer, "chat_template", template)
    pair = tokenize_pair(SHORT, tokenizer)
    assert tokenizer.decode(pair.prompt).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(pair.chosen) == "Red.<|im_end|>\n"


def test_sequences_are_cut_and_long_prompts_left_out(tiny) -> None:
    _, tokenizer = tiny
    short, turns = (tokenize_pair(pair, tokenizer) for pair in (SHORT, TURNS))
    room = len(short.prompt) + len(short.chosen) + 2
    assert len(short.prompt) < room < len(turns.prompt) and len(short.rejected) > len(short.chosen) + 2
    (kept,) = tokenize_pairs([SHORT, TURNS], tokenizer, room)
    assert kept.prompt == short.prompt and kept.chosen == short.chosen
    assert kept.rejected == short.rejected[: len(short.chosen) + 2]
    assert collate_pairs([kept], 0).input_ids.shape == (2, room)
    edge = len(short.prompt)
    assert len(tokenize_pairs([SHORT], tokenizer, edge + 1)[0].chosen) == 1
    with pytest.raises(ValueError, match=f"^max_length: got {edge}, want more: the prompt alone is that long in each"):
        tokenize_pairs([SHORT], tokenizer, edge)


def record(**changes: object) -> str:
    return json.dumps(TURNS._asdict() | changes)


WANTED = 'want a list of messages {"role": "...", "content": "..."}'
BAD_LINES = {
    "not JSON": ('{"prompt": [', "not JSON: Expecting value at column 13"),
    "not an object": ("[1]", "got list, want an object with prompt, chosen, rejected"),
    "fields missing": (
        json.dumps({"prompt": TURNS.prompt}),
        "got no chosen, rejected, want an object with prompt, chosen, rejected",
    ),
    "a string": (record(chosen="Six."), f"chosen: got str, {WANTED}"),
    "no messages": (record(prompt=[]), "prompt: got no messages, want at least 1"),
    "message a string": (record(rejected=["no"]), f"rejected[0]: got str, {WANTED}"),
    "no content": (record(prompt=[{"role": "user"}]), "prompt[0]: got NoneType as 'content', want a string"),
    "role a number": (record(prompt=[{"role": 1, "content": ""}]), "prompt[0]: got int as 'role', want a string"),
    "user answers": (record(chosen=[user("Six.")]), "chosen[0]: got role 'user', want 'assistant'"),
    "no difference": (
        record(rejected=TURNS.chosen),
        "rejected: got the same messages as chosen, want two different responses",
    ),
}


@pytest.mark.parametrize("line, message", BAD_LINES.values(), ids=BAD_LINES)
def test_bad_lines_are_named(tmp_path, line, message) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{GOOD_LINE}\n\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        read_pairs(path)
    assert str(caught.value) == f"{path}, line 3: {message}"


def test_files_without_enough_pairs(tmp_path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n")
    with pytest.raises(ValueError, match="got no pairs, want at least 1"):
        read_pairs(path)
    path.write_text(GOOD_LINE + "\n")
    assert read_pairs(path) == [TURNS]


def test_sample_is_large_enough_and_does_not_overlap() -> None:
    train, heldout = sample_pairs()
    assert len(train) >= 96 and len(heldout) >= 32
    prompts = [json.dumps(pair.prompt) for pair in train + heldout]
    assert len(set(prompts)) == len(prompts)
    questions = [{pair.prompt[-1]["content"].strip().lower() for pair in part} for part in (train, heldout)]
    assert not questions[0] & questions[1]
    responses = [{m["content"] for p in part for m in p.chosen + p.rejected} for part in (train, heldout)]
    assert not responses[0] & responses[1]
    assert sum(len(pair.prompt) > 1 for pair in train) >= 10 and any(len(pair.prompt) > 1 for pair in heldout)
    assert all(pair.prompt[-1]["role"] == "user" for pair in train + heldout)
