from __future__ import annotations

import json
import math

import pytest
from scipy.stats import t as student

from entropy_kernels.errors import UserError
from entropy_kernels.stats import Estimate


def made(value, stderr, n=10, unit="nats/token"):
    return Estimate(value=value, stderr=stderr, n=n, unit=unit, method="made up")


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (-0.0012138, 0.0000412, "-0.001214 ± 0.000041 nats/token"),
        (-2181.3, 406.7, "-2180 ± 410 nats/token"),
        (2.0, 0.0996, "2.00 ± 0.10 nats/token"),
        (1.2347e-9, 3.01e-11, "(1.235 ± 0.030)e-09 nats/token"),
        (1e-8, 2.0, "0.0 ± 2.0 nats/token"),
        (4.7e8, 1.2e7, "(4.70 ± 0.12)e+08 nats/token"),
        (0.25, 0.0, "0.25 ± 0 nats/token"),
        (math.nan, math.nan, "nan ± nan nats/token"),
        (1.5, math.nan, "1.5 ± nan nats/token"),
    ],
)
def test_text_is_rounded_to_two_digits_of_the_error(value, stderr, text):
    assert str(made(value, stderr)) == text


def test_interval_is_students():
    low, high = made(1.0, 0.1, n=5).interval(0.9)
    assert (low, high) == pytest.approx((1 - 0.1 * student.ppf(0.95, 4), 1 + 0.1 * student.ppf(0.95, 4)))
    assert all(math.isnan(end) for end in made(1.0, 0.1, n=1).interval())
    with pytest.raises(UserError, match="level is 95"):
        made(1.0, 0.1).interval(95)


def test_json_round_trip_keeps_nan():
    before = made(0.1 + 0.2, 1e-17, n=3)
    assert Estimate.from_json(json.loads(json.dumps(before.to_json()))) == before
    assert list(before.to_json()) == ["value", "stderr", "n", "unit", "method"]
    undefined = Estimate.from_json(json.loads(json.dumps(made(math.nan, math.inf).to_json())))
    assert math.isnan(undefined.value) and undefined.stderr == math.inf
    with pytest.raises(UserError, match="fields"):
        Estimate.from_json({"value": 1.0})


def test_z_score():
    assert made(3.0, 1.5).z_score() == 2.0
    assert made(3.0, 1.5).z_score(expected=6.0) == -2.0
    assert math.isnan(made(0.0, 0.0).z_score())
    assert made(-1.0, 0.0).z_score() == -math.inf
    assert math.isnan(made(math.nan, 0.0).z_score())
