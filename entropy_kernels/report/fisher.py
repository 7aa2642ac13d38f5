"""The page's part on the Fisher kernel: the matrix as a picture, its eigenvalues, and the tables beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FuncFormatter, NullFormatter

from .. import stats
from .numbers import estimate, number, percent, typeset
from .plots import INK, LINEAR, MEASURED, MUTED, QUADRATIC, STYLE, WIDTH

MOST_CELLS = 64  # a side; larger kernels are drawn by prompt
_LEVELS = 12
_BLOCKS = {
    "diagonal": "a response with itself",
    "same_prompt": "same prompt",
    "cross_prompt": "other prompts",
}
_KERNELS = {"plain": "P = 1", "preconditioned": "the step's P"}
_LAWS = {
    "natural": "−Cov(S, A): natural gradient of a table",
    "table": "−Cov(S, πA): plain gradient of a table",
    "kernel": "the kernel, over the other prompts",
}


def available(report: Mapping[str, Any], tables: Mapping[str, pa.Table]) -> dict[str, Callable[[], Figure]]:
    """The pictures there are numbers for, by name."""
    if "fisher" not in report:
        return {}
    found: dict[str, Callable[[], Figure]] = {"spectrum": lambda: spectrum_plot(report)}
    if "fisher" in tables:
        found["kernel"] = lambda: kernel_plot(tables["fisher"])
    return found


def kernel_plot(table: pa.Table) -> Figure:
    """Cosines between responses, prompts as blocks; by prompt where there are many."""
    name = "kernel_preconditioned" if "kernel_preconditioned" in table.column_names else "kernel_plain"
    prompt = np.unique(table["prompt"].to_numpy(), return_inverse=True)[1]
    order = np.argsort(prompt, kind="stable")
    prompt, K = prompt[order], np.array(table[name].to_pylist())[np.ix_(order, order)]
    cosine = stats.cosines(K)
    by_prompt = len(K) > MOST_CELLS
    shown = _prompt_means(cosine, prompt)[:MOST_CELLS, :MOST_CELLS] if by_prompt else cosine
    N = len(shown)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, WIDTH - 1.2), layout="constrained")
        axes = figure.subplots()
        top = float(np.nanmax(np.abs(shown))) if by_prompt else 1.0
        for colour, sign in ((QUADRATIC, 1), (LINEAR, -1)):
            level = np.ceil(np.nan_to_num(sign * shown) / top * _LEVELS - 0.5)  # NaN: nothing is drawn
            for k in range(1, _LEVELS + 1):
                cells = np.argwhere(level == k)
                if len(cells):
                    axes.add_patch(
                        PathPatch(_squares(cells), facecolor=colour, alpha=k / _LEVELS, linewidth=0)
                    )
        if not by_prompt:
            for edge in (np.flatnonzero(np.diff(prompt)) + 1).tolist():
                axes.axhline(edge, color=MUTED, linewidth=0.5)
                axes.axvline(edge, color=MUTED, linewidth=0.5)
        axes.set(xlim=(0, N), ylim=(N, 0), aspect="equal")
        axes.grid(False)
        what = (
            "prompts, mean cosine of their responses" if by_prompt else "responses in order of their prompts"
        )
        axes.set_xlabel(what)
        axes.set_title(
            f"Cosine of gradients, {_KERNELS[name.removeprefix('kernel_')]}: orange alike, blue opposed"
            + (f"; full colour at ±{number(top, 2)}" if by_prompt else "")
        )
        return figure


def spectrum_plot(report: Mapping[str, Any]) -> Figure:
    """Eigenvalues of the cosines by rank, with the fitted law's range, quantiles and threshold."""
    kernels = report["fisher"]["kernels"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
        several = np.atleast_1d(figure.subplots(1, len(kernels), sharey=True))
        for axes, (name, kernel) in zip(several, kernels.items(), strict=True):
            found = kernel["spectrum"]
            values = np.array(found["cosine_eigenvalues"])
            N, rank = len(values), np.arange(1, len(values) + 1)
            axes.set_yscale("log")
            axes.set_xlabel("rank")
            axes.set_title(_KERNELS[name])
            axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: typeset(number(float(x), 3))))
            axes.yaxis.set_minor_formatter(NullFormatter())
            if not np.isfinite(found["dimension"]):
                continue
            axes.axhline(
                found["threshold"], color=QUADRATIC, linewidth=1, dashes=(4, 2), label="outliers above"
            )
            left = N - found["outliers"]
            place = 1 - (np.arange(left) + 0.5) / left
            law = found["scale"] * stats.marchenko_pastur_quantiles(place, N, found["dimension"])
            axes.plot(rank[N - left :], law, color=LINEAR, label="Marchenko-Pastur law")
            axes.plot(
                rank,
                np.maximum(values, values[0] * 1e-6),
                ".",
                color=MEASURED,
                markersize=4,
                label="eigenvalues",
            )
        several[0].set_ylabel("eigenvalue of the cosines")
        several[0].legend(loc="best", labelcolor=INK)
        return figure


