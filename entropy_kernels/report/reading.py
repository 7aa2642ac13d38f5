"""What a report says: the change to put in the headline, the verdict of each check, who contributed.

Used by the terminal summary and by the page, so that both say the same. Nothing is estimated here: numbers
of the report are picked, compared with thresholds, sorted and divided by their sum.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from ..stats import Estimate
from . import attribution
from .numbers import estimate, in_words, number

Verdict = Literal["pass", "warn", "unknown"]

# A change is called one only from this many standard errors on.
RESOLVED_Z = 2.0
MAX_SANITY_Z = 3.0
MAX_FLOORS_APART = 3.0
MAX_LOGPROB_MISMATCH = 1e-2
MIN_ESS_SHARE = 0.5
MAX_INTEGRATION_SHARE = 0.1
MAX_ROUNDING = 1e-2
MAX_TRUNCATED_SHARE = 0.5
MAX_DEGENERATE_SHARE = 0.8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the sanity table."""

    name: str
    found: str
    wanted: str
    verdict: Verdict
    meaning: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shares:
    """Contributions to h'(0) as shares of their sum, largest magnitude first.

    Attributes:
        share: signed, adds up to 1.
        row: the row of the table each belongs to (tokens), or the first of its rows in rollouts (prompts).
    """

    share: np.ndarray
    row: np.ndarray

    def concentration(self) -> np.ndarray:
        """Share of Σ|c| that the first 1, 2, ... hold; the last is 1."""
        magnitude = np.cumsum(np.abs(self.share))
        return magnitude / magnitude[-1]


# --- which change ----------------------------------------------------------------------------------------


def learning_rate(report: Mapping[str, Any]) -> float:
    """The checkpoint's learning rate; NaN where it has none to speak of."""
    for section in ("update", "config"):
        value = report.get(section, {}).get("learning_rate")
        if isinstance(value, int | float) and math.isfinite(value) and value > 0:
            return float(value)
    return math.nan


def headline_change(report: Mapping[str, Any]) -> dict[str, Any]:
    """The change at the η nearest to the checkpoint's learning rate; without one, at the largest η."""
    changes = report["changes"]
    rate = learning_rate(report)
    if math.isnan(rate):
        return max(changes, key=lambda change: change["eta"])
    return min(changes, key=lambda change: abs(math.log(change["eta"] / rate)))


def headline_place(report: Mapping[str, Any]) -> str:
    """Where the headline change is measured, in words."""
    eta, rate = headline_change(report)["eta"], learning_rate(report)
    if math.isnan(rate):
        return f"At the largest learning rate measured, {number(eta)},"
    if math.isclose(eta, rate, rel_tol=1e-6):
        return f"At the checkpoint's learning rate {number(eta)}"
    return f"At learning rate {number(eta)}, the nearest measured to the checkpoint's {number(rate)},"


def defined(item: Any) -> bool:
    """Whether an entry is an estimate with a value."""
    return isinstance(item, Estimate) and not math.isnan(item.value)


def measured(change: Mapping[str, Any]) -> tuple[Estimate, str]:
    """The measured change and how it was measured: the integrated one where there is one."""
    for key, words in (("true_integrated", "path-integrated"), ("true_direct", "direct difference")):
        if defined(change.get(key)):
            return change[key], words
    undefined = Estimate(
        value=math.nan, stderr=math.nan, n=0, unit=change["linear"].unit, method="not measured"
    )
    return undefined, "not measured"


def verb(change: Estimate) -> str:
    """What the entropy does."""
    if math.isnan(change.value):
        return "was not measured"
    if abs(change.value) < RESOLVED_Z * change.stderr:
        return "does not change measurably:"
    return "falls by" if change.value < 0 else "rises by"


def headline(report: Mapping[str, Any]) -> str:
    """The result in one sentence."""
    truth, _ = measured(headline_change(report))
    action = verb(truth)
    amount = estimate(truth, unsigned=action.endswith("by"), unit=True)
    return (
        f"{headline_place(report)} entropy {action} {'' if math.isnan(truth.value) else amount}".rstrip()
        + "."
    )


