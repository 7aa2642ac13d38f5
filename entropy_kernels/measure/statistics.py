"""How far the figures can be trusted, from what is known of E anyway: baselines, lags, mixes of estimators, tails.

baseline        fitted at θ once, then shared by every truth and prediction of the run (docs/theory.md, section 5)
lag profile     always; it is about the per-decision estimator without a baseline
rao_blackwell, tails, baselines   always: arithmetic on arrays
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .. import stats
from ..derivatives import token_stats, token_tangents
from ..errors import UserError
from ..policy import Parameters, Policy, TokenBatch
from .config import MeasureConfig
from .features import hidden_features
from .store import Store

CHEAP: tuple[stats.BaselineKind, ...] = (
    "position",
    "ema",
    "regression",
    "least_error",
)  # from E's own numbers alone


def check_baseline(config: MeasureConfig, prompt: np.ndarray) -> None:
    """Refuse a baseline that these samples do not allow, before anything is evaluated on them.

    Raises:
        UserError: "group" where each prompt has a single response.
    """
    if config.baseline == "group" and len(np.unique(prompt)) == len(prompt):
        raise UserError(
            "baseline: 'group' compares the responses to one prompt, and each prompt of E has a single one. Draw more with "
            "--group-size-e 2, or choose another baseline."
        )


def fit_baseline(
    config: MeasureConfig,
    policy: Policy,
    batch: TokenBatch,
    direction: Parameters,
    values: stats.TokenValues,
    tangents: stats.TokenTangents | None,
    store: Store,
    tick: Callable[[int], Any] | None = None,
) -> np.ndarray | None:
    """b [N, T] of the kind that was asked for, fitted at θ across prompts; None for none.

    "critic" takes one forward pass more; "least_error" a forward-mode pass along v where the tangents are not there yet.
    """
    if config.baseline == "none":
        return None

    def fitted() -> dict[str, np.ndarray]:
        features, along_v = None, None
        if config.baseline == "least_error":
            along_v = tangents or _tangents(policy, batch, direction)
        if config.baseline == "critic":
            features = hidden_features(policy, batch, progress=tick).numpy()
        b = stats.baseline(
            config.baseline,  # type: ignore[arg-type]  # the configuration saw to it
            values,
            batch.response_mask.numpy().astype(bool),
            batch.prompt_index.numpy(),
            per=config.per,
            estimator=config.estimator,
            features=features,
            tangents=along_v,
        )
        return {"baseline": b}

    return store.tensors("baseline", fitted)["baseline"].numpy()


def baseline_of_e(
    config: MeasureConfig, policy: Policy, batch: TokenBatch, direction: Parameters, store: Store
) -> np.ndarray | None:
    """As `fit_baseline`, for a stage that runs before the tangents are there."""
    if config.baseline == "none":
        return None
    found = store.in_parts("values_e", lambda parts: token_stats(policy, batch, parts=parts)._asdict())
    values = stats.TokenValues(found["entropy"].double().numpy(), found["logprob"].double().numpy())
    return fit_baseline(config, policy, batch, direction, values, None, store)


def _tangents(policy: Policy, batch: TokenBatch, direction: Parameters) -> stats.TokenTangents:
    found = token_tangents(policy, batch, direction)
    return stats.TokenTangents(found.d_entropy.double().numpy(), found.d_logprob.double().numpy())


def lag_rows(profile: stats.LagProfile) -> list[dict[str, Any]]:
    """The report's lag_profile: lag 0 is the path part; `up_to` sums all lags to `last` and is biased, by about `bias`."""
    rows = [{"first": 0, "last": 0, "part": profile.path, "up_to": profile.path}]
    for lag in profile.lags:
        rows.append(
            {
                "first": lag.first,
                "last": lag.last,
                "part": lag.part,
                "up_to": lag.up_to.value,
                "bias": lag.up_to.bias,
            }
        )
    return rows


