"""The benchmark of hosts: the same step with and without fastpref, checked before it is timed."""

from __future__ import annotations

import argparse

import pytest
import torch

pytest.importorskip("trl")

from benchmarks import hosts

ARGS = argparse.Namespace(
    model="tiny", data=None, host=None, pairs=1, batches=2, repeats=1, max_length=128, device="cpu"
)


@pytest.fixture
def sizes(monkeypatch):
    """Peaks by hand: measuring them takes a process each."""
    peaks = {"own": 180, "fastpref": 110, "own backbone": 100, "fastpref backbone": 90}
    monkeypatch.setattr(hosts, "peak_in_process", lambda what, *_: peaks[what])


def test_record_and_table(sizes, monkeypatch):
    monkeypatch.setattr(ARGS, "host", ["TRL DPOTrainer", "TRL KTOTrainer", hosts.LOOP])
    found = hosts.run(ARGS)
    assert [(r["case"], r["provider"]) for r in found["rows"]] == [
        (host, who) for host in ARGS.host for who in (hosts.OWN, hosts.FAST)
    ]
    assert all(len(r["seconds"]) == 2 and r["head_bytes"] in (80, 20) for r in found["rows"])
    assert all(c["passed"] and 0 < c["errors"]["gradients"] < 1e-4 for c in found["gate"])
    speed, memory = found["targets"]  # of the first
    assert memory["value"] == 0.25 and memory["met"] and speed["limit"] == 1.5
    assert sum(line.startswith("| ") for line in hosts.table(found).splitlines()) == 4


def test_wrong_gradients_are_not_timed(sizes, monkeypatch):
    monkeypatch.setattr(ARGS, "host", [hosts.LOOP])
    monkeypatch.setattr(hosts, "seconds", lambda *_: pytest.fail("timed"))
    loss_of = hosts.batch_loss

    def wrong(*args):
        out = loss_of(*args)
        return out._replace(loss=out.loss + 1e-3 * (out.loss - out.loss.detach()))

    monkeypatch.setattr(hosts, "batch_loss", wrong)
    found = hosts.run(ARGS)
    own, fast = found["gate"]
    assert found["rows"] == [] and own["passed"] and not fast["passed"]
    assert f"- absent: {hosts.LOOP}: errors of " in hosts.table(found)


def test_rounding_of_the_host_was_taken_for_an_error_of_ours(sizes, monkeypatch):
    """TRL's ORPO gradients on SmolLM2 are 1.2e-4 off in fp32, ours 3.4e-6: they differ, and ours are right."""
    prepare = hosts.prepare

    def rounding(*args):
        models, step = prepare(*args)

        def rounded(with_fastpref, number):
            loss = step(with_fastpref, number)
            if not with_fastpref and loss.dtype == torch.float32:
                for p in models[0].parameters():
                    p.grad *= 1 + 1.2e-4
            return loss

        return models, rounded

    monkeypatch.setattr(hosts, "prepare", rounding)
    monkeypatch.setattr(ARGS, "host", [hosts.LOOP])
    found = hosts.run(ARGS)
    own, fast = found["gate"]
    assert own["errors"]["gradients"] == pytest.approx(1.2e-4, rel=0.1) and fast["errors"]["gradients"] < 1e-5
    assert (own["passed"], fast["passed"], len(found["rows"])) == (False, True, 2)


@pytest.mark.parametrize("host", ["TRL DPOTrainer", hosts.LOOP])  # packed, and padded
@pytest.mark.parametrize("what", ["fastpref backbone", "own backbone"])
def test_backbone_peak_runs_the_backbone_alone(host, what, monkeypatch, tmp_path):
    (model, *_), step = hosts.prepare(host, ARGS, hosts.model_folder("tiny", tmp_path), str(tmp_path))
    monkeypatch.setattr(hosts.measure, "peak_bytes", lambda run, device: run() or 7)
    head_ran = []
    model.lm_head.register_forward_hook(lambda *_: head_ran.append(1))
    assert hosts.peak(what, model, step, torch.device("cpu")) == 7
    assert what == "own backbone" or not head_ran
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
