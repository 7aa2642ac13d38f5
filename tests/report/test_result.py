"""A result goes to disk and comes back the same, whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from entropy_kernels.errors import UserError
from entropy_kernels.report import Result, html, plots
from entropy_kernels.report.result import from_json, to_json
from entropy_kernels.stats import Estimate

from . import builder


def same(left, right) -> bool:
    """Equality of nested reports in which NaN equals NaN."""
    if isinstance(left, Estimate) and isinstance(right, Estimate):
        return same(dataclasses.asdict(left), dataclasses.asdict(right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float) and isinstance(right, float) and math.isnan(left):
        return math.isnan(right)
    return type(left) is type(right) and left == right


def strict(text: str):
    """Parses JSON and refuses the NaN and Infinity that Python's parser alone accepts."""

    def refuse(constant: str):
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "made" / "on the way"
    result = builder.result()
    assert result.save(directory) == directory / "report.html"
    return result, directory


def test_round_trip(saved):
    result, directory = saved
    loaded = Result.load(directory)
    assert same(loaded.report, result.report)
    assert isinstance(loaded.report["changes"][0]["linear"], Estimate)
    for name, table in result.tables.items():
        assert loaded.tables[name].equals(table), name
        assert loaded.tables[name].schema.metadata == table.schema.metadata, name


def test_files(saved):
    _, directory = saved
    tables = [f"{name}.parquet" for name in ("rollouts_e", "rollouts_u", "tokens_e", "tokens_u")]
    assert sorted(path.name for path in directory.iterdir()) == ["report.html", "report.json", *tables]
    assert pq.read_schema(directory / "rollouts_e.parquet").field("prompt_ids").type == pa.list_(pa.int32())
    assert pq.read_schema(directory / "tokens_e.parquet").field("entropy").type == pa.float32()


def test_an_estimate_on_disk(saved):
    _, directory = saved
    change = strict((directory / "report.json").read_text())["changes"][0]
    assert set(change["linear"]) == {"value", "stderr", "n", "unit", "method"}


def test_undefined_and_infinite_numbers():
    unknown = Estimate(value=math.nan, stderr=math.inf, n=1, unit="1", method="none")
    report = {
        "schema_version": 1,
        "config": {"adapter": None, "note": 'Infinity "\\u0000infinity" 1e999'},
        "changes": [{"linear": unknown, "z": math.nan, "low": -math.inf, "high": np.float32(math.inf)}],
    }
    text = to_json(report)
    strict(text)
    back = from_json(text)
    assert back["config"] == report["config"]
    row = back["changes"][0]
    assert math.isnan(row["linear"].value) and row["linear"].stderr == math.inf and row["linear"].n == 1
    assert math.isnan(row["z"]) and (row["low"], row["high"]) == (-math.inf, math.inf)


def test_schema_version_is_written_and_checked():
    assert strict(to_json({}))["schema_version"] == 1
    with pytest.raises(UserError, match="schema version 2"):
        from_json(to_json({"schema_version": 2}))
    with pytest.raises(UserError, match="schema version None"):
        from_json("{}")


def test_a_leaf_json_cannot_hold_is_named():
    with pytest.raises(TypeError, match=r"report\.changes\[0\]\.eta is a complex"):
        to_json({"changes": [{"eta": 1j}]})


def test_load_says_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Result.load(tmp_path)
    (tmp_path / "report.json").write_text('{"schema_version": 1,')
    with pytest.raises(UserError, match="is not JSON"):
        Result.load(tmp_path)


def test_unknown_table_is_refused():
    with pytest.raises(UserError, match="tokens_x"):
        Result(report={}, tables={"tokens_x": pa.table({})})


@pytest.fixture
def plain_page(monkeypatch):
    """What is on the page does not matter to how it is saved."""
    monkeypatch.setattr(html, "render", lambda report, _: f"page of {report['derivatives']['first'].value}")


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_failed_numbers_leave_the_old_files(plain_page, tmp_path, monkeypatch):
    builder.result().save(tmp_path)
    before = contents(tmp_path)
    write, calls = pq.write_table, []

    def fail_halfway(table, path, **options):
        write(table, path, **options)
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(path.read_bytes()[:50])
            raise OSError("disk full")

    monkeypatch.setattr(pq, "write_table", fail_halfway)
    with pytest.raises(OSError, match="disk full"):
        builder.result(sign=-1.0).save(tmp_path)
    assert contents(tmp_path) == before


def test_failed_page_keeps_the_new_numbers_and_no_old_page(plain_page, tmp_path, monkeypatch):
    builder.result().save(tmp_path)

    def fail(*_):
        raise RuntimeError("no picture")

    monkeypatch.setattr(html, "render", fail)
    other = builder.result(sign=-1.0)
    with pytest.raises(RuntimeError, match="no picture"):
        other.save(tmp_path)
    assert same(Result.load(tmp_path).report, other.report)
    assert not (tmp_path / "report.html").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_plots_are_figures_in_real_colours_drawn_on_access(tmp_path):
    result = builder.result()
    assert list(result.plots) == ["change", "residual", "path", "prompts", "concentration"]
    assert len(builder.Result(report={"changes": result.report["changes"][:2]}, tables={}).plots) == 2
    figure = result.plots["path"]
    figure.savefig(tmp_path / "path.png")
    assert (tmp_path / "path.png").read_bytes().startswith(b"\x89PNG")
    assert figure.axes[0].lines[0].get_color() == plots.LINEAR
    with pytest.raises(KeyError, match="no plot 'nonsense'.*concentration"):
        result.plots["nonsense"]
    assert len(set(plots._VARIABLES)) == 7  # one colour for two things would lose its variable in the page
