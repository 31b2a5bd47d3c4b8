"""`use_liger_kernel=True` with Liger itself: its kernels of layers run, the loss is ours. Interpreted where there is no
GPU, but for its RMSNorm, which assigns None as Triton's interpreter cannot."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("trl")
pytest.importorskip("liger_kernel")

from trl_hosts import checkpoint, dataset

from fastpref import trainers

runtime = pytest.importorskip("triton.runtime.interpreter")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def _floats_are_tensors_in_kernels(monkeypatch) -> None:
    """As compiled kernels have them; Triton's interpreter leaves them Python's."""
    if not INTERPRETED:
        return
    language, converted = runtime.tl, runtime._implicit_cvt

    def convert(value):
        if type(value) is not float:
            return converted(value)
        return language.tensor(runtime.TensorHandle(np.array([value], np.float32), language.float32), language.float32)

    monkeypatch.setattr(runtime, "_implicit_cvt", convert)


def losses(folder, liger: bool) -> tuple[list[float], torch.nn.Module]:
    torch.manual_seed(0)
    tokenizer, model = AutoTokenizer.from_pretrained(checkpoint()), AutoModelForCausalLM.from_pretrained(checkpoint())
    more = {"liger_kernel_config": {"rms_norm": False}} if INTERPRETED and liger else {}
    args = trainers.DPOConfig(
        str(folder), use_cpu=not torch.cuda.is_available(), bf16=False, max_steps=2, logging_steps=1, report_to="none",
        optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", disable_tqdm=True, save_strategy="no",
        reference_cache=str(folder / "reference"), use_liger_kernel=liger, **more,
    )  # fmt: skip
    trainer = trainers.DPOTrainer(model=model, args=args, train_dataset=dataset("dpo"), processing_class=tokenizer)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model


def test_its_layers_run_and_the_loss_is_ours(_floats_are_tensors_in_kernels, monkeypatch, tmp_path) -> None:
    from liger_kernel.ops import rope, swiglu
    from transformers.models.llama import modeling_llama

    for name in ("apply_rotary_pos_emb", "LlamaMLP", "LlamaRMSNorm"):  # Liger replaces them for all models
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    called = []
    for module, kernel in ((rope, "rope_forward"), (swiglu, "swiglu_forward"), (swiglu, "swiglu_backward")):
        real = getattr(module, kernel)
        monkeypatch.setattr(module, kernel, lambda *a, real=real, kernel=kernel: called.append(kernel) or real(*a))
    own, _ = losses(tmp_path / "own", liger=False)
    assert not called
    with pytest.warns(UserWarning, match="use_liger_kernel: Liger's kernels of layers are used; its cross-entropy"):
        found, model = losses(tmp_path / "liger", liger=True)
    assert set(called) == {"rope_forward", "swiglu_forward", "swiglu_backward"}
    assert type(model).forward.__module__.startswith("transformers.")  # not Liger's, which has a loss
    assert found == pytest.approx(own, rel=2e-6) and found[0] != found[1]
