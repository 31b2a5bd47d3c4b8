"""Online training: runs that go on as if never stopped, two ranks, the KL where it is asked for, what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from support_rl import QUIET, Gradients, Script, length_reward, prompts, train, vowel_reward
from support_trainers import furthest, tiny, weights
from transformers import AutoModelForSequenceClassification

from fastpref import trainers
from fastpref.trainers.rl_loss import SampleLosses

SAMPLED = QUIET | {"max_steps": 5, "num_iterations": 2, "steps_per_generation": 2, "learning_rate": 1e-4, "seed": 3}


def make(method, folder, rewards=length_reward, sampler=None, **options):
    model, tokenizer = tiny()
    given = ("peft_config", "heldout_funcs", "eval_dataset", "reward_processing_classes")
    extra = {name: options.pop(name) for name in given if name in options}
    gradients = Gradients()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = getattr(trainers, f"{method}Trainer")(
            model, rewards, getattr(trainers, f"{method}Config")(output_dir=str(folder), **(QUIET | options)),
            prompts(), processing_class=tokenizer, sampler=sampler, callbacks=[gradients], **extra,
        )  # fmt: skip
    trainer.gradients = gradients.found
    return trainer


class PowerCut(Exception):
    pass


@pytest.mark.parametrize("where", ["rollout", "update"])
def test_a_run_that_was_killed_goes_on_to_the_bit(where, tmp_path, monkeypatch):
    """The checkpoint after the third update lies within a round of samples: two batches, twice each."""
    steered = {"beta": 0.05, "kl_placement": "reward", "kl_estimator": "exact", "kl_target": 0.5, "kl_horizon": 50}
    options = SAMPLED | steered | {"reward_normalizer": "running", "save_strategy": "steps", "save_steps": 3}
    options |= {"log_completions": True, "num_completions_to_print": 0}
    whole = make("RLOO", tmp_path / "whole", **options)
    train(whole)
    calls = {"rollout": 0, "update": 0}

    def reward(**given):
        calls["rollout"] += 1
        if where == "rollout" and calls["rollout"] == 2:
            raise PowerCut
        return length_reward(**given)

    reward.__name__ = length_reward.__name__
    cut = make("RLOO", tmp_path / "cut", reward, **options)
    if where == "update":
        loss = SampleLosses.part_loss

        def part_loss(self, *args):
            calls["update"] += 1
            if calls["update"] == 5:
                raise PowerCut
            return loss(self, *args)

        monkeypatch.setattr(SampleLosses, "part_loss", part_loss)
    with pytest.raises(PowerCut):
        train(cut)
    monkeypatch.undo()
    again = make("RLOO", tmp_path / "cut", **options)
    train(again, resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    assert furthest(weights(again), weights(whole)) == 0.0
    cut_log, whole_log = ((tmp_path / run / "completions.jsonl").read_text() for run in ("cut", "whole"))
    assert cut_log == whole_log and cut_log.count("\n") == 32, "a round that is sampled again is written once"
    assert again.beta == whole.beta != 0.05
    assert all(
        bool((a == b).all()) for a, b in zip(again.normalizer.buffers(), whole.normalizer.buffers(), strict=True)
    )


def test_tokenized_prompts_are_found_again(tmp_path):
    """datasets names them by the function and what it gets: two trainers' are the same, another template's are not."""
    running = (n for n in range(3))  # what a reward holds has no hash, and is nothing to the prompts
    rewards = [length_reward, lambda completions, **_: [next(running) for _ in completions], length_reward]
    found = [make("GRPO", tmp_path / str(i), rewards[i], **more).train_dataset._fingerprint
             for i, more in enumerate(({}, {}, {"chat_template_kwargs": {"thinking": True}}))]  # fmt: skip
    assert found[0] == found[1] != found[2]


def test_a_second_run_on_the_same_trainer_begins_anew(tmp_path):
    trainer = make("GRPO", tmp_path, **(SAMPLED | {"max_steps": 3}))
    seen = []
    trainer.rewards.functions[0] = lambda completion_ids, **_: (
        seen.append(completion_ids) or [float(len(ids)) for ids in completion_ids]
    )
    train(trainer)
    first = list(seen)
    seen.clear()
    train(trainer)
    assert len(seen) == len(first) == 1
    assert [len(ids) for ids in seen[0]] == [len(ids) for ids in first[0]], "its random numbers begin anew"


def test_an_interrupted_round_was_counted_in_the_next_run(tmp_path):
    """What its functions had logged."""
    interrupted = [True]

    def reward(log_metric, **given):
        log_metric("seen", 9.0 if interrupted else 1.0)
        if interrupted and interrupted.pop():
            raise KeyboardInterrupt
        return length_reward(**given)

    trainer = make("RLOO", tmp_path, reward, max_steps=1)
    with pytest.raises(KeyboardInterrupt):
        train(trainer)
    (entry,) = train(trainer)
    assert entry["seen"] == 1.0


def test_a_reward_model_can_still_be_trained(tmp_path):
    """It was frozen, and its own trainer then refused it."""
    model, _ = tiny()
    model.config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(model.config)
    before = [p.detach().clone() for p in model.parameters()]
    args = {"reward_processing_classes": tiny()[1], "max_steps": 1}
    train(make("GRPO", tmp_path, model, **args))
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert parameter.requires_grad and parameter.grad is None and torch.equal(parameter, value)


def test_responses_are_learnt_from_as_they_were_sampled(tmp_path):
    """Sampled ids are what is scored: nothing goes through text. The log-probs are those of generating."""
    trainer = make("GRPO", tmp_path, **SAMPLED)
    batches = trainer.sample([trainer.train_dataset[i // 4] for i in range(16)])
    samples = [s for batch in batches for s in batch]
    assert len({tuple(s.ids) for s in samples}) > 8
    for sample in samples[:4]:
        ids = torch.tensor([sample.prompt_ids + sample.ids])
        logps = trainer.model(ids).logits[0, :-1].log_softmax(-1)
        wanted = logps[torch.arange(len(sample.prompt_ids) - 1, ids.shape[1] - 1), torch.tensor(sample.ids)]
        assert torch.allclose(sample.old_logps, wanted.detach(), atol=1e-5)


PLACES = [("reward", "k1"), ("reward", "exact"), ("loss", "k2"), ("loss", "k3"), ("loss", "exact")]


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("method", ["RLOO", "GRPO"])
@pytest.mark.parametrize("place", PLACES, ids="-".join)
def test_gradients_against_fp64(place, method, adapters, tmp_path):
    """The second update of a round, against autograd through all logits in fp64."""
    if adapters and place not in (("reward", "exact"), ("loss", "exact")):
        pytest.skip("the reference differs only where it runs in the update")
    if method == "GRPO" and not adapters and place[1] in ("k1", "k2"):
        pytest.skip("as in RLOO")
    beta, more = 0.3, {}
    if adapters:
        from peft import LoraConfig

        torch.manual_seed(0)
        more = {"peft_config": LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])}
    if method == "GRPO":
        more |= {"loss_type": "grpo", "scale_rewards": "batch"}
    trainer = make(
        method, tmp_path, sampler=Script(2), beta=beta, kl_placement=place[0], kl_estimator=place[1], num_iterations=2,
        learning_rate=2e-3 if adapters else 2e-5, vllm_importance_sampling_correction=False, token_budget=60, **more,
    )  # fmt: skip
    found, kept = {}, {}
    step = trainer.training_step

    def training_step(model, inputs, *args):
        if trainer.state.global_step == 1:
            kept.update(inputs=inputs, state={n: p.detach().double() for n, p in model.named_parameters()})
        return step(model, inputs, *args)

    trainer.training_step = training_step
    train(trainer)
    found = trainer.gradients[1]
    wanted = fp64_gradients(trainer, kept, place, beta, method)
    largest = max(float(g.abs().max()) for g in wanted.values())
    for name, gradient in found.items():
        assert torch.allclose(gradient.double(), wanted[name], atol=1e-5 * largest, rtol=1e-4), name


def fp64_gradients(trainer, kept, place, beta, method):
    """By a model in fp64 with whole logits, one sequence after the other; clipping is not reached."""
    import copy

    policy = copy.deepcopy(trainer.model).double().train()
    policy.load_state_dict(kept["state"], strict=False)
    policy.zero_grad()
    samples = [s for part in kept["inputs"]["parts"] for s in part["samples"].samples]
    total = torch.zeros((), dtype=torch.float64)
    for sample in samples:
        ids = torch.tensor([sample.prompt_ids + sample.ids])
        rows = slice(len(sample.prompt_ids) - 1, ids.shape[1] - 1)
        log_p = policy(ids).logits[0, rows].log_softmax(-1)
        with trainer.reference.model() as reference, torch.no_grad():
            log_q = reference(ids).logits[0, rows].double().log_softmax(-1)
        at = torch.arange(len(sample.ids)), torch.tensor(sample.ids)
        logps, ref = log_p[at], log_q[at]
        log_ratio = logps - sample.old_logps.double()
        ratio = log_ratio.sum().exp() if method == "RLOO" else log_ratio.exp()
        loss = -(ratio * sample.advantage) if method == "RLOO" else -(ratio * sample.advantage).mean()
        kl = {
            "k1": torch.zeros(1), "k2": ratio.detach() * (logps - ref).square() / 2,
            "k3": ratio * ((ref - logps).exp() - 1 - (ref - logps)), "exact": (log_p.exp() * (log_p - log_q)).sum(-1),
        }[place[1]]  # fmt: skip
        kl = kl * (sample.slope if place[0] == "reward" else 1.0)
        total = total + loss + beta * (kl.sum() if method == "RLOO" else kl.mean())
    (total / len(samples)).backward()
    return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


def test_two_ranks_learn_what_one_learns(tmp_path):
    """A prompt's samples are on both ranks."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parents[1])]), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "found.pt")
    one = of_ranks(tmp_path / "one", 1)
    for ours, theirs in zip(found["evaluations"], evaluations(one, tmp_path / "one", 1), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-4), "of examples that fill up a rank, none counts"
    assert furthest(found["weights"], weights(one)) < 1e-6
    logged = [entry for entry in one.state.log_history if "loss" in entry]
    for ours, theirs in zip(found["logged"], logged, strict=True):
        for name in ours.keys() - {"step_time", "epoch"}:
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5, rel=1e-4), name


