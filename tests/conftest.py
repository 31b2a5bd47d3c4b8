"""Every test runs seeded, on either backend, and with memory that was never written reading as NaN."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when fastpref_kernels is imported
sys.path.insert(0, str(Path(__file__).parent))  # for `import support`

import interpreter
from support import BACKENDS, DEVICE
from support_servers import Scripted

import fastpref
from fastpref.common import memory

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # one process a core already

interpreter.hasten()
PACKAGES = ("fastpref", "fastpref_kernels")
GARBAGE = 0x5A5A5A5A  # fits int32, and is no plausible index or count


def pytest_configure(config) -> None:
    # NumPy, under Triton's interpreter, warns of arithmetic on lanes that the kernel then masks off
    config.addinivalue_line("filterwarnings", "ignore:.* encountered in:RuntimeWarning:triton.runtime.interpreter")
    config.addinivalue_line("filterwarnings", "ignore:All-NaN slice:RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    fastpref.set_backend(request.param)
    yield request.param
    fastpref.set_backend("auto")


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(scope="module")
def scripted() -> Iterator[Scripted]:
    """A server that answers by script. What fails is tried again without the usual waits."""
    server = Scripted()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastpref.online.client.FIRST_WAIT", 0.01)
        yield server
    server.kill()


@pytest.fixture(autouse=True, scope="module")
def _what_is_imported_is_no_garbage() -> None:
    """Accelerate collects garbage in every run of a trainer, and went through all of transformers, TRL and PyTorch for
    it: three quarters of the time of a tiny training run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def poison(value: torch.Tensor) -> torch.Tensor:
    """Overwrite a real tensor with what no test can mistake for a result; fakes have no memory to fill."""
    if type(value) is not torch.Tensor or value.is_meta or torch._is_functional_tensor(value):
        return value
    with torch.no_grad():
        if value.is_floating_point():
            return value.fill_(float("nan"))
        if value.dtype == torch.bool:
            return value.fill_(True)
        if value.element_size() < 4:
            return value.fill_(torch.iinfo(value.dtype).max)
        return value.fill_(GARBAGE)


def _called_from_fastpref() -> bool:
    caller = sys._getframe(2).f_globals.get("__name__", "")
    return caller.split(".", 1)[0] in PACKAGES


def _poisoning(allocate):
    @functools.wraps(allocate)
    def wrapped(*args, **kwargs):
        value = allocate(*args, **kwargs)
        return poison(value) if _called_from_fastpref() else value

    return wrapped


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch) -> None:
    """Whatever fastpref allocates and does not write is NaN (a large integer, True). Tensors of anyone else are left
    alone, so that PyTorch's own operators run as they do for a user."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoning(getattr(owner, name)))
    borrowed = memory.borrowed

    @contextlib.contextmanager
    def poisoned_scratch(*shape, like):  # a kept buffer still holds what the last call left in it
        with borrowed(*shape, like=like) as scratch:
            yield poison(scratch)

    monkeypatch.setattr(memory, "borrowed", poisoned_scratch)
