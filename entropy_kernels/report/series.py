"""A series of measurements as data: along the checkpoints of a run, to disk and back, and as text for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..stats import Estimate
from .numbers import estimate, in_words, number, percent
from .reading import verb
from .result import Plots, complete_or_absent, read_saved, to_json
from .terminal import table

SERIES_TABLES = ("rollouts_e", "influence")
_WORDS = {"linear": "first order", "quadratic": "second order"}


@dataclass(frozen=True, kw_only=True)
class SeriesResult:
    """Everything one series found.

    Attributes:
        report: the nested dictionary of series.json, its leaves `Estimate`, str, bool, int, float or None; undefined numbers are NaN.
            `intervals` has one entry per step between checkpoints, with `cumulative` sums up to it; `checkpoints` one per
            checkpoint; `batches` one per draw of held-out samples.
        tables: Arrow tables: rollouts_e, the samples of every batch; influence, each prompt's pull on each interval's changes.
    """

    report: dict[str, Any]
    tables: dict[str, pa.Table]

    def summary(self) -> str:
        """The whole change in a sentence or two, then one line per interval."""
        return summarize_series(self.report)

    @property
    def plots(self) -> Plots:
        """The pictures by name, matplotlib figures drawn on access: `result.plots["cumulative"].savefig("series.png")`."""
        from .series_plots import available  # matplotlib is slow to import and wanted here only

        return Plots(available(self.report))

    @property
    def intervals(self) -> pa.Table:
        """One row per interval, as in series.parquet: every estimate as two columns, NAME and NAME_stderr."""
        return pa.Table.from_pylist([_flat(row) for row in self.report["intervals"]])

    def save(self, directory: str | Path) -> Path:
        """Writes series.json, series.parquet, influence.parquet, rollouts_e.parquet and series.html; returns the path of series.html.

        No file is ever half-written: each is complete under a temporary name before it takes its place.

        Args:
            directory: made if it is not there; files of these names in it are replaced.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        text = to_json(self.report)
        writers: dict[str, Callable[[Path], object]] = {
            f"{name}.parquet": lambda path, found=found: pq.write_table(found, path)  # type: ignore[misc]
            for name, found in {**self.tables, "series": self.intervals}.items()
        }
        writers["series.json"] = lambda path: path.write_text(text, encoding="utf-8")
        page = directory / "series.html"
        with complete_or_absent(directory, writers):
            page.unlink(missing_ok=True)

        from .html import render_series  # matplotlib is slow to import and wanted here only

        page_text = render_series(self.report)
        with complete_or_absent(
            directory, {page.name: lambda path: path.write_text(page_text, encoding="utf-8")}
        ):
            return page

    @classmethod
    def load(cls, directory: str | Path) -> SeriesResult:
        """Reads what `save` wrote.

        Raises:
            UserError: no series.json in `directory`, not JSON, or another schema version.
        """
        report, tables = read_saved(directory, "series.json", SERIES_TABLES, "series")
        return cls(report=report, tables=tables)


def summarize_series(report: Mapping[str, Any]) -> str:
    """Headline, warnings, and a table with one line per interval."""
    rows = report["intervals"]
    second = "quadratic" in rows[0]
    heading = [
        "from",
        "to",
        "batch",
        "ESS",
        "measured Δ",
        "first order",
        *(["second order"] if second else []),
    ]
    heading += ["measured − first", "Σ measured", "Σ first order"]
    lines = [tuple(heading)]
    for row in rows:
        kinds = ["measured", "linear", *(["quadratic"] if second else []), "missed"]
        sums = [row["cumulative"][kind] for kind in ("measured", "linear")]
        lines.append(
            (
                row["from"],
                row["to"],
                str(row["batch"] + 1),
                number(row["ess_after"], 2),
                *(estimate(item) for item in [*(row[kind] for kind in kinds), *sums]),
            )
        )
    aligned = table(lines, align="<<" + ">" * (len(heading) - 2))
    unit = in_words(rows[0]["measured"].unit)
    return "\n".join([headline(report), prediction(report), *notes(report), "", *aligned, f"in {unit}"])


def headline(report: Mapping[str, Any]) -> str:
    """The whole measured change, in a sentence."""
    rows = report["intervals"]
    total: Estimate = rows[-1]["cumulative"]["measured"]
    start, end = report["checkpoints"][0], report["checkpoints"][-1]
    return (
        f"From {start['name']} to {end['name']} entropy {verb(total)} {estimate(total, unsigned=True, unit=True)}, "
        f"from {estimate(start['entropy'])} to {estimate(end['entropy'])}."
    )


def prediction(report: Mapping[str, Any]) -> str:
    """What the predictions of all intervals add up to, in a sentence."""
    last = report["intervals"][-1]["cumulative"]
    parts = [f"{words} {estimate(last[kind])}" for kind, words in _WORDS.items() if kind in last]
    missed: Estimate = last["missed"]
    share = abs(missed.value / last["measured"].value) if last["measured"].value else float("nan")
    return (
        f"Predictions along the {len(report['intervals'])} steps taken add up to {', '.join(parts)}; measured minus first order is "
        f"{estimate(missed)} (paired), {percent(share)} of the change."
    )


def notes(report: Mapping[str, Any]) -> list[str]:
    """What a reader has to know: samples drawn, straight paths, weights that ran out, batches that disagree."""
    rows, batches = report["intervals"], report["batches"]
    found = [
        f"Held-out samples were drawn {len(batches)} time{'s' if len(batches) > 1 else ''}, at "
        f"{_listed([b['drawn_at'] for b in batches])}; {batches[0]['prompts']} prompts, {batches[0]['sequences']} responses each time."
    ]
    several = [row for row in rows if (row["optimizer_steps"] or 0) > 1]
    if several:
        steps = sorted({row["optimizer_steps"] for row in several})
        found.append(
            f"Between {len(several)} of {len(rows)} pairs of checkpoints lie several optimizer steps ({_listed([str(s) for s in steps])}): "
            "their path is taken to be straight; the measured change compares end points and does not depend on it."
        )
    least = report["config"]["min_ess"]
    short = [row for row in rows if not row["ess_after"] >= least]
    if short:
        found.append(
            f"warning: between {short[0]['from']} and {short[0]['to']}{f' and {len(short) - 1} other pairs' if len(short) > 1 else ''} the "
            f"effective sample size falls to {percent(min(row['ess_after'] for row in short))} even with new samples: save checkpoints "
            "more often."
        )
    apart = [b for b in batches if "new_minus_old" in b and abs(b["new_minus_old"].z_score()) > 3]
    if apart:
        found.append(
            f"warning: at {apart[0]['drawn_at']} new samples and old ones, re-weighted, give entropies "
            f"{estimate(apart[0]['new_minus_old'])} apart ({number(apart[0]['new_minus_old'].z_score(), 2)} standard errors): weights that "
            "vary this much are not to be trusted; raise min_ess."
        )
    return found


def _listed(names: Sequence[str], most: int = 6) -> str:
    shown = list(names[:most]) + ([f"{len(names) - most} more"] if len(names) > most else [])
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections joined with a dot, estimates as value and standard error."""
    flat: dict[str, Any] = {}
    for name, item in row.items():
        if isinstance(item, Estimate):
            flat |= {prefix + name: item.value, f"{prefix}{name}_stderr": item.stderr}
        elif isinstance(item, Mapping):
            flat |= _flat(item, f"{prefix}{name}.")
        else:
            flat[prefix + name] = item
    return flat