def of_ranks(folder, world):
    trainer = make(
        "GRPO", folder, per_device_train_batch_size=8 // world, num_generations=8, beta=0.1, kl_target=1.0,
        num_iterations=2, max_steps=3, learning_rate=1e-4, optim="sgd", max_grad_norm=0.0,
        per_device_eval_batch_size=8 // world, num_generations_eval=2, heldout_funcs=[vowel_reward],
    )  # fmt: skip
    train(trainer)
    return trainer


def evaluations(trainer, folder, world):
    """The last round has one prompt (the second rank has none), or three, which are on both ranks."""
    corrected = make(
        "RLOO", folder, sampler=Script(2), per_device_train_batch_size=8 // world, num_generations=2, beta=0.1,
        per_device_eval_batch_size=8 // world, mask_truncated_completions=True,
    )  # fmt: skip
    found = [one.evaluate(prompts(number)) for one in (trainer, corrected) for number in (5, 7)]
    timed = ("_runtime", "_per_second", "_time")
    return [
        {n: v for n, v in some.items() if not n.endswith(timed) and "sampling/" not in n} for some in found
    ]  # of a sampler, means of ranks' means are logged, as in TRL


@pytest.mark.parametrize("method", ["RLOO", "GRPO"])
def test_the_defaults_of_the_host_learn(method, tmp_path):
    """bf16 autocast, gradient checkpointing, LoRA, the exact KL; twice on one trainer."""
    from peft import LoraConfig

    trainer = make(
        method, tmp_path, bf16=True, gradient_checkpointing=True, max_steps=2, learning_rate=1e-2, beta=0.1,
        kl_placement="reward", kl_estimator="exact", peft_config=LoraConfig(task_type="CAUSAL_LM"),
    )  # fmt: skip
    before = weights(trainer)
    for _ in range(2):
        logged = train(trainer)
        assert all(0 <= entry["kl/exact"] < 20 and entry["grad_norm"] > 0 for entry in logged if "kl/exact" in entry)
    assert furthest(before, weights(trainer)) > 1e-4


