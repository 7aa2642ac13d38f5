r"""The structure of a kernel matrix between responses: blocks, spectrum, growth, and what it predicts (docs/theory.md, section 9).

    cos(t, t') = K(t,t')/√(K(t,t)K(t',t'));    blocks: t = t' (diagonal), same prompt, other prompts

Responses to one prompt depend on each other, and so do all entries of one row, so errors come from drawing whole prompts again: a draw
gives every response its prompt's multiplicity m, a pair of different prompts the weight m·m', a pair of one prompt m.

Legend: N responses; B prompts; d effective dimension; γ = N/d.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..errors import UserError
from .estimate import Estimate
from .ranks import rank_correlations
from .samples import FloatArray

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
DRAWS = 200
_TRACY_WIDOM = 2.02  # 99 % quantile of the law of the largest eigenvalue of pure noise, orthogonal case


class Distribution(NamedTuple):
    """The distribution of a block's entries."""

    mean: Estimate
    quantiles: dict[str, Estimate]


class Spectrum(NamedTuple):
    """Eigenvalues of a kernel and of its cosines, descending, and the noise they are held against.

    Attributes:
        eigenvalues: of K.
        participation: (Σλ)²/Σλ² of K: how many directions carry it.
        leading_share: of the largest in the trace.
        cosine_eigenvalues: of cos.
        dimension: d of the Marchenko-Pastur law that the bulk of them is closest to.
        scale: σ² of that law: the share of every gradient that looks like noise.
        bulk: σ²(1 ± √γ)², the range of the law.
        threshold: above which an eigenvalue is an outlier: the upper end and its fluctuation at this N (99 %).
        outliers: how many eigenvalues of cos are above.
        misfit: largest distance between the distribution of the others and the law's.
    """

    eigenvalues: FloatArray
    participation: float
    leading_share: float
    cosine_eigenvalues: FloatArray
    dimension: float
    scale: float
    bulk: tuple[float, float]
    threshold: float
    outliers: int
    misfit: float


def cosines(K: ArrayLike) -> FloatArray:
    """K(t,t')/√(K(t,t)K(t',t')) [N, N]; NaN in the row of a gradient that is zero."""
    K = _square(K)
    with np.errstate(divide="ignore", invalid="ignore"):
        size = np.sqrt(np.diag(K))
        return K / np.outer(size, size)


def block_distributions(
    K: ArrayLike, prompt: ArrayLike, *, unit: str, draws: int = DRAWS, seed: int = 0
) -> dict[str, dict[str, Distribution]]:
    """block -> "raw" or "cosine" -> mean and quantiles, with errors over prompts.

    Args:
        K: [N, N], symmetric.
        prompt: [N] integers.
        unit: of K.
        draws: bootstrap draws over prompts.
        seed: of the draws.

    Returns:
        Blocks "diagonal" (raw alone), "same_prompt" (only where some prompt has two responses) and "cross_prompt".

    Raises:
        UserError: fewer than two prompts, shapes that do not fit.
    """
    K = _square(K)
    group, B = _prompts(prompt, len(K))
    row, col = np.triu_indices(len(K))
    same = group[row] == group[col]
    pairs = {
        "diagonal": row == col,
        "same_prompt": same & (row != col),
        "cross_prompt": ~same,
    }
    scaled = cosines(K)
    counts = _draws(B, draws, seed)
    found: dict[str, dict[str, Distribution]] = {}
    for block, chosen in pairs.items():
        if not chosen.any():
            continue
        r, c = row[chosen], col[chosen]
        once = block != "cross_prompt"
        weights = [m[group[r]] * (1.0 if once else m[group[c]]) for m in counts]
        kinds = {"raw": (K, unit)} | ({} if block == "diagonal" else {"cosine": (scaled, "1")})
        found[block] = {
            kind: _distribution(x[r, c], weights, B, own_unit) for kind, (x, own_unit) in kinds.items()
        }
    return found


