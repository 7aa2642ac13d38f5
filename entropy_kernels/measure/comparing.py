"""Two reports side by side: which settings differ, which numbers, and by how much more than their errors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .. import stats
from ..report import Result
from ..report.comparison import Comparison
from ..stats import Estimate

# Sections whose entries say how a report was made; timings and file names of one run are left out.
_SETTINGS = ("config", "definitions", "parameters", "update", "environment")
_SAME_SAMPLES = ("prompt_ids", "completion_ids")


def compare_results(a: Result, b: Result, names: tuple[str, str] = ("A", "B")) -> Comparison:
    """What differs from a to b: settings, and every estimate that both have, as b − a.

    Differences are paired over prompts where both reports were measured on the very same held-out responses and say what every prompt
    contributed (influence.parquet); otherwise the errors are added as if independent, and `pairing` says why.

    Args:
        a: the first result.
        b: the second.
        names: what to call them.
    """
    why = _why_unpaired(a, b)
    pulls = None if why else (_pulls(a), _pulls(b))
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    for (quantity, eta), left, right in _shared_estimates(a.report, b.report):
        if left.unit != right.unit:
            skipped.append(f"{quantity} is in {left.unit} in one and in {right.unit} in the other")
            continue
        there = None if pulls is None else tuple(found.get((quantity, _rounded(eta))) for found in pulls)
        if there is None or there[0] is None or there[1] is None:
            paired, difference = False, stats.unpaired_difference(left, right)
        else:
            paired, difference = True, stats.paired_difference(left, right, there[0], there[1])
        rows.append(
            {
                "quantity": quantity,
                "eta": math.nan if eta is None else eta,
                "a": left,
                "b": right,
                "difference": difference,
                "z": difference.z_score(),
                "paired": paired,
            }
        )
    return Comparison(
        names=names,
        settings=_differing_settings(a.report, b.report),
        pairing="on the very same held-out responses: differences are paired over prompts"
        if why is None
        else why,
        rows=rows,
        skipped=sorted(set(skipped)),
    )


def _why_unpaired(a: Result, b: Result) -> str | None:
    """Why differences cannot be paired; None where they can."""
    reason = "errors are added as if the two were independent"
    tables = [r.tables.get("rollouts_e") for r in (a, b)]
    if tables[0] is None or tables[1] is None:
        return f"a report is without rollouts_e.parquet, so whether both have the same samples is not known: {reason}"
    columns = [[table[name].to_pylist() for name in _SAME_SAMPLES] for table in tables if table is not None]
    if columns[0] != columns[1]:
        same_prompts = {tuple(x) for x in columns[0][0]} == {tuple(x) for x in columns[1][0]}
        return f"on {'other responses to the same prompts' if same_prompts else 'other samples'}: {reason}"
    if any("influence" not in r.tables for r in (a, b)):
        return f"on the same samples, but a report is without influence.parquet: {reason}, which is too wide"
    return None


def _pulls(result: Result) -> dict[tuple[str, float | None], np.ndarray]:
    """Influences by quantity and learning rate, over the prompts in the table's order, which is that of the samples."""
    table = result.tables["influence"]
    found: dict[tuple[str, float | None], list[float]] = {}
    for quantity, eta, pull in zip(
        *(table[name].to_pylist() for name in ("quantity", "eta", "influence")), strict=True
    ):
        found.setdefault((quantity, _rounded(eta)), []).append(pull)
    return {key: np.array(x) for key, x in found.items()}


def _rounded(eta: float | None) -> float | None:
    """Learning rates that agree to nine digits are the same: some are computed, others read."""
    return None if eta is None else float(f"{eta:.9g}")


def _shared_estimates(
    a: Mapping[str, Any], b: Mapping[str, Any]
) -> Iterator[tuple[tuple[str, float | None], Estimate, Estimate]]:
    left, right = _estimates(a), _estimates(b)
    for key in left:
        if key in right:
            yield key, left[key], right[key]


def _estimates(report: Mapping[str, Any]) -> dict[tuple[str, float | None], Estimate]:
    """The entropies, derivatives and changes of a report."""
    found: dict[tuple[str, float | None], Estimate] = {}
    for section in ("entropy", "derivatives"):
        for name, item in report.get(section, {}).items():
            if isinstance(item, Estimate):
                found[f"{section}.{name}", None] = item
    for change in report["changes"]:
        for name, item in change.items():
            if isinstance(item, Estimate):
                found[f"changes.{name}", _rounded(change["eta"])] = item
    return found


def _differing_settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = []
    for section in _SETTINGS:
        left, right = (_flat(report.get(section, {})) for report in (a, b))
        for name in {**left, **right}:
            one, other = left.get(name), right.get(name)
            if one != other and not (one != one and other != other) and name != "output":
                found.append({"section": section, "name": name, "a": one, "b": other})
    return found


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, item in section.items():
        flat |= _flat(item, f"{prefix}{name}.") if isinstance(item, Mapping) else {prefix + name: item}
    return flat
