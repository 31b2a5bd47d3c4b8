"""Attention over packed rows whose sequences form trees, registered with transformers.

A pair is packed as `[prompt | chosen | rejected]`. The prompt runs once. The rejected tokens see the prompt and
themselves, and their positions restart at the prompt's length. A tree of any depth is the same: a segment of
consecutive rows sees its path of ancestors, which are ranges of earlier rows, and itself.

As variable-length attention a segment is a block of queries over the gathered keys `[ancestors; itself]`, causal from
the bottom right. Sequences that share nothing have no ancestors.

Shapes: `N` rows (tokens), `H` attention heads, `D` a head's width, `G` segments, `M` gathered keys.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpref.common.precision import HALF
from fastpref.models.segments import QUERIES, Segment, Segments, gathered

KWARG = "fastpref_segments"  # the argument of a model's forward that reaches its attention layers
_PREFIX = "fastpref_"  # + the implementation that calls without segments go to
_DELEGATES = ("sdpa", "eager")
_packed: contextvars.ContextVar[bool] = contextvars.ContextVar("fastpref_packed", default=False)


@torch.compiler.disable
def by_segment(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None, window: int | None = None,
    softcap: float | None = None, dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """Attention `[1, H, N, D]` by calls of `scaled_dot_product_attention` for each segment: any device, any dtype.

    A segment takes one call, or where it needs a mask one for every `QUERIES` queries: a mask of all would be
    quadratic in its length, and half of it would be masked.
    """
    key, value = gathered(key, segments, 2), gathered(value, segments, 2)
    rows, sizes = ([f(s) for s in segments.table] for f in (Segment.queries, Segment.keys))
    parts = (x.split(n, dim=2) for x, n in ((query, rows), (key, sizes), (value, sizes)))  # one gradient buffer, not G
    outputs = []
    for q, k, v in zip(*parts, strict=True):
        own, keys = q.shape[2], k.shape[2]
        plain = own == keys and (window is None or window >= keys)
        for some in [q] if plain else q.split(QUERIES, dim=2):
            seen = keys - own + some.shape[2]
            own -= some.shape[2]
            first = 0 if window is None else max(0, seen - some.shape[2] - window + 1)
            mask = segments.mask(some.shape[2], seen - first, window, query)
            outputs.append(_attend(some, k[:, :, first:seen], v[:, :, first:seen], mask, scale, softcap, dropout))
    return torch.cat(outputs, dim=2)


def _attend(query, key, value, mask: Tensor | None, scale: float | None, softcap: float | None, dropout: float):
    if softcap is not None:
        return _softcapped(query, key, value, mask, scale, softcap, dropout)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale,
        enable_gqa=key.shape[1] != query.shape[1],
    )  # fmt: skip


def _softcapped(query, key, value, mask: Tensor | None, scale: float | None, softcap: float, dropout: float) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        n = query.shape[2]
        mask = torch.full((n, n), float("-inf"), dtype=query.dtype, device=query.device).triu(1)
    weights = torch.softmax(scores + mask, dim=-1, dtype=torch.float32).to(query.dtype)
    return F.dropout(weights, dropout) @ value


@functools.cache
def _varlen() -> tuple[Callable, frozenset[str]] | None:
    """torch's variable-length attention and the names of its parameters, which differ between versions of torch."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


@torch.compiler.disable
def by_varlen(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None, window: int | None = None
) -> Tensor:
    """The same by torch's variable-length attention, in one launch, for half precision on a GPU.

    The keys of ancestors are read through a gather.
    """
    found = _varlen()
    assert found is not None
    varlen_attn, names = found
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [N, H, D]
    k, v = gathered(k, segments, 0), gathered(v, segments, 0)
    options: dict[str, Any] = {"scale": scale} if scale is not None else {}
    if "enable_gqa" in names:  # until 2.12 fewer key heads need no permission
        options["enable_gqa"] = k.shape[1] != q.shape[1]
    if "is_causal" in names:
        options["is_causal"] = True
    else:  # (left, right): keys up to the query's own, aligned at the bottom right
        options["window_size"] = (-1 if window is None else window - 1, 0)
    out = varlen_attn(
        q.contiguous(), k.contiguous(), v.contiguous(), segments.cu_queries, segments.cu_keys,
        segments.max_queries, segments.max_keys, **options,
    )  # fmt: skip
    return out.transpose(0, 1)[None]


