"""The main job in one command, and an example of a plain PyTorch loop around a fused loss.

Validate the numerics of this machine, train a small language model with DPO on preference pairs, show what
it learnt on pairs it never saw, save it, and measure the fused loss against eager PyTorch on the same data.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastpref import linear_token_logprobs, models, sequence_logprobs
from fastpref.commands.demo import comparison, report
from fastpref.common import terminal
from fastpref.common.memory import keep_freed_memory
from fastpref.data.collate import IGNORE_INDEX, PairBatch, batches_by_length, tokenize_pairs
from fastpref.data.pairs import Pair, read_pairs, sample_pairs, split_pairs
from fastpref.models import Head, hidden_states
from fastpref.objectives.paired import DPOLoss, PreferenceOutput

WARM_UP = 0.1  # of all steps
MAX_GRAD_NORM = 1.0
QUICK_STEPS = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", metavar="FILE.jsonl", help="preference pairs as messages (default: the sample that fastpref ships)")
    add("--model", metavar="PATH", help="a transformers checkpoint, or smollm2 (the default) or tiny (with --quick)")
    add("--output", default="demo-model", metavar="DIR", help="where the trained model goes (default: %(default)s)")
    add("--epochs", type=_positive(int), default=1, help="passes over the training pairs (default: %(default)s)")
    add("--steps", type=_positive(int), help="optimizer steps, in place of --epochs")
    add("--batch-size", type=_positive(int), default=4, help="pairs a step (default: %(default)s)")
    add("--max-length", type=_positive(int), default=512, help="tokens a sequence (default: %(default)s)")
    add("--lr", type=_positive(float), help="peak learning rate (default: 2e-5; 2e-3 for the tiny model)")
    add("--beta", type=_positive(float), default=0.1, help="strength of the KL constraint (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the order of the batches (default: %(default)s)")
    add("--device", help="a torch device (default: the GPU if there is one)")
    add("--quick", action="store_true", help=f"{QUICK_STEPS} steps, on a tiny random model unless --model is given")
    add("--no-validate", dest="validate", action="store_false", help="skip the check of the numerics")


def _positive(kind: type) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"got {text}, want more than 0")
        return value

    return parse


def run(args: argparse.Namespace) -> int:
    begin = time.perf_counter()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cpu":
        keep_freed_memory()
    try:
        job = prepare(args, device)
    except ModuleNotFoundError as error:
        print(f"fastpref demo: {error}; run `pip install 'fastpref[demo]'`", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"fastpref demo: {error}", file=sys.stderr)
        return 2
    if args.validate and not validate():
        print("The numerics are wrong on this machine (above): not training on them.", file=sys.stderr)
        return 1
    same = train_and_save(job, args) and compare(job, args.beta)
    terminal.heading(f"Done in {time.perf_counter() - begin:.0f} s")
    return 0 if same else 1


def validate() -> bool:
    from fastpref.commands.cli import main

    terminal.heading("Numerics on this machine, against fp64")
    return main(["validate", "--quick"]) == 0


class Job(NamedTuple):
    model: Any
    tokenizer: Any
    head: Head
    train: list[PairBatch]
    tokens: list[int]  # of each training batch, without its padding
    heldout: list[PairBatch]
    precision: Callable[[], contextlib.AbstractContextManager]

    @property
    def device(self) -> torch.device:
        return self.head.weight.device


def prepare(args: argparse.Namespace, device: torch.device) -> Job:
    train, heldout = sample_pairs() if args.data is None else split_pairs(read_pairs(args.data))
    name = args.model or ("tiny" if args.quick else "smollm2")
    if name == "tiny":
        model, tokenizer = models.tiny(_texts(train + heldout), args.seed)
    else:
        if name == "smollm2":
            print("Loading SmolLM2-135M-Instruct (the first time it is converted, half a minute)", flush=True)
        model, tokenizer = models.load(models.smollm2() if name == "smollm2" else name)
    if args.lr is None:
        args.lr = 2e-3 if name == "tiny" else 2e-5
    model.to(device).eval()  # no dropout: policy and reference must see the same network
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def batches(pairs: Sequence[Pair]) -> list[PairBatch]:
        tokenized = tokenize_pairs(pairs, tokenizer, args.max_length)
        if len(tokenized) < len(pairs):
            print(f"{len(pairs) - len(tokenized)} pairs left out: their prompts have {args.max_length} tokens or more")
        return [batch.to(device) for batch in batches_by_length(tokenized, args.batch_size, pad or 0)]

    def precision() -> contextlib.AbstractContextManager:
        return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()

    training = batches(train)
    tokens = [int(batch.attention_mask.sum()) for batch in training]
    return Job(model, tokenizer, models.output_head(model), training, tokens, batches(heldout), precision)


def _texts(pairs: Sequence[Pair]) -> list[str]:
    return [message["content"] for pair in pairs for messages in pair for message in messages]


def train_and_save(job: Job, args: argparse.Namespace) -> bool:
    """Whether the saved model, loaded again, is the trained one."""
    order = batch_order(len(job.train), args.epochs, args.steps or (QUICK_STEPS if args.quick else None), args.seed)
    pairs, heldout_pairs = (sum(len(b.labels) for b in batches) // 2 for batches in (job.train, job.heldout))
    terminal.heading(
        f"DPO on {pairs} pairs, {len(order)} steps of {args.batch_size} pairs, beta {args.beta}, on {job.device}"
    )

    # the reference is the model as it is now: its log-probs are computed once, and no second model is kept
    used = sorted(set(order))
    print(f"Reference log-probs of {len(used)} training and {len(job.heldout)} held-out batches ...", flush=True)
    references = dict(zip(used, logps_of(job, [job.train[i] for i in used]), strict=True))
    heldout_references = logps_of(job, job.heldout)
    before = score(heldout_references, heldout_references, job.heldout, args.beta)
    with report.Progress(len(order)) as progress:
        for i, out in zip(order, train(job, references, order, args.lr, args.beta), strict=True):
            metrics = torch.stack([out.loss.detach(), out.margins.mean(), out.accuracies.mean()])
            loss, margin, accuracy = metrics.tolist()
            progress.update(loss, margin, accuracy, job.tokens[i])
    final = logps_of(job, job.heldout)
    report.show_scores(heldout_pairs, before, score(final, heldout_references, job.heldout, args.beta))

    job.model.save_pretrained(args.output)
    job.tokenizer.save_pretrained(args.output)
    loaded = job._replace(model=models.load(args.output)[0].to(job.device).eval())
    loaded = loaded._replace(head=models.output_head(loaded.model))
    difference = float((logps_of(loaded, job.heldout[:1])[0] - final[0]).abs().max())
    same = difference <= 1e-5 * float(final[0].abs().max())
    print(f"Saved in {args.output}/; loaded again with AutoModelForCausalLM.from_pretrained:")
    print(f"  log-probs of held-out responses {'the same' if same else 'NOT the same'}, at most {difference:.1e} apart")
    return same


def batch_order(batches: int, epochs: int, steps: int | None, seed: int) -> list[int]:
    """Which batch each step takes: every epoch all of them, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * batches if steps is None else steps
    rounds = -(-steps // batches)
    return torch.cat([torch.randperm(batches, generator=generator) for _ in range(rounds)])[:steps].tolist()


def train(
    job: Job, references: dict[int, Tensor], order: Sequence[int], lr: float, beta: float
) -> Iterator[PreferenceOutput]:
    """One optimizer step for each batch in `order`; yields what the loss says of it."""
    loss_fn = DPOLoss(beta=beta)
    optimizer = torch.optim.AdamW(job.model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    warm_up = max(1, round(WARM_UP * len(order)))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (len(order) - step) / max(1, len(order) - warm_up))
    )
    for i in order:
        batch = job.train[i]
        with job.precision():
            hidden = hidden_states(job.model, batch.input_ids, batch.attention_mask)
            out = loss_fn.from_hidden(
                hidden, job.head.weight, batch.labels, job.head.bias, ref_logps=references[i], **job.head.options()
            )
        out.loss.backward()
        nn.utils.clip_grad_norm_(job.model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield out


@torch.no_grad()
def logps_of(job: Job, batches: Sequence[PairBatch]) -> list[Tensor]:
    """Summed log-probs `[2B]` of the responses in each batch."""
    found = []
    for batch in batches:
        with job.precision():
            hidden = hidden_states(job.model, batch.input_ids, batch.attention_mask)
            logps = linear_token_logprobs(hidden, job.head.weight, batch.labels, job.head.bias, **job.head.options())
        found.append(sequence_logprobs(logps, batch.labels))
    return found


def score(logps: list[Tensor], references: list[Tensor], batches: list[PairBatch], beta: float) -> report.Scores:
    rows = []
    for policy, reference, batch in zip(logps, references, batches, strict=True):
        lengths = (batch.labels != IGNORE_INDEX).sum(1).clamp(min=1)
        pairs = torch.stack([beta * (policy - reference), policy, policy / lengths]).unflatten(1, (2, -1))
        rows.append(pairs[:, 0] - pairs[:, 1])
    margin, total, per_token = torch.cat(rows, 1)
    return report.Scores(*(float(x) for x in (
        (margin > 0).float().mean(), margin.mean(), (total > 0).float().mean(), (per_token > 0).float().mean()
    )))  # fmt: skip


@torch.no_grad()
def compare(job: Job, beta: float) -> bool:
    """Whether the fused gradients are right; prints the table of time and memory if they do."""
    batch = max(job.train, key=lambda b: b.labels.numel())
    with job.precision():
        hidden = hidden_states(job.model, batch.input_ids, batch.attention_mask)
    (references,) = logps_of(job, [batch])
    inputs = comparison.HeadBatch(hidden, job.head.weight, batch.labels, references, beta)
    scored, rows = int((batch.labels != IGNORE_INDEX).sum()), batch.labels.numel()
    terminal.heading(
        f"The loss alone, on {len(batch.labels) // 2} of these pairs: {scored} of {rows} rows scored, "
        f"hidden size {hidden.shape[-1]}, vocabulary {len(inputs.weight):,}"
    )
    with torch.enable_grad():
        errors = comparison.gradient_errors(inputs, job.device)
    agree = report.show_gradients(errors, comparison.gradient_limit(inputs))
    if agree:
        report.show_comparison(comparison.compare(inputs, job.device))
    return agree
