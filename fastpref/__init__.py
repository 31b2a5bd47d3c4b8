"""fastpref: preference learning, fast and lean. The public names, imported when first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "AdaptiveKLController": "fastpref.kl",
    "BCOLoss": "fastpref.bco",
    "BradleyTerryLoss": "fastpref.reward",
    "CPOLoss": "fastpref.reference_free",
    "DPOLoss": "fastpref.losses",
    "FixedKLController": "fastpref.kl",
    "IPOLoss": "fastpref.losses",
    "KTOLoss": "fastpref.unpaired",
    "ORPOLoss": "fastpref.reference_free",
    "PairedLoss": "fastpref.losses",
    "PenalizedRewards": "fastpref.kl",
    "PolicyGradientLoss": "fastpref.policy",
    "PolicyOutput": "fastpref.policy",
    "PreferenceOutput": "fastpref.losses",
    "ProcessRewardLoss": "fastpref.process_reward",
    "ProcessRewardOutput": "fastpref.process_reward",
    "RewardHead": "fastpref.reward",
    "RewardNormalizer": "fastpref.normalize",
    "RewardOutput": "fastpref.reward",
    "SimPOLoss": "fastpref.reference_free",
    "TokenKL": "fastpref.kl",
    "TokenStatistics": "fastpref.reference",
    "UnpairedOutput": "fastpref.unpaired",
    "aggregate_steps": "fastpref.process_reward",
    "explain": "fastpref.linear",
    "kl_estimate": "fastpref.kl",
    "kl_penalized_rewards": "fastpref.kl",
    "kto_kl": "fastpref.unpaired",
    "linear_token_kl": "fastpref.kl",
    "linear_token_logprobs": "fastpref.linear",
    "linear_token_statistics": "fastpref.linear",
    "mismatched_indices": "fastpref.unpaired",
    "mismatched_kl_from_hidden": "fastpref.unpaired",
    "sequence_logprobs": "fastpref.linear",
    "set_backend": "fastpref.backends",
    "token_kl": "fastpref.kl",
    "token_logprobs": "fastpref.linear",
    "token_statistics": "fastpref.linear",
}
__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from fastpref.backends import set_backend as set_backend
    from fastpref.bco import BCOLoss as BCOLoss
    from fastpref.kl import AdaptiveKLController as AdaptiveKLController
    from fastpref.kl import FixedKLController as FixedKLController
    from fastpref.kl import PenalizedRewards as PenalizedRewards
    from fastpref.kl import TokenKL as TokenKL
    from fastpref.kl import kl_estimate as kl_estimate
    from fastpref.kl import kl_penalized_rewards as kl_penalized_rewards
    from fastpref.kl import linear_token_kl as linear_token_kl
    from fastpref.kl import token_kl as token_kl
    from fastpref.linear import explain as explain
    from fastpref.linear import linear_token_logprobs as linear_token_logprobs
    from fastpref.linear import linear_token_statistics as linear_token_statistics
    from fastpref.linear import sequence_logprobs as sequence_logprobs
    from fastpref.linear import token_logprobs as token_logprobs
    from fastpref.linear import token_statistics as token_statistics
    from fastpref.losses import DPOLoss as DPOLoss
    from fastpref.losses import IPOLoss as IPOLoss
    from fastpref.losses import PairedLoss as PairedLoss
    from fastpref.losses import PreferenceOutput as PreferenceOutput
    from fastpref.normalize import RewardNormalizer as RewardNormalizer
    from fastpref.policy import PolicyGradientLoss as PolicyGradientLoss
    from fastpref.policy import PolicyOutput as PolicyOutput
    from fastpref.process_reward import ProcessRewardLoss as ProcessRewardLoss
    from fastpref.process_reward import ProcessRewardOutput as ProcessRewardOutput
    from fastpref.process_reward import aggregate_steps as aggregate_steps
    from fastpref.reference import TokenStatistics as TokenStatistics
    from fastpref.reference_free import CPOLoss as CPOLoss
    from fastpref.reference_free import ORPOLoss as ORPOLoss
    from fastpref.reference_free import SimPOLoss as SimPOLoss
    from fastpref.reward import BradleyTerryLoss as BradleyTerryLoss
    from fastpref.reward import RewardHead as RewardHead
    from fastpref.reward import RewardOutput as RewardOutput
    from fastpref.unpaired import KTOLoss as KTOLoss
    from fastpref.unpaired import UnpairedOutput as UnpairedOutput
    from fastpref.unpaired import kto_kl as kto_kl
    from fastpref.unpaired import mismatched_indices as mismatched_indices
    from fastpref.unpaired import mismatched_kl_from_hidden as mismatched_kl_from_hidden


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastpref' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
