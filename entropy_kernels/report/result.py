"""A measurement as data, and its way to disk and back."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UserError
from ..stats import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEMA_VERSION = 1
TABLES = ("rollouts_u", "rollouts_e", "tokens_u", "tokens_e", "sequences_u", "influence", "fisher")
# In these sections null is a setting that was left out (None); elsewhere it is an undefined number (NaN).
SETTINGS = ("config", "environment", "certify", "definitions")

_ESTIMATE_KEYS = frozenset({"value", "stderr", "n", "unit", "method"})
# Stands for 1e999, the only JSON number that reads back as infinite, until the text is complete.
_INFINITY = "\0infinity"


@dataclass(frozen=True, kw_only=True)
class Result:
    """Everything one measurement found.

    Attributes:
        report: the nested dictionary of report.json, its leaves `Estimate`, str, bool, int, float or None;
            undefined numbers are NaN.
        tables: Arrow tables by name, any of rollouts_u, rollouts_e, tokens_u, tokens_e, sequences_u, influence, fisher. `sequence` in the
            token tables counts the rows of the rollouts; `contribution` in tokens_e adds up to h'(0); influence has
            every held-out prompt's pull on every estimate.

    Raises:
        UserError: a table has another name.
    """

    report: dict[str, Any]
    tables: dict[str, pa.Table]

    def __post_init__(self) -> None:
        """Refuses names under which nothing would be saved."""
        unknown = sorted(set(self.tables) - set(TABLES))
        if unknown:
            raise UserError(
                f"`tables` has {unknown}; a result holds tables named {list(TABLES)}. Rename them."
            )

    def summary(self) -> str:
        """The main numbers with their errors, in at most 25 lines for a terminal."""
        from .terminal import summarize

        return summarize(self.report)

    @property
    def plots(self) -> Plots:
        """The report's pictures by name, matplotlib figures drawn on access: `result.plots["change"].savefig("change.png")`."""
        from . import plots, statistics  # matplotlib is slow to import and wanted here only

        return Plots(plots.available(self.report, self.tables) | statistics.available(self.report))

    def save(self, directory: str | Path) -> Path:
        """Writes report.json, one Parquet file per table, and report.html; returns the path of report.html.

        No file is ever half-written: each is complete under a temporary name before it takes its place. The
        numbers are in place before the page is drawn, and no page of older numbers stays beside them.

        Args:
            directory: made if it is not there; files of these names in it are replaced.

        Raises:
            TypeError: a leaf of `report` is of a type JSON has no form for.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        report_text = to_json(self.report)
        writers: dict[str, Callable[[Path], object]] = {
            f"{name}.parquet": lambda path, table=table: pq.write_table(table, path)  # type: ignore[misc]
            for name, table in self.tables.items()
        }
        writers["report.json"] = lambda path: path.write_text(report_text, encoding="utf-8")
        page = directory / "report.html"
        with complete_or_absent(directory, writers):
            page.unlink(missing_ok=True)

        from .html import render  # matplotlib is slow to import and wanted here only

        text = render(self.report, self.tables)
        with complete_or_absent(directory, {page.name: lambda path: path.write_text(text, encoding="utf-8")}):
            return page

    @classmethod
    def load(cls, directory: str | Path) -> Result:
        """Reads what `save` wrote: `Estimate` objects, undefined numbers as NaN, tables with their schema.

        Raises:
            UserError: no report.json in `directory`, not JSON, or another schema version.
        """
        report, tables = read_saved(directory, "report.json", TABLES, "measurement")
        return cls(report=report, tables=tables)


def read_saved(
    directory: str | Path, file: str, tables: Iterable[str], what: str
) -> tuple[dict[str, Any], dict[str, pa.Table]]:
    """What was saved in a directory: the report in `file`, and those of the named tables that are there.

    Raises:
        UserError: no such file in `directory`, not JSON, or another schema version.
    """
    path = Path(directory) / file
    try:
        report = from_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"`directory`: {path} does not exist. Expected the output of a finished {what}; pass what was given as --output."
        ) from error
    except json.JSONDecodeError as error:
        raise UserError(f"`directory`: {path} is not JSON ({error}). Measure again to replace it.") from error
    files = {name: path.with_name(f"{name}.parquet") for name in tables}
    return report, {name: pq.read_table(table) for name, table in files.items() if table.exists()}


class Plots(Mapping[str, "Figure"]):
    """Figures by name, each drawn anew when it is asked for; `list(...)` names them."""

    def __init__(self, draw: Mapping[str, Callable[[], Figure]]) -> None:
        self._draw = draw

    def __getitem__(self, name: str) -> Figure:
        """Draws one."""
        if name not in self._draw:
            raise KeyError(f"no plot {name!r}; this result has {', '.join(self._draw)}")
        return self._draw[name]()

    def __iter__(self) -> Iterator[str]:
        """Their names."""
        return iter(self._draw)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._draw)


@contextlib.contextmanager
def complete_or_absent(directory: Path, writers: dict[str, Callable[[Path], object]]) -> Iterator[None]:
    """Writes every file under a temporary name, runs the body, then moves all into place, in order."""
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=directory) as scratch:
        for name, write in writers.items():
            write(Path(scratch) / name)
        yield
        for name in writers:
            os.replace(Path(scratch) / name, directory / name)


def to_json(report: dict[str, Any]) -> str:
    """The text of report.json: strict JSON, NaN as null, infinity as 1e999 (and so parsers read it)."""
    text = json.dumps(
        _plain({"schema_version": SCHEMA_VERSION} | report, "report"),
        indent=2,
        allow_nan=False,
        ensure_ascii=False,
    )
    return text.replace(json.dumps("-" + _INFINITY), "-1e999").replace(json.dumps(_INFINITY), "1e999") + "\n"


def from_json(text: str) -> dict[str, Any]:
    """The report in the text of a report.json.

    Raises:
        UserError: another schema version, or none.
        json.JSONDecodeError: not JSON.
    """
    data = json.loads(text)
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(
            f"report.json has schema version {version!r}; this entropy_kernels reads {SCHEMA_VERSION}. "
            "Read it with the version that wrote it (see environment in the file), or measure again."
        )
    return {key: value if key in SETTINGS else _revive(value) for key, value in data.items()}


def _plain(item: Any, where: str) -> Any:
    """`item` with JSON's own types only; `where` is its path, for the error."""
    if isinstance(item, Estimate):
        return _plain(item.to_json(), where)
    if isinstance(item, dict):
        return {str(key): _plain(value, f"{where}.{key}") for key, value in item.items()}
    if isinstance(item, list | tuple):
        return [_plain(value, f"{where}[{index}]") for index, value in enumerate(item)]
    if isinstance(item, np.generic):
        item = item.item()
    if isinstance(item, float) and not math.isfinite(item):
        return None if math.isnan(item) else ("-" if item < 0 else "") + _INFINITY
    if item is None or isinstance(item, str | bool | int | float):
        return item
    raise TypeError(
        f"{where} is a {type(item).__name__}; expected Estimate, str, bool, int, float, None, list or dict"
    )


def _revive(item: Any) -> Any:
    """The inverse of `_plain` outside the settings."""
    if item is None:
        return math.nan
    if isinstance(item, dict):
        revived = {key: _revive(value) for key, value in item.items()}
        return Estimate.from_json(revived) if frozenset(item) == _ESTIMATE_KEYS else revived
    if isinstance(item, list):
        return [_revive(value) for value in item]
    return item
