"""Evaluation of policies and reward models against the models' own logits, pair by pair; the loop of commands."""

from __future__ import annotations

import json
import math

import pytest
import torch
from support_online import PROMPTS, tiny, write_lines

from fastpref import RewardHead
from fastpref.commands import cli
from fastpref.online import evaluate_policy, evaluate_reward_model, statistics
from fastpref.online.prompts import load_pairs

ANSWERS = ("Red.", "Four, I think.", "Because it turns.", "So?", "They are old, some of them, and tall.", "Blue.")


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


PAIRS = [
    {"prompt": PROMPTS[i]["prompt"], "chosen": answer(ANSWERS[i]), "rejected": answer(ANSWERS[i - 1])} for i in range(6)
]
LENGTHS = [len(ANSWERS[i]) - len(ANSWERS[i - 1]) for i in range(6)]


@pytest.fixture(scope="module")
def policy():
    return tiny()


@pytest.fixture(scope="module")
def reference():
    return tiny(seed=5)[0]


def token_ids(tokenizer, prompt, response) -> tuple[list[int], list[int]]:
    """(prompt, response) by the template alone."""
    head = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template(prompt + response, return_dict=True)["input_ids"]
    assert whole[: len(head)] == head
    return head, whole[len(head) :]


def whole(tokenizer, prompt, response) -> list[int]:
    head, tail = token_ids(tokenizer, prompt, response)
    return head + tail


@torch.no_grad()
def by_hand(model, reference, tokenizer, prompt, response) -> dict[str, float]:
    head, tail = token_ids(tokenizer, prompt, response)
    ids = torch.tensor([head + tail])
    p, q = (m(ids).logits[0, len(head) - 1 : -1].log_softmax(-1) for m in (model, reference))
    own, other = (x.gather(-1, torch.tensor(tail)[:, None])[:, 0] for x in (p, q))
    x = own - other
    return {
        "tokens": len(tail), "logp": float(own.sum()), "ref": float(other.sum()),
        "exact": float((p.exp() * (p - q)).sum()), "k1": float(x.sum()), "k3": float((torch.exp(-x) - 1 + x).sum()),
    }  # fmt: skip


def test_policy_against_its_own_logits(policy, reference) -> None:
    model, tokenizer = policy
    found = evaluate_policy(model, tokenizer, PAIRS, reference=reference, beta=0.7, batch_size=5)
    sides = {
        side: [by_hand(model, reference, tokenizer, p["prompt"], p[side]) for p in PAIRS]
        for side in ("chosen", "rejected")
    }
    margins = [
        0.7 * (c["logp"] - c["ref"] - r["logp"] + r["ref"])
        for c, r in zip(sides["chosen"], sides["rejected"], strict=True)
    ]
    assert found["margins"]["mean"] == pytest.approx(statistics.mean(margins), rel=1e-9)
    assert found["margins"]["quantiles"] == pytest.approx(statistics.quantiles(margins), rel=1e-9)
    assert 0 < found["accuracy"]["share"] == sum(m > 0 for m in margins) / 6 < 1
    assert found["calibration"]["log_loss"] == pytest.approx(
        sum(-math.log(1 / (1 + math.exp(-m))) for m in margins) / 6
    )
    wanted = statistics.length_bias(margins, LENGTHS)
    assert found["length_bias"]["correlation"] == pytest.approx(wanted.pop("correlation"), rel=1e-9)
    assert {k: v for k, v in found["length_bias"].items() if k != "correlation"} == wanted
    for side, values in sides.items():
        tokens = sum(v["tokens"] for v in values)
        assert found["logps"][side]["sum"] == pytest.approx(sum(v["logp"] for v in values) / 6, rel=1e-9)
        assert found["logps"][side]["per_token"] == pytest.approx(sum(v["logp"] / v["tokens"] for v in values) / 6)
        for name in ("exact", "k1", "k3"):
            total = sum(v[name] for v in values)
            assert found["kl"][side][name]["per_token"] == pytest.approx(total / tokens, rel=1e-8)
            assert found["kl"][side][name]["per_sequence"] == pytest.approx(total / 6, rel=1e-8)
    ahead = sum(c["logp"] > r["logp"] for c, r in zip(sides["chosen"], sides["rejected"], strict=True))
    assert found["prefers_chosen"]["sum"]["share"] == ahead / 6
    assert json.loads(json.dumps(found, allow_nan=False)) == json.loads(json.dumps(found))


def test_policy_without_a_reference(policy) -> None:
    model, tokenizer = policy
    found = evaluate_policy(model, tokenizer, PAIRS, beta=1.0)
    margins = []
    for p in PAIRS:
        chosen, rejected = (
            by_hand(model, model, tokenizer, p["prompt"], r)["logp"] for r in (p["chosen"], p["rejected"])
        )
        margins.append(chosen - rejected)
    assert found["margins"]["mean"] == pytest.approx(statistics.mean(margins), rel=1e-9) and found["kl"] is None
    assert found["accuracy"] == found["prefers_chosen"]["sum"]


