r"""What-if rules: factors on the token weights of the loss.

A rule turns the weight of token (i, k) from g_ik into f_ik g_ik; f = 0 drops it. Advantages and token counts stay as they are. To
first order in f − 1 the change of δH₁ is Σ (f_ik − 1) m_ik, m the marginals (docs/theory.md, section 10).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from .proxies import token_proxies

RULES = {
    "drop-top": "SHARE: drop the tokens whose marginal influence on entropy is largest in magnitude (0.02)",
    "drop-negative-unlikely": "P: drop tokens with negative advantage and probability below P (0.1)",
    "scale-negative": "FACTOR: weights of tokens with negative advantage (0.5)",
    "scale-positive": "FACTOR: weights of tokens with positive advantage (0.5)",
    "clip-cov": "SHARE,LOW,HIGH: drop that share of tokens, drawn where the covariance (A − Ā)(S − S̄) is in [LOW, HIGH] (0.0002,1,5)",
    "kl-cov": "SHARE,BETA: penalise ½ (log ratio)² with BETA on the share of tokens with the largest covariance (0.002,1)",
    "clip-higher": "LOW,HIGH: drop tokens whose ratio to the sampling policy is beyond 1 − LOW (A < 0) or 1 + HIGH (A > 0) (0.2,0.28)",
}
_DEFAULTS: dict[str, tuple[float, ...]] = {
    "drop-top": (0.02,),
    "drop-negative-unlikely": (0.1,),
    "scale-negative": (0.5,),
    "scale-positive": (0.5,),
    "clip-cov": (2e-4, 1.0, 5.0),
    "kl-cov": (2e-3, 1.0),
    "clip-higher": (0.2, 0.28),
}
_NEEDS_RATIO = ("kl-cov", "clip-higher")


@dataclass(frozen=True)
class Rule:
    """A rule and its numbers; `text` is as it was asked for."""

    name: str
    numbers: tuple[float, ...]
    text: str


class TokenFacts(NamedTuple):
    """What rules look at: arrays [N, T] (advantage [N]) of U."""

    mask: np.ndarray
    prompt_index: np.ndarray
    advantage: np.ndarray
    logprob: np.ndarray
    entropy: np.ndarray
    marginal: np.ndarray
    log_ratio: (
        np.ndarray | None
    )  # S − S_old to the policy that sampled; None where its log-probs are not known


def parse_rule(text: str) -> Rule:
    """NAME or NAME:NUMBER,NUMBER with numbers left out taken from the defaults.

    Raises:
        UserError: an unknown name, or numbers that do not fit it.
    """
    name, _, given = text.partition(":")
    if name not in RULES:
        listed = "; ".join(f"{rule}:{what}" for rule, what in RULES.items())
        raise UserError(
            f"what_if: got {text!r}; expected FILE.parquet with columns sequence, position, weight, or one of {listed}."
        )
    default = _DEFAULTS[name]
    try:
        numbers = tuple(float(x) for x in given.split(",")) if given else ()
    except ValueError:
        raise UserError(
            f"what_if: {text!r} has arguments that are not numbers; expected {name}:{RULES[name]}."
        ) from None
    if len(numbers) > len(default) or not all(math.isfinite(x) for x in numbers):
        raise UserError(
            f"what_if: {text!r} has {len(numbers)} arguments; expected at most {len(default)}, {name}:{RULES[name]}."
        )
    numbers += default[len(numbers) :]
    if name in ("drop-top", "drop-negative-unlikely", "clip-cov", "kl-cov") and not 0 < numbers[0] <= 1:
        raise UserError(
            f"what_if: {text!r} has first argument {numbers[0]:g}; expected a share or probability in (0, 1]."
        )
    return Rule(name, numbers, text)


def factors(rule: Rule, facts: TokenFacts, *, seed: int = 0) -> np.ndarray:
    """f_ik [N, T]: 1 where a token keeps its weight, and outside the response.

    ``kl-cov`` adds a penalty's gradient to that of the loss: β ½ (S − S_old)² has the gradient β (S − S_old) ∇S, which as a factor on
    −A∇S is 1 − β (S − S_old)/A (tokens with A = 0 are left alone). It vanishes where the ratio is 1, that is in a step on the very
    policy that sampled; the published code's β |S − S_old| has no gradient of its own there either. The same holds for
    ``clip-higher``: on-policy nothing is clipped.

    Args:
        rule: from `parse_rule`.
        facts: of U.
        seed: of the tokens that ``clip-cov`` draws.

    Raises:
        UserError: a rule that needs ratios without the sampler's log-probs.
    """
    on, A = facts.mask, facts.advantage[:, None]
    f = np.ones(on.shape)
    count = int(on.sum())
    ratio = facts.log_ratio
    if rule.name in _NEEDS_RATIO and ratio is None:
        raise UserError(
            f"what_if: {rule.text!r} acts on the ratio to the policy that sampled the update, whose log-probs the rollouts do not hold. "
            "Pass rollouts with the column logprobs, or another rule."
        )
    if rule.name == "drop-top":
        f[_largest(np.abs(facts.marginal), on, math.ceil(rule.numbers[0] * count))] = 0.0
    elif rule.name == "drop-negative-unlikely":
        f[on & (A < 0) & (facts.logprob < math.log(rule.numbers[0]))] = 0.0
    elif rule.name == "scale-negative":
        f[on & (A < 0)] = rule.numbers[0]
    elif rule.name == "scale-positive":
        f[on & (A > 0)] = rule.numbers[0]
    elif rule.name == "clip-cov":
        share, low, high = rule.numbers
        covariance = _covariance(facts)
        eligible = np.argwhere(on & (covariance >= low) & (covariance <= high))
        drawn = np.random.default_rng(seed).permutation(len(eligible))[: math.ceil(share * count)]
        f[tuple(eligible[drawn].T)] = 0.0
    elif rule.name == "kl-cov":
        assert ratio is not None
        share, beta = rule.numbers
        top = _largest(_covariance(facts), on, math.ceil(share * count))
        with np.errstate(divide="ignore", invalid="ignore"):
            f[top] -= np.where(A == 0, 0.0, beta * ratio / A)[top]
    else:
        assert ratio is not None
        low, high = rule.numbers
        f[on & (A < 0) & (ratio < math.log1p(-low))] = 0.0
        f[on & (A > 0) & (ratio > math.log1p(high))] = 0.0
    return f


def _covariance(facts: TokenFacts) -> np.ndarray:
    """(A − Ā)(S − S̄) over the batch."""
    found = token_proxies(facts.logprob, facts.entropy, facts.advantage, facts.mask, facts.prompt_index)
    return -found["cov_batch"]


def _largest(score: np.ndarray, on: np.ndarray, count: int) -> np.ndarray:
    """The mask [N, T] of the `count` response tokens with the largest scores; the earlier token first where they are equal."""
    tokens = np.flatnonzero(on)
    chosen = tokens[np.argsort(-score.ravel()[tokens], kind="stable")[:count]]
    found = np.zeros(on.size, dtype=bool)
    found[chosen] = True
    return found.reshape(on.shape)
