r"""Published scores that say which tokens of an update lower or raise entropy, each with the sign that predicts ΔH.

    cov_batch   −(A − Ā)(S − S̄)          means over all tokens of the batch (Cui et al., arXiv 2505.22617)
    cov_prompt  −(A − Ā)(S − S̄)          means over the tokens of the prompt
    s_star      −A p (H + log p)          (arXiv 2602.03392)
    steer       −A p (1 − p)² (log p + H) (STEER, arXiv 2510.10150)

S = log p is the token's log-prob, H the entropy at its position, A the advantage of its response. They need one forward pass and
nothing of the model, optimizer or held-out samples; docs/theory.md, section 10, says what each assumes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

PROXIES = {
    "cov_batch": "−(A − Ā)(S − S̄), means over the batch (arXiv 2505.22617)",
    "cov_prompt": "−(A − Ā)(S − S̄), means over the prompt (arXiv 2505.22617)",
    "s_star": "−A p (H + log p) (arXiv 2602.03392)",
    "steer": "−A p (1 − p)² (log p + H) (STEER, arXiv 2510.10150)",
}


def token_proxies(
    logprob: ArrayLike, entropy: ArrayLike, advantage: ArrayLike, mask: ArrayLike, prompt_index: ArrayLike
) -> dict[str, np.ndarray]:
    """The proxies above for every token, by name.

    Args:
        logprob: S [N, T], nats.
        entropy: H [N, T], nats.
        advantage: A [N].
        mask: bool [N, T], True on response tokens.
        prompt_index: integers [N].

    Returns:
        name -> float64 [N, T], 0 outside the response.
    """
    on = np.asarray(mask, dtype=bool)
    S, H = (np.where(on, np.asarray(x, dtype=np.float64), 0.0) for x in (logprob, entropy))
    A = np.where(on, np.asarray(advantage, dtype=np.float64)[:, None], 0.0)
    p = np.exp(S)
    everyone = np.zeros(len(on), dtype=int)
    return {
        "cov_batch": -_centred(A, on, everyone) * _centred(S, on, everyone),
        "cov_prompt": -_centred(A, on, prompt_index) * _centred(S, on, prompt_index),
        "s_star": np.where(on, -A * p * (H + S), 0.0),
        "steer": np.where(on, -A * p * (1 - p) ** 2 * (S + H), 0.0),
    }


def sequence_covariance(
    logprob: ArrayLike, advantage: ArrayLike, mask: ArrayLike, prompt_index: ArrayLike
) -> np.ndarray:
    """−(A_i − Ā)(S_i − S̄) with S_i the log-prob of the response and means over its prompt's responses, [N].

    Its mean over a prompt's responses is −Cov(S, A), the change of that prompt's entropy per unit of a natural-gradient step
    (docs/theory.md, section 9).

    Args:
        logprob: S [N, T], nats.
        advantage: A [N].
        mask: bool [N, T].
        prompt_index: integers [N].
    """
    S = np.where(np.asarray(mask, dtype=bool), np.asarray(logprob, dtype=np.float64), 0.0).sum(axis=1)[
        :, None
    ]
    A = np.asarray(advantage, dtype=np.float64)[:, None]
    on = np.ones_like(S, dtype=bool)
    return (-_centred(A, on, prompt_index) * _centred(S, on, prompt_index))[:, 0]


def _centred(x: np.ndarray, on: np.ndarray, group: ArrayLike) -> np.ndarray:
    """X minus its mean over the tokens of its group; 0 off the mask."""
    _, inverse = np.unique(np.asarray(group), return_inverse=True)
    mean = np.bincount(inverse, np.where(on, x, 0.0).sum(axis=1)) / np.bincount(inverse, on.sum(axis=1))
    return np.where(on, x - mean[inverse][:, None], 0.0)
