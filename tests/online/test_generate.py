"""Sampling: the right distribution, random numbers of each response's own, runs that go on as if never stopped."""

from __future__ import annotations

import copy
import inspect
import itertools
import json

import numpy as np
import pytest
import torch
from support_online import PROMPTS, PowerCut, stop_at, tiny, write_lines
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)  # fmt: skip

from fastpref.commands import cli
from fastpref.data.encode import prompt_ids
from fastpref.data.randomness import draw, keys, uniforms
from fastpref.data.sampling import _response
from fastpref.online import Sampling, generate_file, load_policy, sample_responses
from fastpref.online.prompts import read_prompts

HOW = Sampling(k=2, max_new_tokens=6, seed=3)
TEXTS = [r["prompt"] for r in PROMPTS]


@pytest.fixture(scope="module")
def policy():
    return tiny()


def texts(policy, how=HOW, **options) -> list[list[str]]:
    return [[r.text for r in row] for row in sample_responses(*policy, TEXTS, how, **options)]


def words_by_hand(seed, prompt, response, step, vocab) -> np.ndarray:
    """The same hash in NumPy's wrapping 32-bit arithmetic."""
    word = int(np.random.PCG64(np.random.SeedSequence([seed, prompt, response])).random_raw(step + 1)[step])

    def mixed(x):
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
        x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
        return x ^ (x >> np.uint32(16))

    return mixed(mixed(np.arange(vocab, dtype=np.uint32) ^ np.uint32(word >> 32)) + np.uint32(word & 0xFFFFFFFF))


