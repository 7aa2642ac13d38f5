r"""What shares and marginals say about an update as a whole: parts, concentration, correlations, cells, the trial of the proxies.

Arrays here are over the response tokens of U, [n], in the order of its table; η is in them. A quantity that is a sum over the prompts
of E comes as two halves a, b (docs/theory.md, section 10, "Noise").
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from .. import stats
from .proxies import PROXIES

FRACTIONS = (0.002, 0.02, 0.2)


class Halves(NamedTuple):
    """A token's influence by two halves of the prompts of E; their sum is the influence."""

    a: np.ndarray
    b: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """a + b."""
        return self.a + self.b


class Tokens(NamedTuple):
    """What is known of the tokens of U without any attribution, [n] each."""

    sequence: np.ndarray
    prompt: np.ndarray
    position: np.ndarray
    length: np.ndarray  # of the response
    advantage: np.ndarray
    solve_rate: np.ndarray  # mean reward of the prompt; NaN where rewards are not known
    logprob: np.ndarray
    entropy: np.ndarray
    lowest_logprob: np.ndarray  # of the response


def sum_rule(
    shares: Mapping[str, Halves], parts: Mapping[str, tuple[float, float]], linear: stats.Estimate
) -> dict[str, Any]:
    """Σ c + η X·v_momentum + η X·v_decay against the linear change found by forward mode on E.

    Args:
        shares: by part of the loss.
        parts: the parts of v that are not the gradient, (η X_a·v_part, η X_b·v_part).
        linear: δH₁ (or δJ₁) of the same samples, derived otherwise.

    Returns:
        each part, their sum, the linear change, and `missed`: |sum − linear| as a share of Σ|parts|.
    """
    found = {
        name: stats.from_halves(float(c.a.sum()), float(c.b.sum()), linear.unit) for name, c in shares.items()
    }
    found |= {name: stats.from_halves(a, b, linear.unit) for name, (a, b) in parts.items()}
    total = sum(part.value for part in found.values())
    size = sum(abs(part.value) for part in found.values())
    return {
        "parts": found,
        "sum": total,
        "linear": linear,
        "missed": abs(total - linear.value) / size if size else math.nan,
    }


def concentration(c: Halves, prompt: np.ndarray, fractions: tuple[float, ...] = FRACTIONS) -> dict[str, Any]:
    """How much of Σ|c| the largest tokens hold, as it looks and as it repeats, and the reliability of a token's c.

    Args:
        c: influence of every token.
        prompt: of every token.
        fractions: of the tokens.
    """
    looks = stats.held_by_top(c.total, c.total, prompt, fractions)
    repeats = stats.cross_fitted_top(c.a, c.b, prompt, fractions)
    halves = stats.rank_correlations({"halves": c.a}, c.b, prompt)["halves"]
    return {
        "top": [
            {"fraction": x.fraction, "held": x.held._asdict(), "held_on_the_other_half": y.held._asdict()}
            for x, y in zip(looks, repeats, strict=True)
        ],
        "halves": halves._asdict(),
        "reliability": stats.doubled_reliability(halves.estimate.value),
    }


def correlations(tokens: Tokens, share: np.ndarray, marginal: np.ndarray) -> dict[str, Any]:
    """Rank correlation of share, marginal and |marginal| with what is known of a token; bootstrap over prompts.

    Args:
        tokens: of U.
        share: c [n].
        marginal: m [n].
    """
    known = ("advantage", "logprob", "entropy", "length", "position", "solve_rate")
    scores = {name: getattr(tokens, name) for name in known}
    return {
        target: {name: x._asdict() for name, x in stats.rank_correlations(scores, y, tokens.prompt).items()}
        for target, y in (("share", share), ("marginal", marginal), ("size_of_marginal", np.abs(marginal)))
    }