@torch.compiler.disable(recursive=False)
def by_flex(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None, window: int | None = None,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """The same by FlexAttention, for what variable-length attention has no argument for: a soft cap, large heads.

    On a GPU it is compiled once for all lengths. Elsewhere it forms the whole score matrix, for tests.
    """
    key, value = gathered(key, segments, 2), gathered(value, segments, 2)
    call = _flex(query.device.type)

    # a tensor: as a Python float it would be read from one on the host, which Inductor cannot compile in a score
    cap = None if softcap is None else segments.scalar(softcap, torch.promote_types(query.dtype, torch.float32))

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        assert cap is not None
        return cap * torch.tanh(score / cap)

    large = query.shape[-1] > 256  # by default three stages of keys and values: 256 KiB, where an H100 has 227
    return call(
        query, key, value, score_mod=None if softcap is None else capped, block_mask=segments.block_mask(window),
        scale=scale, enable_gqa=key.shape[1] != query.shape[1], kernel_options={"num_stages": 1} if large else None,
    )  # fmt: skip


@functools.cache
def _flex(device: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if device == "cpu" else torch.compile(flex_attention, dynamic=True)


@torch.compiler.disable
def _can_flex(query: Tensor, dropout: float) -> bool:
    half = query.dtype in HALF  # in fp32 it is no faster than a call a segment
    return query.is_cuda and half and not dropout and query.shape[-1] >= 16 and torch.version.hip is None


@torch.compiler.disable
def _can_varlen(query: Tensor, window: int | None, softcap: float | None, dropout: float) -> bool:
    found = _varlen() if query.is_cuda and query.dtype in HALF else None
    if found is None or softcap is not None or dropout or query.shape[-1] > 256 or query.shape[-1] % 8:
        return False
    if torch.version.hip is None and torch.cuda.get_device_capability(query.device) < (8, 0):
        return False
    return window is None or "window_size" in found[1]


def attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
    softcap: float | None = None, fastpref_segments: Segments | None = None, *, delegate: str = "sdpa", **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention as transformers calls it: `[1, H, N, D]` -> `[1, N, H, D]`, and None in place of the weights.

    Without `fastpref_segments` the call goes to transformers' own implementation `delegate`.

    Raises:
        ValueError: segments together with a mask, or with an argument that packed attention does not know.
    """
    if fastpref_segments is None:
        options = {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window, "softcap": softcap}
        options = {name: value for name, value in (options | kwargs).items() if value is not None}
        return _delegate(delegate, module)(module, query, key, value, attention_mask, **options)
    unknown = [name for name in ("s_aux", "position_bias", "cache") if kwargs.get(name) is not None]
    if unknown or (attention_mask is not None and attention_mask.shape != (1, 1, 1, 1)):
        raise ValueError(f"{', '.join(unknown) or 'attention_mask'}: got one in packed attention, want none")
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings leave fp32 queries and keys beside half values
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    out = packed_attention(query, key, value, fastpref_segments, scaling, sliding_window, softcap, dropout)
    return out.transpose(1, 2).contiguous(), None


# a compiled model breaks here, since the segments' sizes would be compiled into it; FlexAttention is compiled by itself
@torch.compiler.disable(recursive=False)
def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None, window: int | None,
    softcap: float | None, dropout: float,
) -> Tensor:  # fmt: skip
    """By the fastest of the three implementations that can: `by_varlen`, `by_flex`, else `by_segment`."""
    if _can_varlen(query, window, softcap, dropout):
        return by_varlen(query, key, value, segments, scale, window)
    if _can_flex(query, dropout):
        return by_flex(query, key, value, segments, scale, window, softcap)
    return by_segment(query, key, value, segments, scale, window, softcap, dropout)


def _delegate(name: str, module: torch.nn.Module) -> Callable:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name == "eager":  # each model has its own, under this name
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]


def _mask(*args: Any, delegate: str, **kwargs: Any) -> Tensor | None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    return None if _packed.get() else ALL_MASK_ATTENTION_FUNCTIONS[delegate](*args, **kwargs)


@functools.cache
def register() -> None:
    """Make the implementations `fastpref_sdpa` and `fastpref_eager` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    for delegate in _DELEGATES:
        AttentionInterface.register(_PREFIX + delegate, functools.partial(attention, delegate=delegate))
        AttentionMaskInterface.register(_PREFIX + delegate, functools.partial(_mask, delegate=delegate))


def enable(model: Any) -> None:
    """Let `model` take packed rows too. Without segments it computes what it did before."""
    register()
    capped_attention(model)
    current = model.config._attn_implementation
    if not current.startswith(_PREFIX):
        model.set_attn_implementation(_PREFIX + (current if current in _DELEGATES else "sdpa"))


def capped_attention(model: Any) -> None:
    """Give a model whose config caps attention's logits eager attention instead of sdpa.

    transformers' sdpa leaves the cap out. Up to 5.17 it is what Gemma 2 gets by default.
    """
    caps = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    if caps and model.config._attn_implementation in ("sdpa", _PREFIX + "sdpa"):
        model.set_attn_implementation("eager")


def disable(model: Any) -> None:
    """Undo `enable`."""
    current = model.config._attn_implementation
    if current.startswith(_PREFIX):
        model.set_attn_implementation(current.removeprefix(_PREFIX))


def prepared_mask(input_ids: Tensor) -> Tensor:
    """A mask `[1, 1, 1, 1]` that masks nothing, for packed rows.

    transformers passes a 4-d mask on to `attention` as it is. Without a mask it would look for packed sequences in
    the positions, on the host, in every forward.
    """
    return torch.zeros(1, 1, 1, 1, device=input_ids.device)


@contextlib.contextmanager
def packed_rows() -> Iterator[None]:
    """For a `with` block around the forward of a model that is given segments: transformers builds no mask."""
    token = _packed.set(True)
    try:
        yield
    finally:
        _packed.reset(token)
