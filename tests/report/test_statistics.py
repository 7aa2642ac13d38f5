"""The statistics of a report as tables and pictures: what is there is shown, what is not is left out."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from entropy_kernels.measure.config import MeasureConfig
from entropy_kernels.measure.statistics import about_e
from entropy_kernels.report import Result, html, statistics
from entropy_kernels.report.terminal import summarize
from entropy_kernels.stats import TokenTangents, TokenValues

from . import builder


@pytest.fixture(scope="module")
def result():
    """The builder's report with sections made from random numbers."""
    rng = np.random.default_rng(0)
    N, T = 64, 24
    mask = np.arange(T) < rng.integers(2, T + 1, size=N)[:, None]
    values = TokenValues(rng.gamma(1.0, size=(N, T)), -rng.gamma(1.0, size=(N, T)))
    tangents = TokenTangents(rng.normal(size=(N, T)), rng.normal(size=(N, T)))
    config = MeasureConfig.demo()
    made = builder.result()
    made.report.update(about_e(config, values, tangents, mask, np.repeat(np.arange(32), 2), None))
    return made


def test_the_page_shows_every_table(result):
    text = html.render(result.report, result.tables)
    for words in (
        "Where are signal and noise?",
        "Baselines",
        "Three estimates of the entropy",
        "Heavy tails",
    ):
        assert words in text
    full = result.report["statistics"]["unbiased"]
    assert statistics.tables(result.report)["unbiased"] in text and full.n == 32
    assert 'id="lags-' in text and 'id="tails-' in text
    for name in ("position", "ema", "regression", "least_error", "group"):
        assert f">{name}<" in text


def test_tables_hold_what_the_report_says(result):
    found = statistics.tables(result.report)
    assert [row[0] for row in found["lags"]] == ["path", 1, 2, 4, 8, 16]
    assert found["lags"][0][3] == "–"  # the path part has no estimated bias of its own
    assert [row[0] for row in found["tails"]] == [32, 16, 8]
    assert [row[0] for row in found["mix"]] == ["Σ H", "−Σ S", "best mix"]
    assert found["coefficients"].count(",") == 4


def test_errors_over_either_batch_are_told_apart(result):
    first = result.report["derivatives"]["first"]
    other = builder.estimate(3.0, 0.25)
    found = {"statistics": {"two_batch": {"given_update": first, "given_evaluation": other, "both": other}}}
    rows = statistics.tables(found)["batches"]
    assert [name.split(",")[0] for name, _ in rows][:2] == ["new held-out samples E", "new update samples U"]
    assert rows[1][1] == "3.00 ± 0.25"


def test_the_terminal_names_the_baseline_and_what_it_saves(result):
    report = copy.deepcopy(result.report)
    assert "baseline" not in summarize(report)
    report["statistics"]["baseline"] = "ema"
    saved = report["statistics"]["baselines"]["ema"]["variance_ratio"]
    assert f"baseline ema: {str(saved).removesuffix(' 1')} of the variance" in summarize(report)


def test_a_report_without_statistics_is_as_it_was(monkeypatch):
    monkeypatch.setattr(html, "_plots", lambda *_: {})  # pictures take most of the time
    made = builder.result()
    assert statistics.available(made.report) == {}
    text = html.render(made.report, made.tables)
    assert "Where are signal and noise?" not in text and "Heavy tails" not in text


def test_sections_survive_the_way_to_disk_and_back(result, tmp_path, monkeypatch):
    monkeypatch.setattr(html, "_plots", lambda *_: {})
    Result(report=result.report, tables=result.tables).save(tmp_path)
    again = Result.load(tmp_path)
    assert statistics.tables(again.report) == statistics.tables(result.report)
    assert {"lags", "tails"} <= set(again.plots)
