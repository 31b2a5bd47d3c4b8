"""One BOS and one EOS token, whoever adds them: the tokenizer, the chat template, the text."""

from __future__ import annotations

from typing import Any

import pytest
from support_data import assistant, dataset, user
from tokenizers.processors import TemplateProcessing

from fastpref import models
from fastpref.data import formats, tokenize
from fastpref.data.encode import prompt_ids
from fastpref.online import evaluate_policy, sample_responses
from fastpref.online.sequences import sequence_ids

TEXTS = ["Hello there", " world", " sun"]
ADDS = {"nothing": "$A", "bos": "<s> $A", "eos": "$A <|im_end|>", "both": "<s> $A <|im_end|>"}
BROUGHT = {"none": ("", ""), "bos": ("<s>", ""), "eos": ("", "<|im_end|>"), "both": ("<s>", "<|im_end|>\n")}


def make(adds: str) -> tuple[Any, Any]:
    model, tokenizer = models.tiny([*TEXTS, "system user assistant"] * 3)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    model.resize_token_embeddings(len(tokenizer))
    known = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "<|im_end|>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(ADDS[adds], f"{ADDS[adds]} $B", known)
    tokenizer.chat_template = "{{ bos_token }}" + models.CHATML
    return model, tokenizer


CASES = [("nothing", "none"), ("bos", "bos"), ("eos", "none"), ("eos", "both"), ("both", "eos")]


@pytest.mark.parametrize(("adds", "brought"), CASES)
def test_texts(adds, brought) -> None:
    """EOS was there twice where tokenizer and text had one, or the trainer and the tokenizer added one each; and
    `generate` sent a prompt that ended in EOS."""
    model, tokenizer = make(adds)
    begin, end = BROUGHT[brought]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    def bare(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    begun = [bos] if adds in ("bos", "both") or begin else []
    prompt, chosen, rejected = begun + bare(TEXTS[0]), [*bare(TEXTS[1]), eos], [*bare(TEXTS[2]), eos]
    if end.endswith("\n"):  # as a chat template ends texts
        chosen, rejected = chosen + bare("\n"), rejected + bare("\n")
    record = {"prompt": begin + TEXTS[0], "chosen": TEXTS[1] + end, "rejected": TEXTS[2] + end}

    def rows(kind: str, **options: Any) -> dict[str, Any]:
        given = getattr(formats, "unpaired" if kind == "unpaired" else "paired")(dataset(record))
        return getattr(tokenize, f"tokenize_{kind}")(given, tokenizer, max_length=None, **options)[0]

    for written in (False, True):
        row = rows("paired", responses_as_written=written)
        assert (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) == (prompt, chosen, rejected)
        row = rows("reward", responses_as_written=written)
        assert (row["chosen_ids"], row["rejected_ids"]) == (prompt + chosen, prompt + rejected)
        row = rows("unpaired", block_size=None, responses_as_written=written)
        assert (row["prompt_ids"], row["completion_ids"]) == (prompt, chosen)
    row = rows("reference_free")  # TRL's, which has a BOS token wherever the tokenizer knows one
    assert (row["prompt_ids"], row["chosen_ids"]) == ([bos, *bare(TEXTS[0])], chosen)
    steps = dataset({"prompt": record["prompt"], "completions": ["Hello"], "labels": [True]})
    steps = tokenize.tokenize_stepwise(steps, tokenizer, max_length=None)
    assert steps[0]["input_ids"][:3] == [bos, *bare(TEXTS[0])][:3]
    # and what is not training
    assert prompt_ids(record, tokenizer) == prompt
    assert sequence_ids(record, record["chosen"], tokenizer)[:2] == (prompt, chosen)
    seen: list[list[int]] = []
    generate = model.generate
    model.generate = lambda **given: seen.append(given["input_ids"][0].tolist()) or generate(**given)
    list(sample_responses(model, tokenizer, [record["prompt"]]))
    assert seen == [prompt]
    lengths = evaluate_policy(model, tokenizer, [record])["logps"]["chosen"]
    assert lengths["sum"] == pytest.approx(lengths["per_token"] * len(chosen))


@pytest.mark.parametrize("adds", ["nothing", "both"])
def test_messages_have_what_the_template_writes(adds) -> None:
    _, tokenizer = make(adds)
    record = {"prompt": [user(TEXTS[0])], "chosen": [assistant("world")], "rejected": [assistant("sun")]}
    text = f"<s><|im_start|>user\n{TEXTS[0]}<|im_end|>\n<|im_start|>assistant\n"
    row = tokenize.tokenize_paired(formats.paired(dataset(record)), tokenizer, max_length=None)[0]
    assert tokenizer.decode(row["prompt_ids"]) == text == tokenizer.decode(prompt_ids(record, tokenizer))
    assert tokenizer.decode(row["chosen_ids"]) == "world<|im_end|>\n"
    row = tokenize.tokenize_reward(formats.paired(dataset(record)), tokenizer, max_length=None)[0]
    assert tokenizer.decode(row["rejected_ids"]) == f"{text}sun<|im_end|>\n"


def test_a_second_eos_as_trl_adds_it_is_told(caplog) -> None:
    """After a template that ends turns in EOS and a newline, TRL's CPO and ORPO add another: their losses are kept."""
    _, tokenizer = make("nothing")
    record = {"prompt": [user(TEXTS[0])], "chosen": [assistant("world")], "rejected": [assistant("sun")]}
    row = tokenize.tokenize_reference_free(formats.paired(dataset(record)), tokenizer, max_length=None)[0]
    assert tokenizer.decode(row["chosen_ids"]) == "world<|im_end|>\n<|im_end|>"
    assert "train: 1 of 1 records (number 1) end in EOS twice" in caplog.text
    caplog.clear()
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>\n", "<|im_end|>")
    for written in (False, True):
        row = tokenize.tokenize_reference_free(
            formats.paired(dataset(record)), tokenizer, max_length=None, responses_as_written=written
        )[0]
        assert tokenizer.decode(row["chosen_ids"]) == "world<|im_end|>"
    assert not caplog.records
