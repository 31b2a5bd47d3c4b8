"""Whatever a model is made of: its log-probs are those of its own logits, one sequence at a time; or it is refused.

FASTPREF_ALL_MODELS=1 pytest tests/models/test_zoo.py    every architecture of transformers, in some minutes
"""

from __future__ import annotations

import copy
import os
import warnings

import pytest
import torch
from support_zoo import ARCHITECTURES, tiny_model
from torch import Tensor, nn

from fastpref import linear_token_logprobs, models
from fastpref.data.packing import Scored, pack
from fastpref.models import attention
from fastpref.trainers.forward import by_sequence, head_labels, head_rows, hidden_rows
from fastpref.trainers.layout import choose_layout

PROMPT, TURN, OTHER = [5, 6, 7, 8, 9, 10], [27, 28, 29], [20, 21]
SEQUENCES = [  # a tree of four levels, with equal branches and one that is the beginning of another, and a stranger
    Scored([*PROMPT, 11, 12, 13], 6), Scored(PROMPT + TURN + [14, 15, 16, 17, 18], 6), Scored([*OTHER, 22, 23, 24], 2),
    Scored(PROMPT + TURN + [14, 15, 19], 9), Scored(PROMPT + TURN, 6), Scored([*OTHER, 26], 2),
    Scored(PROMPT + TURN + [14, 15, 19], 6),
]  # fmt: skip
NODES = 6 + 3 + (3 + 5 + 1) + 2 + (3 + 1)
MIXING = [  # state spaces, linear attention, recurrences and short convolutions, some beside attention
    "bamba", "falcon_h1", "granitemoehybrid", "jamba", "lfm2", "mamba2", "minimax", "qwen3_next", "recurrent_gemma",
    "rwkv", "xlstm", "zamba",
]  # fmt: skip
SHARED = [
    "apertus", "cohere2", "deepseek_v3", "ernie4_5", "exaone4", "gemma2", "gemma3_text", "gemma3n_text", "glm4", "gpt2",
    "gpt_bigcode", "granite", "llama", "mistral", "olmo2", "olmoe", "opt", "phi", "phi3", "qwen2", "qwen3", "smollm3",
    "starcoder2",
]  # fmt: skip
# heads of several layers, as masked language models have them, or logits of more than the head; CPM-Ant and XLNet put
# tokens of their own beside those of the batch
REFUSED = {
    "bert", "big_bird", "camembert", "cpmant", "data2vec-text", "electra", "ernie", "inkling_text", "megatron-bert",
    "modernbert-decoder", "prophetnet", "rembert", "roberta", "roberta-prelayernorm", "roformer", "xlm-roberta",
    "xlm-roberta-xl", "xlnet",
}  # fmt: skip


def own_logps(model: nn.Module) -> Tensor:
    """From the model's own logits, one sequence at a time."""
    found = []
    for sequence in SEQUENCES:
        ids = torch.tensor(sequence.ids)
        logps = model(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        found.append(logps.gather(1, ids[1:, None])[sequence.first - 1 :, 0])
    return torch.cat(found)


def our_logps(model: nn.Module) -> tuple[Tensor, str]:
    head = models.output_head(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="layout")
        layout, ours = choose_layout(model, "auto")
    batch = pack(SEQUENCES, layout)
    if layout == "shared":
        assert batch["input_ids"].numel() == NODES
    if not ours:
        batch.pop(attention.KWARG, None)
    hidden = hidden_rows(model, batch).index_select(0, head_rows(batch))
    logps = linear_token_logprobs(hidden, head.weight, head_labels(batch)[0], head.bias, **head.options())
    return by_sequence(logps, batch), layout


def gradient(model: nn.Module, logps: Tensor) -> Tensor:
    """Of a weighted sum of log-probs, in all parameters, as one vector."""
    loss = (logps * torch.linspace(-1, 1, len(logps))).sum()
    found = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


def check(model: nn.Module, gradients: bool = False) -> str:
    with torch.set_grad_enabled(gradients):
        wanted = own_logps(model)
        found, layout = our_logps(model)
    scale = max(1.0, float(wanted.detach().abs().max()))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6 * scale)
    if gradients:
        one, other = gradient(model, found), gradient(model, wanted)
        if (one - other).norm() > 1e-6 * other.norm():  # whose rounding? Gemma 2's own are 1.03e-6 off in 5.17
            exact = copy.deepcopy(model).double()
            truth = gradient(exact, own_logps(exact))
            assert (one - truth).norm() <= min(1e-6 * truth.norm(), (other - truth).norm())
    return layout


@pytest.mark.parametrize("scale", [0.1, 1.0, 6.0])
@pytest.mark.parametrize("architecture", MIXING)
def test_sequences_do_not_mix_whatever_the_scale_of_the_weights(architecture, scale):
    assert check(tiny_model(architecture, scale)) == "padded"


@pytest.mark.parametrize("scale", [0.1, 6.0])
@pytest.mark.parametrize("architecture", SHARED)
def test_prompts_are_shared(architecture, scale):
    assert check(tiny_model(architecture, scale), gradients=True) == "shared"


@pytest.mark.skipif("FASTPREF_ALL_MODELS" not in os.environ, reason="minutes: FASTPREF_ALL_MODELS=1")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(architecture):
    try:
        model = tiny_model(architecture, 3.0)
        own_logps(model)
    except Exception as error:
        pytest.skip(f"no tiny model: {type(error).__name__}: {error}")
    if architecture in REFUSED:
        with pytest.raises(ValueError, match="model: got"):
            our_logps(model)
    else:
        check(model)
