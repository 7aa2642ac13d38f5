r"""A truncated policy's section of the report: what its sets hold, whether they would move, and the full entropy beside its own.

The report's entropy is H(p_S/s) throughout, S as kept at θ. Beside it, never mixed with it: H(p) at the same tokens with the same
weights, and the share of tokens at which θ + ηv, asked by itself, would keep another set than S (docs/theory.md, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import stats
from ..truncation import Truncation


def kept_sets(
    truncation: Truncation,
    support: Mapping[float, Mapping[str, np.ndarray]],
    mask: np.ndarray,
    prompt: np.ndarray,
    *,
    per: stats.Per,
    estimator: stats.EstimatorKind,
) -> dict[str, Any]:
    """The section `truncation`.

    Args:
        truncation: top-k and top-p.
        support: the fields of `TokenSupport` at every learning rate, 0 among them, [N, T].
        mask: bool [N, T], true on response tokens.
        prompt: integers [N].
        per: per token or per sequence, as the report's entropy.
        estimator: as the report's.
    """
    at = {eta: stats.TokenValues(x["full_entropy"], x["logprob"]) for eta, x in support.items()}
    base = support[0.0]
    plain = stats.prompt_sums(at[0.0], at[0.0], mask, prompt, per=per, estimator="path")
    along = []
    for eta in sorted(eta for eta in support if eta > 0):
        sums = stats.change_sums(at[0.0], at[eta], mask, prompt, per=per, estimator=estimator)
        along.append(
            {
                "eta": eta,
                "moved_share": stats.token_mean(support[eta]["moved"], mask, prompt, unit="1"),
                "full_entropy_change": stats.direct_change(sums),
            }
        )
    return {
        "top_k": truncation.top_k,
        "top_p": truncation.top_p,
        "kept_mass": stats.token_mean(base["kept_mass"], mask, prompt, unit="1"),
        "kept_count": stats.token_mean(base["kept_count"], mask, prompt, unit="tokens"),
        "tokens_at_edge": int(base["at_edge"][mask].sum()),
        "full_entropy": stats.entropy(plain),
        "along": along,
    }
