"""Two reports side by side, as text, JSON and one HTML page."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .numbers import estimate, in_words, number, typeset
from .result import complete_or_absent, to_json
from .terminal import table

_WORDS = {
    "entropy.per_token": "entropy per token",
    "entropy.per_sequence": "entropy per sequence",
    "derivatives.first": "h', slope",
    "derivatives.second": "h'', curvature",
    "changes.true_direct": "ΔH, direct",
    "changes.true_integrated": "ΔH, integrated",
    "changes.linear": "ΔH, linear",
    "changes.quadratic": "ΔH, quadratic",
}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What differs from report A to report B.

    Attributes:
        names: of A and B.
        settings: settings that differ: section, name, a, b.
        pairing: on which samples, and how the errors of the differences were found, in words.
        rows: quantity (its place in the report), eta (NaN but for changes), a, b, difference b − a (Estimates), z, paired.
        skipped: what both have and cannot be compared, in words.
    """

    names: tuple[str, str]
    settings: list[dict[str, Any]]
    pairing: str
    rows: list[dict[str, Any]]
    skipped: list[str]

    def summary(self) -> str:
        """Settings that differ, then every quantity with its difference, for a terminal."""
        lines = [f"A: {self.names[0]}", f"B: {self.names[1]}", f"Measured {self.pairing}.", ""]
        if self.settings:
            rows = [("differs", "A", "B")] + [(s["name"], *_both(s)) for s in self.settings]
            lines += [*table(rows, align="<<<"), ""]
        else:
            lines += ["No setting differs.", ""]
        lines += table([_HEADING, *map(_cells, self.rows)], align="<>>>>><")
        return "\n".join([line.rstrip() for line in lines] + [f"left out: {text}" for text in self.skipped])

    def save(self, path: str | Path) -> Path:
        """Writes the comparison as .json or .html, by the name's ending; complete or absent.

        Raises:
            UserError: another ending.
        """
        path = Path(path)
        if path.suffix == ".json":
            text = to_json(asdict(self) | {"rows": self.rows})
        elif path.suffix == ".html":
            from .html import render_comparison  # jinja2 and matplotlib are wanted here only

            text = render_comparison(self)
        else:
            raise UserError(f"output: got {str(path)!r}, expected a name that ends in .html or .json.")
        path.parent.mkdir(parents=True, exist_ok=True)
        with complete_or_absent(
            path.parent, {path.name: lambda part: part.write_text(text, encoding="utf-8")}
        ):
            return path

    def cells(self) -> list[tuple[str, ...]]:
        """The rows of the table as text, for print."""
        return [tuple(map(typeset, _cells(row))) for row in self.rows]


_HEADING = ("quantity", "η", "A", "B", "B − A", "z", "")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    eta = "" if row["eta"] != row["eta"] else number(row["eta"])
    how = in_words(row["difference"].unit) + ("" if row["paired"] else ", unpaired")
    return (
        _WORDS.get(row["quantity"], row["quantity"]),
        eta,
        *(estimate(row[name]) for name in ("a", "b", "difference")),
        number(row["z"], 2),
        how,
    )


def _both(setting: dict[str, Any]) -> tuple[str, str]:
    """Both values; long texts from where they part."""
    left, right = (_text(setting[name]) for name in ("a", "b"))
    if max(len(left), len(right)) <= 60:
        return left, right
    start = max(len(os.path.commonprefix([left, right])) - 10, 0)
    return tuple(("…" if start else "") + x[start : start + 50] for x in (left, right))  # type: ignore[return-value]


def _text(item: Any) -> str:
    if isinstance(item, float):
        return number(item, 6)
    return "–" if item is None else str(item)