def prediction(report: Mapping[str, Any]) -> str:
    """The predictions beside it, in one sentence."""
    change = headline_change(report)
    parts = [f"The linear law predicts {estimate(change['linear'])}"]
    if defined(change.get("quadratic")):
        parts.append(f"the quadratic {estimate(change['quadratic'])}")
    return " and ".join(parts) + f" {in_words(change['linear'].unit)}."


def limits(report: Mapping[str, Any]) -> str:
    """What a truncated policy keeps, in words; nothing for the full law."""
    kept = report.get("truncation", {})
    found = [(name, kept.get(name.replace("-", "_"))) for name in ("top-k", "top-p")]
    return ", then ".join(f"{name} {value:g}" for name, value in found if value is not None)


def eta_star(report: Mapping[str, Any]) -> str:
    """How far the linear law reaches, in one sentence."""
    star = report.get("derivatives", {}).get("eta_star")
    if not star:
        return ""
    if not star["resolved"]:
        return "How far the linear law reaches is not resolved by these samples."
    return (
        f"The second-order term is as large as the first at η* = {number(star['value'])} "
        f"[{number(star['low'])}, {number(star['high'])}]."
    )


def noise_floor(report: Mapping[str, Any]) -> float:
    """The smallest change a direct difference can see, in the unit of the changes; NaN where not measured.

    It is the standard error of sanity.noise_floor.difference, ½[ĥ(+η) + ĥ(−η)] − ĥ(0) at the smallest η.
    """
    difference = report.get("sanity", {}).get("noise_floor", {}).get("difference")
    return difference.stderr if isinstance(difference, Estimate) else math.nan


def below_floor(report: Mapping[str, Any], change: Mapping[str, Any]) -> bool:
    """Whether the direct difference at this η is lost in rounding."""
    return defined(change.get("true_direct")) and abs(change["true_direct"].value) < noise_floor(report)


# --- checks ----------------------------------------------------------------------------------------


def checks(report: Mapping[str, Any]) -> list[Check]:
    """The lines of the sanity table; what depends on η is taken at the headline learning rate."""
    sanity, rollouts = report.get("sanity", {}), report.get("rollouts", {})
    change = headline_change(report)
    eta = f"η = {number(change['eta'])}"
    rows = [
        _limit(
            "Weights average to one",
            sanity.get("z_mean_weight"),
            MAX_SANITY_Z,
            ("z = {:.2g}", "|z| ≤ {:g}"),
            "Importance weights of samples that really come from this policy average to one. "
            "Otherwise sampler and model differ.",
        ),
        _limit(
            "Scores average to zero",
            sanity.get("z_mean_score"),
            MAX_SANITY_Z,
            ("z = {:.2g}", "|z| ≤ {:g}"),
            "The directional score Σ S′ averages to zero under the policy itself. "
            "Otherwise samples and derivatives do not belong together.",
        ),
        _limit(
            "Sampler and model agree",
            sanity.get("logprob_mismatch"),
            MAX_LOGPROB_MISMATCH,
            ("{:.2g} nats", "≤ {:g} nats"),
            "Mean difference per token between the log-probs recorded while sampling and those computed here; samples from a file "
            "are refused from 0.05 on. Not measured where the file has none: then only the two averages above speak for the samples.",
        ),
        _even_weights(change, rollouts.get("e", {}), eta),
        _agreement(change, noise_floor(report), eta),
        _limit(
            "Integration is fine enough",
            change.get("integration_error"),
            MAX_INTEGRATION_SHARE * measured(change)[0].stderr,
            ("{:.2g}", "≤ {:.2g}"),
            f"Error of the integral over the path at {eta}, against a tenth of the standard error.",
        ),
        _limit(
            "Parameters move as told",
            change.get("rounding"),
            MAX_ROUNDING,
            ("{:.2g}", "≤ {:g}"),
            f"‖fl(θ + ηv) − θ − ηv‖ / ‖ηv‖ at {eta}: the part of the step lost to rounding parameters.",
        ),
        _limit(
            "Completions end by themselves",
            rollouts.get("e", {}).get("truncated_share"),
            MAX_TRUNCATED_SHARE,
            ("{:.1%}", "≤ {:.0%}"),
            "Share of held-out completions cut by the length limit. "
            "The entropy is that of the policy with this limit.",
        ),
        _limit(
            "Groups disagree about reward",
            rollouts.get("u", {}).get("degenerate_groups_share"),
            MAX_DEGENERATE_SHARE,
            ("{:.1%}", "≤ {:.0%}"),
            "Share of groups in the update whose rewards are all equal: they carry no gradient.",
        ),
    ]
    if "attribution" in report:
        missed, allowed = attribution.sum_rule_check(report)
        rows.append(
            _limit(
                "Shares add up",
                missed,
                allowed,
                ("{:.2g}", "≤ {:g}"),
                "What shares of the update's tokens, momentum and decay miss of the linear change, which is found by another mode of "
                "differentiation on other samples; as a share of Σ|parts|.",
            )
        )
    return rows


