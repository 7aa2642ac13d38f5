"""The summary for a terminal: read in ten seconds, at most 25 lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..stats import Estimate
from . import attribution, reading
from .numbers import estimate, in_words, number

MAX_LINES = 25
_MAX_CHANGES = 9
_MAX_WARNINGS = 3


def summarize(report: Mapping[str, Any]) -> str:
    """Headline, the state before the step, the sweep over η, and what the checks say."""
    sentences = (reading.headline(report), reading.prediction(report), reading.eta_star(report))
    lines = [*filter(None, sentences), ""]
    lines += (
        table(_state(report), align="<<<") + _part_measured(report) + _truncation(report) + _given(report)
    )
    lines += [""] + _sweep(report) + _attribution(report) + _verdicts(report)
    return "\n".join(line.rstrip() for line in lines)


def _state(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    rollouts = report.get("rollouts", {}).get("e", {})
    sample = ", ".join(
        f"{rollouts[name]} {name}" for name in ("prompts", "sequences", "tokens") if name in rollouts
    )
    derivatives = report.get("derivatives", {})
    rows = [
        ("entropy before", report.get("entropy", {}).get("per_token"), sample),
        ("h', slope", derivatives.get("first"), _baseline(report)),
        ("h'', curvature", derivatives.get("second"), ""),
    ]
    return [
        (name, estimate(item), f"{in_words(item.unit)}{f'   ({note})' if note else ''}")
        for name, item, note in rows
        if isinstance(item, Estimate)
    ]


def _baseline(report: Mapping[str, Any]) -> str:
    """Which baseline was used and what it saved; nothing without one."""
    found = report.get("statistics", {})
    chosen = found.get("baseline", "none")
    if chosen == "none":
        return ""
    return (
        f"baseline {chosen}: {estimate(found['baselines'][chosen]['variance_ratio'])} of the variance without"
    )


def _part_measured(report: Mapping[str, Any]) -> list[str]:
    """A line where some parameters of the model are held constant."""
    found = report.get("parameters", {})
    measured, whole = found.get("numbers", 0), found.get("numbers_in_model", 0)
    if measured == whole:
        return []
    return [
        f"parameters measured: {measured:,} of {whole:,} ({found['selected']}); the others are held constant"
    ]


def _given(report: Mapping[str, Any]) -> list[str]:
    """A line where samples come from files: how far their log-probs are from the policy's."""
    config, found = report.get("config", {}), report.get("rollouts", {})
    parts = []
    for letter in "ue":
        batch = found.get(letter, {})
        if config.get(f"rollouts_{letter}") is None or not any(name.startswith("sampler") for name in batch):
            continue
        if "sampler_mean_difference" in batch:
            apart, limit = (
                number(batch[f"sampler_{name}"], 2) for name in ("mean_difference", "refused_above")
            )
            parts.append(f"{letter.upper()} {apart} nats per token off (refused above {limit})")
        else:
            parts.append(f"{letter.upper()}: {batch['sampler']}")
    return [f"log-probs of samples from files: {'; '.join(parts)}"] if parts else []


def _truncation(report: Mapping[str, Any]) -> list[str]:
    """A line where the policy is truncated."""
    kept = report.get("truncation")
    if kept is None:
        return []
    chosen = reading.headline_change(report)["eta"]
    moved = next(row["moved_share"] for row in kept["along"] if row["eta"] == chosen)
    return [
        f"policy truncated to {reading.limits(report)}: {estimate(kept['kept_mass'])} of the probability kept, full entropy "
        f"{estimate(kept['full_entropy'], unit=True)}; at η = {number(chosen)} {moved.value:.2%} of tokens would keep another set"
    ]


def _sweep(report: Mapping[str, Any]) -> list[str]:
    chosen = reading.headline_change(report)
    changes = _around(report["changes"], report["changes"].index(chosen), _MAX_CHANGES)
    with_second = any(isinstance(change.get("quadratic"), Estimate) for change in changes)
    heading = [
        "",
        "η",
        "measured ΔH",
        "linear",
        *(["quadratic"] if with_second else []),
        "z(measured−linear)",
        "ESS",
    ]
    rows = [tuple(heading)]
    for change in changes:
        truth, _ = reading.measured(change)
        cells = [truth, change["linear"], *([change.get("quadratic")] if with_second else [])]
        rows.append(
            (
                ">" if change is chosen else "",
                number(change["eta"]),
                *(estimate(cell) if isinstance(cell, Estimate) else "-" for cell in cells),
                number(change["z_linear"], 2) if "z_linear" in change else "-",
                number(change["ess_sequences"]) if "ess_sequences" in change else "-",
            )
        )
    return table(rows, align=">" * len(heading))


def _attribution(report: Mapping[str, Any]) -> list[str]:
    """Up to three sentences about who moved the entropy."""
    return ["", *attribution.sentences(report)] if "attribution" in report else []


def _verdicts(report: Mapping[str, Any]) -> list[str]:
    checks = reading.checks(report)
    warnings = [check for check in checks if check.verdict == "warn"]
    passed = sum(check.verdict == "pass" for check in checks)
    unknown = len(checks) - passed - len(warnings)
    lines = [
        f"checks: {passed} passed, {len(warnings)} warned" + (f", {unknown} not measured" if unknown else "")
    ]
    for check in warnings[:_MAX_WARNINGS]:
        lines.append(f"  warning: {check.name.lower()}: {check.found}, wanted {check.wanted}")
    if len(warnings) > _MAX_WARNINGS:
        lines.append(f"  and {len(warnings) - _MAX_WARNINGS} more, see report.html")
    return ["", *lines]


def _around(changes: Sequence[dict[str, Any]], at: int, count: int) -> Sequence[dict[str, Any]]:
    """The `count` changes nearest to position `at`."""
    start = min(max(at - count // 2, 0), max(len(changes) - count, 0))
    return changes[start : start + count]


def table(rows: Sequence[tuple[str, ...]], align: str) -> list[str]:
    """Lines with aligned columns; `align` has < or > for each."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))] if rows else []
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True))
        for row in rows
    ]