def test_the_reference_itself_is_a_tie(policy) -> None:
    found = evaluate_policy(*policy, PAIRS, reference=policy[0])
    assert (found["accuracy"]["share"], found["ties"]) == (0, 6)
    assert found["calibration"]["ece"] == 0 and found["calibration"]["brier"] == 0.25
    assert all(abs(k["per_token"]) < 1e-12 for side in found["kl"].values() for k in side.values())


def test_pairs_without_room_are_left_out_and_counted(policy) -> None:
    model, tokenizer = policy
    sizes = [len(token_ids(tokenizer, p["prompt"], p["chosen"])[0]) for p in PAIRS]
    limit = sorted(sizes)[3]
    found = evaluate_policy(model, tokenizer, PAIRS, max_length=limit)
    assert found["pairs"] == sum(size < limit for size in sizes) == 6 - found["left_out"]
    with pytest.raises(ValueError, match="max_length: got 3, want more: none of 6 pairs has room"):
        evaluate_policy(model, tokenizer, PAIRS, max_length=3)


def test_a_reference_of_another_vocabulary_is_refused(policy) -> None:
    other = tiny()[0]
    other.resize_token_embeddings(500)
    with pytest.raises(ValueError, match="reference: got a vocabulary of 500 and"):
        evaluate_policy(*policy, PAIRS, reference=other)


def test_reward_model_against_its_own_scores(policy) -> None:
    tokenizer = policy[1]
    torch.manual_seed(3)
    model = RewardHead.from_causal_lm(tiny(seed=5)[0]).eval()

    def score(p, response) -> float:
        ids = torch.tensor([whole(tokenizer, p["prompt"], response)])
        with torch.no_grad():
            return float(model(ids))

    margins = [score(p, p["chosen"]) - score(p, p["rejected"]) for p in PAIRS]
    found = evaluate_reward_model(model, tokenizer, PAIRS, batch_size=5)
    assert found["margins"]["mean"] == pytest.approx(statistics.mean(margins), rel=1e-9)
    assert found["accuracy"]["share"] == sum(m > 0 for m in margins) / 6
    assert found["calibration"]["brier"] == pytest.approx(statistics.calibration(margins)["brier"])
    longest = max(len(whole(tokenizer, p["prompt"], r)) for p in PAIRS for r in (p["chosen"], p["rejected"]))
    assert evaluate_reward_model(model, tokenizer, PAIRS, max_length=longest)["left_out"] == 0
    assert evaluate_reward_model(model, tokenizer, PAIRS, max_length=longest - 1)["left_out"] >= 1


def test_the_loop_of_commands(policy, reference, tmp_path, capsys) -> None:
    """What the README shows, but for training."""
    model, tokenizer = policy
    for name, part in (("model", model), ("reference", reference)):
        part.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    RewardHead.from_causal_lm(tiny(seed=5)[0]).save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    write_lines(tmp_path / "prompts.jsonl", PROMPTS)

    def fastpref(command: str) -> str:
        words = [str(tmp_path / w[1:]) if w.startswith("@") else w for w in command.split()]
        assert cli.main(words) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    fastpref("generate --model @model --prompts @prompts.jsonl --output @responses.jsonl -k 3 --max-new-tokens 8")
    fastpref("score --responses @responses.jsonl --output @a.jsonl --reward-model @reward --name learnt")
    fastpref("score --responses @a.jsonl --output @b.jsonl --function examples/concise_judge.py:score --name concise")
    fastpref("pairs --scores @b.jsonl --output @pairs.jsonl --how all --combine rank --min-agreement 0.5")
    printed = fastpref(
        "evaluate --model @model --reference @reference --data @pairs.jsonl --json @e.json --plot @e.png"
    )
    assert "KL per token at chosen" in printed and "calibration of sigmoid(margin)" in printed
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["pairs"] == len((tmp_path / "pairs.jsonl").read_text().splitlines()) > 0
    assert (tmp_path / "e.png").read_bytes().startswith(b"\x89PNG")
    assert "accuracy" in fastpref("evaluate --reward-model @reward --data @pairs.jsonl")
    command = ["evaluate", "--reward-model", "x", "--reference", "y", "--data", "z"]
    assert cli.main(command) == 2 and "--reference: got one with a reward model" in capsys.readouterr().err


def test_pairs_of_text_and_of_other_formats(policy, tmp_path) -> None:
    model, tokenizer = policy
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([{"chosen": "Two and two? Four.", "rejected": "Two and two? Five, I think."}]))
    (pair,) = load_pairs(str(path))
    found = evaluate_policy(model, tokenizer, [pair], beta=1.0)
    head, end = tokenizer("Two and two?")["input_ids"], tokenizer("<|im_end|>")["input_ids"]
    wanted = []
    for text in (" Four.", " Five, I think."):
        ids = torch.tensor([head + tokenizer(text)["input_ids"] + end])
        with torch.no_grad():
            logps = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
        wanted.append(float(logps[len(head) - 1 :].sum()))
    assert found["margins"]["mean"] == pytest.approx(wanted[0] - wanted[1], rel=1e-9)
    path.write_text(json.dumps([{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}]))
    with pytest.raises(ValueError, match="got token ids, want texts or messages"):
        load_pairs(str(path))
