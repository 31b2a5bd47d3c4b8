"""Drop-in trainers: change the import of a TRL script.

from fastpref.trainers import DPOConfig, DPOTrainer  # was: from trl import DPOConfig, DPOTrainer
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
from fastpref.trainers.paired import CPOTrainer, DPOTrainer, IPOTrainer, ORPOTrainer, SimPOTrainer
from fastpref.trainers.reward import PRMTrainer, RewardTrainer
from fastpref.trainers.unpaired import KTOTrainer

__all__ = [
    "CPOConfig",
    "CPOTrainer",
    "DPOConfig",
    "DPOTrainer",
    "IPOConfig",
    "IPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "ORPOConfig",
    "ORPOTrainer",
    "PRMConfig",
    "PRMTrainer",
    "PreferenceConfig",
    "RewardConfig",
    "RewardTrainer",
    "SimPOConfig",
    "SimPOTrainer",
]