def test_random_numbers_are_the_same_everywhere_and_every_responses_own() -> None:
    assert words_by_hand(0, 0, 0, 0, 3).tolist() == [1622548202, 2480345100, 1041493773]
    every = list(itertools.product(range(3), repeat=3))
    key = torch.from_numpy(np.concatenate([keys(*k, 2) for k in every]))
    found = uniforms(key, 1000)
    for row, (which, step) in enumerate(itertools.product(every, range(2))):
        wanted = (words_by_hand(*which, step, 1000).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
        assert np.array_equal(found[row].numpy(), wanted.clip(max=1 - 2.0**-24))
    assert len(set(found[:, :8].flatten().tolist())) == found[:, :8].numel()


def test_random_numbers_are_uniform_and_independent() -> None:
    """Of neighbouring tokens, steps and responses: 5 standard deviations."""
    table = np.stack([keys(0, prompt, 0, 40) for prompt in range(40)])
    u = uniforms(torch.from_numpy(table).flatten(0, 1), 500).unflatten(0, (40, 40)).double()
    assert u.min() > 0 and u.max() < 1
    counts = torch.histc(u, 64, 0, 1)
    expected = u.numel() / 64
    assert abs(float(((counts - expected) ** 2 / expected).sum()) - 63) < 5 * (2 * 63) ** 0.5
    v = (u - 0.5) * 12**0.5
    for dim in range(3):
        for lag in (1, 2, 16):
            size = v.shape[dim] - lag
            product = v.narrow(dim, 0, size) * v.narrow(dim, lag, size)
            assert abs(float(product.sum())) < 5 * product.numel() ** 0.5


def test_draws_have_the_probabilities_of_the_softmax() -> None:
    """4 standard deviations; a token that is excluded is never drawn, one that is alone always."""
    logits = torch.tensor([-torch.inf, 1.0, -2.0, -torch.inf, 0.3, -6.0])
    key = torch.from_numpy(np.concatenate([keys(1, i, 0, 100) for i in range(500)]))
    counts = torch.bincount(draw(logits.expand(len(key), -1), key)[:, 0], minlength=6)
    p = logits.softmax(-1)
    assert ((counts - len(key) * p).abs() <= 4 * (len(key) * p * (1 - p)).sqrt()).all()
    alone = torch.tensor([-torch.inf, -torch.inf, -9.0])
    assert (draw(alone.expand(len(key), -1), key) == 2).all()


def test_rounding_of_the_logits_hardly_ever_changes_a_draw() -> None:
    logits = torch.randn(400, 5000)
    key = torch.from_numpy(keys(0, 0, 0, 400))
    other = logits * (1 + 1e-6 * torch.randn_like(logits))
    assert int((draw(logits, key) != draw(other, key)).sum()) <= 1


@pytest.mark.parametrize(
    "changes", [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.3}, {"temperature": 2.0, "top_p": 0.9}]
)
def test_responses_are_those_of_a_plain_loop(policy, changes) -> None:
    """One response at a time, without padding, batches or a cache."""
    model, tokenizer = policy
    how = Sampling(**{"k": 2, "max_new_tokens": 4, "seed": 1} | changes)
    found = list(sample_responses(model, tokenizer, TEXTS[:3], how, batch_size=6))
    for index, response in itertools.product(range(3), range(2)):
        ids = prompt_ids(PROMPTS[index], tokenizer)
        length = len(ids)
        for step in range(how.max_new_tokens):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1] / how.temperature
            order = logits.argsort(descending=True)
            if how.top_k:
                logits[order[how.top_k :]] = -torch.inf
            before = logits[order].softmax(-1).cumsum(-1) - logits[order].softmax(-1)
            logits[order[before >= how.top_p]] = -torch.inf
            words = torch.from_numpy(words_by_hand(how.seed, index, response, step, len(logits)).astype(np.float64))
            gumbel = -torch.log(-torch.log1p(-(words + 0.5) / 2**32))
            ids.append(int((logits + gumbel).argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        ended = ids[-1] == tokenizer.eos_token_id
        text = tokenizer.decode(ids[length : len(ids) - ended], skip_special_tokens=True)
        assert found[index][response] == (text, len(ids) - length, ended, ids[length:])


def test_batches_do_not_change_responses(policy) -> None:
    wanted = texts(policy, batch_size=16)
    assert wanted == texts(policy, batch_size=1) == texts(policy, batch_size=3)
    assert len({text for row in wanted for text in row}) == 2 * len(TEXTS)
    assert wanted != texts(policy, Sampling(k=2, max_new_tokens=6, seed=4))
    assert [row[0] for row in wanted] == [row[0] for row in texts(policy, Sampling(k=1, max_new_tokens=6, seed=3))]


def test_a_pad_token_that_the_model_lacks(policy) -> None:
    """Added to the tokenizer alone, it was an IndexError where prompts differ in length."""
    tokenizer = copy.deepcopy(policy[1])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert texts((policy[0], tokenizer), batch_size=16) == texts(policy, batch_size=16)


SMALL = dict(
    vocab_size=400, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
MODELS = {
    "sliding window": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=8)),
    "window in every other layer": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, sliding_window=8)),
    "norms of queries": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL)),
    "learnt positions": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=16, n_layer=2, n_head=2)),
    "no positions": lambda: BloomForCausalLM(BloomConfig(vocab_size=400, hidden_size=16, n_layer=2, n_head=2)),
    "a recurrence": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=400, hidden_size=16, state_size=4, num_hidden_layers=2, pad_token_id=0)
    ),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_prompts_that_are_run_once_for_all_their_responses(policy, make) -> None:
    own = make().eval(), policy[1]
    assert texts(own, batch_size=16) == texts(own, batch_size=1)


def test_nan_is_no_response(policy) -> None:
    """In fp64 transformers' eager attention makes NaN of a padded position."""
    with pytest.raises(ValueError, match=r"model: got NaN among the logits of Gemma2ForCausalLM in torch\.float64"):
        texts((MODELS["window in every other layer"]().double().eval(), policy[1]))


def test_prompts_are_run_once_for_all_their_responses(policy, monkeypatch) -> None:
    model, sizes = policy[0], []
    forward = model.model.forward

    def counting(input_ids, **kwargs):
        sizes.append(tuple(input_ids.shape))
        return forward(input_ids=input_ids, **kwargs)

    counting.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(model.model, "forward", counting)
    found = texts(policy, batch_size=16)
    length = max(len(prompt_ids(p, policy[1])) for p in PROMPTS)
    assert sizes[:2] == [(len(PROMPTS), length - 1), (2 * len(PROMPTS), 1)]
    monkeypatch.undo()
    assert found == texts(policy, batch_size=1)


