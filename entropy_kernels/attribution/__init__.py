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
from .proxies import PROXIES, token_proxies
from .what_if import RULES, Rule, TokenFacts, factors, parse_rule

__all__ = [
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
