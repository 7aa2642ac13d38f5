"""The sub-command `plan` on a made-up report whose variances are known."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from entropy_kernels.errors import UserError
from entropy_kernels.measure.cli import main
from entropy_kernels.measure.plan import costs, in_time, plan, read_pilot
from entropy_kernels.report import Result, html
from entropy_kernels.stats import Estimate, TokenTangents, TokenValues, first_derivative, prompt_sums

PROMPTS, GROUP, T, ETA = 60, 2, 5, 1e-5


def pilot(group=GROUP, **config):
    rng = np.random.default_rng(1)
    N = PROMPTS * group
    H, H1, S1 = rng.gamma(1.0, size=(N, T)), rng.normal(size=(N, T)) * 100, rng.normal(size=(N, T)) * 30
    index = np.repeat(np.arange(PROMPTS), group)
    H1 += rng.normal(size=PROMPTS)[index, None] * 60
    mask = np.ones((N, T), dtype=bool)
    values = TokenValues(H, 0 * H)
    sums = prompt_sums(
        values, values, mask, index, per="token", estimator="per_decision", tangents=TokenTangents(H1, S1)
    )
    order = rng.permutation(N * T)  # the table may be in any order
    sequence, position = np.divmod(order, T)
    columns = {"entropy": H, "logprob": 0 * H, "d_entropy": H1, "d_logprob": S1}
    tokens = pa.table(
        {"sequence": pa.array(sequence, pa.int32()), "position": pa.array(position, pa.int32())}
        | {name: x[sequence, position] for name, x in columns.items()}
    )
    zero = Estimate(value=0.0, stderr=1.0, n=PROMPTS, unit="nats/token", method="made up")
    report = {
        "config": {
            "per": "token",
            "estimator": "per_decision",
            "learning_rate": ETA,
            "baseline": "none",
            **config,
        },
        "derivatives": {"first": first_derivative(sums)},
        "changes": [{"eta": ETA, "linear": zero}],
        "rollouts": {"u": {"tokens": 300}, "e": {"prompts": PROMPTS, "sequences": N, "tokens": 100}},
        "timings": {"load": 10.0, "rollouts": 40.0, "update": 20.0, "entropy": 120.0},
    }
    return Result(report=report, tables={"tokens_e": tokens, "rollouts_e": pa.table({"group_index": index})})


def numbers(text):
    """Group size -> prompts wanted."""
    rows = [line.split() for line in text.splitlines()]
    return {int(row[0]): int(row[1]) for row in rows if "to" in row[2:4]}


def test_the_pilots_own_error_takes_the_pilots_own_prompts():
    made = pilot()
    stderr = ETA * made.report["derivatives"]["first"].stderr
    assert numbers(plan(made, stderr * (1 + 1e-9)))[GROUP] == PROMPTS
    assert numbers(plan(made, stderr / 3 * (1 + 1e-9)))[GROUP] == 9 * PROMPTS
    assert numbers(plan(made, stderr * 2 * (1 + 1e-9), eta=2 * ETA))[GROUP] == PROMPTS
    wanted = numbers(plan(made, stderr / 3))
    assert list(wanted) == [1, 2, 4, 8] and sorted(wanted.values(), reverse=True) == list(wanted.values())
    assert all(g * wanted[g] < 2 * g * wanted[2 * g] for g in (1, 2, 4))


def test_costs_are_those_of_e_alone():
    fixed, per_sequence = costs(pilot().report, 120)
    assert per_sequence == pytest.approx((120 + 40 / 4) / 120) and fixed == pytest.approx(10 + 20 + 30)
    assert [in_time(x) for x in (40, 600, 9000, float("nan"))] == ["40 s", "10 min", "2.5 h", "unknown"]


def test_one_response_per_prompt_says_nothing_of_more():
    text = plan(pilot(group=1), 1e-3)
    assert list(numbers(text)) == [1] and "nothing can be said of more" in text


def test_from_disk_by_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(html, "_plots", lambda *_: {})  # pictures take most of the time
    pilot().save(tmp_path)
    assert main(["plan", str(tmp_path), "--stderr", "1e-4", "--group-sizes", "1", "3"]) == 0
    assert list(numbers(capsys.readouterr().out)) == [1, 3]
    assert main(["plan", str(tmp_path), "--stderr", "0"]) == 1
    assert "positive standard error" in " ".join(capsys.readouterr().err.split())


def test_reports_that_cannot_serve_are_refused():
    with pytest.raises(UserError, match="baseline"):
        read_pilot(pilot(baseline="critic"), None)
    with pytest.raises(UserError, match="tokens_e"):
        read_pilot(Result(report=pilot().report, tables={}), None)
    with pytest.raises(UserError, match="--eta"):
        read_pilot(pilot(learning_rate=None), None)
