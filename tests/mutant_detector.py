"""A compact check of every kernel against the specification in fp64, sharp enough to notice each mutant.

    python tests/mutant_detector.py FOLDER BACKEND CHECK [FOLDER BACKEND CHECK ...]

Each FOLDER holds copies of both packages; CHECK is the name of one, or "all". Prints one JSON list for each: the names
of the checks that fail. All folders share one process that has imported PyTorch, which takes longer than the checks; a
fork of it checks each.
"""

from __future__ import annotations

import json
import mmap
import multiprocessing
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import interpreter
import torch
import torch._dynamo  # imported by the first operator call otherwise, once in each fork
from torch import Tensor

IGNORE = -100
CAPPED = {"temperature": 0.7, "logit_scale": 1.3, "softcap": 5.0}
MAP_NORESERVE = 0x4000  # Linux; Python's mmap names it from 3.13 on
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"  # as conftest.py found
TALL = 4101  # one full block of 4096 columns and a tail


def relative_error(got: Tensor, truth: Tensor) -> float:
    return float((got.detach().double() - truth).norm() / truth.norm())


def close(got: Tensor, truth: Tensor) -> None:
    """fp32 against fp64: rule (a) of the tolerance policy."""
    assert got.shape == truth.shape and got.dtype == torch.float32
    projection = ((got.detach().double() - truth) * truth).sum() / truth.square().sum()
    assert relative_error(got, truth) <= 1e-5 and abs(float(projection)) <= 1e-6


def close_loss(got: Tensor, truth: Tensor, terms: int) -> None:
    """A scalar, the sum of so many: rule (d)."""
    assert got.shape == () and relative_error(got, truth) <= 4 * torch.finfo(torch.float32).eps * terms**0.5


def as_good_as(got: Tensor, ideal: Tensor, truth: Tensor) -> None:
    """Half precision: rule (b). The ideal rounds where the kernel must and is exact elsewhere."""
    assert relative_error(got, truth) <= 1.25 * relative_error(ideal, truth)


def labels_of(rows: int, vocab: int) -> Tensor:
    labels = torch.randint(0, vocab, (rows,))
    labels[0], labels[1], labels[2], labels[-1] = vocab - 1, 0, IGNORE, IGNORE
    return labels


