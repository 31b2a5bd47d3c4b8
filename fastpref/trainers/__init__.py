"""Trainers with TRL's names and arguments: to move a script, change its import.

    from fastpref.trainers import DPOConfig, DPOTrainer  # was: from trl import DPOConfig, DPOTrainer

Each method has a trainer and a configuration of its own name. They are imported when first used.
"""

from typing import TYPE_CHECKING

from fastpref.common.lazy import exports

_HOMES = {
    "CPOConfig": "fastpref.trainers.config",
    "CPOTrainer": "fastpref.trainers.paired",
    "DPOConfig": "fastpref.trainers.config",
    "DPOTrainer": "fastpref.trainers.paired",
    "DistillationConfig": "fastpref.trainers.distillation_config",
    "DistillationTrainer": "fastpref.trainers.distillation",
    "GRPOConfig": "fastpref.trainers.rl_config",
    "GRPOTrainer": "fastpref.trainers.rl_methods",
    "IPOConfig": "fastpref.trainers.config",
    "IPOTrainer": "fastpref.trainers.paired",
    "KTOConfig": "fastpref.trainers.config",
    "KTOTrainer": "fastpref.trainers.unpaired",
    "ORPOConfig": "fastpref.trainers.config",
    "ORPOTrainer": "fastpref.trainers.paired",
    "PRMConfig": "fastpref.trainers.config",
    "PRMTrainer": "fastpref.trainers.reward",
    "PreferenceConfig": "fastpref.trainers.config",
    "PromptTrees": "fastpref.trainers.trees",
    "RLOOConfig": "fastpref.trainers.rl_config",
    "RLOOTrainer": "fastpref.trainers.rl_methods",
    "ResponseLogps": "fastpref.trainers.trees",
    "RewardConfig": "fastpref.trainers.config",
    "RewardTrainer": "fastpref.trainers.reward",
    "SimPOConfig": "fastpref.trainers.config",
    "SimPOTrainer": "fastpref.trainers.paired",
    "StopOveroptimization": "fastpref.trainers.overoptimization",
}
__all__ = list(_HOMES)

if TYPE_CHECKING:
    from fastpref.trainers.config import CPOConfig as CPOConfig
    from fastpref.trainers.config import DPOConfig as DPOConfig
    from fastpref.trainers.config import IPOConfig as IPOConfig
    from fastpref.trainers.config import KTOConfig as KTOConfig
    from fastpref.trainers.config import ORPOConfig as ORPOConfig
    from fastpref.trainers.config import PreferenceConfig as PreferenceConfig
    from fastpref.trainers.config import PRMConfig as PRMConfig
    from fastpref.trainers.config import RewardConfig as RewardConfig
    from fastpref.trainers.config import SimPOConfig as SimPOConfig
    from fastpref.trainers.distillation import DistillationTrainer as DistillationTrainer
    from fastpref.trainers.distillation_config import DistillationConfig as DistillationConfig
    from fastpref.trainers.overoptimization import StopOveroptimization as StopOveroptimization
    from fastpref.trainers.paired import CPOTrainer as CPOTrainer
    from fastpref.trainers.paired import DPOTrainer as DPOTrainer
    from fastpref.trainers.paired import IPOTrainer as IPOTrainer
    from fastpref.trainers.paired import ORPOTrainer as ORPOTrainer
    from fastpref.trainers.paired import SimPOTrainer as SimPOTrainer
    from fastpref.trainers.reward import PRMTrainer as PRMTrainer
    from fastpref.trainers.reward import RewardTrainer as RewardTrainer
    from fastpref.trainers.rl_config import GRPOConfig as GRPOConfig
    from fastpref.trainers.rl_config import RLOOConfig as RLOOConfig
    from fastpref.trainers.rl_methods import GRPOTrainer as GRPOTrainer
    from fastpref.trainers.rl_methods import RLOOTrainer as RLOOTrainer
    from fastpref.trainers.trees import PromptTrees as PromptTrees
    from fastpref.trainers.trees import ResponseLogps as ResponseLogps
    from fastpref.trainers.unpaired import KTOTrainer as KTOTrainer

__getattr__, __dir__ = exports(__name__, _HOMES)