def about_e(
    config: MeasureConfig,
    values: stats.TokenValues,
    tangents: stats.TokenTangents,
    mask: np.ndarray,
    prompt: np.ndarray,
    baseline: np.ndarray | None,
) -> dict[str, Any]:
    """The report's sections lag_profile and statistics, as far as E alone goes; everything at η = 0."""
    per = config.per
    profile = stats.lag_profile(values, tangents, mask, prompt, per=per)

    def sums(b: np.ndarray | None) -> stats.PromptSums:
        kinds: dict[str, Any] = {
            "per": per,
            "estimator": config.estimator,
            "tangents": tangents,
            "baseline": b,
        }
        return stats.prompt_sums(values, values, mask, prompt, **kinds)

    plain, chosen = sums(None), sums(baseline)
    baselines: dict[str, Any] = {}
    companions = len(np.unique(prompt)) < len(prompt)
    tried: tuple[stats.BaselineKind, ...] = (*CHEAP, "group") if companions else CHEAP
    for kind in tried:
        kinds: dict[str, Any] = {"per": per, "estimator": config.estimator}
        if kind == "least_error":
            kinds["tangents"] = tangents
        baselines[kind] = _against(sums(stats.baseline(kind, values, mask, prompt, **kinds)), plain)
    if config.baseline not in ("none", *baselines):
        baselines[config.baseline] = _against(chosen, plain)
    shares = stats.token_contributions(
        values, tangents, mask, per=per, estimator=config.estimator, baseline=baseline
    )
    tails = stats.heavy_tails(chosen, shares, mask, prompt, seed=config.seed)
    found: dict[str, Any] = {
        "unbiased": profile.full,
        "discounted": [
            {"discount": gamma, "value": x.value, "bias": x.bias} for gamma, x in profile.discounted
        ],
        "baseline": config.baseline,
        "baselines": baselines,
        "tails": {
            "kurtosis": tails.kurtosis,
            "top_1_percent_share": tails.top_share,
            "against_prompts": [
                {
                    "prompts": row.prompts,
                    **{
                        f"q{100 * level:g}": q
                        for level, q in zip(stats.TAIL_LEVELS, row.quantiles, strict=True)
                    },
                    "tail_index": row.tail_index._asdict(),
                }
                for row in tails.against_prompts
            ],
        },
    }
    if len(plain.numerator) >= 4:  # a mix is fitted on other prompts than it is used on
        mix = stats.best_mix(values, mask, prompt, per=per)
        found["rao_blackwell"] = {**mix._asdict(), "coefficients": list(mix.coefficients)}
    return {"lag_profile": lag_rows(profile), "statistics": found}


def two_batch(
    along_first: stats.Estimate, shares: np.ndarray, prompt_u: np.ndarray, eta: float
) -> dict[str, Any]:
    """The report's statistics.two_batch: the error of h'(0) over new draws of E, of U, and of both (docs/theory.md, section 11).

    Args:
        along_first: h'(0) with its error given the update.
        shares: of U's tokens in δH₁ at eta, [N, T].
        prompt_u: integers [N], of U.
        eta: the learning rate in the shares.
    """
    _, inverse = np.unique(prompt_u, return_inverse=True)
    of_update, of_both = stats.without_trace(
        along_first, np.bincount(inverse, weights=shares.sum(axis=1)) / eta
    )
    return {"given_update": along_first, "given_evaluation": of_update, "both": of_both}


def one_batch(
    K: np.ndarray,
    pull: np.ndarray,
    logprob: np.ndarray,
    length: np.ndarray,
    prompt: np.ndarray,
    *,
    prompts_in_update: int,
    gain: float,
    per: stats.Per,
    entropy: float,
    seed: int = 0,
) -> dict[str, Any]:
    """The report's statistics.one_batch: the gradient's part of h'(0) from U alone, −κU, pairs of different prompts only.

    Args:
        K: ∇SᵀP∇S between responses of U, [n, n].
        pull: ω A of each, [n].
        logprob: S of each, nats, [n].
        length: response tokens of each, [n].
        prompt: integers [n].
        prompts_in_update: B_U; K may hold fewer.
        gain: κ.
        per: which entropy.
        entropy: h, nats per token; only for per token.
        seed: of the bootstrap.
    """
    f = logprob if per == "sequence" else (logprob + entropy * length) / length.mean()
    Q = stats.pair_products(K, stats.leave_one_out(f, prompt), prompts_in_update * pull, prompt)
    found = stats.one_batch(-gain * Q, unit=f"nats/{per} per unit eta", seed=seed)
    return {
        "first": found.u,
        "zeta_1": found.zeta_1,
        "zeta_2": found.zeta_2,
        "hoeffding_variance": found.variance,
        "bootstrap_stderr": found.bootstrap_stderr,
    }


def _against(sums: stats.PromptSums, plain: stats.PromptSums) -> dict[str, stats.Estimate]:
    return {"first": stats.first_derivative(sums), "variance_ratio": stats.variance_ratio(sums, plain)}