def test_any_start_gives_the_rest(policy, monkeypatch) -> None:
    monkeypatch.setattr("fastpref.data.sampling.WINDOW_BATCHES", 2)  # windows of 3 prompts
    wanted = texts(policy, batch_size=3)
    for start in range(len(TEXTS) + 1):
        assert texts(policy, batch_size=3, start=start) == wanted[start:]


def test_greedy_is_transformers_own(policy) -> None:
    model, tokenizer = policy
    found = texts(policy, Sampling(k=1, max_new_tokens=5, temperature=0))
    for prompt, (text,) in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([prompt_ids(prompt, tokenizer)])
        wanted = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=5)
        assert text == tokenizer.decode(wanted[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_response_ends_at_its_first_end(policy) -> None:
    tokenizer = policy[1]
    (end,) = tokenizer("<|im_end|>")["input_ids"]
    a, b = tokenizer("a")["input_ids"] + tokenizer("b")["input_ids"]
    assert _response([a, end, b, end], [end], tokenizer) == ("a", 2, True, [a, end])
    assert _response([a, b], [end], tokenizer) == ("ab", 2, False, [a, b])
    assert _response([end, end], [end], tokenizer) == ("", 1, True, [end])


def test_a_stopped_run_goes_on_to_the_same_file(policy, tmp_path, monkeypatch, capsys) -> None:
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    assert generate_file(*policy, PROMPTS, whole, HOW, batch_size=3) == len(PROMPTS)
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(PowerCut):
            generate_file(*policy, PROMPTS, torn, HOW, batch_size=3)
    assert torn.read_bytes() not in (b"", whole.read_bytes())
    assert generate_file(*policy, PROMPTS, torn, HOW, batch_size=3) == len(PROMPTS) - 2
    assert torn.read_bytes() == whole.read_bytes()
    assert "cut off 19 bytes" in capsys.readouterr().err
    monkeypatch.setattr(policy[0], "generate", lambda *_, **__: pytest.fail("sampled again"))
    assert generate_file(*policy, PROMPTS, torn, HOW, batch_size=3) == 0


def test_records_keep_what_they_had(policy, tmp_path) -> None:
    generate_file(*policy, PROMPTS[:2], tmp_path / "out.jsonl", HOW)
    for i, line in enumerate((tmp_path / "out.jsonl").read_text().splitlines()):
        record = json.loads(line)
        assert {k: record[k] for k in ("prompt", "source", "index")} == {**PROMPTS[i], "index": i}
        assert [len(record[k]) for k in ("responses", "response_tokens", "finished")] == [2, 2, 2]


def test_another_run_is_refused(policy, tmp_path) -> None:
    out = tmp_path / "out.jsonl"
    generate_file(*policy, PROMPTS[:2], out, HOW)
    other = tiny(seed=1)
    changed = [PROMPTS[0], {**PROMPTS[1], "source": "other"}]
    for arguments, name in (
        ((*policy, PROMPTS[:2], out, Sampling(k=2, max_new_tokens=6, seed=4)), "seed 4, want seed 3"),
        ((*other, PROMPTS[:2], out, HOW), "model '[0-9a-f]{32}', want model '[0-9a-f]{32}'"),
        ((*policy, changed, out, HOW), "prompts '[0-9a-f]{32}', want prompts '[0-9a-f]{32}'"),
    ):
        with pytest.raises(ValueError, match=f"got {name} as it was begun with"):
            generate_file(*arguments)
    assert generate_file(*policy, changed, out, HOW, overwrite=True) == 2


def test_responses_with_other_ends_were_taken_for_these(policy, tmp_path, monkeypatch) -> None:
    generate_file(*policy, PROMPTS[:2], tmp_path / "out.jsonl", HOW)
    monkeypatch.setattr(policy[0].generation_config, "eos_token_id", [5, 6])
    with pytest.raises(ValueError, match=r"end_tokens \[.*5, 6"):
        generate_file(*policy, PROMPTS[:2], tmp_path / "out.jsonl", HOW)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"k": 0}, "k: got 0, want an integer, at least 1"),
        ({"temperature": 0}, "k: got 4 with temperature 0, want 1: greedy responses are all the same"),
        ({"temperature": -1.0}, "temperature: got -1.0, want a number in [0, inf)"),
        ({"top_p": 1.5}, "top_p: got 1.5, want a number in [0, 1]"),
        ({"seed": -1}, "seed: got -1, want an integer, at least 0"),
    ],
)
def test_settings_that_make_no_sense(changes, message) -> None:
    with pytest.raises(ValueError) as caught:
        Sampling(**changes)
    assert str(caught.value) == message


