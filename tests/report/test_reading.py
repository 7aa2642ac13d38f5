"""Verdicts turn at their thresholds, and shares of contributions add up."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest

from entropy_kernels.report import reading
from entropy_kernels.report.numbers import estimate, in_words, number, typeset
from entropy_kernels.stats import Estimate

from . import builder


def verdict(report, name):
    (found,) = [check.verdict for check in reading.checks(report) if check.name == name]
    return found


@pytest.mark.parametrize(
    ("name", "section", "key", "good", "bad"),
    [
        ("Weights average to one", "sanity", "z_mean_weight", -2.9, -3.1),
        ("Scores average to zero", "sanity", "z_mean_score", 2.9, 3.1),
        ("Sampler and model agree", "sanity", "logprob_mismatch", 0.009, 0.011),
        ("Weights stay even", "change", "ess_sequences", 65.0, 63.0),
        ("Integration is fine enough", "change", "integration_error", 5e-6, 6e-6),
        ("Parameters move as told", "change", "rounding", 0.009, 0.011),
        ("Completions end by themselves", "e", "truncated_share", 0.49, 0.51),
        ("Groups disagree about reward", "u", "degenerate_groups_share", 0.79, 0.81),
    ],
)
def test_verdict_turns_at_the_threshold(name, section, key, good, bad):
    report = builder.result().report
    places = {"sanity": report["sanity"], "change": reading.headline_change(report), **report["rollouts"]}
    for value, expected in ((good, "pass"), (bad, "warn"), (math.nan, "unknown")):
        places[section][key] = value
        assert verdict(report, name) == expected


@pytest.mark.parametrize(("floors", "expected"), [(2.9, "pass"), (3.1, "warn")])
def test_two_measurements_must_agree_within_three_floors(floors, expected):
    report = builder.result().report
    change = reading.headline_change(report)
    change["true_direct"] = builder.estimate(change["true_integrated"].value + floors * builder.FLOOR, 1e-5)
    assert verdict(report, "Two measurements agree") == expected


def test_below_the_floor_two_measurements_say_nothing():
    report = builder.result().report
    report["sanity"]["noise_floor"]["difference"] = builder.estimate(0.0, 1.0)
    assert verdict(report, "Two measurements agree") == "unknown"


def test_token_shares_add_up_and_lead_with_the_largest():
    shares = reading.token_shares(builder.tables())
    contribution = builder.tables()["tokens_e"]["contribution"].to_numpy()
    assert shares.share.sum() == pytest.approx(1.0, abs=1e-12)
    np.testing.assert_allclose(shares.share, contribution[shares.row] / contribution.sum(), rtol=1e-12)
    assert (np.diff(np.abs(shares.share)) <= 0).all() and shares.concentration()[-1] == 1.0


def test_prompt_shares_collect_all_completions_of_a_prompt():
    tables = {
        "rollouts_e": pa.table({"prompt_id": ["b", "a", "b"]}),
        "tokens_e": pa.table({"sequence": [0, 0, 1, 2, 2], "contribution": [1.0, 2.0, -4.0, 3.0, 6.0]}),
    }
    shares = reading.prompt_shares(tables)
    np.testing.assert_allclose(shares.share, [12 / 8, -4 / 8])
    assert shares.row.tolist() == [0, 1]


@pytest.mark.parametrize("contribution", [[1.0, -1.0], [math.nan, 1.0]])
def test_no_shares_of_nothing(contribution):
    assert reading.token_shares({"tokens_e": pa.table({"contribution": contribution})}) is None


def test_numbers():
    assert [number(x) for x in (0.0, 5e-5, 0.0121, -1.5, 123456.0, 9.999e-4)] == [
        "0",
        "5e-05",
        "0.0121",
        "-1.5",
        "1.23e+05",
        "0.001",
    ]
    assert (number(math.nan), number(-math.inf)) == ("undefined", "-inf")
    assert typeset("5e-05 and (-1.2 ± 0.3)e-07, 1e-08, 2.1e+05, run-60") == (
        "5×10⁻⁵ and (−1.2 ± 0.3)×10⁻⁷, 10⁻⁸, 2.1×10⁵, run-60"
    )
    item = Estimate(value=-0.00121, stderr=0.00004, n=9, unit="nats/token", method="")
    assert estimate(item, unsigned=True, unit=True) == "0.001210 ± 0.000040 nats per token"
    assert in_words("nats/token per unit eta^2") == "nats per token per unit η²"
