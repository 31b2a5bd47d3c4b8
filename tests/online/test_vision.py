"""Responses to pictures, sampled, scored and evaluated: as the model's own logits and the processor have it."""

from __future__ import annotations

import json

import pytest
import torch
from support_vision import FAMILIES, one_sequence, own_logps, picture, records

from fastpref import RewardHead
from fastpref.commands.cli import main
from fastpref.data.files import load_records
from fastpref.data.sampling import Sampling, sample_responses
from fastpref.models.vision import sequence_classifier
from fastpref.online.evaluation import evaluate_policy
from fastpref.online.judges import reward_model_scorer


@pytest.fixture(scope="module")
def pair():
    return FAMILIES["qwen2_vl"]()


def test_evaluation_has_the_log_probs_of_the_models_own_logits(pair):
    model, processor = pair
    rows = records()
    found = evaluate_policy(model, processor, rows, batch_size=4)
    for side in ("chosen", "rejected"):
        own = torch.stack([own_logps(model, processor, row, side)[1].sum() for row in rows])
        assert found["logps"][side]["sum"] == pytest.approx(float(own.mean()), abs=1e-4)


def test_greedy_responses_are_those_of_transformers_one_at_a_time(pair):
    model, processor = pair
    rows = records()[1:4]
    responses = [r for (r,) in sample_responses(model, processor, rows, Sampling(1, 6, 0.0), batch_size=2)]
    for row, response in zip(rows, responses, strict=True):
        content = [*({"type": "image"} for _ in row["images"]), {"type": "text", "text": row["prompt"][0]["content"]}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        images = {"images": [row["images"]]} if row["images"] else {}
        inputs = processor(text=[text], **images, return_tensors="pt", add_special_tokens=False)
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=2)
        assert response.ids == ids[0, inputs["input_ids"].shape[1] :].tolist()


def test_rewards_are_those_of_transformers_own_forward_and_see_the_pictures(pair):
    model, processor = pair
    rows = records()[:3]
    other = [{**r, "images": [picture(40 + i) for i in range(len(r["images"]))]} for r in rows]
    config = type(model.config).from_dict({**model.config.to_dict(), "num_labels": 1})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = sequence_classifier(type(config))(config).eval()
    whole.model.load_state_dict(model.model.state_dict())
    scorer = reward_model_scorer(RewardHead(whole.model, whole.score), processor, batch_size=2)
    responses = [{**r, "responses": [r["chosen"][0]["content"]]} for r in rows]
    with torch.no_grad():
        wanted = [float(whole(**one_sequence(processor, row, "chosen")[0]).logits) for row in rows]
    assert [score for (score,) in scorer(responses)] == pytest.approx(wanted, abs=1e-5)
    changed = [
        score for (score,) in scorer([r | {"images": o["images"]} for r, o in zip(responses, other, strict=True)])
    ]
    assert all(abs(score - own) > 1e-4 for score, own in zip(changed, wanted, strict=True))


def test_paths_are_relative_to_the_data_file(tmp_path, monkeypatch):
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    picture(1).save(tmp_path / "data" / "pictures" / "one.png")
    record = {"image": "pictures/one.png", "prompt": "a", "chosen": "b", "rejected": "c"}
    (tmp_path / "data" / "pairs.jsonl").write_text(json.dumps(record) + "\n")
    monkeypatch.chdir(tmp_path)
    wanted = str(tmp_path / "data" / "pictures" / "one.png")
    assert load_records("data/pairs.jsonl")[0]["image"] == wanted


def test_commands_from_a_folder(pair, tmp_path, monkeypatch, capsys):
    model, processor = FAMILIES["llava"]()
    model.save_pretrained(tmp_path / "policy")
    processor.save_pretrained(tmp_path / "policy")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    rows = []
    for i in range(4):
        picture(i).save(tmp_path / "data" / f"{i}.png")
        rows.append({**records(4)[i], "images": [f"{i}.png"]})
    (tmp_path / "data" / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = "--max_steps 2 --per_device_train_batch_size 2 --report_to none --eval_split 0.25 --use_peft"
    argv = f"train dpo --model policy --data data/pairs.jsonl --output_dir out {options}".split()
    assert main(argv) == 0, capsys.readouterr()
    assert main(["evaluate", "--model", "out", "--data", "data/pairs.jsonl", "--json", "found.json"]) == 0, (
        capsys.readouterr()
    )
    assert json.loads((tmp_path / "found.json").read_text())["pairs"] == 4
    argv = "generate --model policy --prompts data/pairs.jsonl --output responses.jsonl -k 2 --max-new-tokens 4"
    assert main(argv.split()) == 0, capsys.readouterr()
    argv = "score --implicit --model out --reference policy --responses responses.jsonl --output scores.jsonl"
    assert main(argv.split()) == 0, capsys.readouterr()
    assert len((tmp_path / "scores.jsonl").read_text().splitlines()) == 4
