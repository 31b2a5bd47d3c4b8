"""fastpref: preference learning, fast and lean. The public names, imported when first used."""

from typing import TYPE_CHECKING

from fastpref.common.lazy import exports

__version__ = "0.1.0"

_HOMES = {
    "AdaptiveKLController": "fastpref.objectives.kl",
    "BCOLoss": "fastpref.objectives.bco",
    "BradleyTerryLoss": "fastpref.objectives.reward",
    "CPOLoss": "fastpref.objectives.reference_free",
    "DPOLoss": "fastpref.objectives.paired",
    "FixedKLController": "fastpref.objectives.kl",
    "IPOLoss": "fastpref.objectives.paired",
    "KTOLoss": "fastpref.objectives.unpaired",
    "ListDPOLoss": "fastpref.objectives.lists",
    "ListOutput": "fastpref.objectives.lists",
    "ORPOLoss": "fastpref.objectives.reference_free",
    "PairedLoss": "fastpref.objectives.paired",
    "PenalizedRewards": "fastpref.objectives.kl",
    "PolicyGradientLoss": "fastpref.objectives.policy",
    "PolicyOutput": "fastpref.objectives.policy",
    "PreferenceOutput": "fastpref.objectives.paired",
    "ProcessRewardLoss": "fastpref.objectives.process_reward",
    "ProcessRewardOutput": "fastpref.objectives.process_reward",
    "RewardHead": "fastpref.objectives.reward",
    "RewardNormalizer": "fastpref.objectives.normalize",
    "RewardOutput": "fastpref.objectives.reward",
    "SimPOLoss": "fastpref.objectives.reference_free",
    "TokenKL": "fastpref.objectives.kl",
    "TokenStatistics": "fastpref.reference",
    "UnpairedOutput": "fastpref.objectives.unpaired",
    "aggregate_steps": "fastpref.objectives.process_reward",
    "explain": "fastpref.objectives.tokens",
    "kl_estimate": "fastpref.objectives.kl",
    "kl_penalized_rewards": "fastpref.objectives.kl",
    "kto_kl": "fastpref.objectives.unpaired",
    "linear_token_kl": "fastpref.objectives.kl",
    "linear_token_logprobs": "fastpref.objectives.tokens",
    "linear_token_statistics": "fastpref.objectives.tokens",
    "mismatched_indices": "fastpref.objectives.unpaired",
    "mismatched_kl_from_hidden": "fastpref.objectives.unpaired",
    "sequence_logprobs": "fastpref.objectives.tokens",
    "set_backend": "fastpref.backends",
    "token_kl": "fastpref.objectives.kl",
    "token_logprobs": "fastpref.objectives.tokens",
    "token_statistics": "fastpref.objectives.tokens",
}
_MODULES = {"parallel": "fastpref.objectives.vocab_parallel"}
__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from fastpref.backends import set_backend as set_backend
    from fastpref.objectives.bco import BCOLoss as BCOLoss
    from fastpref.objectives.kl import AdaptiveKLController as AdaptiveKLController
    from fastpref.objectives.kl import FixedKLController as FixedKLController
    from fastpref.objectives.kl import PenalizedRewards as PenalizedRewards
    from fastpref.objectives.kl import TokenKL as TokenKL
    from fastpref.objectives.kl import kl_estimate as kl_estimate
    from fastpref.objectives.kl import kl_penalized_rewards as kl_penalized_rewards
    from fastpref.objectives.kl import linear_token_kl as linear_token_kl
    from fastpref.objectives.kl import token_kl as token_kl
    from fastpref.objectives.lists import ListDPOLoss as ListDPOLoss
    from fastpref.objectives.lists import ListOutput as ListOutput
    from fastpref.objectives.normalize import RewardNormalizer as RewardNormalizer
    from fastpref.objectives.paired import DPOLoss as DPOLoss
    from fastpref.objectives.paired import IPOLoss as IPOLoss
    from fastpref.objectives.paired import PairedLoss as PairedLoss
    from fastpref.objectives.paired import PreferenceOutput as PreferenceOutput
    from fastpref.objectives.policy import PolicyGradientLoss as PolicyGradientLoss
    from fastpref.objectives.policy import PolicyOutput as PolicyOutput
    from fastpref.objectives.process_reward import ProcessRewardLoss as ProcessRewardLoss
    from fastpref.objectives.process_reward import ProcessRewardOutput as ProcessRewardOutput
    from fastpref.objectives.process_reward import aggregate_steps as aggregate_steps
    from fastpref.objectives.reference_free import CPOLoss as CPOLoss
    from fastpref.objectives.reference_free import ORPOLoss as ORPOLoss
    from fastpref.objectives.reference_free import SimPOLoss as SimPOLoss
    from fastpref.objectives.reward import BradleyTerryLoss as BradleyTerryLoss
    from fastpref.objectives.reward import RewardHead as RewardHead
    from fastpref.objectives.reward import RewardOutput as RewardOutput
    from fastpref.objectives.tokens import explain as explain
    from fastpref.objectives.tokens import linear_token_logprobs as linear_token_logprobs
    from fastpref.objectives.tokens import linear_token_statistics as linear_token_statistics
    from fastpref.objectives.tokens import sequence_logprobs as sequence_logprobs
    from fastpref.objectives.tokens import token_logprobs as token_logprobs
    from fastpref.objectives.tokens import token_statistics as token_statistics
    from fastpref.objectives.unpaired import KTOLoss as KTOLoss
    from fastpref.objectives.unpaired import UnpairedOutput as UnpairedOutput
    from fastpref.objectives.unpaired import kto_kl as kto_kl
    from fastpref.objectives.unpaired import mismatched_indices as mismatched_indices
    from fastpref.objectives.unpaired import mismatched_kl_from_hidden as mismatched_kl_from_hidden
    from fastpref.reference import TokenStatistics as TokenStatistics

__getattr__, __dir__ = exports(__name__, _HOMES, _MODULES)
