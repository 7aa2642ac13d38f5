"""The page's part on statistics: pictures of the lag profile and of the tails, and the tables beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from ..stats import Estimate
from .numbers import estimate, in_words, number, typeset
from .plots import DIRECT, LINEAR, MUTED, QUADRATIC, STYLE, WIDTH

_SHOWN_LAGS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def available(report: Mapping[str, Any]) -> dict[str, Callable[[], Figure]]:
    """The pictures there are numbers for, by name."""
    found: dict[str, Callable[[], Figure]] = {}
    if len(report.get("lag_profile", [])) > 1:
        found["lags"] = lambda: lag_plot(report)
    if len(_tails(report)) > 1:
        found["tails"] = lambda: tail_plot(report)
    return found


def lag_plot(report: Mapping[str, Any]) -> Figure:
    """h' summed up to a lag, with its error, beside the unbiased figure; and the part of each lag."""
    rows, full = report["lag_profile"], report["statistics"]["unbiased"]
    lag = np.array([row["last"] for row in rows])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(1.7, 1))
        axes.axhspan(full.value - full.stderr, full.value + full.stderr, color=MUTED, alpha=0.15, linewidth=0)
        axes.axhline(full.value, color=MUTED, linewidth=1, label="all lags: unbiased, ± one standard error")
        value, error = _columns([row["up_to"] for row in rows])
        axes.errorbar(
            lag,
            value,
            yerr=error,
            fmt="o-",
            color=LINEAR,
            markersize=4,
            elinewidth=1,
            label="lags up to here: biased",
        )
        axes.set_ylabel(f"h′  ({in_words(full.unit)})")
        axes.set_title("How far ahead a token's change reaches")
        axes.legend(loc="best")
        value, error = _columns([row["part"] for row in rows[1:]])
        wide = np.array([row["last"] - row["first"] + 1 for row in rows[1:]])
        below.axhline(0, color=MUTED, linewidth=0.8)
        below.errorbar(
            lag[1:], value / wide, yerr=error / wide, fmt="o", color=QUADRATIC, markersize=3.5, elinewidth=1
        )
        below.set_ylabel("per lag")
        below.set_xlabel("lag, tokens")
        for each in (axes, below):
            each.yaxis.set_major_formatter(FuncFormatter(_tick))
        return figure


def tail_plot(report: Mapping[str, Any]) -> Figure:
    """Quantiles of the error of h' against the number of prompts, with the slope −½ of a law with a variance."""
    rows = _tails(report)
    prompts = np.array([row["prompts"] for row in rows])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
        axes = figure.subplots()
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for name, colour, marker in (("q95", QUADRATIC, "^"), ("q80", LINEAR, "o"), ("q50", DIRECT, "D")):
            value = np.array([row[name] for row in rows])
            axes.plot(
                prompts,
                value,
                marker=marker,
                color=colour,
                linestyle="none",
                label=f"{name[1:]} % of draws are nearer",
            )
            axes.plot(
                prompts, value[0] * (prompts / prompts[0]) ** -0.5, color=colour, linewidth=1, alpha=0.7
            )
        axes.set_xticks(prompts)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(_tick))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("prompts")
        axes.set_ylabel("distance from h′ of all")
        axes.set_title("Error of h′ against the number of prompts; lines fall with its root")
        axes.legend(loc="best")
        return figure


def tables(report: Mapping[str, Any]) -> dict[str, Any]:
    """What statistics.html shows: rows of text by table; empty where the report has none."""
    found = report.get("statistics", {})
    lags = [row for row in report.get("lag_profile", []) if row["last"] in _SHOWN_LAGS]
    return {
        "lags": [
            (row["last"] or "path", _text(row["part"]), _text(row["up_to"]), _text(row.get("bias")))
            for row in lags
        ],
        "discounted": [
            (number(row["discount"]), _text(row["value"]), _text(row["bias"]))
            for row in found.get("discounted", [])
        ],
        "unbiased": _text(found.get("unbiased")),
        "unit": in_words(found["unbiased"].unit) if "unbiased" in found else "",
        "baselines": [
            (name, _text(row["first"]), _text(row["variance_ratio"]))
            for name, row in found.get("baselines", {}).items()
        ],
        "batches": _batches(found),
        "chosen": found.get("baseline", "none"),
        "mix": _mix(found.get("rao_blackwell", {})),
        "coefficients": _coefficients(found.get("rao_blackwell", {})),
        "tails": [
            (
                row["prompts"],
                *(typeset(number(row[q])) for q in ("q50", "q80", "q95")),
                _index(row["tail_index"]),
            )
            for row in _tails(report)
        ],
        "kurtosis": _text(found.get("tails", {}).get("kurtosis")),
        "top_share": _text(found.get("tails", {}).get("top_1_percent_share")),
    }


def _batches(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Whose new draws an error of h' is over."""
    two, one = found.get("two_batch", {}), found.get("one_batch", {})
    rows = (
        ("new held-out samples E, the update as it is", two.get("given_update")),
        ("new update samples U, E and the preconditioner as they are", two.get("given_evaluation")),
        ("both anew, preconditioner as it is (an upper bound in the mean)", two.get("both")),
        ("the part of this step's gradient, from U alone", one.get("first")),
    )
    return [(name, _text(item)) for name, item in rows if item is not None]


def _mix(found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    rows = (("rao_blackwell", "Σ H"), ("monte_carlo", "−Σ S"), ("best_mix", "best mix"))
    return [
        (name, _text(found[key]), _text(found.get(f"{key}_variance_ratio")))
        for key, name in rows
        if key in found
    ]


def _coefficients(found: Mapping[str, Any]) -> str:
    return typeset(", ".join(number(c, 2) for c in found.get("coefficients", [])))


def _index(found: Mapping[str, Any]) -> str:
    if any(math.isnan(found[key]) for key in ("value", "low", "high")):
        return "undefined"
    return typeset(f"{number(found['value'])} ({number(found['low'])} to {number(found['high'])})")


def _tails(report: Mapping[str, Any]) -> list[Any]:
    rows: list[Any] = report.get("statistics", {}).get("tails", {}).get("against_prompts", [])
    return rows


def _columns(items: list[Estimate]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([item.value for item in items]), np.nan_to_num([item.stderr for item in items])


def _text(item: Any) -> str:
    return typeset(estimate(item)) if isinstance(item, Estimate) else "–"


def _tick(value: float, _: int) -> str:
    return typeset(number(float(value), 3))
