"""Two processes give what one process with their batches gives: losses and gradients, however they are wrapped."""

from __future__ import annotations

import importlib.util
import io
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

pytest.importorskip("trl")
from tests import support_distributed as support
from tests import trl_hosts
from tests.support_ranks import EXAMPLES


def resumes() -> bool:
    """Whether a rank on a CPU loads its optimizer: transformers 5.17 asks for "cpu:0", which torch 2.11 lacks."""
    saved = io.BytesIO()
    torch.save(torch.zeros(1), saved)
    saved.seek(0)
    try:
        torch.load(saved, map_location=torch.device("cpu", 0))
    except RuntimeError:
        return False
    return True


CAN_RESUME = resumes()
WRAPPERS = {"ddp": "DistributedDataParallel", "fsdp2": "FSDP", "zero2": "DeepSpeedEngine", "zero3": "DeepSpeedEngine"}
SHARDING = ("fsdp2", "zero3")
NAMES = [
    *(f"loop:{case}" for case in support.LOOPS),
    *(f"ours:{case}" for case in support.OURS),
    *("trl:dpo", "trl:apo", "trl:reward", *["resumed:tr-dpo"] * CAN_RESUME, "evaluated:lora-dpo"),
    *("adapted:goes-on-dpo", "adapted:fresh-dpo"),
]
# z0 of TRL's KTO depends on how batches are cut: two patched ranks are two unpatched ones
ALIKE = [f"{wrapper}/{kind}:kto" for wrapper in ("ddp", "fsdp2") for kind in ("trl", "unpatched")]
REFUSED = ["fsdp2/refused:precompute", "fsdp2/refused:budget"]
CASES = [f"{wrapper}/{name}" for wrapper, name in itertools.product(("ddp", "fsdp2"), NAMES)]
CASES.remove("fsdp2/ours:budget-dpo")
if not hasattr(FSDPModule, "reset_iter_state"):  # an older torch keeps parts of a model that had no backward whole
    CASES = [case for case in CASES if case not in ("fsdp2/ours:tr-dpo", "fsdp2/resumed:tr-dpo")]
UNEVEN = [f"ddp/uneven:{case}" for case in support.UNEVEN] + ["fsdp2/uneven:kto"]
RESUMED = "ddp/uneven-resumed:dpo"
DISTILLED = ["ddp/distilled:online", "ddp/distilled:cached", "ddp/distilled:on-policy", "fsdp2/distilled:online"]
BUGS = {  # found by these cases
    "fsdp2/loop:head-dpo": "a-head-sharded-on-its-own-gets-the-mean-gradient",
    "fsdp2/loop:plain-dpo": "fully_shard-gathers-without-an-accelerator",
    "fsdp2/ours:tr-dpo": "a-moving-reference-is-sharded-like-the-policy",
    "fsdp2/resumed:tr-dpo": "a-sharded-reference-is-saved-and-resumed-from",
    "fsdp2/evaluated:lora-dpo": "ranks-do-not-fill-a-cache-with-a-sharded-reference",
}
PICTURED = [
    *(f"ddp/pictured:{case}" for case in ("accumulated-dpo", "budget-kto", "reward")),
    "fsdp2/pictured:each-dpo",
]
PICTURED_TRL = ["ddp/pictured:trl-dpo", "ddp/unpatched-pictured:trl-dpo"]
MIXED = "fsdp2/mixed:dpo"
DEEPSPEED = [
    f"{wrapper}/{name}"
    for wrapper in ("zero2", "zero3")
    for name in ("ours:dpo", "ours:online-dpo", "ours:untied-dpo", "ours:apo", "ours:reward", "trl:dpo", "trl:apo")
]


def launch(folder: Path, cases: list[str], **environment: str) -> dict:
    """All cases in one pair of processes: starting them takes longer than running them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    checkpoints = os.pathsep.join(trl_hosts.checkpoint(seed) for seed in (0, 1))
    environment |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join((os.getcwd(), str(Path(__file__).parents[1]))),
        trl_hosts.CHECKPOINTS: checkpoints,
    }
    done = subprocess.run(
        [*command, "-m", "tests.support_distributed", str(folder), str(EXAMPLES // 2), *cases],
        env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return torch.load(folder / "found.pt", weights_only=False)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> dict:
    cases = [*CASES, *ALIKE, *REFUSED, *UNEVEN, *DISTILLED, *PICTURED, *PICTURED_TRL, MIXED]
    return launch(tmp_path_factory.mktemp("ranks"), cases + [RESUMED] * CAN_RESUME)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process gives, by name."""
    known: dict[str, dict] = {}

    def measured(name: str) -> dict:
        if name not in known:
            known[name] = support.measure(name, "one", EXAMPLES, tmp_path_factory.mktemp("one"))
        return known[name]

    return measured


def difference(found: dict, wanted: dict) -> float:
    """Relative, over all parameters together."""
    assert found.keys() == wanted.keys()
    error = sum(float((found[name].double() - value.double()).square().sum()) for name, value in wanted.items())
    return (error / sum(float(value.double().square().sum()) for value in wanted.values())) ** 0.5