def test_the_command(policy, tmp_path, capsys) -> None:
    for part in policy:
        part.save_pretrained(tmp_path / "model")
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "Name a colour."}, *PROMPTS[1:3]])
    command = ["generate", "--model", str(tmp_path / "model"), "--prompts", str(prompts)]
    command += ["--output", str(tmp_path / "out.jsonl"), "-k", "2", "--max-new-tokens", "4", "--chat"]
    assert cli.main(command) == 0
    assert "3 prompts done now, 3 in all, 2 responses each" in capsys.readouterr().out
    first = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert first["prompt"] == [{"role": "user", "content": "Name a colour."}]
    assert cli.main(command) == 0 and "0 prompts done now" in capsys.readouterr().out
    assert cli.main([*command[:-1], "--seed", "1"]) == 2
    assert "fastpref generate: " in capsys.readouterr().err
    write_lines(prompts, [{"prompt": 3}])
    assert cli.main(command) == 2
    assert "record 1: got a prompt of int, want text or a list of messages" in capsys.readouterr().err


FORMATS = {
    "a list of objects": ("a.json", [{"prompt": "Hi", "source": "x"}], [{"prompt": "Hi", "source": "x"}]),
    "pairs with a copied question": (
        "a.jsonl",
        [{"prompt": "Q", "chosen": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "1"}],
          "rejected": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "2"}]}],
        [{"prompt": [{"role": "user", "content": "Q"}]}],
    ),
    "LLaMA-Factory": (
        "a.json",
        [{"conversations": [{"from": "human", "value": "Q"}], "chosen": {"from": "gpt", "value": "1"},
          "rejected": {"from": "gpt", "value": "2"}, "id": 7}],
        [{"prompt": [{"role": "user", "content": "Q"}], "id": 7}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name, content, wanted", FORMATS.values(), ids=FORMATS)
def test_prompts_of_other_formats(name, content, wanted, tmp_path) -> None:
    pytest.importorskip("datasets")
    path = tmp_path / name
    lines = json.dumps(content) if path.suffix == ".json" else "\n".join(map(json.dumps, content))
    path.write_text(lines, encoding="utf-8")
    assert read_prompts(path) == wanted


def test_templates_get_a_records_own_options(policy) -> None:
    tokenizer = copy.deepcopy(policy[1])
    tokenizer.chat_template += "{% if thinking %}<think>{% endif %}"
    record = {**PROMPTS[0], "chat_template_kwargs": {"thinking": True}}
    assert tokenizer.decode(prompt_ids(record, tokenizer)).endswith("assistant\n<think>")


def test_adapters(policy, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    base, tokenizer = tiny()
    base.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    )
    for part in (adapted, tokenizer):
        part.save_pretrained(tmp_path / "adapter")
    loaded = load_policy(tmp_path / "adapter")[0].double()
    assert texts((loaded, tokenizer)) == texts((adapted.merge_and_unload().double(), tokenizer)) != texts(policy)


def test_prompts_were_encoded_once_for_the_file_and_once_more_for_the_sampling(policy, tmp_path, monkeypatch) -> None:
    calls = []
    monkeypatch.setattr("fastpref.data.sampling.prompt_ids", lambda *given: calls.append(given) or prompt_ids(*given))
    generate_file(*policy, PROMPTS[:2], tmp_path / "out.jsonl", Sampling(k=1, max_new_tokens=2))
    assert len(calls) == 2
