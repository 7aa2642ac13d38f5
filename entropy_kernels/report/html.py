"""The page: one HTML file with everything inside, made from a report and its tables."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jinja2
import pyarrow as pa
from markupsafe import Markup

from ..stats import Estimate
from . import attribution, fisher, plots, reading, statistics
from .comparison import Comparison
from .numbers import estimate, in_words, number, percent, typeset

TOP_TOKENS = 25
TOP_PROMPTS = 10
CONTEXT_BEFORE, CONTEXT_AFTER = 40, 16  # characters
PROMPT_CHARACTERS = 160
# How tokenizers write blanks and line ends inside a token, and what a reader should see.
_MARKS = str.maketrans({"Ġ": " ", "▁": " ", "Ċ": "↵", "\n": "↵", "\t": "⇥", "\r": "␍"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenRow:
    """One line of the table of tokens; numbers are text already."""

    share: str
    part: str
    before: str
    token: str
    after: str
    cells: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptRow:
    """One line of the table of prompts."""

    share: str
    part: str
    prompt: str
    reward: str
    completions: int


def render(report: Mapping[str, Any], tables: Mapping[str, pa.Table]) -> str:
    """The text of report.html. Text of models and users is escaped; nothing is loaded from elsewhere."""
    tokens, prompts = reading.token_shares(tables), reading.prompt_shares(tables)
    change = reading.headline_change(report)
    truth, truth_method = reading.measured(change)
    return (
        _environment()
        .get_template("page.html")
        .render(
            report=report,
            change=change,
            truth=truth,
            truth_method=truth_method,
            headline=typeset(reading.headline(report)),
            prediction=typeset(reading.prediction(report)),
            eta_star=typeset(reading.eta_star(report)),
            rate=reading.learning_rate(report),
            floor=reading.noise_floor(report),
            limits=reading.limits(report),
            lost=[reading.below_floor(report, row) for row in report["changes"]],
            checks=[
                {name: typeset(text) for name, text in dataclasses.asdict(check).items()}
                for check in reading.checks(report)
            ],
            plots=_plots(report, tables),
            statistics=statistics.tables(report),
            fisher=fisher.tables(report),
            **(attribution.context(report, tables, truth) if "attribution" in report else {}),
            prompts=None if prompts is None else _concentration(prompts),
            tokens=None if tokens is None else _concentration(tokens),
            top_prompts=[]
            if prompts is None
            else _top_prompts(prompts, tables["rollouts_e"], change["linear"]),
            top_tokens=[] if tokens is None else _top_tokens(tokens, tables["tokens_e"], change["linear"]),
            token_columns=[]
            if tokens is None
            else [_HEADINGS[name] for name in _token_columns(tables["tokens_e"])],
        )
    )


def render_series(report: Mapping[str, Any]) -> str:
    """The text of series.html."""
    from . import series, series_plots

    pictures = {
        name: Markup(plots.svg(draw(), name)) for name, draw in series_plots.available(report).items()
    }
    return (
        _environment()
        .get_template("series_page.html")
        .render(
            report=report,
            headline=typeset(series.headline(report)),
            prediction=typeset(series.prediction(report)),
            notes=[typeset(note) for note in series.notes(report)],
            plots=pictures,
            integrated="integrated" in report["intervals"][0],
            second="quadratic" in report["intervals"][0],
        )
    )


def render_comparison(comparison: Comparison) -> str:
    """The page of two reports side by side."""
    return _environment().get_template("comparison.html").render(comparison=comparison)


def _environment() -> jinja2.Environment:
    """Templates of this package, everything escaped, nothing undefined."""
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("entropy_kernels", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {
        "typeset": typeset,
        "number": _number,
        "estimate": lambda item: typeset(estimate(item)) if isinstance(item, Estimate) else "–",
        "in_words": in_words,
        "percent": percent,
        "leaf": leaf,
    }
    return found


def _number(value: Any, digits: int = 3) -> str:
    return typeset(number(float(value), digits))


def leaf(item: Any) -> str:
    """A setting as text."""
    if isinstance(item, Estimate):
        return typeset(estimate(item, unit=True))
    if isinstance(item, bool):
        return "yes" if item else "no"
    if isinstance(item, float):
        return typeset(number(item, 6))
    if item is None:
        return "–"
    return ", ".join(map(leaf, item)) if isinstance(item, list | tuple) else str(item)


def _plots(report: Mapping[str, Any], tables: Mapping[str, pa.Table]) -> dict[str, Markup]:
    """The pictures as SVG, by name. They hold no text of users, so they go in as they are."""
    drawn = plots.available(report, tables) | statistics.available(report) | fisher.available(report, tables)
    return {name: Markup(plots.svg(draw(), name)) for name, draw in drawn.items()}


def _concentration(shares: reading.Shares) -> dict[str, Any]:
    """How much the top 1 % and 10 % hold, in words."""
    held, count = shares.concentration(), len(shares.share)
    return {
        "count": count,
        "top": [(percent(part), percent(held[max(math.ceil(part * count), 1) - 1])) for part in (0.01, 0.1)],
    }


def _part(share: float, linear: Estimate) -> str:
    return typeset(number(share * linear.value, 2))


def _top_prompts(shares: reading.Shares, rollouts: pa.Table, linear: Estimate) -> list[PromptRow]:
    names = rollouts["prompt_id"].to_pylist()
    rewards = rollouts["reward"].to_pylist() if "reward" in rollouts.column_names else [None] * len(names)
    rows = []
    for share, row in list(zip(shares.share, shares.row.tolist(), strict=True))[:TOP_PROMPTS]:
        own = [rewards[other] for other, name in enumerate(names) if name == names[row]]
        known = [reward for reward in own if reward is not None]
        prompt = rollouts["prompt"][row].as_py()
        rows.append(
            PromptRow(
                share=typeset(percent(share)),
                part=_part(share, linear),
                prompt=prompt if len(prompt) <= PROMPT_CHARACTERS else "…" + prompt[-PROMPT_CHARACTERS:],
                reward=typeset(number(sum(known) / len(known))) if known else "–",
                completions=len(own),
            )
        )
    return rows


_HEADINGS = {
    "position": "position",
    "logprob": "log-prob",
    "entropy": "entropy",
    "d_logprob": "S′",
    "d_entropy": "H′",
}


def _token_columns(tokens: pa.Table) -> list[str]:
    return [name for name in _HEADINGS if name in tokens.column_names]


def _top_tokens(shares: reading.Shares, tokens: pa.Table, linear: Estimate) -> list[TokenRow]:
    columns = _token_columns(tokens)
    rows = []
    for share, row in list(zip(shares.share, shares.row.tolist(), strict=True))[:TOP_TOKENS]:
        start = max(row - CONTEXT_BEFORE, 0)
        near = (
            tokens.slice(start, CONTEXT_BEFORE + 1 + CONTEXT_AFTER).select(["sequence", "token"]).to_pylist()
        )
        own = near[row - start]["sequence"]
        text = [
            (at + start, item["token"].translate(_MARKS))
            for at, item in enumerate(near)
            if item["sequence"] == own
        ]
        values = tokens.slice(row, 1).select(columns).to_pylist()[0]
        rows.append(
            TokenRow(
                share=typeset(percent(share)),
                part=_part(share, linear),
                before="".join(piece for at, piece in text if at < row)[-CONTEXT_BEFORE:],
                token="".join(piece for at, piece in text if at == row),
                after="".join(piece for at, piece in text if at > row)[:CONTEXT_AFTER],
                cells=tuple(typeset(number(float(values[name]))) for name in columns),
            )
        )
    return rows
