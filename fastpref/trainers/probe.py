"""Tries a layout on a few tokens: does a model give the sequences of a batch the hidden states that each has alone?

It asks two questions. The scale of the weights decides neither:

- Does a token depend on one of another sequence? Asked by the gradient, which is exactly zero where it does not.
- Are the values right? Asked in fp32: the error may be as large as what rounding the embeddings does to the same
  values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastpref.common.precision import HALF
from fastpref.data import images
from fastpref.data.collators import PackedCollator
from fastpref.data.formats import PAIR
from fastpref.data.packing import Scored
from fastpref.data.vision import Vision, context_of
from fastpref.models import evaluating
from fastpref.trainers.forward import run_backbone, to_device

TOKENS = 24
RESPONSES = {"chosen": "yes", "rejected": "none"}


class _Trial(NamedTuple):
    alone: list[dict[str, Any]]  # a batch of each sequence
    batch: dict[str, Any]  # of all of them
    rows: list[Tensor]  # of each sequence, where its tokens lie in the batch


def batch_fault(inner: Any, layout: str, ours: bool, vision: Vision | None = None) -> str | None:
    """Why a batch's sequences are not as they are alone, or None. Runs in evaluation mode and leaves the model as it
    was. With `vision`, their prompts have images."""
    with evaluating(inner):
        trial = _trial(inner, layout, ours, vision)
        return _leak(inner, trial) or _difference(inner, trial)


def _trial(inner: Any, layout: str, ours: bool, vision: Vision | None) -> _Trial:
    groups, examples = _texts(inner) if vision is None else _pictures(vision)
    device = next(inner.parameters()).device

    def made(some: list[list[Scored]], layout: str, of: list[dict[str, Any]]) -> dict[str, Any]:
        collator = PackedCollator(layout=layout, ours=ours, vision=vision)
        return to_device(collator.pack(some, of), device)

    batch = made(groups, layout, examples)
    rows = batch["rows"].tensor_split(batch["cu_seqlens"][1:-1].tolist())  # all tokens but each sequence's last
    whole = [torch.cat([r, last[None]]) for r, last in zip(rows, batch["last_rows"], strict=True)]
    pairs = [(group[branch], i) for branch in range(2) for i, group in enumerate(groups)]
    return _Trial([made([[s]], "padded", examples[i : i + 1]) for s, i in pairs], batch, whole)


def _texts(inner: Any) -> tuple[list[list[Scored]], list[dict[str, Any]]]:
    vocab = inner.config.get_text_config().vocab_size
    ids = (torch.arange(TOKENS) * 7 + 3).remainder(vocab).tolist()
    prompt, turn = ids[:4], ids[4:7]
    branches = [prompt + turn + ids[7:10], prompt + turn + ids[10:15], prompt + ids[15:18], ids[18:24]]
    sequences = [Scored(branch, 1) for branch in branches]
    return [sequences[:2], sequences[2:]], []


def _pictures(vision: Vision) -> tuple[list[list[Scored]], list[dict[str, Any]]]:
    """Two pairs about one picture each, of different sizes."""
    groups, examples = [], []
    for number, size in enumerate(((40, 32), (32, 48))):
        example = images.encode(
            {"images": [images.gradient(size, number)], "prompt": images.question(vision.processor), **RESPONSES},
            vision.processor, PAIR,
        )  # fmt: skip
        context = context_of(example)
        groups.append([Scored(example["prompt_ids"] + example[f"{side}_ids"], 1, context=context) for side in PAIR])
        examples.append(example)
    return groups, examples


def _leak(inner: Any, trial: _Trial) -> str | None:
    leaf: list[Tensor] = []

    def cut(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        leaf.append(output.detach().requires_grad_())
        return leaf[-1].clone()  # which a model may change in place

    handle = inner.get_input_embeddings().register_forward_hook(cut)
    try:
        with torch.enable_grad():
            hidden = _hidden(inner, trial.batch)
            if not hidden.isfinite().all():
                return "its hidden states are not finite"
            for rows in trial.rows:
                weights = torch.linspace(1, 2, rows.numel() * hidden.shape[1], device=hidden.device)
                loss = (hidden[rows].float() * weights.view(rows.numel(), -1)).sum()
                (found,) = torch.autograd.grad(loss, leaf[:1], retain_graph=True)
                own = torch.zeros(hidden.shape[0], dtype=torch.bool, device=hidden.device).index_fill(0, rows, True)
                reached = found.flatten(0, 1).ne(0).any(dim=1)
                if not reached[own].any():
                    return "its hidden states do not depend on its embeddings"
                if reached[~own].any():
                    return "its tokens depend on those of other sequences"
    finally:
        handle.remove()
    return None


@torch.no_grad()
def _difference(inner: Any, trial: _Trial) -> str | None:
    def alone(pixels: float = 0.0) -> Tensor:
        return torch.cat([_hidden(inner, _moved(batch, pixels)) for batch in trial.alone]).float()

    quantized = any(not p.is_floating_point() for p in inner.parameters())
    eps = torch.finfo(torch.bfloat16 if quantized else torch.float32).eps
    with single_precision(inner):
        found = _hidden(inner, trial.batch)[torch.cat(trial.rows)].float()
        wanted = alone()
        with _rounded(inner.get_input_embeddings(), eps):
            response = (alone(pixels=eps) - wanted).abs().max()
    # every layer rounds what it adds, a few times
    layers = int(getattr(inner.config.get_text_config(), "num_hidden_layers", None) or 1)
    if trial.batch.get("vision"):
        tower = inner.config.vision_config
        layers += int(getattr(tower, "num_hidden_layers", None) or getattr(tower, "depth", None) or 1)
    limit = 4 * (layers + 1) * torch.maximum(response, eps * wanted.abs().max())
    error = (found - wanted).abs().max()
    return None if error <= limit else f"its hidden states differ by {float(error):.1e}"


def _hidden(inner: Any, batch: dict[str, Any]) -> Tensor:
    """Hidden states `[N, d]` as the backbone gives them: rounded for the head they would differ in the last place."""
    return run_backbone(inner, batch).last_hidden_state.flatten(0, 1)


def _moved(batch: dict[str, Any], eps: float) -> dict[str, Any]:
    """The batch with its pixels, if it has some, moved like `_rounded` embeddings."""
    pixels = batch.get("vision", {}).get("pixel_values")
    if pixels is None or not eps:
        return batch
    return {**batch, "vision": {**batch["vision"], "pixel_values": _up_or_down(pixels, eps)}}


def _up_or_down(values: Tensor, eps: float) -> Tensor:
    signs = 1.0 - 2.0 * (torch.arange(values.numel(), device=values.device) % 3 % 2)
    return values * (1 + eps * signs.view_as(values))


@contextlib.contextmanager
def _rounded(embeddings: nn.Module, eps: float) -> Iterator[None]:
    """Embeddings moved by one unit in the last place, up or down."""

    def move(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return _up_or_down(output, eps)

    handle = embeddings.register_forward_hook(move)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def single_precision(model: nn.Module) -> Iterator[None]:
    """Runs the model's forward in fp32, one layer's weights at a time, so that no second copy of the model is made."""
    kept: dict[nn.Module, list[tuple[nn.Module, str, Any, bool]]] = {}

    def widen(unit: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        # what was cast to the dtype of a weight that is not widened yet
        given = tuple(map(_wide, args)), {name: _wide(value) for name, value in kwargs.items()}
        if unit in kept:
            return given
        kept[unit] = []
        for module in unit.modules():
            for values, buffers in ((module._parameters, False), (module._buffers, True)):
                for name, value in values.items():
                    if value is not None and value.dtype in HALF:
                        kept[unit].append((module, name, value, buffers))
                        wide: Any = value.detach().float()
                        values[name] = wide if buffers else nn.Parameter(wide, requires_grad=False)
        return given

    def restore(unit: nn.Module, *_: Any) -> None:
        for module, name, value, buffers in kept.pop(unit, []):
            (module._buffers if buffers else module._parameters)[name] = value

    handles = []
    for unit in units(model):
        handles.append(unit.register_forward_pre_hook(widen, with_kwargs=True))
        handles.append(unit.register_forward_hook(restore, always_call=True))
    try:
        with _named_single(model):
            yield
    finally:
        for handle in handles:
            handle.remove()
        for unit in list(kept):
            restore(unit)


def _wide(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in HALF
    return value.float() if half else value


@contextlib.contextmanager
def _named_single(model: nn.Module) -> Iterator[None]:
    """For a `with` block, its models in half precision say that their dtype is fp32. They cast pixels and features of
    images to it."""
    from transformers import PreTrainedModel

    models = (m for m in model.modules() if isinstance(m, PreTrainedModel) and "dtype" not in vars(type(m)))
    classes: set[Any] = {type(m) for m in models if m.dtype in HALF}
    for cls in classes:
        cls.dtype = property(lambda self: torch.float32)
    try:
        yield
    finally:
        for cls in classes:
            del cls.dtype


def units(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of a model, and the modules beside them."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        elif any(isinstance(m, nn.ModuleList) for m in child.modules()):
            yield from units(child)
        else:
            yield child
