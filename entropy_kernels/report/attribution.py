"""What a report says about who moved the entropy: sentences, rows and coloured responses, for the page and the terminal.

Nothing is estimated here; numbers of the section `attribution` and of the tables tokens_u and sequences_u are picked and put in words.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from ..stats import Estimate
from .numbers import estimate, in_words, number, percent, typeset

PROMPT_CHARACTERS = 60
SEQUENCES = 40  # coloured on the page, those of largest |marginal|
MAX_MISSED = 1e-4  # of Σ|parts| in float32
_MARKS = str.maketrans({"Ġ": " ", "▁": " ", "Ċ": "↵", "\n": "↵", "\t": "⇥", "\r": "␍"})
_SIGNIFICANT = 0.02  # of the largest influence: less is left uncoloured
QUARTERS = {
    1: "1st quarter, the most outlying token",
    2: "2nd quarter",
    3: "3rd quarter",
    4: "4th quarter, no unlikely token",
}
NAMES = {
    "policy_gradient": "this batch's tokens",
    "momentum": "momentum",
    "decay": "weight decay",
    "cov_batch": "covariance, batch",
    "cov_prompt": "covariance, prompt",
    "cov_sequence": "covariance of responses",
    "s_star": "p (H + log p)",
    "steer": "STEER",
    "logprob": "log-prob",
    "solve_rate": "mean reward of the prompt",
    "length": "length of the response",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """A token as it is shown: its text, the strength of its colour from −1 (lowers) to 1 (raises), and its numbers."""

    text: str
    strength: float
    title: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceRow:
    """A completion of U: numbers to sort by, numbers as text, and its coloured tokens."""

    values: tuple[float, ...]
    cells: tuple[str, ...]
    prompt: str  # its end
    pieces: tuple[Piece, ...]


COLUMNS = {
    "marginal": "influence on ΔH",
    "share": "share of δH₁",
    "marginal_reward": "influence on ΔJ",
    "advantage": "advantage",
    "reward": "reward",
    "solve_rate": "mean reward of the prompt",
    "length": "tokens",
    "lowest_logprob": "lowest log-prob",
    "mean_entropy": "mean entropy",
}


def sentences(report: Mapping[str, Any]) -> list[str]:
    """Where δH₁ comes from, how concentrated that is, and which proxy sees it."""
    section = report["attribution"]
    shares, rule = section["entropy"]["shares"], section["entropy"]["sum_rule"]
    parts = ", ".join(f"{name(key)} {number(part.value, 2)}" for key, part in rule["parts"].items())
    top = shares["top"][1]
    held, repeated = (top[key]["estimate"].value for key in ("held", "held_on_the_other_half"))
    found_again = (
        f"{percent(repeated)} when half of the held-out prompts choose them and the others count"
        if 0 <= repeated <= 1
        else "not resolved: what half of the held-out prompts choose, the others do not see"
    )
    lines = [
        f"The linear change {number(rule['linear'].value)} is made up of {parts}.",
        f"{percent(held)} of the influence of its tokens, counted without sign, comes from {percent(top['fraction'])} of them "
        f"({found_again}).",
    ]
    proxies = section["proxies"]["tokens"]
    ranked = {key: x["share"]["estimate"] for key, x in proxies.items() if x["share"]["estimate"].value > -1}
    if ranked:
        best = max(ranked, key=lambda key: ranked[key].value)
        lines.append(
            f"Best of {len(ranked)} published proxies: {name(best)}, rank correlation with the shares {estimate(ranked[best])}."
        )
    return lines


def name(key: str) -> str:
    """A key of the report in words."""
    return NAMES.get(key, key.replace("_", " "))


def context(report: Mapping[str, Any], tables: Mapping[str, pa.Table], truth: Estimate) -> dict[str, Any]:
    """What attribution.html needs beside the report; `truth` is the measured change."""
    tokens, sequences, rollouts = (tables.get(key) for key in ("tokens_u", "sequences_u", "rollouts_u"))
    known = tokens is not None and sequences is not None and rollouts is not None
    rows = sequence_rows(tokens, sequences, rollouts) if known else []
    return {
        "who": [typeset(line) for line in sentences(report)],
        "who_unit": in_words(report["attribution"]["entropy"]["sum_rule"]["linear"].unit),
        "who_columns": [] if sequences is None else _headings(sequences),
        "who_rows": rows,
        "who_name": name,
        "who_quarters": QUARTERS,
        "who_verdicts": verdicts(report, truth),
    }


def sequence_rows(tokens: pa.Table, sequences: pa.Table, rollouts: pa.Table) -> list[SequenceRow]:
    """The completions of largest |marginal|, each token coloured by its marginal relative to the largest of all shown."""
    columns = [key for key in COLUMNS if key in sequences.column_names]
    order = np.argsort(-np.abs(sequences["marginal"].to_numpy()), kind="stable")[:SEQUENCES]
    of = tokens["sequence"].to_numpy()
    marginal = tokens["marginal"].to_numpy()
    shown = np.isin(of, order)
    largest = float(np.abs(marginal[shown]).max()) if shown.any() else 0.0
    start = np.searchsorted(of, np.arange(sequences.num_rows + 1))  # rows of a completion stand together
    rows = []
    for i in order.tolist():
        own = tokens.slice(start[i], start[i + 1] - start[i]).select(
            ["token", "marginal", "share", "logprob", "entropy"]
        )
        prompt = rollouts["prompt"][i].as_py()
        prompt = prompt if len(prompt) <= PROMPT_CHARACTERS else "…" + prompt[-PROMPT_CHARACTERS:]
        pieces = tuple(_piece(token, largest) for token in own.to_pylist())
        values = tuple(_float(sequences[key][i].as_py()) for key in columns)
        cells = tuple("–" if math.isnan(x) else typeset(number(x)) for x in values)
        rows.append(SequenceRow(values=values, cells=cells, prompt=prompt, pieces=pieces))
    return rows


def verdicts(report: Mapping[str, Any], truth: Estimate) -> list[dict[str, Any]]:
    """For every proxy: whether the sign of its mean is that of this batch's part of δH₁, and of the measured change.

    Signs are only compared where both numbers are two standard errors from zero.
    """
    parts = report["attribution"]["entropy"]["sum_rule"]["parts"]
    own = [part for key, part in parts.items() if key not in ("momentum", "decay")]
    value, stderr = sum(part.value for part in own), sum(part.stderr for part in own)
    rows = []
    for key, mean in report["attribution"]["proxies"]["mean"].items():
        rows.append(
            {
                "name": name(key),
                "mean": typeset(estimate(mean)),
                "own": _agreement((mean.value, mean.stderr), (value, stderr)),
                "truth": _agreement((mean.value, mean.stderr), (truth.value, truth.stderr)),
            }
        )
    return rows


def _agreement(*numbers: tuple[float, float]) -> str:
    """Whether two numbers, each with its standard error, have one sign."""
    if not all(abs(value) > 2 * stderr for value, stderr in numbers):  # NaN is not resolved
        return "not resolved"
    return "same sign" if math.prod(value for value, _ in numbers) > 0 else "other sign"


def _headings(sequences: pa.Table) -> list[str]:
    return [heading for key, heading in COLUMNS.items() if key in sequences.column_names]


def _piece(token: Mapping[str, Any], largest: float) -> Piece:
    strength = token["marginal"] / largest if largest else 0.0
    title = " · ".join(
        f"{label} {typeset(number(token[key]))}"
        for key, label in (
            ("marginal", "influence"),
            ("share", "share"),
            ("logprob", "log-prob"),
            ("entropy", "entropy"),
        )
    )
    return Piece(
        text=token["token"].translate(_MARKS),
        strength=0.0 if abs(strength) < _SIGNIFICANT else round(float(strength), 3),
        title=title,
    )


def _float(x: Any) -> float:
    return math.nan if x is None else float(x)


def sum_rule_check(report: Mapping[str, Any]) -> tuple[float, float]:
    """(what the sum rule misses as a share of Σ|parts|, the most that is allowed); NaN where nothing was attributed."""
    section = report.get("attribution")
    if not section:
        return math.nan, MAX_MISSED
    return max(
        section[key]["sum_rule"]["missed"] for key in ("entropy", "reward") if key in section
    ), MAX_MISSED
