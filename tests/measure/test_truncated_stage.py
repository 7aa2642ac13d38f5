"""The demo measured under top-k and top-p: one law for sampling, update and measurement, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch

from entropy_kernels.derivatives import token_gradient, token_stats
from entropy_kernels.errors import UserError
from entropy_kernels.measure.config import MeasureConfig
from entropy_kernels.measure.direction import load_state, token_weights
from entropy_kernels.measure.samples import batch_of
from entropy_kernels.measure.steps import load_policy, measure_step
from entropy_kernels.report import Result
from entropy_kernels.rl.rollouts import Rollouts

SMALL = dict(prompts_u=8, group_size=8, prompts_e=6, group_size_e=2, etas=(1e-6, 2e-2))
LIMITS = dict(top_k=20, top_p=0.9)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    directory = tmp_path_factory.mktemp("truncated")
    config = MeasureConfig.demo(**SMALL, **LIMITS, update="sgd")
    return config, directory, measure_step(config, directory=str(directory), progress=False)


def test_report_has_the_truncated_law_and_the_full_one_beside_it(measured, tmp_path):
    config, directory, result = measured
    kept, entropy = result.report["truncation"], result.report["entropy"]
    policy, E = load_policy(config), Rollouts.load(directory / "rollouts_e.parquet")
    batch = batch_of(E)
    own, full = (
        token_stats(p, batch).entropy[batch.response_mask].mean().item() for p in (policy, policy.full())
    )
    assert entropy["per_token"].value == pytest.approx(own, rel=1e-6)
    assert kept["full_entropy"].value == pytest.approx(full, rel=1e-6)
    assert own < 0.98 * full and 0.9 <= kept["kept_mass"].value < 1 < kept["kept_count"].value < 20
    assert result.report["sanity"]["logprob_mismatch"] < 1e-5
    assert [row["eta"] for row in kept["along"]] == [1e-6, 2e-2]
    small, large = (row["moved_share"].value for row in kept["along"])
    assert 0 <= small < large < 1
    row = result.report["changes"][1]
    assert row["true_integrated"].value == pytest.approx(row["true_direct"].value, rel=1e-2)
    words = result.report["definitions"]["policy"]
    assert "top-k 20, then top-p 0.9" in words and "renormalised" in words
    summary = result.summary()
    assert "policy truncated to top-k 20, then top-p 0.9" in summary and len(summary.splitlines()) <= 25
    page = result.save(tmp_path).read_text()
    assert "What does the truncation leave out?" in page
    assert Result.load(tmp_path).report["truncation"]["kept_mass"] == kept["kept_mass"]


def test_the_update_is_that_of_the_truncated_law(measured):
    config, directory, result = measured
    policy = load_policy(config)
    U = Rollouts.load(directory / "rollouts_u.parquet")
    batch = batch_of(U)
    weight = token_weights(config, U, batch)["policy_gradient"].logprob
    norms = [
        torch.cat([g.flatten() for g in token_gradient(p, batch, logprob_weight=weight).values()])
        .norm()
        .item()
        for p in (policy, policy.full())
    ]
    assert result.report["update"]["gradient_norm"] == pytest.approx(norms[0], rel=1e-4)
    assert abs(norms[1] / norms[0] - 1) > 1e-3
    assert load_state(config, policy)[0].slots == {}


def test_integrated_truth_alone_still_says_how_sets_move(measured):
    config, directory, result = measured
    again = replace(
        config, truth="integrated", second_order=False, rollouts_u=str(directory / "rollouts_u.parquet"),
        rollouts_e=str(directory / "rollouts_e.parquet"), estimator="whole_sequence",
    )  # fmt: skip
    report = measure_step(again, progress=False).report
    assert "true_direct" not in report["changes"][0]
    want = [row["moved_share"].value for row in result.report["truncation"]["along"]]
    assert [row["moved_share"].value for row in report["truncation"]["along"]] == want


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    directory = tmp_path_factory.mktemp("full")
    config = MeasureConfig.demo(**SMALL, second_order=False, truth="direct", update="sgd")
    measure_step(config, directory=str(directory), progress=False)
    return directory


def files(directory):
    return {f"rollouts_{x}": str(directory / f"rollouts_{x}.parquet") for x in "ue"}


def test_samples_of_the_full_law_are_refused_for_a_truncated_one(full, tmp_path):
    config = MeasureConfig.demo(**SMALL, **files(full), top_p=0.9)
    with pytest.raises(
        UserError, match="have top_p none; the policy measured has top_p 0.9.*leave out --top-p"
    ):
        measure_step(config, progress=False)
    silent = {}  # the same without a word on how they were drawn, and without log-probs
    for name, path in files(full).items():
        silent[name] = str(tmp_path / f"{name}.parquet")
        pq.write_table(
            pq.read_table(path).replace_schema_metadata({}).drop_columns(["logprobs"]), silent[name]
        )
    with pytest.raises(
        UserError, match=r"\d+ of the \d+ response tokens in .* lie outside what top-p 0.9 keeps"
    ):
        measure_step(replace(config, **silent), progress=False)


def test_samples_of_a_truncated_law_are_refused_for_the_full_one(measured):
    config, directory, _ = measured
    with pytest.raises(UserError, match=r"pass --top-k 20 --top-p 0.9, or sample again"):
        measure_step(replace(config, top_k=None, top_p=None, **files(directory)), progress=False)
    with pytest.raises(UserError, match="expected a whole number of at least 2"):
        replace(config, top_k=1)
