"""Two reports compared: paired where they share their samples, and the influences that pairing rests on."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from entropy_kernels.errors import UserError
from entropy_kernels.measure import MeasureConfig, compare_results, measure_step
from entropy_kernels.measure.cli import main
from entropy_kernels.report import Result
from entropy_kernels.stats import Estimate, paired_difference, unpaired_difference

ETAS = (1e-5, 2e-4)


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """A; B on the same samples along a direction 1.01 times as long; C on other responses to the same prompts."""
    where = tmp_path_factory.mktemp("compare")
    small = dict(prompts_u=8, prompts_e=16, group_size_e=2, etas=ETAS, micro_batch_tokens=16384)
    (where / "a").mkdir()
    a = measure_step(MeasureConfig.demo(**small), directory=str(where / "a"), progress=False)
    a.save(where / "a")
    v = load_file(where / "a" / "update.safetensors")
    save_file({name: 1.01 * x for name, x in v.items()}, where / "longer.safetensors")
    same = dict(etas=ETAS, micro_batch_tokens=16384, update=str(where / "longer.safetensors"))
    b = measure_step(
        MeasureConfig.demo(**same, rollouts_e=str(where / "a" / "rollouts_e.parquet")), progress=False
    )
    c = measure_step(MeasureConfig.demo(**same, prompts_e=16, group_size_e=2, seed=3), progress=False)
    b.save(where / "b")
    c.save(where / "c")
    return where, a, b, c


def rows_of(comparison):
    return {
        (row["quantity"], row["eta"] if row["eta"] == row["eta"] else None): row for row in comparison.rows
    }


def test_influences_give_every_reported_error(reports):
    _, a, _, _ = reports
    table = a.tables["influence"].to_pandas()
    seen = 0
    for (quantity, eta), own in table.groupby(["quantity", "eta"], dropna=False):
        section, name = quantity.split(".")
        where = (
            a.report[section] if math.isnan(eta) else next(c for c in a.report[section] if c["eta"] == eta)
        )
        B = len(own)
        assert B == 16 and own.influence.sum() == pytest.approx(0, abs=1e-9 * own.influence.abs().max())
        expected = np.sqrt(B / (B - 1) * (own.influence**2).sum())
        assert where[name].stderr == pytest.approx(expected, rel=1e-9), quantity
        seen += 1
    assert seen == 4 + 4 * len(ETAS)


def test_the_same_samples_are_compared_as_pairs(reports):
    """B's derivative is exactly 1.01 times A's, so the paired error is 1 % of A's; independent errors would be 140 %."""
    _, a, b, _ = reports
    found = compare_results(a, b)
    assert found.pairing.startswith("on the very same")
    rows = rows_of(found)
    slope = rows["derivatives.first", None]
    assert slope["paired"]
    assert slope["difference"].value == pytest.approx(0.01 * slope["a"].value, rel=1e-4)
    assert slope["difference"].stderr == pytest.approx(0.01 * slope["a"].stderr, rel=1e-4)
    assert rows["entropy.per_token", None]["difference"].value == 0.0
    assert rows["entropy.per_token", None]["difference"].stderr == 0.0
    truth = rows["changes.true_integrated", ETAS[1]]
    assert truth["difference"].stderr < 0.03 * truth["a"].stderr
    assert all(row["paired"] for row in found.rows)
    assert compare_results(a, a).settings == []
    assert all(row["difference"].value == row["difference"].stderr == 0 for row in compare_results(a, a).rows)


def test_other_samples_are_not_and_it_says_so(reports):
    _, a, _, c = reports
    found = compare_results(a, c)
    assert "other samples: errors are added as if the two were independent" in found.pairing
    for row in found.rows:
        assert not row["paired"]
        assert row["difference"].stderr == pytest.approx(
            math.hypot(row["a"].stderr, row["b"].stderr), rel=1e-12
        )
    without = Result(report=a.report, tables={k: v for k, v in a.tables.items() if k != "influence"})
    assert "without influence.parquet" in compare_results(a, without).pairing
    assert "is not known" in compare_results(a, Result(report=a.report, tables={})).pairing


def test_settings_that_differ_are_listed(reports):
    _, a, _, c = reports
    differ = {s["name"]: (s["a"], s["b"]) for s in compare_results(a, c).settings if s["section"] == "config"}
    assert differ["seed"] == (0, 3) and differ["update"][0] == "adamw"
    assert "temperature" not in differ and "output" not in differ


def test_other_units_are_left_out(reports):
    _, a, _, _ = reports
    slope = Estimate(value=1.0, stderr=1.0, n=16, unit="nats/sequence per unit eta", method="m")
    report = {**a.report, "derivatives": {"first": slope}}
    found = compare_results(a, Result(report=report, tables=a.tables))
    assert "derivatives.first" not in {row["quantity"] for row in found.rows}
    assert "derivatives.first is in nats/token per unit eta in one" in found.summary()


def test_command_line(reports, tmp_path, capsys):
    where, *_ = reports
    a, b = str(where / "a"), str(where / "b" / "report.json")
    assert main(["compare", a, b, "--output", str(tmp_path / "c.html")]) == 0
    printed = capsys.readouterr().out
    assert "h', slope" in printed and "very same held-out responses" in printed and "update" in printed
    page = (tmp_path / "c.html").read_text()
    assert "Two reports compared" in page and "http" not in page and "h', slope" in page.replace("&#39;", "'")
    assert main(["compare", a, b, "--output", str(tmp_path / "c.json")]) == 0
    data = json.loads((tmp_path / "c.json").read_text())
    assert data["rows"][0]["difference"]["unit"] == "nats/token"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nowhere", "nowhere"], "compare: nowhere cannot be read as a report"),
        (["{a}", "{a}", "--output", "c.txt"], "ends in .html or .json"),
        (["{a}/rollouts_e.parquet", "{a}"], "cannot be read as a report"),
        (["{empty}", "{a}"], "does not exist"),
        (["{a}"], "required: B. python -m entropy_kernels.measure compare --help"),
    ],
)
def test_errors_are_one_paragraph(reports, arguments, words, tmp_path, capsys):
    filled = [x.format(a=reports[0] / "a", empty=tmp_path) for x in arguments]
    assert main(["compare", *filled]) == 1
    printed = capsys.readouterr()
    assert words in " ".join(printed.err.split()) and printed.out == ""


def test_differences_need_one_unit_and_one_set_of_prompts():
    one = Estimate(value=1.0, stderr=0.3, n=3, unit="nats/token", method="m")
    other = Estimate(value=2.0, stderr=0.4, n=5, unit="nats/token", method="m")
    found = unpaired_difference(one, other)
    assert (found.value, found.stderr, found.n) == (1.0, pytest.approx(0.5), 3)
    pull = np.array([0.1, -0.3, 0.2])
    assert paired_difference(one, other, pull, 2 * pull).stderr == pytest.approx(
        np.sqrt(1.5 * (pull**2).sum())
    )
    with pytest.raises(UserError, match="one unit"):
        unpaired_difference(one, Estimate(value=2.0, stderr=0.4, n=5, unit="nats/sequence", method="m"))
    with pytest.raises(UserError, match="lengths"):
        paired_difference(one, other, pull, np.zeros(4))
