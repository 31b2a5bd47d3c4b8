"""TRL's own, unmodified trainers on fastpref's operators: the same training, with fewer products and no logits."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import types
import warnings

import pytest
import torch
from support import relative_error

if importlib.util.find_spec("trl") is None or importlib.metadata.version("trl").split(".")[:2] != ["1", "16"]:
    pytest.skip("TRL 1.16 is not installed", allow_module_level=True)

import trl_hosts
from trl_hosts import LORA, assert_same, build, head_rows, train

from fastpref import models
from fastpref.integrations import trl as fast_trl

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:trl"),
]


@pytest.fixture(autouse=True)
def _left_as_it_was():
    yield
    fast_trl.unpatch()


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("sft", {"max_steps": 20}),
        ("dpo", {"max_steps": 20}),
        ("dpo", {"loss_type": ["sigmoid", "bco_pair", "sft"], "ld_alpha": 0.5}),
        ("dpo", {"use_weighting": True, "f_divergence_type": "js_divergence"}),
        ("dpo", {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}),
        ("kto", {"max_steps": 20}),
        ("grpo", {"max_steps": 20}),
        ("grpo", {"max_steps": 20, "entropy_coef": 0.1}),
        ("rloo", {"max_steps": 20}),
        ("cpo", {"max_steps": 20}),
        ("cpo", {"loss_type": "simpo", "cpo_alpha": 0.0}),
        ("cpo", {"loss_type": "ipo"}),
        ("orpo", {"max_steps": 20}),
        ("online_dpo", {"max_steps": 20}),
    ],
    ids=str,
)
def test_training_is_the_same(method, options, tmp_path):
    want = train(method, tmp_path / "own", **options)
    got = train(method, tmp_path / "patched", patch=fast_trl.patched, **options)
    assert len(want.losses) >= 2 and any(g.abs().max() > 0 for g in want.gradients[0].values())
    assert_same(got, want)


@pytest.mark.parametrize("method", ["dpo", "cpo"])
def test_training_with_adapters_is_the_same(method, tmp_path):
    peft = pytest.importorskip("peft")
    records = []
    for patch in (fast_trl.patched, trl_hosts.contextlib.nullcontext):
        config = peft.LoraConfig(task_type="CAUSAL_LM", **LORA)
        records.append(train(method, tmp_path / patch.__name__, patch=patch, peft=config, learning_rate=1.0))
    assert_same(*records)


@pytest.fixture(scope="module")
def dpo(tmp_path_factory):
    """(a DPO trainer, one of its batches, its initial weights)"""
    trainer = build("dpo", tmp_path_factory.mktemp("dpo"), label_smoothing=0.1)
    batch = next(iter(trainer.get_train_dataloader()))
    return trainer, batch, {name: value.clone() for name, value in trainer.model.state_dict().items()}


def steps(dpo, number: int) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    trainer, batch, weights = dpo
    trainer.model.load_state_dict(weights)
    losses, gradients = [], []
    for _ in range(number):
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad.clone() for name, p in trainer.model.named_parameters()})
        with torch.no_grad():
            norm = torch.stack([p.grad.norm() for p in trainer.model.parameters()]).norm()
            for p in trainer.model.parameters():
                p.sub_(p.grad, alpha=0.005 / max(1.0, float(norm)))
    return losses, gradients


@pytest.mark.parametrize("loss_type", trl_hosts.loss_types())
def test_twenty_steps_of_each_loss_type(dpo, loss_type, monkeypatch):
    monkeypatch.setattr(dpo[0], "loss_types", [loss_type])
    wanted = steps(dpo, 20)
    with fast_trl.patched():
        found = steps(dpo, 20)
    assert len(set(wanted[0])) > 10
    for a, b in zip(found[0], wanted[0], strict=True):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-7)
    for name in wanted[1][0]:  # of the largest in 20 steps: near a minimum a gradient is a difference that vanishes
        largest = max(float(step[name].norm()) for step in wanted[1])
        assert all(
            float((a[name] - b[name]).norm()) <= 1e-5 * largest for a, b in zip(*(found[1], wanted[1]), strict=True)
        )


@pytest.mark.parametrize(("frozen", "ours", "theirs"), [(False, 3, 4), (True, 2, 3)])
def test_products_of_a_dpo_step(frozen, ours, theirs, tmp_path):
    """Of the scored rows only; the reference's log-probs, another product each, are precomputed."""
    config = None
    if frozen:
        config = pytest.importorskip("peft").LoraConfig(task_type="CAUSAL_LM", **LORA)
    trainer = build("dpo", tmp_path, peft=config, precompute_ref_log_probs=True)
    batch = next(iter(trainer.get_train_dataloader()))
    sequences = trainer.model, batch["input_ids"], batch["attention_mask"]
    scored = batch["completion_mask"][:, 1:]

    def step() -> None:
        trainer.compute_loss(trainer.model, batch).backward()

    assert head_rows(*sequences, step) == theirs * scored.numel()  # on a CPU, all rows
    with fast_trl.patched():
        assert head_rows(*sequences, step) == ours * scored.sum()


