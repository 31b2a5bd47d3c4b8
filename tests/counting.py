"""What a step really runs, on a CPU: kernel launches, bytes through large tensors, and what would wait for a device.

A dispatch mode sees every operator, those inside of fastpref's own ones too. Copies between host and device, which a
CPU does not make, are counted where Python asks for them.
"""

from __future__ import annotations

import functools
import math
import sys
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastpref.common import checks

# operators that only say how memory is read, or reserve it
FREE = frozenset((
    "view", "_unsafe_view", "reshape", "_reshape_alias", "expand", "t", "transpose", "permute", "select", "slice",
    "split", "split_with_sizes", "chunk", "unbind", "unsqueeze", "squeeze", "as_strided", "detach", "detach_", "alias",
    "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "lift_fresh", "unfold", "diagonal",
))  # fmt: skip
# operators whose result's size, or value on the host, depends on data
WAITING = frozenset((
    "nonzero", "_local_scalar_dense", "item", "masked_select", "unique_dim", "_unique", "_unique2", "equal",
    "unique_consecutive", "unique_dim_consecutive", "is_nonzero", "allclose", "bincount", "histc",
))  # fmt: skip
INDEXING = frozenset(("index", "index_put", "index_put_", "_index_put_impl_"))


class Event(NamedTuple):
    what: str
    where: str  # package/file.py:line of whoever asked for it: the innermost frame outside of torch

    @property
    def file(self) -> str:
        return self.where.split(":")[0]

    @property
    def ours(self) -> bool:
        return self.where.startswith(("fastpref/", "fastpref_kernels/"))


class Touched(NamedTuple):
    """A tensor that an operator read, wrote, or both. The tensor itself is not kept: gradients would be copied."""

    by: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Operators(TorchDispatchMode):
    """Every operator that runs within its `with` block, in this thread; a Triton kernel is one launch."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.of_fastpref: set[str] = set()  # its operators that ran
        self.waits: list[Event] = []
        self.touched: list[Touched] = []
        self._kernel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._kernel or func.namespace == "prim":  # which asks a tensor without values for its device
            return func(*args, **kwargs)
        if func.namespace == "fastpref":
            self.of_fastpref.add(func._schema.name.split("::")[1])
            with self:
                return torch._library.custom_ops.OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                found = func.decompose(*args, **kwargs)
            if found is not NotImplemented:
                return found
        name = func._schema.name.split("::")[1]
        result = func(*args, **kwargs)
        if name not in FREE and not (name == "fill_" and _poisons()):
            self._note(name, args, kwargs, result)
        return result

    def _note(self, name: str, args: Any, kwargs: Any, result: Any) -> None:
        self.launches[name] += 1
        tensors = {id(x): x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)}
        self.touched += [Touched(name, tuple(x.shape), x.dtype) for x in tensors.values()]
        sized = name != "repeat_interleave" or len(args) > 1 or kwargs.get("output_size") is not None
        checked = name == "segment_reduce" and kwargs.get("lengths") is not None and not kwargs.get("unsafe")
        if name in WAITING or not sized or checked or (name in INDEXING and any(map(_is_mask, args[1]))):
            self.waits.append(Event(name, _origin()))

    def moved(self, *shape: int) -> int:
        """Bytes read and written in tensors of this shape, but by matrix products and by what picks rows."""
        others = ("mm", "addmm", "index", "index_select")
        return sum(x.bytes for x in self.touched if x.shape == shape and x.by not in others)


def _poisons() -> bool:
    """Is it the tests' own NaN in memory that nobody has written?"""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "poison":
        frame = frame.f_back
    return frame is not None


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _origin() -> str:
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        for root in ("/site-packages/", "/kernels/"):
            if root in path and "/site-packages/torch/" not in path:
                return f"{path.rsplit(root, 1)[1]}:{frame.f_lineno}"
        if "/fastpref/" in path and "/tests/" not in path:
            return f"fastpref/{path.rsplit('/fastpref/', 1)[1]}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


class Watch:
    """`operators` of a step as an accelerator would run it: nothing looks at values because that is free on a CPU, and
    copies that wait for the host or a device are among its `waits`."""

    def __init__(self, monkeypatch: Any) -> None:
        self.operators = Operators()
        self.on = False
        monkeypatch.setattr(checks, "free_to_read", lambda value: not self.on)
        for owner, name, waits in (
            (Tensor, "tolist", lambda *_, **__: True),
            (Tensor, "numpy", lambda *_, **__: True),
            (Tensor, "cpu", lambda *_, **__: True),
            (Tensor, "to", _moves_and_waits),
            (Tensor, "new_tensor", lambda *_, **__: True),
            (torch, "tensor", lambda *_, device=None, **__: device is not None),
            (torch, "as_tensor", lambda *_, device=None, **__: device is not None),
        ):
            monkeypatch.setattr(owner, name, self._watched(getattr(owner, name), name, waits))
        _watch_kernels(monkeypatch, self.operators)

    def _watched(self, function: Any, name: str, waits: Any) -> Any:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self.on and not self.operators._kernel and waits(*args, **kwargs):
                self.operators.waits.append(Event(name, _origin()))
            return function(*args, **kwargs)

        return wrapped

    def start(self) -> None:
        self.on = True
        self.operators.__enter__()

    def stop(self) -> None:
        self.operators.__exit__(None, None, None)
        self.on = False

    def __enter__(self) -> Operators:
        self.start()
        return self.operators

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def ours(self) -> list[Event]:
        return [event for event in self.operators.waits if event.ours]


def _moves_and_waits(_: Tensor, *args: Any, **kwargs: Any) -> bool:
    """A `.to(device)` that the host waits for."""
    target = kwargs.get("device", args[0] if args else None)
    return isinstance(target, (str, torch.device)) and not kwargs.get("non_blocking", False)


def _watch_kernels(monkeypatch: Any, operators: Operators) -> None:
    """A kernel in Triton's interpreter counts as one launch, and what the interpreter runs does not count."""
    from triton.runtime import interpreter

    execute = interpreter.GridExecutor.__call__

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        operators.launches["kernel"] += 1
        operators._kernel += 1
        try:
            return execute(self, *args, **kwargs)
        finally:
            operators._kernel -= 1

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launched)
