"""The picture of the proxies on trial: what the tokens that each ranks first hold of all influence."""

from __future__ import annotations

import matplotlib
import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from .attribution import name
from .plots import DIRECT, LINEAR, MEASURED, MUTED, QUADRATIC, STYLE, WIDTH

_CURVES = {
    "share": (MEASURED, (None, None)),
    "proxy_cov_batch": (LINEAR, (None, None)),
    "proxy_cov_prompt": (LINEAR, (5, 2)),
    "proxy_s_star": (QUADRATIC, (None, None)),
    "proxy_steer": (DIRECT, (5, 2)),
}
_MOST_POINTS = 300


def proxy_plot(tokens: pa.Table) -> Figure:
    """Σ|share| over the tokens that a score ranks first, over Σ|share|, against their number.

    Args:
        tokens: tokens_u with columns share and proxy_*.
    """
    share = np.abs(tokens["share"].to_numpy())
    count = len(share)
    at = np.unique(np.geomspace(1, count, _MOST_POINTS).astype(int))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
        axes = figure.subplots()
        for column, (color, dashes) in _CURVES.items():
            order = np.argsort(-np.abs(tokens[column].to_numpy()), kind="stable")
            held = np.cumsum(share[order]) / share.sum()
            label = "the shares themselves" if column == "share" else name(column.removeprefix("proxy_"))
            axes.plot(at / count, held[at - 1], color=color, dashes=dashes, label=label)
        even = np.geomspace(1 / count, 1, 60)
        axes.plot(even, even, color=MUTED, linewidth=1, dashes=(1, 2), label="by chance")
        axes.set_xscale("log")
        axes.set_xlim(1 / count, 1)
        axes.set_ylim(0, 1.02)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g}%"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel(f"tokens ranked first, share of {count:,}".replace(",", " "))
        axes.set_ylabel("their share of Σ|share|")
        axes.set_title("What a score finds of the influence on entropy")
        axes.legend(loc="upper left")
        return figure
