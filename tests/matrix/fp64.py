"""The judge: the same model in fp64, eager attention, one sequence at a time; the losses as their papers write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.matrix import models

BETA, GAMMA = 0.5, 0.4


def twin(trains: str) -> nn.Module:
    """Of a policy: parameters of the same names, which `put` fills."""
    model = AutoModelForCausalLM.from_pretrained(models.folder(), dtype=torch.float64, attn_implementation="eager")
    return models.adapted(model, trains).double().eval()


def put(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Weights as `whole_weights` found them; the model has all that it needs of them."""
    for name, value in model.named_parameters():
        value.data.copy_(weights[name])
    return model


def logps(model: Any, sequences: list[tuple[list[int], int]]) -> Tensor:
    """(sum, mean) over the completion's tokens `[S, 2]` of sequences (ids, where the completion begins)."""
    found = []
    for ids, start in sequences:
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, start - 1 : -1]
        tokens = logits.log_softmax(-1).gather(-1, torch.tensor(ids[start:])[:, None])[:, 0]
        found.append(torch.stack([tokens.sum(), tokens.mean()]))
    return torch.stack(found)


def loss(model: Any, reference: Tensor | None, pairs: list[tuple[list[int], list[int], list[int]]]) -> Tensor:
    """DPO (Rafailov et al. 2023, eq. 7) with the reference's sums `[2B]`, else SimPO (Meng et al. 2024, eq. 6)."""
    found = logps(model, models.sequences(pairs))
    if reference is None:
        chosen, rejected = found[:, 1].chunk(2)
        return -F.logsigmoid(BETA * (chosen - rejected) - GAMMA).mean()
    chosen, rejected = (found[:, 0] - reference).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()