def rows_of(vocab: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Logits whose last column matters, labels, and an upstream gradient."""
    logits = torch.randn(6, vocab) * 2
    logits[:, -1] += 8
    return logits.to(dtype).requires_grad_(), labels_of(6, vocab), torch.randn(6)


def in_fp64(*tensors: Tensor) -> Iterator[Tensor]:
    return (t.detach().double().requires_grad_(t.requires_grad) for t in tensors)


class Checks:
    """Methods without a leading underscore are the checks; the first argument of each is the copy of fastpref."""

    def log_probs(self, fastpref, reference):
        for vocab, options in ((37, {}), (TALL, {}), (TALL, CAPPED)):
            logits, labels, upstream = rows_of(vocab)
            (exact,) = in_fp64(logits)
            got = fastpref.token_logprobs(logits, labels, **options)
            truth = reference.token_logprobs(exact, labels, **options)
            close(got, truth.detach())
            (gradient,) = torch.autograd.grad((got * upstream).sum(), logits)
            close(gradient, *torch.autograd.grad((truth * upstream.double()).sum(), exact))

    def statistics(self, fastpref, reference):
        logits, labels, upstream = rows_of(TALL)
        with torch.no_grad():
            logits[0, 5] = logits[0].max() + 1  # beats the label, the last column, from outside the tail
            logits[1, 0] = logits[1].max() + 1  # is the label
        (exact,) = in_fp64(logits)
        got, truth = fastpref.token_statistics(logits, labels), reference.token_statistics(exact, labels)
        assert torch.equal(got.is_top1, truth.is_top1)
        for name in ("logps", "entropy", "mean_logit", "log_sum_sq"):
            close(getattr(got, name), getattr(truth, name).detach())
        gradient = torch.autograd.grad((got.entropy * upstream).sum(), logits)
        close(*gradient, *torch.autograd.grad((truth.entropy * upstream.double()).sum(), exact))

    def entropy_of_large_logits(self, fastpref, reference):
        """A difference of numbers near 1000 if it is not taken of z - max."""
        logits, labels = torch.randn(4, 37) + 1000, torch.zeros(4, dtype=torch.long)
        truth = reference.token_statistics(logits.double(), labels)
        close(fastpref.token_statistics(logits, labels).entropy, truth.entropy)

    def logits_far_apart(self, fastpref, reference):
        """Lanes whose largest logits differ by more than fp32's exponentials can."""
        logits = torch.randn(3, 300)
        logits[:, ::7] += 200
        labels = torch.tensor([0, 1, 294])
        close(fastpref.token_logprobs(logits, labels), reference.token_logprobs(logits.double(), labels))

    def divergences(self, fastpref, reference):
        for direction, beta in (("reverse", 0.5), ("forward", 0.5), ("jsd", 0.3)):
            policy, ref, upstream = (torch.randn(4, 300) * 3).requires_grad_(), torch.randn(4, 300) * 3, torch.randn(4)
            exact, exact_ref = in_fp64(policy, ref)
            got = fastpref.token_kl(policy, ref, direction, beta=beta)
            truth = reference.token_kl(exact, exact_ref, direction, beta=beta)
            close(got, truth.detach())
            (gradient,) = torch.autograd.grad((got * upstream).sum(), policy)
            close(gradient, *torch.autograd.grad((truth * upstream.double()).sum(), exact))

    def half_precision_gradient(self, fastpref, reference):
        logits, labels, upstream = rows_of(513, torch.float16)
        (exact,) = in_fp64(logits)
        (got,) = torch.autograd.grad((fastpref.token_logprobs(logits, labels) * upstream).sum(), logits)
        (truth,) = torch.autograd.grad((reference.token_logprobs(exact, labels) * upstream.double()).sum(), exact)
        as_good_as(got, truth.half(), truth)

    def half_precision_head(self, fastpref, reference):
        """Likely labels, whose rounded logits would dominate the log-sum-exp."""
        hidden, weight = torch.randn(16, 32).half(), (torch.randn(257, 32) * 0.5).half()
        labels = (hidden.double() @ weight.double().t()).argmax(1)
        truth = reference.linear_token_logprobs(hidden.double(), weight.double(), labels)
        rounded, chosen = hidden.double() @ weight.double().t(), labels[:, None]
        exact = rounded.gather(1, chosen)
        ideal = rounded.half().double().scatter(1, chosen, exact).log_softmax(1).gather(1, chosen)[:, 0]
        as_good_as(fastpref.linear_token_logprobs(hidden, weight, labels), ideal, truth)

    def heads(self, fastpref, reference):
        """Every plan, with products over tiles of rows or slices of 128 of the 300 columns."""
        hidden, weight, bias = (torch.randn(*shape).requires_grad_() for shape in ((4, 3, 8), (300, 8), (300,)))
        labels, upstream = labels_of(12, 300).view(4, 3), torch.randn(4, 3)
        exact = tuple(in_fp64(hidden, weight, bias))

        def weighted(f, *leaves, **options):
            logps = f(leaves[0], leaves[1], labels, leaves[2], **options, **CAPPED)
            return (logps * upstream.to(logps.dtype)).sum()

        truth = torch.autograd.grad(weighted(reference.linear_token_logprobs, *exact), exact)
        for plan in ("store", "recompute"):
            result = weighted(
                fastpref.linear_token_logprobs, hidden, weight, bias, plan=plan, workspace_bytes=4 * 4 * 300
            )
            for gradient, want in zip(torch.autograd.grad(result, (hidden, weight, bias)), truth, strict=True):
                close(gradient, want)
        result = weighted(fastpref.linear_token_logprobs, hidden, weight.detach(), bias.detach(), plan="frozen")
        close(*torch.autograd.grad(result, hidden), truth[0])

    def pairs_from_hidden_states(self, fastpref, reference):
        hidden, weight = torch.randn(6, 4, 8).requires_grad_(), torch.randn(130, 8).requires_grad_()
        labels, refs = labels_of(24, 130).view(6, 4), torch.randn(6) * 4 - 15
        exact = tuple(in_fp64(hidden, weight))
        sums = reference.sequence_logprobs(reference.linear_token_logprobs(*exact, labels), labels)
        counts = (labels != IGNORE).sum(1)
        objective = reference.PairedObjective(label_smoothing=0.1)
        sequences = (x.chunk(2) for x in (sums, refs.double(), counts))
        truth = reference.paired_loss(*(half for pair in sequences for half in pair), objective)
        wanted = torch.autograd.grad(truth, exact)
        loss_fn = fastpref.DPOLoss(label_smoothing=0.1)
        for plan in ("pair", "store"):
            out = loss_fn.from_hidden(hidden, weight, labels, ref_logps=refs, plan=plan, workspace_bytes=4 * 8 * 130)
            close_loss(out.loss, truth.detach(), terms=24)
            for gradient, want in zip(torch.autograd.grad(out.loss, (hidden, weight)), wanted, strict=True):
                close(gradient, want)

    def objectives(self, fastpref, reference):
        """Loss, metrics and each token's coefficient; the ignored tokens have log-probs that must not count."""
        from fastpref.ops.common import encode

        logps, labels, refs = torch.randn(40) - 2, torch.randint(0, 9, (40,)), torch.randn(8) - 9
        labels[::3] = IGNORE
        edges = torch.tensor([0, 3, 9, 14, 20, 21, 28, 33, 40])
        mixture = (("sigmoid", "ipo", "sft"), (0.5, 1.0, 0.3))
        for losses, weights in ((("sigmoid",), (1.0,)), mixture, (("aot", "hinge", "exo_pair"), (1.0, 0.7, 0.2))):
            objective = reference.PairedObjective(losses, weights, beta=0.3, label_smoothing=0.1)
            for cu_seqlens in (edges, None):
                shape = labels if cu_seqlens is not None else labels.view(8, 5)
                (exact,) = in_fp64(logps.requires_grad_())
                sums = reference.sequence_logprobs(exact, shape, cu_seqlens=cu_seqlens)
                counts = reference.sequence_logprobs(torch.ones(40).double(), shape, cu_seqlens=cu_seqlens)
                sequences = [half for x in (sums, refs.double(), counts) for half in x.chunk(2)]
                truth = reference.paired_loss(*sequences, objective)
                loss, metrics, coefs = torch.ops.fastpref.paired_loss(
                    logps.detach(), labels, cu_seqlens, refs, None, None, encode(objective), 4, IGNORE
                )
                close_loss(loss, truth.detach(), terms=40)
                close(metrics, reference.paired_metrics(*sequences, objective).detach())
                close(coefs, *torch.autograd.grad(truth, exact))

    def lists(self, fastpref, reference):
        """Groups of three, one and two, with ties."""
        logps, refs = torch.randn(20) * 3 - 30, torch.randn(20) * 3 - 30
        ranks, group = torch.randint(0, 3, (20,)), torch.tensor([0, 1, 0, 3, 0, 1, 4, 1, 5, 5] * 2) * 2
        group[-1] = 99
        for name in reference.LIST_LOSSES:
            (exact,) = in_fp64(logps.requires_grad_())
            loss_fn = fastpref.ListDPOLoss(0.3, name)
            out = loss_fn(logps, refs, ranks, group)
            truth = reference.list_loss(0.3 * (exact - refs.double()), ranks, group, loss_fn.objective)
            close_loss(out.loss, truth.detach(), terms=20)
            close(*torch.autograd.grad(out.loss, logps), *torch.autograd.grad(truth, exact))

    def rows_far_apart(self, fastpref, reference):
        """The third row begins 2^31 elements behind the first. Memory that nobody touches takes no space, and what
        precedes the first row is where an offset that has wrapped around would look."""
        stride, vocab = 1 << 30, 64
        size = 4 * stride + vocab
        if DEVICE == "cuda":
            memory = torch.zeros(size, dtype=torch.float16)
        else:
            lazy = mmap.mmap(-1, 2 * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
            memory = torch.frombuffer(lazy, dtype=torch.float16)
        logits = memory.as_strided((3, vocab), (stride, 1), 2 * stride)
        logits.copy_(torch.randn(3, vocab))
        labels = torch.tensor([1, 2, 3])
        close(fastpref.token_logprobs(logits, labels), reference.token_logprobs(logits.double(), labels))


def failing_checks(folder: str, backend: str, wanted: str) -> list[str]:
    sys.path.insert(0, folder)
    import fastpref
    from fastpref import reference

    assert Path(fastpref.__file__).is_relative_to(folder)
    fastpref.set_backend(backend)
    torch.set_default_device(DEVICE)
    checks, failing = Checks(), []
    names = [name for name in vars(Checks) if not name.startswith("_")] if wanted == "all" else [wanted]
    for name in names:
        torch.manual_seed(0)
        try:
            getattr(checks, name)(fastpref, reference)
        except AssertionError:  # a mutant that crashes is not one that a comparison has caught
            failing.append(name)
    return failing


def main() -> None:
    torch.set_num_threads(1)
    interpreter.hasten()
    jobs = list(zip(sys.argv[1::3], sys.argv[2::3], sys.argv[3::3], strict=True))
    context = multiprocessing.get_context("fork" if DEVICE == "cpu" else "spawn")  # CUDA does not survive a fork
    with context.Pool(min(8, os.cpu_count() or 1), maxtasksperchild=1) as pool:
        for found in pool.starmap(failing_checks, jobs, chunksize=1):
            print(json.dumps(found))


if __name__ == "__main__":
    main()
