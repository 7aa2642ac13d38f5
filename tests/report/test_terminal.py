"""The summary is short, aligned, and says which way entropy goes."""

from __future__ import annotations

import math

import pytest

from entropy_kernels.report import reading

from . import builder


@pytest.mark.parametrize(
    ("sign", "words"), [(1.0, "entropy falls by 0.001114"), (-1.0, "entropy rises by 0.001114")]
)
def test_signs(sign, words):
    summary = builder.result(sign).summary()
    assert words in summary.splitlines()[0]
    assert f"{'-' if sign > 0 else ''}0.001114 ± 0.000056" in summary.split("measured ΔH")[1]


def test_short_and_aligned():
    summary = builder.result().summary()
    lines = summary.splitlines()
    assert len(lines) <= 25 and max(map(len, lines)) <= 110
    at = next(index for index, line in enumerate(lines) if "measured ΔH" in line)
    ends = {line.index("ΔH") + 2 for line in lines[at : at + 1]}
    rows = lines[at + 1 : at + 10]
    assert all(row[max(ends) - 1] not in " " and row[max(ends)] == " " for row in rows)
    assert sum(row.startswith(">") for row in rows) == 1


def test_many_learning_rates_and_warnings_still_fit():
    result = builder.result()
    result.report["changes"] = [builder.change(1e-9 * 1.3**power) for power in range(60)]
    result.report["sanity"] |= {"z_mean_weight": 9.0, "z_mean_score": -9.0, "logprob_mismatch": 1.0}
    result.report["rollouts"]["u"]["degenerate_groups_share"] = 0.99
    result.report["rollouts"]["e"]["truncated_share"] = 0.99
    lines = result.summary().splitlines()
    assert len(lines) <= 25
    assert any(line.startswith(">") for line in lines) and "and 2 more" in lines[-1]


def test_a_change_within_its_error_is_not_called_one():
    report = builder.result().report
    change = reading.headline_change(report)
    change["true_integrated"] = builder.estimate(-1e-3, 0.6e-3)
    assert "entropy does not change measurably: -0.00100 ± 0.00060 nats per token." in reading.headline(
        report
    )


def test_headline_says_where_it_stands():
    report = builder.result().report
    report["changes"] = [change for change in report["changes"] if change["eta"] != builder.RATE]
    assert reading.headline(report).startswith(
        "At learning rate 3.34e-05, the nearest measured to the checkpoint's 5e-05,"
    )
    report["update"]["learning_rate"] = report["config"]["learning_rate"] = 0.0
    assert reading.headline(report).startswith("At the largest learning rate measured, 5e-04,")


def test_unresolved_eta_star():
    report = builder.result().report
    report["derivatives"]["eta_star"] |= {"resolved": False, "high": math.inf}
    assert "not resolved" in reading.eta_star(report)