@pytest.mark.parametrize("method", ["cpo", "orpo"])
def test_no_logits_are_built(method, tmp_path, monkeypatch):
    with fast_trl.patched():
        trainer = build(method, tmp_path)
        monkeypatch.setattr(trainer.model.lm_head, "forward", lambda *_: pytest.fail("the model's own head ran"))
        batch = next(iter(trainer.get_train_dataloader()))
        scored = sum(int((batch[f"{side}_labels"][:, 1:] != -100).sum()) for side in ("chosen", "rejected"))
        if method == "orpo":  # its NLL is of chosen prompts, too
            scored += int(
                (batch["chosen_attention_mask"][:, 1:].bool() & (batch["chosen_labels"][:, 1:] == -100)).sum()
            )
        ids = trainer.concatenated_inputs(batch, padding_value=0)
        rows = head_rows(
            trainer.model, ids["concatenated_input_ids"], ids["concatenated_attention_mask"],
            lambda: trainer.compute_loss(trainer.model, batch).backward(),
        )  # fmt: skip
    assert rows == 3 * scored


def test_a_head_that_is_not_known_stays_with_trl(tmp_path):
    model, _ = models.tiny(trl_hosts.TEXTS)
    model.lm_head.register_forward_hook(lambda layer, inputs, output: output * 1.01)
    with fast_trl.patched():
        with pytest.warns(UserWarning, match="CPOTrainer builds logits, as without fastpref: model: got Llama"):
            trainer = build("cpo", tmp_path, model=model)
        batch = next(iter(trainer.get_train_dataloader()))
        found = trainer.compute_loss(trainer.model, batch)
    assert torch.equal(found, trainer.compute_loss(trainer.model, batch))


def test_a_head_that_cannot_be_tried_stays_with_trl(tmp_path):
    """Its hidden states may be on another device; the constructor raised where TRL's would have run."""
    model, _ = models.tiny(trl_hosts.TEXTS)

    def elsewhere(layer, inputs, output):
        raise RuntimeError("Expected all tensors to be on the same device")

    hook = model.lm_head.register_forward_hook(elsewhere)
    with fast_trl.patched(), pytest.warns(UserWarning, match="CPOTrainer builds logits, as without fastpref: Expected"):
        trainer = build("cpo", tmp_path, model=model)
    hook.remove()
    assert not trainer._fastpref


def test_options_that_stay_with_trl():
    assert fast_trl.forwards.supported(types.SimpleNamespace(is_encoder_decoder=False, aux_loss_enabled=False))
    for name in ("is_encoder_decoder", "aux_loss_enabled", "padding_free", "use_weighting"):
        assert not fast_trl.forwards.supported(types.SimpleNamespace(**{name: True}))
    assert not fast_trl.forwards.supported(types.SimpleNamespace(args=types.SimpleNamespace(torch_compile=True)))
    assert not fast_trl.forwards.supported(types.SimpleNamespace(args=types.SimpleNamespace(ld_alpha=0.5)))
    assert fast_trl.forwards.text_only({"vision_inputs": None}, ())
    assert not fast_trl.forwards.text_only({"vision_inputs": {"pixel_values": 1}}, ())
    assert not fast_trl.forwards.text_only({}, ({"image_sizes": 1},))