def cells(tokens: Tokens, share: Halves, marginal: Halves, unit: str) -> list[dict[str, Any]]:
    """Sums by the sign of the advantage and the quarter of responses by their lowest token log-prob.

    Quarter 1 holds the responses with the most outlying token. Is there anything beyond negative advantage with an outlying token?

    Args:
        tokens: of U.
        share: c.
        marginal: m.
        unit: of both.
    """
    _, first = np.unique(tokens.sequence, return_index=True)
    edges = np.quantile(tokens.lowest_logprob[first], [0.25, 0.5, 0.75])
    quarter = np.searchsorted(edges, tokens.lowest_logprob, side="left")
    bounds = [-math.inf, *edges.tolist(), math.inf]
    size = np.abs(share.total).sum()
    rows = []
    for sign, name in ((-1, "negative"), (0, "zero"), (1, "positive")):
        for q in range(4):
            on = (np.sign(tokens.advantage) == sign) & (quarter == q)
            if sign == 0 and not on.any():
                continue
            rows.append(
                {
                    "advantage": name,
                    "quarter": q + 1,
                    "lowest_logprob_from": bounds[q],
                    "lowest_logprob_to": bounds[q + 1],
                    "responses": len(np.unique(tokens.sequence[on])),
                    "tokens": int(on.sum()),
                    "share": stats.from_halves(float(share.a[on].sum()), float(share.b[on].sum()), unit),
                    "marginal": stats.from_halves(
                        float(marginal.a[on].sum()), float(marginal.b[on].sum()), unit
                    ),
                    "size": float(np.abs(share.total[on]).sum() / size) if size else math.nan,
                }
            )
    return rows


def trial(
    tokens: Tokens,
    proxies: Mapping[str, np.ndarray],
    covariance: np.ndarray,
    share: np.ndarray,
    marginal: np.ndarray,
    own_change: np.ndarray,
) -> dict[str, Any]:
    """Every proxy against shares, marginals, and the measured change of the entropy at the token's own position.

    Args:
        tokens: of U.
        proxies: name -> [n].
        covariance: −(A − Ā)(S − S̄) of whole responses, over the sequences of U.
        share: c [n].
        marginal: m [n].
        own_change: H_ik(θ + ηv) − H_ik(θ) [n].

    Returns:
        "tokens": by proxy the rank correlations, and what its top tokens hold of Σ|c|; "ceiling": what c's own top holds;
        "sequences": rank correlations of sums over responses with the responses' shares; "mean": of each proxy over the tokens.
    """
    targets = {"share": share, "marginal": marginal, "own_change": own_change}
    ranked = {name: stats.rank_correlations(proxies, y, tokens.prompt) for name, y in targets.items()}

    def held(score: np.ndarray) -> list[dict[str, Any]]:
        top = stats.held_by_top(score, share, tokens.prompt, FRACTIONS)
        return [{"fraction": x.fraction, "held": x.held._asdict()} for x in top]

    _, first, sequence = np.unique(tokens.sequence, return_index=True, return_inverse=True)
    sums = {name: np.bincount(sequence, x) for name, x in proxies.items()} | {"cov_sequence": covariance}
    of_sequences = stats.rank_correlations(sums, np.bincount(sequence, share), tokens.prompt[first])
    return {
        "formulas": {
            **PROXIES,
            "cov_sequence": "−(A − Ā)(S − S̄) of whole responses, means over the prompt: −Cov(S, A)",
        },
        "tokens": {
            name: {target: ranked[target][name]._asdict() for target in targets} | {"top": held(proxy)}
            for name, proxy in proxies.items()
        },
        "ceiling": held(share),
        "sequences": {name: x._asdict() for name, x in of_sequences.items()},
        "mean": {name: _mean(x, tokens.prompt) for name, x in proxies.items()}
        | {"cov_sequence": _mean(covariance, tokens.prompt[first])},
    }


def _mean(x: np.ndarray, prompt: np.ndarray) -> stats.Estimate:
    """Σ x / n with its jackknife over prompts."""
    _, group = np.unique(prompt, return_inverse=True)
    count = np.bincount(group).astype(np.float64)
    total = np.asarray(np.bincount(group, x), dtype=np.float64)
    value, stderr, replicates = stats.jackknife(lambda N, D: N / D, total, count)
    method = "mean over tokens; jackknife over prompts of U"
    return stats.Estimate(value=value, stderr=stderr, n=len(replicates), unit="1", method=method)
