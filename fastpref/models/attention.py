"""Attention over packed rows whose sequences may share a prefix, registered with transformers.

A pair is packed as `[prompt | chosen | rejected]`. The prompt runs once. The rejected tokens see the prompt and
themselves, and their positions restart at the prompt's length.

As variable-length attention that is two blocks of queries: `[prompt; chosen]` over the same keys, and `[rejected]`
over the keys `[prompt; rejected]`, causal from the bottom right. Sequences that share nothing have no prefixes.

Shapes: `N` rows (tokens), `H` attention heads, `D` a head's width, `G` segments.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

KWARG = "fastpref_segments"  # the argument of a model's forward that reaches its attention layers
_PREFIX = "fastpref_"  # + the implementation that calls without segments go to
_DELEGATES = ("sdpa", "eager")
_packed: contextvars.ContextVar[bool] = contextvars.ContextVar("fastpref_packed", default=False)


class Segment(NamedTuple):
    """The query rows start..end-1 of a packed row, and the earlier rows prefix_start..prefix_end-1 that all of them
    see."""

    start: int
    end: int
    prefix_start: int = 0
    prefix_end: int = 0


@dataclass
class Segments:
    """The segments of one packed row, which cover it without gaps. Built on the CPU, and moved with its batch."""

    table: tuple[Segment, ...]
    cu_queries: Tensor  # [G + 1] int32
    cu_keys: Tensor  # [G + 1] int32, offsets into key_rows
    key_rows: Tensor  # [M] the packed rows whose keys the segments see, one segment after the other
    max_queries: int
    max_keys: int
    _masks: dict[tuple, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, table: Sequence[Segment]) -> Segments:
        """From the segments in the order of their rows."""
        queries = [s.end - s.start for s in table]
        keys = [s.prefix_end - s.prefix_start + n for s, n in zip(table, queries, strict=True)]
        rows = [torch.arange(a, b) for s in table for a, b in ((s.prefix_start, s.prefix_end), (s.start, s.end))]
        offsets = [torch.tensor([0, *sizes]).cumsum(0).int() for sizes in (queries, keys)]
        return cls(tuple(table), offsets[0], offsets[1], torch.cat(rows), max(queries), max(keys))

    @property
    def shared(self) -> bool:
        """Does any segment see a prefix?"""
        return any(s.prefix_end > s.prefix_start for s in self.table)

    def to(self, device: torch.device | str, **kwargs: Any) -> Segments:
        """A copy whose tensors are on `device`; `kwargs` as in `Tensor.to`."""
        return self._with(lambda x: x.to(device, **kwargs))

    def pin_memory(self) -> Segments:
        """A copy whose tensors are in pinned memory."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Segments:
        queries, keys, rows = (change(x) for x in (self.cu_queries, self.cu_keys, self.key_rows))
        return Segments(self.table, queries, keys, rows, self.max_queries, self.max_keys)

    def mask(self, segment: Segment, window: int | None, like: Tensor) -> Tensor | None:
        """The segment's additive mask `[queries, keys]`, of the dtype and device of `like`.

        None where a plain causal mask (`is_causal`) says the same. It is kept for the other layers.
        """
        queries = segment.end - segment.start
        keys = queries + segment.prefix_end - segment.prefix_start
        if queries == keys and (window is None or window >= keys):
            return None
        key = (queries, keys, window, like.dtype)
        if key not in self._masks:
            at = torch.arange(keys - queries, keys, device=like.device)[:, None]
            seen = torch.arange(keys, device=like.device)
            hidden = (seen > at) if window is None else (seen > at) | (seen <= at - window)
            self._masks[key] = torch.zeros(queries, keys, dtype=like.dtype, device=like.device).masked_fill(
                hidden, float("-inf")
            )
        return self._masks[key]

    @torch.compiler.disable
    def block_mask(self, window: int | None) -> Any:
        """FlexAttention's mask over the gathered keys, of which each query sees one range. Kept for other layers."""
        from torch.nn.attention.flex_attention import create_block_mask

        if ("flex", window) not in self._masks:
            queries, keys = self.table[-1].end, len(self.key_rows)
            at = torch.arange(queries, device=self.key_rows.device)
            segment = torch.bucketize(at, self.cu_queries[1:], right=True)
            last = self.cu_keys[segment + 1] - self.cu_queries[segment + 1] + at
            first = self.cu_keys[segment] if window is None else torch.maximum(self.cu_keys[segment], last - window + 1)

            def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                return (key >= first[query]) & (key <= last[query])

            self._masks["flex", window] = create_block_mask(seen, None, None, queries, keys, self.key_rows.device)
        return self._masks["flex", window]


@torch.compiler.disable
def by_segment(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None, window: int | None = None,
    softcap: float | None = None, dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """Attention `[1, H, N, D]` by one `scaled_dot_product_attention` for each segment: any device, any dtype."""
    sizes = [s.end - s.start for s in segments.table]
    queries, keys, values = (x.split(sizes, dim=2) for x in (query, key, value))  # one gradient buffer, not G
    starts = {s.start: i for i, s in enumerate(segments.table)}
    outputs = []
    for i, segment in enumerate(segments.table):
        k, v = keys[i], values[i]
        length = segment.prefix_end - segment.prefix_start
        if length:
            owner = starts[segment.prefix_start]
            k = torch.cat([keys[owner][:, :, :length], k], dim=2)
            v = torch.cat([values[owner][:, :, :length], v], dim=2)
        mask = segments.mask(segment, window, query)
        if softcap is None:
            outputs.append(
                F.scaled_dot_product_attention(
                    queries[i], k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale,
                    enable_gqa=k.shape[1] != query.shape[1],
                )
            )  # fmt: skip
        else:
            outputs.append(_softcapped(queries[i], k, v, mask, scale, softcap, dropout))
    return torch.cat(outputs, dim=2)


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

    The keys of a shared prefix are read through a gather. For two responses its backward adds two numbers in each row,
    which is deterministic.
    """
    found = _varlen()
    assert found is not None
    varlen_attn, names = found
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [N, H, D]
    if segments.shared:
        k, v = k.index_select(0, segments.key_rows), v.index_select(0, segments.key_rows)
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
    if segments.shared:
        key, value = key.index_select(2, segments.key_rows), value.index_select(2, segments.key_rows)
    call = _flex(query.device.type)

    cap: Any = softcap

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return call(
        query, key, value, score_mod=None if softcap is None else capped, block_mask=segments.block_mask(window),
        scale=scale, enable_gqa=key.shape[1] != query.shape[1],
    )  # fmt: skip


@functools.cache
def _flex(device: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if device == "cpu" else torch.compile(flex_attention, dynamic=True)


@torch.compiler.disable
def _can_flex(query: Tensor, dropout: float) -> bool:
    half = query.dtype in (torch.bfloat16, torch.float16)  # in fp32 it is no faster than a call a segment
    return query.is_cuda and half and not dropout and query.shape[-1] >= 16 and torch.version.hip is None


@torch.compiler.disable
def _can_varlen(query: Tensor, window: int | None, softcap: float | None, dropout: float) -> bool:
    found = _varlen() if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) else None
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
