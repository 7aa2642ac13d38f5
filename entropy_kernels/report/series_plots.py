"""The pictures of a series: the curve, its intervals, the entropy itself, and how long samples last."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..stats import Estimate
from .numbers import in_words
from .plots import DIRECT, LINEAR, MEASURED, MUTED, QUADRATIC, STYLE, WIDTH

_LEVEL = 0.95
_CURVES = (
    ("linear", "first order, Σ h′ along the steps taken", LINEAR, (None, None)),
    ("quadratic", "second order", QUADRATIC, (5, 2)),
)


def available(report: Mapping[str, Any]) -> dict[str, Callable[[], Figure]]:
    """The pictures by name; each is drawn when it is called."""
    return {
        "cumulative": lambda: cumulative_plot(report),
        "intervals": lambda: interval_plot(report),
        "entropy": lambda: entropy_plot(report),
        "ess": lambda: ess_plot(report),
    }


def cumulative_plot(report: Mapping[str, Any]) -> Figure:
    """Cumulative change, measured with its 95 % interval and predicted, over what the prediction misses with its own interval."""
    rows = report["intervals"]
    x, words = _positions(report)
    sums = [row["cumulative"] for row in rows]
    unit = in_words(rows[0]["measured"].unit)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 5.6), layout="constrained")
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(2.4, 1))
        _resampled(axes, report, x)
        _resampled(below, report, x)
        from_start = np.concatenate([[0], x])  # nothing has changed yet at the first checkpoint
        value, low, high = (np.concatenate([[0], y]) for y in _interval([s["measured"] for s in sums]))
        axes.fill_between(
            from_start, low, high, color=MEASURED, alpha=0.13, linewidth=0, label="its 95 % interval"
        )
        axes.plot(from_start, value, color=MEASURED, marker="o", markersize=4.5, label="measured")
        shown = [low, high]
        for kind, label, colour, dashes in _CURVES:
            if kind in sums[0]:
                value, low, high = (np.concatenate([[0], y]) for y in _interval([s[kind] for s in sums]))
                bars = [value - low, high - value]
                axes.errorbar(
                    from_start, value, yerr=bars, fmt="none", ecolor=colour, alpha=0.6, elinewidth=1
                )
                axes.plot(from_start, value, color=colour, dashes=dashes, label=label)
                shown += [value] if kind == "quadratic" else [low, high]
        axes.set_ylim(*_limits(shown))  # a second order that is not resolved must not hide the rest
        axes.axhline(0, color=MUTED, linewidth=0.8)
        axes.set_ylabel(f"change of entropy since {report['checkpoints'][0]['name']}\n({unit})")
        axes.set_title("Change of entropy along the run, measured and predicted")
        axes.legend(loc="best")

        value, low, high = _interval([s["missed"] for s in sums])
        below.axhline(0, color=MUTED, linewidth=0.8)
        below.errorbar(
            x,
            value,
            yerr=[value - low, high - value],
            fmt="o",
            markersize=4,
            color=LINEAR,
            elinewidth=1,
            capsize=2,
        )
        below.set_ylabel("measured −\nfirst order")
        _steps(below, x, words)
        return figure


def interval_plot(report: Mapping[str, Any]) -> Figure:
    """Every interval's measured change against its first-order prediction, with one standard error of each."""
    rows = report["intervals"]
    measured, linear = (_arrays([row[kind] for row in rows]) for kind in ("measured", "linear"))
    unit = in_words(rows[0]["measured"].unit)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
        axes = figure.subplots()
        ends = [
            f(
                np.nan_to_num(
                    [*(v - e for v, e in (measured, linear)), *(v + e for v, e in (measured, linear))]
                )
            )
            for f in (np.min, np.max)
        ]
        axes.plot(ends, ends, color=MUTED, linewidth=1, dashes=(1, 2), label="measured = first order")
        axes.errorbar(
            linear[0],
            measured[0],
            xerr=linear[1],
            yerr=measured[1],
            fmt="o",
            color=LINEAR,
            elinewidth=1,
            markersize=5,
        )
        for j, row in enumerate(rows):
            axes.annotate(
                str(row["to"]).rpartition("-")[2],
                (linear[0][j], measured[0][j]),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize=8,
                color=MUTED,
            )
        axes.set_xlabel(f"first order  ({unit})")
        axes.set_ylabel(f"measured  ({unit})")
        axes.set_title("Every interval, named by the checkpoint at its end")
        axes.legend(loc="upper left")
        return figure


