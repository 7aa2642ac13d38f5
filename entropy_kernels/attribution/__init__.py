"""Who moved the entropy: shares and marginals of every token of an update, published proxies, what-ifs."""

from __future__ import annotations

from .influence import (
    TokenWeights,
    entropy_weights,
    half_gradient,
    marginal_direction,
    part_values,
    reward_weights,
    share_direction,
    token_influence,
    total_weights,
)
from .proxies import PROXIES, sequence_covariance, token_proxies
from .summary import FRACTIONS, Halves, Tokens, cells, concentration, correlations, sum_rule, trial
from .what_if import RULES, Rule, TokenFacts, factors, parse_rule

__all__ = [
    "FRACTIONS",
    "Halves",
    "Tokens",
    "cells",
    "concentration",
    "correlations",
    "sum_rule",
    "trial",
    "sequence_covariance",
    "PROXIES",
    "RULES",
    "Rule",
    "TokenFacts",
    "TokenWeights",
    "entropy_weights",
    "factors",
    "half_gradient",
    "marginal_direction",
    "parse_rule",
    "part_values",
    "reward_weights",
    "share_direction",
    "token_influence",
    "token_proxies",
    "total_weights",
]
