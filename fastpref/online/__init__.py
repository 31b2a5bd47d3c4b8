"""Online preference learning: sample responses, score them, make pairs, and evaluate what was learnt.

The same functions are the commands `fastpref generate`, `score`, `judge`, `pairs` and `evaluate`; the names below are
imported when first used.
"""

from typing import TYPE_CHECKING

from fastpref.common.lazy import exports

_HOMES = {
    "Judging": "fastpref.online.verdicts",
    "PairRules": "fastpref.online.pairing",
    "Response": "fastpref.data.sampling",
    "Sampling": "fastpref.data.sampling",
    "Server": "fastpref.online.servers",
    "ServerError": "fastpref.online.servers",
    "ServerSampler": "fastpref.online.served",
    "evaluate_policy": "fastpref.online.evaluation",
    "evaluate_reward_model": "fastpref.online.evaluation",
    "function_scorer": "fastpref.online.judges",
    "generate_file": "fastpref.online.generate",
    "generate_from_server": "fastpref.online.served",
    "implicit_reward_scorer": "fastpref.online.judges",
    "judge_file": "fastpref.online.judge",
    "judge_scorer": "fastpref.online.judge",
    "load_policy": "fastpref.online.loading",
    "load_reward_model": "fastpref.online.loading",
    "make_pairs": "fastpref.online.pairing",
    "pairs_file": "fastpref.online.pairs",
    "read_records": "fastpref.online.records",
    "reward_function": "fastpref.online.judges",
    "reward_model_scorer": "fastpref.online.judges",
    "sample_responses": "fastpref.data.sampling",
    "score_file": "fastpref.online.score",
    "score_records": "fastpref.online.score",
}
__all__ = list(_HOMES)

if TYPE_CHECKING:
    from fastpref.data.sampling import Response as Response
    from fastpref.data.sampling import Sampling as Sampling
    from fastpref.data.sampling import sample_responses as sample_responses
    from fastpref.online.evaluation import evaluate_policy as evaluate_policy
    from fastpref.online.evaluation import evaluate_reward_model as evaluate_reward_model
    from fastpref.online.generate import generate_file as generate_file
    from fastpref.online.judge import judge_file as judge_file
    from fastpref.online.judge import judge_scorer as judge_scorer
    from fastpref.online.judges import function_scorer as function_scorer
    from fastpref.online.judges import implicit_reward_scorer as implicit_reward_scorer
    from fastpref.online.judges import reward_function as reward_function
    from fastpref.online.judges import reward_model_scorer as reward_model_scorer
    from fastpref.online.loading import load_policy as load_policy
    from fastpref.online.loading import load_reward_model as load_reward_model
    from fastpref.online.pairing import PairRules as PairRules
    from fastpref.online.pairing import make_pairs as make_pairs
    from fastpref.online.pairs import pairs_file as pairs_file
    from fastpref.online.records import read_records as read_records
    from fastpref.online.score import score_file as score_file
    from fastpref.online.score import score_records as score_records
    from fastpref.online.served import ServerSampler as ServerSampler
    from fastpref.online.served import generate_from_server as generate_from_server
    from fastpref.online.servers import Server as Server
    from fastpref.online.servers import ServerError as ServerError
    from fastpref.online.verdicts import Judging as Judging

__getattr__, __dir__ = exports(__name__, _HOMES)
