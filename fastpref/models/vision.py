"""Vision-language models: what takes images, where text tokens with three positions lie, and how their decoder alone
runs a packed row.

The model's own forward reads the images and puts their features among the embeddings. Its decoder then runs the row as
any language model does (`packed_decoder`), so the vision tower never sees a packed row's masks.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from fastpref.models import attention
from fastpref.models.layers import base, decoder
from fastpref.models.wrappers import inner_model


def takes_images(model: Any) -> bool:
    """Whether the model's forward has an argument for pixels."""
    return "pixel_values" in inspect.signature(type(inner_model(model)).forward).parameters


def axis_positions(model: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """For a model whose tokens have three positions (M-RoPE): a function that gives them for one sequence.

    It takes token ids `[1, T]`, what kind of token each is `[1, T]`, and the grids `[images, 3]`; it returns
    `[3, 1, T]`. It is the model's own, and needs none of its weights. None for other models.
    """
    body = base(inner_model(model))
    if not hasattr(body, "get_rope_index"):
        return None
    kind: Any = type(body)
    bare = kind.__new__(kind)  # the method reads the config only
    nn.Module.__init__(bare)
    bare.config = body.config
    return functools.partial(_axis_positions, bare)


def _axis_positions(body: Any, input_ids: Tensor, kinds: Tensor, grids: Tensor) -> Tensor:
    options = {"input_ids": input_ids, "mm_token_type_ids": kinds, "image_grid_thw": grids}
    known = inspect.signature(body.get_rope_index).parameters
    return body.get_rope_index(**{name: value for name, value in options.items() if name in known})[0]


@contextlib.contextmanager
def packed_decoder(model: Any, segments: Any) -> Iterator[None]:
    """For a `with` block around the forward of a model with images: its decoder runs the segments of a packed row."""
    rows = contextlib.ExitStack()

    def begin(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        like = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
        rows.enter_context(attention.packed_rows())
        return args, kwargs | {"attention_mask": attention.prepared_mask(like), attention.KWARG: segments}

    def end(*_: Any) -> None:
        rows.close()

    body = decoder(model)
    hooks = [
        body.register_forward_pre_hook(begin, with_kwargs=True),
        body.register_forward_hook(end, always_call=True),
    ]
    try:
        yield
    finally:
        rows.close()
        for hook in hooks:
            hook.remove()
