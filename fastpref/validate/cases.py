"""The table of cases: every operator with its inputs, computed by fastpref and by the specification.

A new paired objective is one row of OBJECTIVES. Any other operator is one row of OPERATORS.
"""

from __future__ import annotations

from fastpref.objectives.paired import DPOLoss, IPOLoss
from fastpref.objectives.reference_free import CPOLoss, ORPOLoss, SimPOLoss
from fastpref.validate import others, pairs
from fastpref.validate.operator import Operator, linear_token_logprobs, token_logprobs, token_statistics
from fastpref.validate.pairs import Objective

BETA = 0.125  # a power of two, so that the rewards of integers are exact
OVERFLOWS = ("extreme", "integers")  # e^(a log-ratio of tens or hundreds), beyond fp16's 65504 at least
SATURATES = ("integers",)  # IPO: d_hidden beyond fp16; ORPO: the odds of a probability of exactly 1
SORTS = ("tie", "integers")  # which of two equal pairs gets which gradient is anybody's choice

OBJECTIVES = (
    Objective("DPO sigmoid", DPOLoss(BETA)),
    Objective("DPO sigmoid, smoothed", DPOLoss(BETA, "sigmoid", 0.1)),
    Objective("DPO hinge", DPOLoss(BETA, "hinge"), exact=True),
    Objective("DPO ipo", DPOLoss(BETA, "ipo")),
    Objective("DPO exo_pair", DPOLoss(BETA, "exo_pair", 0.1)),
    Objective("DPO nca_pair", DPOLoss(BETA, "nca_pair")),
    Objective("DPO robust", DPOLoss(BETA, "robust", 0.1)),
    Objective("DPO bco_pair", DPOLoss(BETA, "bco_pair")),
    Objective("DPO sppo_hard", DPOLoss(BETA, "sppo_hard")),
    Objective("DPO aot", DPOLoss(BETA, "aot", 0.1), without=SORTS),
    Objective("DPO aot_unpaired", DPOLoss(BETA, "aot_unpaired"), without=SORTS),
    Objective("DPO apo_zero", DPOLoss(BETA, "apo_zero")),
    Objective("DPO apo_down", DPOLoss(BETA, "apo_down")),
    Objective("DPO discopop", DPOLoss(BETA, "discopop")),
    Objective("DPO sft", DPOLoss(BETA, "sft")),
    Objective("DPO sigmoid_norm", DPOLoss(BETA, "sigmoid_norm")),
    Objective("DPO forward_kl", DPOLoss(BETA, f_divergence="forward_kl"), without=OVERFLOWS),
    Objective("DPO js_divergence", DPOLoss(BETA, f_divergence="js_divergence")),
    Objective("DPO alpha_divergence", DPOLoss(BETA, f_divergence="alpha_divergence"), without=OVERFLOWS),
    Objective("IPO", IPOLoss(BETA), without=SATURATES),
    Objective("SimPO", SimPOLoss(BETA * 16, 1.0)),
    Objective("CPO", CPOLoss(BETA)),
    Objective("ORPO", ORPOLoss(BETA), without=SATURATES),
    Objective("DPO mixture", DPOLoss(BETA, ["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0])),
)

OPERATORS: tuple[Operator, ...] = (
    token_logprobs(),
    token_statistics(),
    linear_token_logprobs("no_grad", ()),
    linear_token_logprobs("frozen", ("hidden",)),
    linear_token_logprobs("store", ("hidden", "weight", "bias")),
    linear_token_logprobs("recompute", ("hidden", "weight", "bias")),
    *(operator for objective in OBJECTIVES for operator in pairs.operators(objective)),
    *others.operators(),
)