def spectrum(K: ArrayLike, prompt: ArrayLike) -> Spectrum:
    """Eigenvalues against those of independent directions in d dimensions.

    N unit vectors that are noise but for a share 1 − σ² in a few common directions have cosines with N − (a few) eigenvalues near the
    Marchenko-Pastur law of d dimensions, scaled by σ². Both are fitted to the eigenvalues between the 10 % and 70 % quantiles, which a few
    outliers do not move: the d whose quantiles have the most constant ratio to them, in logarithms; σ² is that ratio.

    Args:
        K: [N, N], symmetric, positive semi-definite up to rounding.
        prompt: [N] integers.

    Raises:
        UserError: fewer than two prompts, fewer than eight responses, shapes that do not fit.
    """
    K = _square(K)
    _prompts(prompt, len(K))
    N = len(K)
    if N < 8:
        raise UserError(f"K: got {N} responses, expected 8 at least: fewer say nothing about a spectrum.")
    scaled = cosines(K)
    values = np.linalg.eigvalsh(K)[::-1].astype(np.float64)
    found = np.full(N, np.nan)
    d = scale = threshold = misfit = float("nan")
    bulk = (d, d)
    if np.isfinite(scaled).all():
        found = np.linalg.eigvalsh(scaled)[::-1].astype(np.float64)
        d, scale = _fitted(found[::-1])
        (low, high), top = marchenko_pastur_range(N, d)
        bulk, threshold = (scale * low, scale * high), scale * top
        inside = found[found <= threshold][::-1]
        expected = np.interp(inside / scale, *_distribution_function(N, d))
        steps = np.arange(len(inside) + 1) / len(inside)
        misfit = float(np.maximum(np.abs(expected - steps[1:]), np.abs(expected - steps[:-1])).max())
    with np.errstate(divide="ignore", invalid="ignore"):
        return Spectrum(
            eigenvalues=values,
            participation=float(values.sum() ** 2 / (values**2).sum()),
            leading_share=float(values[0] / values.sum()),
            cosine_eigenvalues=found,
            dimension=d,
            scale=scale,
            bulk=bulk,
            threshold=threshold,
            outliers=int((found > threshold).sum()),
            misfit=misfit,
        )


def marchenko_pastur_range(N: int, d: float) -> tuple[tuple[float, float], float]:
    """((1 − √γ)², (1 + √γ)²) for N ≤ d directions in d dimensions, and the 99 % quantile of the largest eigenvalue at this N.

    The latter is Johnstone's: centre (√d + √N)²/d, scale (√d + √N)(1/√d + 1/√N)^{1/3}/d, Tracy-Widom law of order 1.
    """
    root = np.sqrt(N / d)
    bulk = (float((1 - root) ** 2), float((1 + root) ** 2))
    scale = (np.sqrt(d) + np.sqrt(N)) * (1 / np.sqrt(d) + 1 / np.sqrt(N)) ** (1 / 3) / d
    return bulk, float(bulk[1] + _TRACY_WIDOM * scale)


def marchenko_pastur_density(x: ArrayLike, N: int, d: float) -> FloatArray:
    """√((λ₊ − x)(x − λ₋))/(2πγx): density of the eigenvalues of N ≤ d directions in d dimensions."""
    x = np.asarray(x, dtype=np.float64)
    (low, high), _ = marchenko_pastur_range(N, d)
    inside = (x > low) & (x < high)
    at = np.where(inside, x, high)
    return np.where(inside, np.sqrt((high - at) * (at - low)) / (2 * np.pi * N / d * at), 0.0)


def marchenko_pastur_quantiles(place: ArrayLike, N: int, d: float) -> FloatArray:
    """Eigenvalue below which the law has the mass `place`, in [0, 1]."""
    x, mass = _distribution_function(N, d)
    return np.interp(np.asarray(place, dtype=np.float64), mass, x)


def _distribution_function(N: int, d: float) -> tuple[FloatArray, FloatArray]:
    """Points across the law's range and the mass up to each: x = mean + half·sin φ, where the density is smooth in φ."""
    (low, high), _ = marchenko_pastur_range(N, d)
    phi = np.linspace(-np.pi / 2, np.pi / 2, 401)
    x = (low + high) / 2 + (high - low) / 2 * np.sin(phi)
    f = marchenko_pastur_density(x, N, d) * (high - low) / 2 * np.cos(phi)
    mass = np.concatenate([[0.0], np.cumsum((f[1:] + f[:-1]) / 2)])
    return x, mass / mass[-1]


