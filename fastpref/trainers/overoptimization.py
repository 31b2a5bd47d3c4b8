"""Stops a run that exploits its reward: by its KL from the reference, or by what a second scorer says."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from fastpref.common import checks

KL, REWARD = "kl/exact", "reward"


class StopOveroptimization(TrainerCallback, ExportableState):
    """A callback of `RLOOTrainer` and `GRPOTrainer` that stops a run, and says why.

    The more a policy is optimised against a reward model, the further it is from the reference and the less that reward
    means (Gao et al. 2023, arXiv 2210.10760).

    Args:
        max_kl: stop where the exact KL of a response is above this, in nats. It needs `track_kl`, `kl_target` or an
            exact KL in the reward.
        patience: stop where, for so many logs in a row, a held-out scorer gave less than at its best while the reward
            that is trained on was higher than there. It needs `heldout_funcs`.
        heldout: the name of that scorer; by default the only one.
        smoothing: weight of the past in the moving averages that are compared, in [0, 1).

    Raises:
        ValueError: there is no rule, or a number is out of its range; in a run, a metric that a rule needs is missing.
    """

    def __init__(
        self, max_kl: float | None = None, patience: int | None = None, heldout: str | None = None,
        smoothing: float = 0.7,
    ) -> None:  # fmt: skip
        if max_kl is None and patience is None:
            raise ValueError("max_kl: got None without patience, want one of them: there is nothing to stop by")
        if max_kl is not None:
            checks.positive("max_kl", max_kl)
        if patience is not None:
            checks.positive("patience", patience)
        checks.within("smoothing", smoothing, 0, 1)
        self.max_kl, self.patience, self.heldout, self.smoothing = max_kl, patience, heldout, smoothing
        self.reason: str | None = None
        self._averages: dict[str, float] = {}
        self._best: dict[str, float] = {}  # of the held-out scorer, and the step and the reward there
        self._worse = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        names = ("max_kl", "patience", "heldout", "smoothing")
        kept = {"_averages": self._averages, "_best": self._best, "_worse": self._worse}
        return {"args": {name: getattr(self, name) for name in names}, "attributes": kept}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.reason = None
        if state.global_step == 0:
            self._averages, self._best, self._worse = {}, {}, 0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or REWARD not in logs:  # of an evaluation, or of an update that samples nothing
            return
        self.reason = self._kl_rule(logs, state.global_step) or self._heldout_rule(logs, state.global_step)
        if self.reason is not None:
            control.should_training_stop = True
            if state.is_world_process_zero:
                print(f"fastpref: stopped at step {state.global_step}: {self.reason}", flush=True)

    def _kl_rule(self, logs: dict[str, float], step: int) -> str | None:
        if self.max_kl is None:
            return None
        kl = _logged(logs, KL, "track_kl=True")
        return None if kl <= self.max_kl else f"{KL} is {kl:.3g} nats a response, and max_kl is {self.max_kl:g}"

    def _heldout_rule(self, logs: dict[str, float], step: int) -> str | None:
        if self.patience is None:
            return None
        names = [name for name in logs if name.startswith("heldout/") and name.endswith("/mean")]
        name = f"heldout/{self.heldout}/mean" if self.heldout else names[0] if len(names) == 1 else None
        if name is None:
            raise ValueError(f"heldout: got None with {len(names)} held-out scorers, want the name of one")
        second = self._smooth(name, _logged(logs, name, "heldout_funcs with that name"))
        reward = self._smooth(REWARD, _logged(logs, REWARD, "rewards"))
        if not self._best or second >= self._best["heldout"]:
            self._best, self._worse = {"heldout": second, "reward": reward, "step": step}, 0
            return None
        self._worse = self._worse + 1 if reward > self._best["reward"] else 0
        if self._worse < self.patience:
            return None
        best = self._best
        return (
            f"since step {best['step']:.0f} {name} went from {best['heldout']:.3g} to {second:.3g} while the "
            f"reward went from {best['reward']:.3g} to {reward:.3g} (moving averages)"
        )

    def _smooth(self, name: str, value: float) -> float:
        past = self._averages.get(name, value)
        self._averages[name] = self.smoothing * past + (1 - self.smoothing) * value
        return self._averages[name]


def _logged(logs: dict[str, float], name: str, source: str) -> float:
    value = logs.get(name)
    if value is None or not math.isfinite(value):
        raise ValueError(f"StopOveroptimization: got no {name} in the log, want it there: {source}")
    return value
