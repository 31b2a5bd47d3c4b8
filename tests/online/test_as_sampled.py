"""What was sampled is what is trained on, from command to command, with a template that leaves the reasoning out."""

from __future__ import annotations

import json

from support_online import PROMPTS, tiny, write_lines

from fastpref.commands import cli
from fastpref.data import files, formats, tokenize
from fastpref.data.encode import prompt_ids
from fastpref.online.records import read_records

REASONING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'].split('e')[-1] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>' }}{% endif %}"
)


def test_from_sampled_tokens_to_training(tmp_path) -> None:
    model, tokenizer = tiny()
    tokenizer.chat_template = REASONING
    for part in (model.float(), tokenizer):
        part.save_pretrained(tmp_path / "model")
    prompts = write_lines(tmp_path / "prompts.jsonl", PROMPTS[:4])
    (tmp_path / "judge.py").write_text("def judge(prompt, responses):\n    return [len(r) for r in responses]\n")
    names = {name: str(tmp_path / f"{name}.jsonl") for name in ("responses", "scores", "pairs")}
    policy = str(tmp_path / "model")
    for command in (
        ["generate", "--model", policy, "--prompts", str(prompts), "--output", names["responses"], "-k", "3",
         "--max-new-tokens", "8", "--save-ids"],
        ["score", "--responses", names["responses"], "--output", names["scores"],
         "--function", f"{tmp_path / 'judge.py'}:judge"],
        ["pairs", "--scores", names["scores"], "--output", names["pairs"]],
        ["evaluate", "--model", policy, "--data", names["pairs"], "--json", str(tmp_path / "found.json"),
         "--responses-as-written"],
    ):  # fmt: skip
        assert cli.main(command) == 0
    sampled = {tuple(ids) for record in read_records(names["responses"]) for ids in record["response_ids"]}
    records = files.load_records(names["pairs"])
    rows = tokenize.tokenize_paired(formats.paired(records), tokenizer, max_length=None, responses_as_written=True)
    assert len(rows) >= 2
    for row, record in zip(rows, records, strict=True):
        assert row["prompt_ids"] == prompt_ids(record, tokenizer)
        assert {tuple(row["chosen_ids"]), tuple(row["rejected_ids"])} <= sampled
    assert json.loads((tmp_path / "found.json").read_text())["pairs"] == len(rows)
