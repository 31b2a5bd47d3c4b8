"""Trainers with TRL's names and arguments: to move a script, change its import.

    from fastpref.trainers import DPOConfig, DPOTrainer  # was: from trl import DPOConfig, DPOTrainer

Each method has a trainer and a configuration of its own name.
"""

from fastpref.trainers.config import (
    CPOConfig,
    DPOConfig,
    IPOConfig,
    KTOConfig,
    ORPOConfig,
    PreferenceConfig,
    PRMConfig,
    RewardConfig,
    SimPOConfig,
)
from fastpref.trainers.distillation import DistillationTrainer
from fastpref.trainers.distillation_config import DistillationConfig
from fastpref.trainers.overoptimization import StopOveroptimization
from fastpref.trainers.paired import CPOTrainer, DPOTrainer, IPOTrainer, ORPOTrainer, SimPOTrainer
from fastpref.trainers.reward import PRMTrainer, RewardTrainer
from fastpref.trainers.rl_config import GRPOConfig, RLOOConfig
from fastpref.trainers.rl_methods import GRPOTrainer, RLOOTrainer
from fastpref.trainers.trees import PromptTrees, ResponseLogps
from fastpref.trainers.unpaired import KTOTrainer

__all__ = [
    "CPOConfig",
    "CPOTrainer",
    "DPOConfig",
    "DPOTrainer",
    "DistillationConfig",
    "DistillationTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "IPOConfig",
    "IPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "ORPOConfig",
    "ORPOTrainer",
    "PRMConfig",
    "PRMTrainer",
    "PreferenceConfig",
    "PromptTrees",
    "RLOOConfig",
    "RLOOTrainer",
    "ResponseLogps",
    "RewardConfig",
    "RewardTrainer",
    "SimPOConfig",
    "SimPOTrainer",
    "StopOveroptimization",
]
