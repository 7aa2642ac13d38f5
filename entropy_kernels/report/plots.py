"""The pictures of a report as matplotlib figures, and as inline SVG whose colours and font are the page's own.

A figure is drawn in the page's light colours, each of them used for one thing alone; in the SVG each becomes a CSS variable, so
that one picture serves light, dark and print.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from ..stats import Estimate
from . import reading
from .numbers import in_words, number, typeset

# As in page.html, but all different. The hues are told apart with any colour vision; line style and marker differ as well.
INK, MUTED, GRID = "#1b1d21", "#666c75", "#e3e5e9"
MEASURED, DIRECT, LINEAR, QUADRATIC = "#1b1d20", "#00876a", "#0072b2", "#d55e00"
_VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    MEASURED: "measured",
    LINEAR: "linear",
    QUADRATIC: "quadratic",
    DIRECT: "direct",
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelsize": 10,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "lines.markersize": 6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
WIDTH = 7.6
_MAX_CURVE_POINTS = 400


def change_plot(report: Mapping[str, Any]) -> Figure:
    """|ΔH| against η: measurements, predictions, the noise floor, the reach of the linear law."""
    changes = report["changes"]
    eta = np.array([change["eta"] for change in changes])
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(4.6)
        _log_axes(axes, eta)
        for key, label, color, dashes in (
            ("linear", "linear prediction", LINEAR, (None, None)),
            ("quadratic", "quadratic prediction", QUADRATIC, (5, 2)),
        ):
            value, _ = _series(changes, key)
            axes.plot(
                *_broken_where_sign_changes(eta, value), color=color, dashes=dashes, label=label, zorder=2
            )
            _bars(axes, eta, changes, key, color)
        _triangles(axes, eta, changes, "true_integrated", MEASURED, "measured, path-integrated")
        lost = [reading.below_floor(report, change) for change in changes]
        _triangles(axes, eta, changes, "true_direct", DIRECT, "measured, direct difference", faint=lost)

        low, high = _span(
            [
                abs(change[key].value)
                for change in changes
                for key in _TRUTHS
                if reading.defined(change.get(key))
            ]
        )
        floor = reading.noise_floor(report)
        axes.set_ylim(min(low / 4, floor / 2 if floor > 0 else low), high * 6)
        if floor > 0:
            axes.axhspan(low / 100, floor, color=GRID, alpha=0.45, linewidth=0, zorder=0)
            _note(axes, 0.48, floor, "noise floor of the direct difference", above=True)
        _mark_rate(axes, report)
        _mark_eta_star(axes, report)
        axes.set_title(_sign_words(changes))
        axes.set_ylabel(f"|ΔH|  ({in_words(changes[0]['linear'].unit)})")
        axes.legend(loc="upper left")
        return figure


def residual_plot(report: Mapping[str, Any]) -> Figure:
    """|measured − predicted| against η, with slopes 2 and 3 to compare with."""
    changes = report["changes"]
    eta = np.array([change["eta"] for change in changes])
    truth = np.array([reading.measured(change)[0].value for change in changes])
    error = np.array([_plain(change.get("integration_error")) for change in changes])
    z_linear = np.array([_plain(change.get("z_linear")) for change in changes])
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(4.0)
        _log_axes(axes, eta)
        shown: list[float] = []
        for key, power, color, marker, dashes in (
            ("linear", 2, LINEAR, "o", (None, None)),
            ("quadratic", 3, QUADRATIC, "D", (5, 2)),
        ):
            residual = np.abs(truth - _series(changes, key)[0])
            good = np.isfinite(residual) & (residual > 0)
            if not good.any():
                continue
            clear = good & ~(residual < error)
            bars = np.abs(residual / z_linear) if key == "linear" else np.full_like(residual, np.nan)
            bars = np.where(np.isfinite(bars), bars, 0.0)
            for chosen, alpha, label in ((clear, 1.0, f"measured − {key}"), (good & ~clear, 0.3, None)):
                if chosen.any():
                    axes.errorbar(
                        eta[chosen],
                        residual[chosen],
                        yerr=[np.minimum(bars, 0.9 * residual)[chosen], bars[chosen]],
                        fmt=marker,
                        color=color,
                        alpha=alpha,
                        elinewidth=1,
                        label=label,
                    )
            shown += list(residual[good])
            at = np.flatnonzero(clear if clear.any() else good)
            at = at[np.argmin(np.abs(np.log(eta[at] / np.exp(np.log(eta[at]).mean()))))]
            guide = residual[at] * (eta / eta[at]) ** power
            axes.plot(
                eta,
                guide,
                color=color,
                linewidth=1,
                dashes=dashes,
                alpha=0.7,
                label=f"slope {power}",
                zorder=1,
            )
        if shown:
            low, high = _span(shown)
            axes.set_ylim(low / 4, high * 4)
        _mark_rate(axes, report)
        axes.set_title("Distance between measurement and prediction")
        axes.set_ylabel(f"|measured − predicted|  ({in_words(changes[0]['linear'].unit)})")
        if shown:
            axes.legend(loc="upper left")
        return figure


def path_plot(report: Mapping[str, Any]) -> Figure:
    """h'(η) at the nodes of the path: flat where the linear law holds."""
    nodes = report["nodes"]
    eta = np.array([node["eta"] for node in nodes])
    value, error = _series(nodes, "first_derivative")
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(3.0)
        axes.axhline(
            value[np.argmin(eta)], color=LINEAR, linewidth=1.2, label="its value at the start: the linear law"
        )
        axes.errorbar(
            eta,
            value,
            yerr=np.nan_to_num(error),
            fmt="o",
            color=MEASURED,
            elinewidth=1.2,
            capsize=2,
            label="h′ at the nodes",
        )
        axes.set_xlabel("η, distance along the update (units of learning rate)")
        axes.set_ylabel(f"h′  ({in_words(nodes[0]['first_derivative'].unit)})")
        axes.xaxis.set_major_formatter(FuncFormatter(_tick))
        axes.yaxis.set_major_formatter(FuncFormatter(_tick))
        axes.set_title("Derivative of the entropy along the step")
        axes.legend(loc="best")
        return figure


