"""Two processes give what one process with their batches gives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support_trainers import config, furthest, pairs, responses, tiny, train, weights

METHODS = {"dpo": "DPO", "apo": "KTO", "reward": "Reward", "orpo": "ORPO"}
STEPS = 3


def run(method: str, folder: str, batch: int):
    """Train, on as many processes as there are; rank 0 leaves losses and weights in the folder."""
    import transformers

    from fastpref import trainers

    model, tokenizer = tiny()
    if method == "reward":
        model.config.num_labels = 1
        torch.manual_seed(3)
        model = transformers.AutoModelForSequenceClassification.from_config(model.config)
    # one shuffle for all, so that two ranks' batches are one process's batch; SGD: Adam would blow up rounding
    options = {"optim": "sgd", "learning_rate": 0.05, "per_device_train_batch_size": batch, "max_steps": STEPS}
    options |= {"ddp_find_unused_parameters": False, "max_length": 256, "train_sampling_strategy": "sequential"}
    if method == "apo":  # without z0, whose mismatched pairs depend on the batch size
        options["loss_type"] = "apo_zero_unpaired"
    args = config(getattr(trainers, f"{METHODS[method]}Config"), Path(folder), **options)
    data = responses() if method == "apo" else pairs()
    trainer = getattr(trainers, f"{METHODS[method]}Trainer")(
        model=model, args=args, train_dataset=data, processing_class=tokenizer
    )
    log = train(trainer)
    if args.process_index == 0:
        torch.save({"log": log, "weights": weights(trainer)}, os.path.join(folder, "found.pt"))


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_are_one_process(method, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = {}
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        batch = 4 // ranks
        code = f"from tests.test_trainers_distributed import run; run({method!r}, {str(folder)!r}, {batch})"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        (folder / "run.py").write_text(code)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd(), "TRITON_INTERPRET": "1"}
        done = subprocess.run(
            [*command, str(folder / "run.py")], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found[ranks] = torch.load(folder / "found.pt")
    one, two = found[1], found[2]
    keys = {"reward": ("margin", "mean_reward")}.get(method, ("rewards/chosen", "logps/rejected", "entropy"))
    assert furthest(one["weights"], two["weights"]) < 2e-6
    for a, b in zip(one["log"], two["log"], strict=True):
        for key in ("num_tokens", *keys):
            assert b[key] == pytest.approx(a[key], rel=2e-5, abs=2e-6), key
