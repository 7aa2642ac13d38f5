"""`compare`: two reports side by side."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from ..report import Result
from ..report.result import from_json
from .cli import Parser
from .comparing import compare_results

_EPILOG = """
  python -m entropy_kernels.measure compare report_a report_b --output comparison.html

Differences are B − A, paired over prompts where both were measured on the very same held-out responses (pass the first report's
rollouts_e.parquet as --rollouts-e to the second).
"""


def parser() -> argparse.ArgumentParser:
    """Two reports, and where to write."""
    p = Parser(
        prog="python -m entropy_kernels.measure compare",
        description="What differs between two reports: settings, and numbers with the error of their difference.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for name in ("A", "B"):
        p.add_argument(name, help="output directory of a measurement, or its report.json")
    p.add_argument(
        "--output", metavar="FILE", help="write the comparison there as well, .html or .json by its ending"
    )
    return p


def run(arguments: Sequence[str]) -> int:
    """The command; returns the exit status."""
    given = parser().parse_args(arguments)
    if given.output is not None and Path(given.output).suffix not in (".html", ".json"):
        raise UserError(f"output: got {given.output!r}, expected a name that ends in .html or .json.")
    found = compare_results(load(given.A), load(given.B), (given.A, given.B))
    print(found.summary())
    if given.output is not None:
        print(f"\ncomparison: {found.save(given.output)}")
    return 0


def load(path: str) -> Result:
    """The result in an output directory, or of a report.json (with the tables beside it if that is its name).

    Raises:
        UserError: nothing there, or something else.
    """
    given = Path(path)
    if given.is_dir():
        if not (given / "report.json").exists() and (given / "series.json").exists():
            raise UserError(
                f"compare: {path} holds a series; expected the report of one measurement. A series compares its checkpoints itself."
            )
        return Result.load(given)
    if given.name == "report.json":
        return Result.load(given.parent)
    try:
        return Result(report=from_json(given.read_text(encoding="utf-8")), tables={})
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"compare: {path} cannot be read as a report: {error}. Pass the output directory of a finished measurement."
        ) from error