def prompt_plot(shares: reading.Shares, change: Estimate) -> Figure:
    """What every prompt contributes to the linear prediction, from the most negative to the most positive."""
    value = np.sort(shares.share * change.value)
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(3.2)
        rank = np.arange(1, len(value) + 1)
        for chosen, color, label in (
            (value < 0, LINEAR, "lowers entropy"),
            (value > 0, QUADRATIC, "raises entropy"),
        ):
            axes.vlines(
                rank[chosen],
                0,
                value[chosen],
                color=color,
                linewidth=_bar_width(len(value)),
                label=f"{label}: {chosen.sum()} prompts",
            )
        axes.axhline(0, color=MUTED, linewidth=0.8)
        axes.set_xlim(0.5, len(value) + 0.5)
        axes.set_xlabel("held-out prompts, sorted")
        axes.set_ylabel(f"part of δH₁  ({in_words(change.unit)})")
        axes.yaxis.set_major_formatter(FuncFormatter(_tick))
        axes.grid(False, axis="x")
        axes.set_title("Which prompts carry the predicted change")
        axes.legend(loc="upper left", handlelength=1)
        return figure


def concentration_plot(prompts: reading.Shares | None, tokens: reading.Shares | None) -> Figure:
    """Share of Σ|contribution| held by the largest contributors, for tokens and for prompts."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(3.4)
        for shares, label, color, dashes in (
            (tokens, "tokens", QUADRATIC, (None, None)),
            (prompts, "prompts", LINEAR, (5, 2)),
        ):
            if shares is None:
                continue
            held = shares.concentration()
            count = len(held)
            at = np.unique(np.geomspace(1, count, _MAX_CURVE_POINTS).astype(int))
            axes.plot(
                at / count,
                held[at - 1],
                color=color,
                dashes=dashes,
                label=f"{count:,} {label}".replace(",", " "),
            )
        even = np.geomspace(1e-4, 1, 60)
        axes.plot(even, even, color=MUTED, linewidth=1, dashes=(1, 2), label="if all were alike")
        counts = [len(shares.share) for shares in (prompts, tokens) if shares is not None]
        axes.set_xscale("log")
        axes.set_xlim(max(1 / max(counts), 1e-4), 1)
        axes.set_ylim(0, 1.02)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g}%"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("largest contributors, share of all")
        axes.set_ylabel("their share of Σ|contribution|")
        axes.set_title("How concentrated the change is")
        axes.legend(loc="upper left")
        return figure


def available(report: Mapping[str, Any], tables: Mapping[str, pa.Table]) -> dict[str, Callable[[], Figure]]:
    """The pictures there are numbers for, by name; each is drawn when it is called."""
    change = reading.headline_change(report)["linear"]
    prompts, tokens = reading.prompt_shares(tables), reading.token_shares(tables)
    found: dict[str, Callable[[], Figure]] = {
        "change": lambda: change_plot(report),
        "residual": lambda: residual_plot(report),
    }
    if report.get("nodes"):
        found["path"] = lambda: path_plot(report)
    if prompts is not None:
        found["prompts"] = lambda: prompt_plot(prompts, change)
    if prompts is not None or tokens is not None:
        found["concentration"] = lambda: concentration_plot(prompts, tokens)
    if "attribution" in report and "tokens_u" in tables:
        from .attribution_plots import proxy_plot  # which draws with what is below

        found["proxies"] = lambda: proxy_plot(tables["tokens_u"])
    return found


# --- parts -------------------------------------------------------------------------------------------------

_TRUTHS = ("true_integrated", "true_direct")


def _axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _log_axes(axes: Axes, eta: np.ndarray) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(eta.min() / 1.8, eta.max() * 1.8)
    axes.set_xlabel("learning rate η")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(numticks=9))
        axis.set_major_formatter(FuncFormatter(_tick))
        axis.set_minor_formatter(NullFormatter())
        axis.set_minor_locator(matplotlib.ticker.NullLocator())


def _tick(value: float, _: int) -> str:
    return typeset(number(float(value), 3))


def _plain(item: Any) -> float:
    return float(item) if isinstance(item, int | float) else np.nan


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Values and standard errors of one estimate over the rows; NaN where a row has none."""
    found = [row[key] if reading.defined(row.get(key)) else None for row in rows]
    return (
        np.array([np.nan if item is None else item.value for item in found]),
        np.array([np.nan if item is None else item.stderr for item in found]),
    )


