"""fastpref: preference learning, fast and lean. The public names, imported when first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "CPOLoss": "fastpref.reference_free",
    "DPOLoss": "fastpref.losses",
    "IPOLoss": "fastpref.losses",
    "ORPOLoss": "fastpref.reference_free",
    "PairedLoss": "fastpref.losses",
    "PreferenceOutput": "fastpref.losses",
    "SimPOLoss": "fastpref.reference_free",
    "TokenStatistics": "fastpref.reference",
    "explain": "fastpref.linear",
    "linear_token_logprobs": "fastpref.linear",
    "linear_token_statistics": "fastpref.linear",
    "sequence_logprobs": "fastpref.linear",
    "set_backend": "fastpref.backends",
    "token_logprobs": "fastpref.linear",
    "token_statistics": "fastpref.linear",
}
__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from fastpref.backends import set_backend as set_backend
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
    from fastpref.reference import TokenStatistics as TokenStatistics
    from fastpref.reference_free import CPOLoss as CPOLoss
    from fastpref.reference_free import ORPOLoss as ORPOLoss
    from fastpref.reference_free import SimPOLoss as SimPOLoss


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastpref' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
