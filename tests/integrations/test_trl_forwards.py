"""TRL 0.24's DPOTrainer.concatenated_forward, called as its trainer does, against the model's own logits: that TRL
does not import beside transformers 5."""

from __future__ import annotations

import contextlib
import types

import pytest
import torch
from support import DEVICE
from support_models import model_of

from fastpref.integrations import trl_0_24, trl_forwards

PAD = 0


class Host:
    """What a TRL trainer has that its `concatenated_forward` reads."""

    def __init__(self, **options) -> None:
        self.accelerator = types.SimpleNamespace(
            unwrap_model=lambda model: model, autocast=contextlib.nullcontext, device=torch.device(DEVICE)
        )
        self.pad_token_id = PAD
        for name, value in options.items():
            setattr(self, name, value)


def sequences() -> tuple[list[list[int]], list[list[int]]]:
    """Two prompts, and two chosen and two rejected completions, all of other lengths."""
    prompts = [[5, 6, 7], [8]]
    return prompts * 2, [[9, 10], [11, 12, 13, 14], [15, 16, 17], [18]]


def padded(rows: list[list[int]], *, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    fill = [[PAD] * (width - len(row)) for row in rows]
    ids = [f + r if left else r + f for r, f in zip(rows, fill, strict=True)]
    mask = [
        [0] * len(f) + [1] * len(r) if left else [1] * len(r) + [0] * len(f) for r, f in zip(rows, fill, strict=True)
    ]
    return torch.tensor(ids, device=DEVICE), torch.tensor(mask, device=DEVICE)


def old_batch() -> dict[str, torch.Tensor]:
    """As 0.24: prompts padded on the left, completions on the right."""
    batch = {}
    for name, rows in zip(("prompt", "completion"), sequences(), strict=True):
        batch[f"{name}_input_ids"], batch[f"{name}_attention_mask"] = padded(rows, left=name == "prompt")
    return batch


def own_rows(model, prompt: list[int], completion: list[int], cut: slice = slice(None)) -> tuple[list, list]:
    """(log-probs, mean logits) of a sequence's completion tokens, from the model's logits, one sequence alone."""
    ids = (prompt + completion)[cut]
    kept = min(len(completion), len(ids)) if cut.start else max(0, len(ids) - len(prompt))
    with torch.no_grad():
        logits = model(torch.tensor([ids], device=DEVICE)).logits[0].double()
    logps = logits.log_softmax(-1)
    places = range(max(1, len(ids) - kept), len(ids))
    return [float(logps[i - 1, ids[i]]) for i in places], [float(logits[i - 1].mean()) for i in places]


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Granite"])
@pytest.mark.parametrize("mode", ["whole", "keep_start", "keep_end"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_dpo_0_24(family, mode, loss_type) -> None:
    cut = {"whole": slice(None), "keep_start": slice(None, 4), "keep_end": slice(-4, None)}[mode]
    host = Host(
        loss_type=[loss_type], truncation_mode="keep_end" if mode == "keep_end" else "keep_start",
        max_length=None if mode == "whole" else 4, args=types.SimpleNamespace(rpo_alpha=0.5),
    )  # fmt: skip
    model, (prompts, completions) = model_of(family), sequences()
    # the batch says how many pairs there are by its prompts, which concatenated_inputs repeats
    batch = old_batch()
    joined, batch["prompt_input_ids"] = dict(batch), batch["prompt_input_ids"][:2]
    host.concatenated_inputs = lambda batch, padding_value: joined
    found = trl_0_24.concatenated_forward(host, model, batch, is_ref_model=False)
    wanted = [own_rows(model, p, c, cut) for p, c in zip(prompts, completions, strict=True)]
    logps = [sum(x) / (len(x) if loss_type == "ipo" else 1) for x, _ in wanted]
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found["chosen_logps"].tolist(), logps[:2], **close)
    torch.testing.assert_close(found["rejected_logps"].tolist(), logps[2:], **close)
    chosen = [x for row, _ in wanted[:2] for x in row]
    torch.testing.assert_close(found["nll_loss"].item(), -sum(chosen) / len(chosen), **close)
    for name, rows in (("chosen", wanted[:2]), ("rejected", wanted[2:])):
        means = [x for _, row in rows for x in row]
        torch.testing.assert_close(found[f"mean_{name}_logits"].item(), sum(means) / len(means), **close)


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Granite", "Phi"])
def test_mean_logits_without_logits(family) -> None:
    model = model_of(family)
    ids = torch.randint(3, 61, (2, 9), device=DEVICE)
    hidden, head = trl_forwards.models.hidden_and_head(model, ids)
    wanted = model(ids).logits.mean()
    torch.testing.assert_close(trl_forwards.mean_logit(hidden, head), wanted.detach(), rtol=1e-4, atol=1e-6)