def _bars(axes: Axes, eta: np.ndarray, changes: Sequence[Mapping[str, Any]], key: str, color: str) -> None:
    """The error bars of |value| alone, for a series that is drawn as a line."""
    value, error = _series(changes, key)
    axes.errorbar(
        eta, np.abs(value), yerr=_reach(value, error), fmt="none", ecolor=color, elinewidth=1, zorder=2
    )


def _triangles(
    axes: Axes,
    eta: np.ndarray,
    changes: Sequence[Mapping[str, Any]],
    key: str,
    color: str,
    label: str,
    faint: Sequence[bool] | None = None,
) -> None:
    """|value| pointing the way entropy goes, pale where `faint`; direct values frame the others."""
    value, error = _series(changes, key)
    reach = _reach(value, error)
    pale = np.zeros(len(eta), bool) if faint is None else np.asarray(faint)
    frame = key == "true_direct"
    legend_label: str | None = label
    for marker, points in (("v", value < 0), ("^", value > 0)):
        for opacity, visible in ((1.0, ~pale), (0.4, pale)):
            chosen = points & visible
            if not chosen.any():
                continue
            axes.errorbar(
                eta[chosen],
                np.abs(value[chosen]),
                yerr=reach[:, chosen],
                fmt=marker,
                color=color,
                markerfacecolor="none" if frame else color,
                markersize=11 if frame else 5.5,
                markeredgewidth=1.1 if frame else 0,
                elinewidth=1,
                alpha=opacity,
                label=legend_label,
                zorder=3,
            )
            legend_label = None


def _reach(value: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Error bars of |value|, [2, n]; on a log axis zero is infinitely far, so they stop at a tenth."""
    error = np.nan_to_num(error)
    return np.array([np.minimum(error, 0.9 * np.abs(np.nan_to_num(value))), error])


def _broken_where_sign_changes(eta: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    cuts = np.flatnonzero(np.diff(np.sign(value))) + 1
    return np.insert(eta, cuts, np.nan), np.insert(np.abs(value), cuts, np.nan)


def _span(values: Sequence[float]) -> tuple[float, float]:
    usable = [value for value in values if np.isfinite(value) and value > 0]
    return (min(usable), max(usable)) if usable else (1e-9, 1.0)


def _sign_words(changes: Sequence[Mapping[str, Any]]) -> str:
    signs = {np.sign(reading.measured(change)[0].value) for change in changes} - {0.0}
    signs = {sign for sign in signs if np.isfinite(sign)}
    if signs == {-1.0}:
        return "Entropy falls at every learning rate measured"
    if signs == {1.0}:
        return "Entropy rises at every learning rate measured"
    return "Entropy falls at some learning rates (▼) and rises at others (▲)"


def _note(axes: Axes, x: float, y: float, text: str, *, above: bool) -> None:
    """A word above a horizontal line (x in axes units, y in data) or along a vertical one (the reverse)."""
    axes.annotate(
        text,
        (x, y),
        xycoords=axes.get_yaxis_transform() if above else axes.get_xaxis_transform(),
        xytext=(0, 3) if above else (-3, 0),
        textcoords="offset points",
        ha="center" if above else "right",
        va="bottom",
        rotation=0 if above else 90,
        fontsize=8.5,
        color=MUTED,
    )


def _mark_rate(axes: Axes, report: Mapping[str, Any]) -> None:
    rate = reading.learning_rate(report)
    if np.isfinite(rate):
        axes.axvline(rate, color=MUTED, linewidth=0.9, dashes=(1, 2), zorder=1)
        _note(axes, rate, 0.02, "checkpoint's learning rate", above=False)


def _mark_eta_star(axes: Axes, report: Mapping[str, Any]) -> None:
    star = report.get("derivatives", {}).get("eta_star") or {}
    if star.get("resolved") and axes.get_xlim()[0] < star["value"] < axes.get_xlim()[1]:
        axes.axvspan(
            max(star["low"], axes.get_xlim()[0]),
            min(star["high"], axes.get_xlim()[1]),
            color=QUADRATIC,
            alpha=0.12,
            linewidth=0,
        )
        axes.axvline(star["value"], color=QUADRATIC, linewidth=0.9, zorder=1)
        _note(axes, star["value"], 0.02, "η*, end of the linear law", above=False)


def _bar_width(count: int) -> float:
    """Line width, in points, that lets `count` bars fill the axes."""
    return max(0.75 * (WIDTH - 0.9) * 72 / count, 0.6)


def svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element of a page: no prolog, no metadata, no outside reference, its own ids."""
    buffer = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text).replace('href="#', f'href="#{name}-')
    # The page's font: matplotlib's own family list would name fonts a reader may not have.
    text = re.sub(r'font: ([\d.]+px) [^;"]+', r"font-size: \1", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return text