def test_a_loss_of_a_users_subclass_was_replaced(tmp_path):
    import trl

    class Doubled(trl.DPOTrainer):
        def _compute_loss(self, *args, **kwargs):
            return 2 * super()._compute_loss(*args, **kwargs)

    class Renamed(trl.DPOTrainer):
        pass

    losses = []
    for cls in (trl.DPOTrainer, Doubled, Renamed):
        args = trl.DPOConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=2,
            gradient_checkpointing=False,
        )  # fmt: skip
        dataset = trl_hosts.dataset("dpo")
        with fast_trl.patched(), warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            trainer = cls(model=trl_hosts.checkpoint(0), args=args, train_dataset=dataset)
            losses.append(float(trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))))
        assert any("Doubled has its own _compute_loss" in str(w.message) for w in seen) == (cls is Doubled)
        assert hasattr(trainer, "packing") == (cls is not Doubled)
    assert losses == pytest.approx([0.693147, 2 * 0.693147, 0.693147], abs=1e-5)


def everything() -> list:
    found = []
    for entry in fast_trl.VERSIONS["1.16"]:
        owner, name = entry.owner()
        found.append(vars(owner)[name])
    return found


def test_unpatch_leaves_trl_as_it_was():
    before = everything()
    fast_trl.unpatch()
    fast_trl.patch()
    fast_trl.patch()
    patched = everything()
    assert all(a is not b for a, b in zip(before, patched, strict=True))
    with fast_trl.patched():
        pass
    assert everything() == patched  # not its own to take back
    fast_trl.unpatch()
    assert everything() == before
    with pytest.raises(KeyError), fast_trl.patched():
        raise KeyError
    assert everything() == before


@pytest.mark.parametrize("version", ["1.17.0", "0.30.1", "2.0.0.dev0"])
def test_an_unknown_trl_is_refused(version, monkeypatch):
    before = everything()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(RuntimeError, match=f"trl: got version {version}, which .* want 0.24.x, 1.8.x, 1.16.x"):
        fast_trl.patch()
    assert everything() == before


def test_another_signature_is_refused(monkeypatch):
    import trl.kernels

    before = everything()
    other = type("Other", (), {"forward": staticmethod(lambda ctx, hidden, weight: None)})
    monkeypatch.setattr(trl.kernels, "ChunkedLogProbFunction", other)
    with pytest.raises(RuntimeError, match=r"whose fused head takes \('hidden', 'weight'\)"):
        fast_trl.patch()
    assert everything() == before


def test_without_trl(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ImportError, match=r"TRL is not installed; run `pip install trl==1\.16\.0`"):
        fast_trl.patch()


@pytest.mark.parametrize("cast_to_fp32", [False, True])
def test_mixed_dtypes_of_the_fused_head(cast_to_fp32):
    """A bf16 model whose head TRL runs in fp32, and an fp32 head under bf16 hidden states."""
    from trl.kernels import ChunkedLogProbFunction

    hidden, weight = torch.randn(9, 16), torch.randn(61, 16)
    hidden, weight = (hidden, weight.bfloat16()) if cast_to_fp32 else (hidden.bfloat16(), weight)
    results = []
    for function in (ChunkedLogProbFunction, fast_trl.TokenLogProbs):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        found = function.apply(h, w, None, torch.arange(9), 0.7, 32768, 5.0, 0.3)
        (found[0].sum() + found[1].square().sum()).backward()
        assert (h.grad.dtype, w.grad.dtype) == (hidden.dtype, weight.dtype)
        results.append([*(x.detach().float() for x in found), h.grad.float(), w.grad.float()])
    for found, wanted in zip(*results, strict=True):
        assert relative_error(found, wanted) < (1e-5 if cast_to_fp32 and found.ndim == 1 else 2e-2)


def test_a_batch_without_labels_is_a_differentiable_zero():
    hidden, weight = torch.randn(0, 16, requires_grad=True), torch.randn(61, 16, requires_grad=True)
    found = fast_trl.TokenLogProbs.apply(hidden, weight, None, torch.empty(0, dtype=torch.long), 1.0, 32768)
    assert all(value.shape == (0,) for value in found)
    (found[0].sum() + found[1].sum()).backward()
    assert hidden.grad.shape == (0, 16) and torch.equal(weight.grad, torch.zeros(61, 16))
