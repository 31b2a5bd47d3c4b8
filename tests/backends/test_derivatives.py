"""The portable backend's thread for derivatives: kept, and never one that cannot answer."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch

from fastpref.backends.derivatives import value_and_gradients


def cube(x: torch.Tensor) -> torch.Tensor:
    return x.pow(3).sum()


def traced(seen: list) -> None:
    def formula(x: torch.Tensor) -> torch.Tensor:
        seen.append((threading.get_ident(), torch.get_num_threads()))
        return cube(x)

    with torch.no_grad():
        value, (gradient,) = value_and_gradients(formula, torch.tensor([2.0, -1.0]))
    assert (float(value), gradient.tolist(), value.requires_grad) == (7.0, [12.0, 3.0], False)


def test_the_thread_is_kept_and_follows_the_number_of_threads():
    seen: list = []
    usual = torch.get_num_threads()
    try:
        for threads in (1, 1, 2):
            torch.set_num_threads(threads)
            traced(seen)
    finally:
        torch.set_num_threads(usual)
    assert seen[0] == seen[1] and seen[0][0] != threading.get_ident()
    assert [threads for _, threads in seen] == [1, 1, 2]


def test_an_error_is_the_callers_and_the_thread_goes_on():
    def wrong(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("formula: got this, want that")

    with pytest.raises(ValueError, match="got this, want that"):
        value_and_gradients(wrong, torch.ones(1))
    traced([])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_has_a_thread_of_its_own():
    """As in a data loader's worker; the parent's thread does not exist there, and waiting for it would not end."""
    traced([])
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends a child that waits for ever
        try:
            traced([])
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_callers_on_many_threads():
    failed: list = []

    def call() -> None:
        try:
            for _ in range(20):
                traced([])
        except BaseException as error:
            failed.append(error)

    callers = [threading.Thread(target=call) for _ in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert not failed and not any(caller.is_alive() for caller in callers)


def test_waiting_for_the_thread_that_waits_for_us_was_a_hang():
    """A checkpoint runs its forward again on autograd's thread of the device; here one that stands for a GPU's."""

    class Within(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, device):
            ctx.device = device
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return value_and_gradients(cube, torch.full((2,), 3.0, device=ctx.device))[1][0], None

    x = torch.ones(2, requires_grad=True)
    Within.apply(x, "cpu").sum().backward()  # its nodes run on the thread that asks
    assert x.grad.tolist() == [27.0, 27.0]
    with pytest.raises(RuntimeError, match="want the loss outside of the checkpointed part"):
        Within.apply(x, "meta").sum().backward()