def entropy_plot(report: Mapping[str, Any]) -> Figure:
    """Entropy at every checkpoint with its 95 % interval; batches of samples are not joined."""
    x, words = _positions(report)
    value, low, high = _interval([point["entropy"] for point in report["checkpoints"]])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
        axes = figure.subplots()
        where = np.concatenate([[0], x])
        _resampled(axes, report, x)
        axes.errorbar(
            where, value, yerr=[value - low, high - value], fmt="o", color=MEASURED, elinewidth=1, capsize=2
        )
        axes.set_ylabel(f"entropy  ({in_words(report['checkpoints'][0]['entropy'].unit)})")
        axes.set_title("Entropy at the checkpoints")
        _steps(axes, x, words)
        return figure


def ess_plot(report: Mapping[str, Any]) -> Figure:
    """Effective sample size at the end of every interval, and where samples were drawn anew."""
    rows = report["intervals"]
    x, words = _positions(report)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
        axes = figure.subplots()
        _resampled(axes, report, x)
        axes.plot(x, [row["ess_after"] for row in rows], "o", color=DIRECT)
        axes.axhline(
            report["config"]["min_ess"], color=MUTED, linewidth=1, dashes=(5, 2), label="least allowed"
        )
        axes.set_ylim(0, 1.05)
        axes.set_ylabel("ESS / responses")
        axes.set_title("How much of the samples is left after re-weighting")
        axes.legend(loc="lower left")
        _steps(axes, x, words)
        return figure


def _positions(report: Mapping[str, Any]) -> tuple[np.ndarray, list[str]]:
    """Where the ends of the intervals are drawn, counted in checkpoints, and the names of all checkpoints."""
    return np.arange(1, len(report["checkpoints"])), [str(c["name"]) for c in report["checkpoints"]]


def _steps(axes: Axes, x: np.ndarray, words: Sequence[str]) -> None:
    """Checkpoint names under the axis, by their number where they share the rest."""
    stems = {name.rpartition("-")[0] for name in words}
    short = len(stems) == 1 and stems != {""}
    axes.set_xlim(-0.3, len(x) + 0.3)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=14, integer=True))
    axes.xaxis.set_major_formatter(
        lambda at, _: words[int(at)].rpartition("-")[2] if 0 <= at < len(words) and at == int(at) else ""
    )
    axes.set_xlabel(stems.pop() if short else "checkpoint")


def _resampled(axes: Axes, report: Mapping[str, Any], x: np.ndarray) -> None:
    """A thin line where new samples were drawn."""
    starts = [
        j
        for j, row in enumerate(report["intervals"])
        if j and row["batch"] != report["intervals"][j - 1]["batch"]
    ]
    for i, j in enumerate(starts):
        label = "new samples" if i == 0 else None
        axes.axvline(x[j] - 1, color=MUTED, linewidth=0.8, dashes=(1, 2), label=label)


def _limits(curves: Sequence[np.ndarray]) -> tuple[float, float]:
    """Room for all curves and a little more."""
    low, high = np.nanmin(np.concatenate(curves)), np.nanmax(np.concatenate(curves))
    room = 0.06 * (high - low) or 1e-6
    return float(low - room), float(high + room)


def _arrays(items: Sequence[Estimate]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([item.value for item in items]), np.array([item.stderr for item in items])


def _interval(items: Sequence[Estimate]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    low, high = np.array([item.interval(_LEVEL) for item in items]).T
    return np.array([item.value for item in items]), low, high