REFUSED = {
    "use_vllm": ("GRPO", {"use_vllm": True}, "use_vllm: got True"),
    "grouped already": ("RLOO", {"group_by_prompt": True}, "group_by_prompt: got True"),
    "unknown loss": ("GRPO", {"loss_type": "ppo"}, "loss_type"),
    "k1 as loss": ("GRPO", {"kl_estimator": "k1"}, "gradient of k1 is 0"),
    "k3 in reward": ("RLOO", {"kl_estimator": "k3"}, "kl_estimator: got 'k3' in the reward"),
    "odd groups": ("RLOO", {"num_generations": 3}, "num_generations: got 3"),
    "no steering at 0": ("GRPO", {"kl_target": 1.0}, "kl_target"),
    "weights": ("GRPO", {"reward_weights": [1.0, 2.0]}, "reward_weights: got 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path):
    method, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make(method, tmp_path, **options)


def test_uneven_ranks_are_refused(tmp_path, monkeypatch):
    """A rank without a batch would let the others wait for ever."""
    monkeypatch.setattr(trainers.GRPOConfig, "world_size", 2)
    with pytest.raises(ValueError, match="even_batches: got False"):
        make("GRPO", tmp_path, accelerator_config={"even_batches": False})


def test_a_reward_function_that_errs_is_named(tmp_path):
    def short(**_):
        return [1.0]

    with pytest.raises(ValueError, match="short gave 1 rewards, want 8"):
        train(make("GRPO", tmp_path, short, sampler=Script(2), vllm_importance_sampling_correction=False))


def test_a_sampler_is_corrected_for(tmp_path):
    """Log-probs far from the trainer's: masked by sequence, as TRL does by default, nothing is left to learn."""
    trainer = make("GRPO", tmp_path, sampler=Script(2), max_steps=1)
    (entry,) = train(trainer)
    assert entry["sampling/sampling_logp_difference/mean"] > 0.5
    kept = make("GRPO", tmp_path, sampler=Script(2), max_steps=1, vllm_importance_sampling_mode="token_truncate",
                vllm_importance_sampling_clip_max=0.1)  # fmt: skip
    (other,) = train(kept)
    assert other["sampling/importance_sampling_ratio/max"] == pytest.approx(0.1)
    assert max(float(g.abs().max()) for g in kept.gradients[0].values()) > 0


def test_a_sampler_with_another_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"sampler: got tokens from \d+ to 60000 in response \d+, want them from 0 to"):
        train(make("GRPO", tmp_path, sampler=Script(60000)))


def test_evaluation_does_not_depend_on_the_batch(tmp_path):
    found = []
    for size in (4, 8):
        trainer = make("RLOO", tmp_path, eval_dataset=prompts(3), per_device_eval_batch_size=size, track_kl=True,
                       heldout_funcs=[lambda completion_ids, **_: [len(ids) for ids in completion_ids]])  # fmt: skip
        found.append(trainer.evaluate())
    assert found[0]["eval_loss"] == pytest.approx(found[1]["eval_loss"], abs=1e-5)
    assert found[0]["eval_reward"] == pytest.approx(found[1]["eval_reward"], abs=1e-5)
    assert "eval_heldout/<lambda>/mean" in found[0]


if __name__ == "__main__":
    done = of_ranks(Path(sys.argv[1]) / "two", 2)
    evaluated = evaluations(done, Path(sys.argv[1]) / "two", 2)
    if done.is_world_process_zero():
        logged = [entry for entry in done.state.log_history if "loss" in entry]
        torch.save(
            {"weights": weights(done), "logged": logged, "evaluations": evaluated}, Path(sys.argv[1]) / "found.pt"
        )
