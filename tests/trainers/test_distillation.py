"""Distillation: full logits' loss and gradients, the host's numbers, samples, the cache, two ranks, resuming."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from datasets import Dataset
from support_trainers import config, furthest, pairs, tiny, train, weights
from torch.profiler import ProfilerActivity, profile

from fastpref import reference
from fastpref.commands import cli
from fastpref.plans import head as plans_head
from fastpref.trainers import DistillationConfig, DistillationTrainer


def completions(number: int = 16) -> Dataset:
    return pairs(number).rename_columns({"chosen": "completion"}).remove_columns("rejected")


def another(seed: int = 1) -> Any:
    """A teacher: the same tokenizer, other weights."""
    return tiny(seed)[0]


def trainer_of(tmp_path, model=None, dataset=None, teacher=None, peft_config=None, **options) -> DistillationTrainer:
    """By default off-policy, a tiny student of another tiny teacher."""
    own, tokenizer = tiny()
    torch.manual_seed(0)  # of new adapters
    given = own if model is None else model, another() if teacher is None else teacher
    args = config(DistillationConfig, tmp_path, **({"lmbda": 0.0} | options))
    dataset = completions() if dataset is None else dataset
    return DistillationTrainer(*given, args, dataset, processing_class=tokenizer, peft_config=peft_config)


def by_hand(student: Any, teacher: Any, examples: list[dict[str, Any]], divergence: tuple[str, float], temperature=1.0):
    """The loss of sequences one at a time, from full logits."""
    total, count = 0.0, 0
    for example in examples:
        prompt, ids = example["prompt_ids"], example["prompt_ids"] + example["completion_ids"]
        inputs = torch.tensor([ids])
        logits, teachers = (m(inputs).logits[0, len(prompt) - 1 : -1] for m in (student, teacher))
        size = min(logits.shape[1], teachers.shape[1])
        kl = reference.token_kl(
            logits[:, :size], teachers[:, :size], divergence[0], beta=divergence[1], temperature=temperature
        )
        total, count = total + kl.sum(), count + len(kl)
    return total / count


DIVERGENCES = {1.0: ("reverse", 1.0), 0.0: ("forward", 0.0), 0.3: ("jsd", 0.3)}


@pytest.mark.parametrize("beta, layout", [(1.0, "auto"), (0.0, "padded"), (0.3, "packed")])
def test_loss_and_gradients_are_those_of_full_logits(tmp_path, beta, layout):
    teacher = another()
    trainer = trainer_of(tmp_path, teacher=teacher, beta=beta, layout=layout, temperature=0.8)
    trainer.model.double(), teacher.double()
    examples = list(trainer.train_dataset.select(range(4)))
    inputs = trainer.data_collator(examples)
    inputs.pop("kept")
    trainer.compute_loss(trainer.model, inputs).backward()
    got = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    student = copy.deepcopy(trainer.model)
    student.zero_grad()
    loss = by_hand(student, teacher, examples, DIVERGENCES[beta], 0.8)
    loss.backward()
    inputs = trainer.data_collator(examples)
    torch.testing.assert_close(trainer.compute_loss(trainer.model, inputs), loss, rtol=1e-9, atol=0)
    want = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-6, atol=1e-9, msg=name)


def test_the_loss_is_that_of_trl_on_the_same_tokens(tmp_path):
    gkd = pytest.importorskip("trl.experimental.gkd").GKDTrainer
    teacher = another()
    for beta in DIVERGENCES:
        trainer = trainer_of(tmp_path, teacher=teacher, beta=beta, layout="padded")
        trainer.model.double(), teacher.double()
        inputs = trainer.data_collator(list(trainer.train_dataset.select(range(3))))
        (part,) = inputs["parts"]
        given = {name: part[name] for name in ("input_ids", "attention_mask")}
        labels = torch.full(part["input_ids"].shape, -100)
        labels.view(-1)[part["rows"] + 1] = part["labels"]
        with torch.no_grad():
            logits, teachers = (m(**given).logits[:, :-1] for m in (trainer.model, teacher))
            want = gkd.generalized_jsd_loss(logits, teachers, labels[:, 1:], beta=beta)
            got = trainer.compute_loss(trainer.model, inputs)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=0)


def test_a_student_moves_towards_its_teacher_in_the_default_precision_and_goes_on(tmp_path):
    """bf16 and gradient checkpointing, half of the batches on-policy, 5 records to batches of 2; then once more."""
    trainer = trainer_of(
        tmp_path, dataset=completions(5), lmbda=0.5, bf16=True, gradient_checkpointing=True, beta=0.5, max_steps=-1,
        num_train_epochs=4, per_device_train_batch_size=2, max_completion_length=8, learning_rate=3e-3,
    )  # fmt: skip
    before = trainer.evaluate(completions(5))["eval_loss"]
    first = train(trainer)
    between = trainer.evaluate(completions(5))["eval_loss"]
    train(trainer)
    after = trainer.evaluate(completions(5))["eval_loss"]
    assert len(first) == 12 and after < between < before
    sampled = [entry for entry in first if "completions/mean_length" in entry]
    assert 0 < len(sampled) < 12
    assert {"entropy", "mean_token_accuracy", "logps/student", "logps/teacher", "num_tokens"} <= first[0].keys()
    assert all(0 < entry["completions/mean_length"] <= 8 for entry in sampled)


def test_prompts_alone_are_answered_by_the_student(tmp_path):
    prompts = completions(6).select_columns(["prompt"])
    with pytest.raises(ValueError, match=r"lmbda: got 0\.0 with prompts alone, want 1\.0"):
        trainer_of(tmp_path, dataset=prompts)
    trainer = trainer_of(tmp_path, dataset=prompts, lmbda=1.0, num_generations=2, max_completion_length=5)
    seen = []
    trainer.data_collator, collate = lambda examples: seen.append(examples) or collate(examples), trainer.data_collator
    train(trainer, resume_from_checkpoint=None)
    answered = [batch for batch in seen if batch[0]["completion_ids"]]
    assert [len(batch) for batch in answered] == [8, 4, 8]
    for one, other in zip(answered[0][::2], answered[0][1::2], strict=True):
        assert one["prompt_ids"] == other["prompt_ids"] and one["completion_ids"] != other["completion_ids"]
    once = trainer.evaluate(prompts)
    assert once["eval_loss"] == trainer.evaluate(prompts)["eval_loss"]  # the same draws in every evaluation


@pytest.mark.parametrize("lora, products", [(False, 4), (True, 3)])
def test_products_with_the_heads_and_no_logits_in_memory(tmp_path, monkeypatch, lora, products):
    """4 products, 3 with a frozen head. Then nothing is as large as the logits; else K alone is, where it fits."""
    peft = pytest.importorskip("peft")
    adapters = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False) if lora else None
    trainer = trainer_of(tmp_path, peft_config=adapters, beta=0.5, statistics="never")
    inputs = trainer.data_collator(list(trainer.train_dataset.select(range(8))))
    (part,) = inputs["parts"]
    head, rows = trainer.head(), sum(part["sizes"])
    trainer.before_part(trainer.model, part)
    hidden = trainer.scored(part)[0].detach().requires_grad_()
    monkeypatch.setattr(trainer, "scored", lambda part: (hidden, None))
    monkeypatch.setattr(plans_head, "MIB", 1 << 11)  # a tile is 40 of about 1,000 rows
    with profile(activities=[ProfilerActivity.CPU], with_flops=True, profile_memory=True) as run:
        trainer.part_loss(part, trainer._items([inputs])).backward()
    flops = sum(e.flops for e in run.events() if e.name in ("aten::mm", "aten::addmm"))
    assert flops == products * 2 * rows * head.weight.numel()
    logits = rows * head.weight.shape[0] * head.weight.element_size()
    allocations = sorted(e.self_cpu_memory_usage for e in run.events())
    assert allocations[-1] < logits / 2 if lora else (logits <= allocations[-1] and allocations[-2] < logits / 2)


def test_cached_hidden_states_give_the_same_training(tmp_path, capsys):
    options = {"beta": 0.5, "statistics": "never", "bf16": True, "max_steps": 4}
    online = trainer_of(tmp_path, **options)
    want = [entry["loss"] for entry in train(online)]
    options |= {"cache_teacher": True, "teacher_cache": str(tmp_path / "cache")}
    first = trainer_of(tmp_path, **options)
    said = capsys.readouterr().out
    assert "hidden states of the train data" in said and "bfloat16" in said and "MiB" in said
    assert first.teacher_model is None  # its head alone is kept
    assert [entry["loss"] for entry in train(first)] == want
    assert furthest(weights(online), weights(first)) == 0
    second = trainer_of(tmp_path, teacher=_that_never_scores(another()), **options)
    assert [entry["loss"] for entry in train(second)] == want
    (shard,) = (tmp_path / "cache").glob("*/*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-3] + b"abc")
    with pytest.warns(UserWarning, match="damaged"):
        third = trainer_of(tmp_path, **options)
    assert [entry["loss"] for entry in train(third)] == want
    other = trainer_of(tmp_path, teacher=another(2), **options)
    assert len(list((tmp_path / "cache").iterdir())) == 2 and train(other)[0]["loss"] != want[0]


def _that_never_scores(model: Any) -> Any:
    """The model, which raises if it runs over a record: trying it out takes shorter sequences."""

    def refuse(module, args, kwargs):
        if kwargs["input_ids"].numel() > 100:
            raise AssertionError("the teacher ran")

    model.base_model.register_forward_pre_hook(refuse, with_kwargs=True)
    return model


def test_a_resumed_run_is_the_run(tmp_path):
    options = {"lmbda": 0.5, "max_completion_length": 6, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trainer_of(tmp_path / "a", **options)
    train(whole)
    again = trainer_of(tmp_path / "b", **options)
    train(again, resume_from_checkpoint=str(tmp_path / "a" / "out" / "checkpoint-2"))
    assert again.state.global_step == 4 and furthest(weights(whole), weights(again)) == 0


def test_vocabularies_padded_to_other_sizes_share_the_smaller_one(tmp_path):
    teacher, (model, tokenizer) = another(), tiny()
    size = model.config.vocab_size
    folder = tmp_path / "teacher"
    teacher.resize_token_embeddings(size + 24)
    torch.nn.init.normal_(teacher.get_output_embeddings().weight)
    teacher.save_pretrained(folder), tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=f"a vocabulary of {size + 24} tokens, want the student's {size}, or the"):
        trainer_of(tmp_path, teacher=teacher)
    trainer = trainer_of(tmp_path, model=model, teacher=str(folder))
    assert trainer.teacher_head().weight.shape[0] == size
    examples = list(trainer.train_dataset.select(range(3)))
    with torch.no_grad():
        got = trainer.compute_loss(trainer.model, trainer.data_collator(examples))
        torch.testing.assert_close(got, by_hand(model, teacher, examples, ("reverse", 1.0)), rtol=1e-5, atol=0)
    tokenizer.add_tokens(["<other>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"whose tokenizer has '<other>' as \d+, the student's as None"):
        trainer_of(tmp_path, teacher=str(folder))


def test_the_student_without_its_adapters_teaches_itself(tmp_path):
    """Without a teacher_model: at the start both are one."""
    peft = pytest.importorskip("peft")
    model, tokenizer = tiny()
    args = config(DistillationConfig, tmp_path, lmbda=1.0, max_completion_length=4, max_steps=1)
    trainer = DistillationTrainer(
        model, None, args, completions(8), processing_class=tokenizer, peft_config=peft.LoraConfig(r=2)
    )
    assert abs(train(trainer)[0]["loss"]) < 1e-6 and trainer.teacher_model is None
    with pytest.raises(ValueError, match="teacher_model: got None, want a causal language model"):
        DistillationTrainer(tiny()[0], None, args, completions(8), processing_class=tokenizer)


def test_what_cannot_teach_is_refused(tmp_path):
    model, _ = tiny()
    with pytest.raises(ValueError, match="teacher_model: got the student itself"):
        trainer_of(tmp_path, model=model, teacher=model)
    with pytest.raises(TypeError, match="teacher_model: got int"):
        trainer_of(tmp_path, teacher=3)
    for options, message in (
        ({"beta": 1.5}, "beta: got 1.5"), ({"lmbda": -0.1}, "lmbda: got -0.1"), ({"use_vllm": True}, "use_vllm"),
        ({"lmbda": 1.0, "cache_teacher": True}, "cache_teacher: got True with lmbda=1.0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            config(DistillationConfig, tmp_path, **options)


def test_the_command_trains_writes_and_draws(tmp_path, capsys):
    folder, data = str(tmp_path / "teacher"), str(tmp_path / "data.jsonl")
    for part in (another(), tiny()[1]):
        part.save_pretrained(folder)
    completions(6).to_json(data)
    options = f"--model tiny --data {data} --output_dir {tmp_path / 'out'} --max_steps 2 --max_completion_length 4"
    more = "--beta 0.5 --lmbda 0.5 --eval_split 0.2 --per_device_train_batch_size 2 --learning_rate 1e-3"
    assert cli.main(["train", "distill", *options.split()]) == 2
    assert "teacher_model: got None, want a causal language model" in capsys.readouterr().err
    assert cli.main(["train", "distill", *options.split(), "--teacher", folder, *more.split()]) == 0
    said = capsys.readouterr().out
    assert "logps/teacher" in said and (tmp_path / "out" / "summary.png").is_file()