def assert_alike(found: dict, wanted: dict) -> None:
    assert [log["loss"] for log in found["logs"]] == pytest.approx([log["loss"] for log in wanted["logs"]], rel=1e-6)
    for a, b in zip(found["gradients"], wanted["gradients"], strict=bool(found["gradients"])):
        assert difference(a, b) < 1e-6
    # what SGD added in the last bits of weights a hundred times larger
    assert difference(found["update"], {n: wanted["update"][n] for n in found["update"]}) < 2e-6
    for a, b in zip(found["logs"], wanted["logs"], strict=True):
        for key in a.keys() & {"num_tokens", "rewards/chosen", "logps/rejected", "entropy", "margin", "mean_reward"}:
            assert a[key] == pytest.approx(b[key], rel=2e-5, abs=2e-6), key


@pytest.mark.parametrize("case", CASES, ids=lambda case: BUGS.get(case, case))
def test_two_ranks_are_one_process(case, ranks, one):
    wrapper, _, name = case.partition("/")
    found, wanted = ranks[case], one(name)
    assert found["wrapped"].startswith(WRAPPERS[wrapper]) and bool(found["sharded"]) == (wrapper in SHARDING)
    assert_alike(found, wanted)
    if "saved" in wanted:
        assert difference(found["saved"], wanted["saved"]) < 2e-6


@pytest.mark.parametrize("case", DISTILLED)
def test_two_ranks_distil_as_one_process(case, ranks, one):
    """On the data, by cached hidden states, and on the same samples; the last batch is uneven."""
    found, wanted = ranks[case], one(case.partition("/")[2])
    assert_alike(found, wanted)
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
    sampled = {"completions/mean_length", "completions/clipped_ratio", "completions/mean_terminated_length"}
    for a, b in zip(found["logs"], wanted["logs"], strict=True):
        assert {key: a.get(key) for key in sampled} == {key: b.get(key) for key in sampled}


@pytest.mark.parametrize("case", [*UNEVEN, *PICTURED])
def test_repeated_examples_of_an_uneven_batch_count_for_nothing(case, ranks, one):
    """Accelerate fills the last batch up with the first examples; accuracy was 0.75 where it is 0.8. With images, a
    rank's batch may have none."""
    found, wanted = ranks[case], one(case.partition("/")[2])
    assert_alike(found, wanted)
    logs = [*zip(found["logs"], wanted["logs"], strict=True)]
    logs += zip(found["evaluations"], wanted["evaluations"], strict=True)
    logs.append((found["evaluations"][1], found["evaluations"][0]))  # a stream of the same data
    for a, b in logs:
        assert a.keys() == b.keys()
        for key in a.keys() - {"grad_norm", "eval_model_preparation_time"}:
            assert a[key] == pytest.approx(b[key], rel=2e-5, abs=2e-6), key


@pytest.mark.skipif(not CAN_RESUME, reason="this torch cannot load to cpu:0, as transformers does on ranks")
def test_an_accumulated_update_lost_real_examples_before_a_filled_batch(ranks, one):
    """And a resumed run trained on repeated ones: it had skipped batches, and Accelerate forgot how many are left."""
    found, wanted = ranks[RESUMED], one("uneven-resumed:dpo")
    assert_alike(found, wanted)
    assert len(found["gradients"]) == 2 and len(found["resumed"]) == 1
    for name, gradient in found["gradients"][-1].items():
        torch.testing.assert_close(found["resumed"][0][name], gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_the_patch_changes_nothing_on_two_ranks(wrapper, ranks):
    assert_alike(ranks[f"{wrapper}/trl:kto"], ranks[f"{wrapper}/unpatched:kto"])


def test_the_patch_changes_nothing_on_two_ranks_with_images(ranks):
    found, wanted = (ranks[case] for case in PICTURED_TRL)
    for run in (found, wanted):  # sums over tokens that TRL cuts to the first rank's in an uneven last batch
        for name in ("num_tokens", "entropy"):
            del run["logs"][-1][name]
    assert_alike(found, wanted)


def test_ranks_without_images_waited_for_those_that_shared_the_tower_with_them(ranks):
    assert "images: got records without any beside others with some" in ranks[MIXED]["error"]


def test_sharding_changes_nothing(ranks):
    assert_alike(ranks["fsdp2/trl:kto"], ranks["ddp/trl:kto"])


def test_weights_that_only_rank_0_has_are_not_precomputed_from(ranks):
    assert "precompute_ref_log_probs: got True with cpu_ram_efficient_loading" in ranks[REFUSED[0]]["error"]


def test_ranks_with_different_numbers_of_parts_waited_for_each_other(ranks):
    """FSDP gathers weights in every part's forward; a budget is refused there."""
    assert "token_budget: got 8, which fastpref does not support: FSDP gathers" in ranks[REFUSED[1]]["error"]


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_deepspeed(tmp_path, one):
    found = launch(tmp_path, DEEPSPEED, DS_ACCELERATOR="cpu", ACCELERATE_USE_DEEPSPEED="true")
    for case in DEEPSPEED:
        wrapper, _, name = case.partition("/")
        assert found[case]["wrapped"] == WRAPPERS[wrapper] and bool(found[case]["sharded"]) == (wrapper in SHARDING)
        assert_alike(found[case], one(name))
