"""Triton's interpreter without what it does again in every call: most of the time of the kernels' tests.

It looks for some 400 names of `triton.language` and replaces them, before a kernel runs and again in every call of a
device function. The same replacements are kept here, and put in place once a kernel. No value depends on it.
"""

from __future__ import annotations

import functools
import inspect
import os
from typing import Any


class _Replacements:
    """What a scope of the interpreter's has replaced, to be made and undone again."""

    def __init__(self, scope: Any, missing: object) -> None:
        first: dict[tuple[int, str], tuple[Any, str, Any]] = {}
        for owner, name, original in scope._changes:  # of a name replaced twice, the first knows the original
            first.setdefault((id(owner), name), (owner, name, original))
        self.originals, self.missing = list(first.values()), missing
        self.values = [(owner, name, getattr(owner, name)) for owner, name, _ in self.originals]

    def make(self) -> None:
        for owner, name, value in self.values:
            setattr(owner, name, value)

    def undo(self) -> None:
        for owner, name, original in self.originals:
            delattr(owner, name) if original is self.missing else setattr(owner, name, original)


ORIGINALS: dict[str, Any] = {}  # what `hasten` has replaced in triton.runtime.interpreter


def hasten() -> None:
    """Nothing where kernels are compiled, or where Triton's interpreter is built another way."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    try:
        from triton.runtime import interpreter

        patch, missing, numpy_dtype = interpreter._patch_lang, interpreter._MISSING, interpreter._get_np_dtype
    except (ImportError, AttributeError):
        return
    known: dict[tuple[int, ...], _Replacements] = {}
    in_place: set[tuple[int, ...]] = set()

    class Scope:
        """Of a kernel. A device function's is never restored: it ends with the kernel's."""

        def __init__(self, modules: tuple[int, ...]) -> None:
            self.modules = modules

        def restore(self) -> None:
            known[self.modules].undo()
            in_place.clear()

    @functools.cache
    def modules(function: Any) -> tuple[int, ...]:
        seen = [value for value in function.__globals__.values() if inspect.ismodule(value)]
        return tuple(sorted({id(value) for value in seen if value in (interpreter.tl, interpreter.tl.core)}))

    def patch_once(function: Any) -> Scope:
        key = modules(function)
        if key not in known:
            known[key] = _Replacements(patch(function), missing)
        elif key not in in_place:
            known[key].make()
        in_place.add(key)
        return Scope(key)

    dtypes: dict[str, Any] = {}

    def np_dtype(kind: Any) -> Any:
        scalar = kind.scalar  # of a block its elements', with a name that tells them apart
        if scalar.name not in dtypes:
            dtypes[scalar.name] = numpy_dtype(scalar)
        return dtypes[scalar.name]

    for replacement, original in ((patch_once, patch), (np_dtype, numpy_dtype)):
        ORIGINALS[original.__name__] = original
        setattr(interpreter, original.__name__, replacement)