def tables(report: Mapping[str, Any]) -> dict[str, Any]:
    """What fisher.html shows, as text; empty where the report has no kernel."""
    section = report.get("fisher")
    if not section:
        return {}
    blocks, spectra, growth = [], [], []
    for name, kernel in section["kernels"].items():
        for block, kinds in kernel["blocks"].items():
            for kind, found in kinds.items():
                unit = "cosine" if kind == "cosine" else found["mean"].unit
                cells = [typeset(estimate(found["quantiles"][q])) for q in ("0.05", "0.5", "0.95")]
                blocks.append(
                    (_KERNELS[name], _BLOCKS[block], unit, typeset(estimate(found["mean"])), *cells)
                )
        s = kernel["spectrum"]
        spectra.append(
            (
                _KERNELS[name],
                *(typeset(number(s[key], 3)) for key in ("participation", "dimension", "threshold")),
                percent(s["leading_share"]), percent(1 - s["scale"]), s["outliers"], typeset(number(s["misfit"], 2)),
            )
        )  # fmt: skip
        g = kernel["growth"]
        growth.append(
            (_KERNELS[name], *(typeset(estimate(g[key])) if key in g else "–" for key in ("length_exponent", "length_rank", "prefix_rank")))
        )  # fmt: skip
    moves = section["log_prob"]
    names = {
        "u": "of the update, measured",
        "e": "held out, measured",
        "by_kernel": "of the update, gradient part from the kernel",
    }
    return {
        "section": section,
        "identical": percent(section["identical_pairs"]),
        "how": "; ".join(f"{_KERNELS[name]}: {kernel['how']['reason']}" for name, kernel in section["kernels"].items()),
        "blocks": blocks,
        "spectra": spectra,
        "growth": growth,
        "moves": [
            (names[key], *(typeset(estimate(moves[key][x])) for x in ("slope", "unexplained", "rank")))
            for key in names
            if key in moves
        ],
        "by_kernel": moves.get("by_kernel"),
        "laws": [
            (
                _LAWS[key], typeset(estimate(law["sum"])), "yes" if law["sum_has_the_sign"] else "no",
                typeset(estimate(law["same_sign"])), typeset(estimate(law["rank"])),
            )
            for key, law in section.get("laws", {}).items()
            if key in _LAWS
        ],
    }  # fmt: skip


def _prompt_means(cosine: np.ndarray, prompt: np.ndarray) -> np.ndarray:
    """Mean cosine between the responses of two prompts, a response with itself left out; NaN where none is left."""
    B = prompt[-1] + 1
    one = np.zeros((len(prompt), B))
    one[np.arange(len(prompt)), prompt] = 1
    off = cosine - np.diag(np.diag(cosine))
    count = one.sum(0)[:, None] * one.sum(0) - np.diag(one.sum(0))
    with np.errstate(invalid="ignore"):
        return (one.T @ off @ one) / count


def _squares(cells: np.ndarray) -> Path:
    """One path of unit squares at (row, column)."""
    corner = np.array([(0, 0), (1, 0), (1, 1), (0, 1), (0, 0)], dtype=float)
    points = (cells[:, None, ::-1] + corner[None]).reshape(-1, 2)
    codes = np.tile([Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY], len(cells))
    return Path(points, codes)