def _limit(name: str, value: Any, limit: float, forms: tuple[str, str], meaning: str) -> Check:
    """A check that |value| ≤ limit; without a value or a limit there is no verdict."""
    known = float(value) if isinstance(value, int | float) else math.nan
    return Check(
        name=name,
        found="not measured" if math.isnan(known) else forms[0].format(known),
        wanted="unknown" if math.isnan(limit) else forms[1].format(limit),
        verdict=_verdict(abs(known) <= limit, known=not math.isnan(known + limit)),
        meaning=meaning,
    )


def _even_weights(change: Mapping[str, Any], sample: Mapping[str, Any], eta: str) -> Check:
    effective, count = change.get("ess_sequences", math.nan), sample.get("sequences", math.nan)
    return Check(
        name="Weights stay even",
        found=f"{number(effective)} of {number(count, 6)} sequences",
        wanted=f"≥ {MIN_ESS_SHARE:.0%}",
        verdict=_verdict(effective >= MIN_ESS_SHARE * count, known=not math.isnan(effective + count)),
        meaning=f"Effective sample size of the importance weights at {eta}. "
        "A small one means that few sequences decide the result.",
    )


def _agreement(change: Mapping[str, Any], floor: float, eta: str) -> Check:
    direct, integrated = (
        change[key].value if defined(change.get(key)) else math.nan
        for key in ("true_direct", "true_integrated")
    )
    apart = abs(direct - integrated)
    allowed = MAX_FLOORS_APART * floor + float(change.get("integration_error", 0.0))
    visible = abs(integrated) > floor and not math.isnan(apart)
    return Check(
        name="Two measurements agree",
        found=f"{number(apart, 2)} apart" if visible else "nothing to compare above the floor",
        wanted=f"≤ {number(allowed, 2)}",
        verdict=_verdict(apart <= allowed, known=visible),
        meaning=f"Direct difference and integral of the derivative at {eta}, against {MAX_FLOORS_APART:g} noise floors and the "
        "integration error. They share samples, so nothing else may separate them.",
    )


def _verdict(good: bool, *, known: bool) -> Verdict:
    return "unknown" if not known else ("pass" if good else "warn")


# --- who contributed ----------------------------------------------------------------------------------------


def token_shares(tables: Mapping[str, pa.Table]) -> Shares | None:
    """Shares of the tokens of E; None where the table has no contributions, or they add up to nothing."""
    table = tables.get("tokens_e")
    if table is None or "contribution" not in table.column_names or table.num_rows == 0:
        return None
    contribution = table["contribution"].to_numpy().astype(np.float64)
    return _shares(contribution, np.arange(len(contribution)))


def prompt_shares(tables: Mapping[str, pa.Table]) -> Shares | None:
    """Shares of the prompts of E: the sum over the tokens of all completions of a prompt."""
    rollouts, tokens = tables.get("rollouts_e"), tables.get("tokens_e")
    if (
        rollouts is None
        or tokens is None
        or "contribution" not in tokens.column_names
        or tokens.num_rows == 0
    ):
        return None
    names = np.asarray(rollouts["prompt_id"].to_pylist())
    _, first, prompt_of_sequence = np.unique(names, return_index=True, return_inverse=True)
    sequence = tokens["sequence"].to_numpy()
    contribution = tokens["contribution"].to_numpy().astype(np.float64)
    return _shares(np.bincount(prompt_of_sequence[sequence], contribution, minlength=len(first)), first)


def _shares(contribution: np.ndarray, row: np.ndarray) -> Shares | None:
    total = contribution.sum()
    if not np.isfinite(total) or total == 0:
        return None
    order = np.argsort(-np.abs(contribution), kind="stable")
    return Shares(share=contribution[order] / total, row=row[order])