def _fitted(ascending: FloatArray) -> tuple[float, float]:
    """(d, σ²) of the law closest to the inner eigenvalues."""
    N = len(ascending)
    place = (np.arange(N) + 0.5) / N
    inner = (place > 0.1) & (place < 0.7) & (ascending > 0)
    best = (np.inf, float("nan"), float("nan"))
    for d in N * np.geomspace(1.02, 1e6, 250):
        ratio = np.log(ascending[inner] / marchenko_pastur_quantiles(place[inner], N, d))
        if (spread := float(ratio.var())) < best[0]:
            best = (spread, float(d), float(np.exp(ratio.mean())))
    return best[1], best[2]


def growth(
    K: ArrayLike,
    length: ArrayLike,
    shared_prefix: ArrayLike,
    prompt: ArrayLike,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Estimate]:
    """How the kernel grows with the length of a response, and with the tokens two responses to one prompt begin with.

    Args:
        K: [N, N].
        length: response tokens [N].
        shared_prefix: [N, N] number of first response tokens in common; read within prompts.
        prompt: [N] integers.
        draws: bootstrap draws over prompts.
        seed: of the draws.

    Returns:
        "length_exponent" a of K(t,t) ∝ T^a (least squares in logarithms), "length_rank" its rank correlation; where prompts have several
        responses also "prefix_rank", the rank correlation of cosine and shared tokens of pairs of one prompt. NaN where the lengths, or
        shared prefixes, are all alike.
    """
    K = _square(K)
    group, B = _prompts(prompt, len(K))
    T = np.asarray(length, dtype=np.float64)
    counts = _draws(B, draws, seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        x, y = np.log(T), np.log(np.diag(K))
        slope = _bootstrapped(lambda m: _slope(x, y, m[group]), counts)
    found = {
        "length_exponent": Estimate(
            value=slope[0], stderr=slope[1], n=B, unit="1",
            method="least squares of log K(t,t) on log length; bootstrap over prompts",
        ),
        "length_rank": rank_correlations({"x": T}, np.diag(K), prompt, draws=draws, seed=seed)["x"].estimate,
    }  # fmt: skip
    row, col = np.triu_indices(len(K), 1)
    same = group[row] == group[col]
    owners = group[row[same]]
    if len(np.unique(owners)) > 1:
        prefix = np.asarray(shared_prefix, dtype=np.float64)[row[same], col[same]]
        cosine = cosines(K)[row[same], col[same]]
        found["prefix_rank"] = rank_correlations({"x": prefix}, cosine, owners, draws=draws, seed=seed)[
            "x"
        ].estimate
    return found


def agreement(
    predicted: ArrayLike, measured: ArrayLike, prompt: ArrayLike, *, draws: int = DRAWS, seed: int = 0
) -> dict[str, Estimate]:
    """How well a prediction per response meets what was measured.

    Returns:
        "slope" Σ predicted·measured/Σ predicted², 1 where the prediction is right; "unexplained" Σ (measured − predicted)²/Σ measured²;
        "rank", their rank correlation; errors over prompts.
    """
    p, q = (np.asarray(x, dtype=np.float64) for x in (predicted, measured))
    group, B = _prompts(prompt, len(p))
    counts = _draws(B, draws, seed)
    found = {}
    for name, f, how in (
        ("slope", lambda m: (m * p) @ q / ((m * p) @ p), "regression of measured on predicted through 0"),
        ("unexplained", lambda m: m @ (q - p) ** 2 / (m @ q**2), "share of the measured squares that is not predicted"),
    ):  # fmt: skip
        with np.errstate(divide="ignore", invalid="ignore"):
            value, stderr = _bootstrapped(lambda m, f=f: float(f(m[group])), counts)  # type: ignore[misc]
        found[name] = Estimate(
            value=value, stderr=stderr, n=B, unit="1", method=f"{how}; bootstrap over prompts"
        )
    found["rank"] = rank_correlations({"x": p}, q, prompt, draws=draws, seed=seed)["x"].estimate
    return found


def covariance_laws(
    K: ArrayLike, S: ArrayLike, advantage: ArrayLike, pull: ArrayLike, prompt: ArrayLike
) -> dict[str, FloatArray]:
    r"""Three predictions of what each prompt's part of the update does to the entropy per sequence, [B] each, up to a factor.

        natural    −Cov_j(S, A)                              were K(t, t') = 1[t=t']/π(t) − 1: the natural gradient of a table
        table      −Cov_j(S, πA)                             were K ∝ 1: the plain gradient of a table
        kernel     −Σ_{i∈j} ω_i A_i mean_t (S_t − b_t) K(t, i)    t over the responses to other prompts

    b_t is the mean of S over t's group without t; in `table` π = e^S is relative to the likeliest response. Units differ: the laws are
    compared by sign and rank.

    Args:
        K: [N, N], with the preconditioner that makes the step.
        S: log π of every response [N].
        advantage: A [N].
        pull: ω A [N], the weight of ∇S_i in the step.
        prompt: [N] integers; every prompt needs two responses.

    Raises:
        UserError: a prompt with a single response; shapes that do not fit.
    """
    K = _square(K)
    group, B = _prompts(prompt, len(K))
    S, A, g = (np.asarray(x, dtype=np.float64) for x in (S, advantage, pull))
    size = np.bincount(group).astype(np.float64)
    if size.min() < 2:
        raise UserError(
            "prompt: a prompt has one response; expected two at least, for the covariance within a group."
        )

    def mean(x: FloatArray) -> FloatArray:
        return np.bincount(group, weights=x, minlength=B) / size

    def covariance(x: FloatArray) -> FloatArray:
        return mean(S * x) - mean(S) * mean(x)

    centred = (S - mean(S)[group]) * (size / (size - 1))[group]  # S_t minus the mean of the others
    other = group[:, None] != group
    moved = (other * (centred[:, None] * K)).sum(axis=0) / other.sum(
        axis=0
    )  # of i: mean over t of other prompts
    return {
        "natural": -covariance(A),
        "table": -covariance(np.exp(S - S.max()) * A),
        "kernel": -np.bincount(group, weights=g * moved, minlength=B).astype(np.float64),
    }


def identical_pairs(shared_prefix: ArrayLike, length: ArrayLike, prompt: ArrayLike) -> float:
    """Share of the pairs of responses to one prompt that are the same tokens twice; NaN without such pairs."""
    T, group = np.asarray(length), np.asarray(prompt)
    row, col = np.triu_indices(len(T), 1)
    pair = group[row] == group[col]
    row, col = row[pair], col[pair]
    same = (np.asarray(shared_prefix)[row, col] == T[row]) & (T[row] == T[col])
    return float(same.mean()) if len(same) else float("nan")


def sums_by_prompt(x: ArrayLike, prompt: ArrayLike) -> FloatArray:
    """Σ of each prompt's entries [B], in the order of the prompts' numbers."""
    _, group = np.unique(np.asarray(prompt), return_inverse=True)
    return np.bincount(group, weights=np.asarray(x, dtype=np.float64)).astype(np.float64)


def kernel_prediction(K: ArrayLike, pull: ArrayLike) -> FloatArray:
    """Σ_i K(t, t_i) ω_i A_i [N]: what a step that is the update of the responses i does to log π(t), per unit ηκ."""
    return np.asarray(K, dtype=np.float64) @ np.asarray(pull, dtype=np.float64)


def compare_laws(
    laws: Mapping[str, ArrayLike], share: ArrayLike, *, draws: int = DRAWS, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Each law against the share that every prompt of U has in δH₁, by sign and rank.

    Args:
        laws: name -> [B], from `covariance_laws`.
        share: [B], in the order of the prompts' numbers.
        draws: bootstrap draws over prompts.
        seed: of the draws.

    Returns:
        name -> {"sum": the law's total, "sum_has_the_sign": of Σ share, "same_sign": share of prompts with the sign of their share, "rank":
        rank correlation over prompts}, all over prompts with a share that is not zero; empty where there are fewer than three.
    """
    c = np.asarray(share, dtype=np.float64)
    taught = c != 0  # a group whose advantages are all zero has no part in the step, and no sign
    c, B = c[taught], int(taught.sum())
    if B < 3:
        return {}
    laws = {name: np.asarray(law, dtype=np.float64)[taught] for name, law in laws.items()}
    ranks = rank_correlations(laws, c, np.arange(B), draws=draws, seed=seed)
    found: dict[str, dict[str, Any]] = {}
    for name, law in laws.items():
        x = np.asarray(law, dtype=np.float64)
        agree = np.sign(x) == np.sign(c)
        found[name] = {
            "sum": Estimate(
                value=float(x.sum()), stderr=float(np.sqrt(B) * x.std(ddof=1)), n=B, unit="arbitrary", method="sum over prompts",
            ),
            "sum_has_the_sign": bool(np.sign(x.sum()) == np.sign(c.sum())),
            "same_sign": Estimate(
                value=float(agree.mean()), stderr=float(agree.std(ddof=1) / np.sqrt(B)), n=B, unit="1", method="share of prompts",
            ),
            "rank": ranks[name].estimate,
        }  # fmt: skip
    return found


def shared_prefixes(responses: list[tuple[int, ...]]) -> np.ndarray:
    """Number of first tokens that two responses have in common, [N, N]."""
    N = len(responses)
    found = np.zeros((N, N), dtype=np.int64)
    for i in range(N):
        for j in range(i, N):
            a, b = responses[i], responses[j]
            count = next(
                (k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
            )
            found[i, j] = found[j, i] = count
    return found


def _square(K: ArrayLike) -> FloatArray:
    K = np.asarray(K, dtype=np.float64)
    if K.ndim != 2 or K.shape[0] != K.shape[1]:
        raise UserError(f"K: got shape {K.shape}, expected [N, N].")
    return K


def _prompts(prompt: ArrayLike, N: int) -> tuple[np.ndarray, int]:
    labels, group = np.unique(np.asarray(prompt), return_inverse=True)
    if len(group) != N:
        raise UserError(f"prompt: got {len(group)} entries for {N} responses; expected one each.")
    if len(labels) < 2:
        raise UserError(
            f"prompt: the responses are to {len(labels)} prompt(s), expected 2 at least: errors are over prompts. Use more prompts."
        )
    return group, len(labels)


def _draws(B: int, draws: int, seed: int) -> list[FloatArray]:
    """Ones, then multiplicities of B prompts drawn from B; a draw of one prompt alone has no pair of prompts and is drawn again."""
    rng = np.random.default_rng(seed)
    found = [np.ones(B)]
    while len(found) <= draws:
        m = rng.multinomial(B, np.full(B, 1 / B)).astype(np.float64)
        if (m > 0).sum() > 1:
            found.append(m)
    return found


def _bootstrapped(f: Callable[[FloatArray], float], counts: list[FloatArray]) -> tuple[float, float]:
    values = [f(m) for m in counts]
    return values[0], float(np.std(values[1:], ddof=1))


def _distribution(x: FloatArray, weights: list[FloatArray], B: int, unit: str) -> Distribution:
    order = np.argsort(x, kind="stable")
    x = x[order]
    rows = []
    for w in weights:
        w = w[order]
        mass = np.cumsum(w) - w / 2
        total = w.sum()
        if total == 0:  # no pair of one prompt in this draw
            continue
        rows.append([w @ x / total, *np.interp(np.array(QUANTILES) * total, mass, x)])
    table = np.array(rows)
    made = [
        Estimate(
            value=float(table[0, i]), stderr=float(np.std(table[1:, i], ddof=1)), n=B, unit=unit,
            method=f"{what} over {len(x)} entries; {len(table) - 1} bootstrap draws of prompts",
        )
        for i, what in enumerate(["mean", *(f"quantile {q:g}" for q in QUANTILES)])
    ]  # fmt: skip
    return Distribution(made[0], {f"{q:g}": e for q, e in zip(QUANTILES, made[1:], strict=True)})


def _slope(x: FloatArray, y: FloatArray, m: FloatArray) -> float:
    x = x - (m @ x) / m.sum()
    spread = (m * x) @ x
    return float((m * x) @ y / spread) if spread > 1e-12 * m.sum() else float("nan")
