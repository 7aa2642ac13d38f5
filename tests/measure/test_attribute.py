"""On the demo's checkpoint at optimizer step 60, in float64: shares add up, marginals foretell what is measured without a token."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from entropy_kernels import demo, stats
from entropy_kernels.attribution import (
    entropy_weights,
    half_gradient,
    marginal_direction,
    part_values,
    share_direction,
    token_influence,
)
from entropy_kernels.derivatives import TokenStats, token_gradient, token_stats, token_tangents
from entropy_kernels.errors import UserError
from entropy_kernels.measure import shares
from entropy_kernels.measure.along import Along
from entropy_kernels.measure.config import MeasureConfig
from entropy_kernels.measure.direction import load_state, token_weights
from entropy_kernels.measure.samples import batch_of, get_rollouts
from entropy_kernels.measure.steps import load_policy, measure_step
from entropy_kernels.measure.store import NOWHERE
from entropy_kernels.measure.what_if import read_factors, truth_of
from entropy_kernels.policy import TokenBatch
from entropy_kernels.report import Result, reading
from entropy_kernels.updates import update_direction

ETA = 2e-5  # the checkpoint's learning rate
SMALL = dict(
    prompts_u=6,
    group_size=8,
    prompts_e=8,
    group_size_e=2,
    etas=(ETA,),
    second_order=False,
    truth="integrated",
)


class Step:
    """The recorded batch of the demo's next step, its direction, and 20 held-out responses."""

    def __init__(self) -> None:
        recorded = str(demo.next_dir() / "recorded" / "rollouts_u.parquet")
        self.config = MeasureConfig.demo(
            rollouts_u=recorded,
            prompts_e=10,
            group_size_e=2,
            precision="float64",
            truth="integrated",
            second_order=False,
        )
        self.policy = load_policy(self.config)
        self.state, info = load_state(self.config, self.policy)
        assert info.optimizer_steps >= 50
        self.U, E = get_rollouts(self.config, self.policy, None, False, NOWHERE)
        self.u, self.e = batch_of(self.U), batch_of(E)
        self.weights = token_weights(self.config, self.U, self.u)
        with self.policy.as_trained():
            g = self.weights["policy_gradient"].logprob
            self.gradient = token_gradient(self.policy, self.u, logprob_weight=g)
        self.update = self.direction(self.gradient)
        values = token_stats(self.policy, self.e)
        of_e = entropy_weights(TokenStats(*values), self.e, per="token", estimator="per_decision")
        halves = [half_gradient(self.policy, self.e, of_e, half) for half in (0, 1)]
        self.X = {name: x + halves[1][name] for name, x in halves[0].items()}
        self.shares, self.marginals = (
            ETA * self.influence(turned(self.update, self.X))
            for turned in (share_direction, marginal_direction)
        )

    def influence(self, y):
        with self.policy.as_trained():
            return token_influence(self.policy, self.u, y, self.weights)["policy_gradient"]

    def direction(self, gradient):
        return update_direction(
            gradient, self.state, rule="adamw", lr=ETA, max_grad_norm=self.config.max_grad_norm, marginal=True
        )

    def token_gradient(self, i, t):
        """g ∇S of token (i, t) of U."""
        row = TokenBatch(
            *(
                x[i : i + 1]
                for x in (self.u.input_ids, self.u.attention_mask, self.u.response_mask, self.u.prompt_index)
            )
        )
        g = torch.zeros(row.input_ids.shape, dtype=torch.float64)
        g[0, t] = self.weights["policy_gradient"].logprob[i, t]
        with self.policy.as_trained():
            return token_gradient(self.policy, row, logprob_weight=g)

    def truth(self, v, eta=ETA):
        """The integrated change of entropy at η along v, on E."""
        return truth_of(Along(self.config, self.policy, v, self.e, (eta,), False), None).nodes


@pytest.fixture(scope="module")
def step():
    return Step()


def test_sum_rule_in_float64(step):
    tangents = token_tangents(step.policy, step.e, step.update.direction)
    arrays = [x.numpy() for x in tangents]
    sums = stats.prompt_sums(
        stats.TokenValues(*arrays[:2]), stats.TokenValues(*arrays[:2]), step.e.response_mask.numpy(), step.e.prompt_index.numpy(),
        per="token", estimator="per_decision", tangents=stats.TokenTangents(*arrays[2:]),
    )  # fmt: skip
    parts = part_values(step.update, step.X)
    total = step.shares.sum() + ETA * (parts["momentum"] + parts["decay"])
    assert total == pytest.approx(stats.linear_change(sums, ETA).value, rel=1e-10)


def chosen(step, small):
    """The three tokens of largest marginal, and some of the others in the first quarter."""
    size = np.abs(step.marginals)
    order = np.argsort(-size.ravel())
    tokens = int(step.u.response_mask.sum())
    picked = [*order[:3], *np.random.default_rng(0).choice(order[3 : tokens // 4], small, replace=False)]
    return [tuple(int(x) for x in np.unravel_index(k, size.shape)) for k in picked]


def test_without_a_token_entropy_changes_as_its_marginal_says(step):
    """Moments, clip and direction made again without the token; measured at the checkpoint's learning rate on the same samples."""
    base = step.truth(step.update.direction)
    for i, t in chosen(step, small=4):
        own = step.token_gradient(i, t)
        without = step.direction({name: g - own[name] for name, g in step.gradient.items()}).direction
        measured = stats.integrated_difference(step.truth(without), base).value
        assert -step.marginals[i, t] == pytest.approx(measured, rel=0.05)


def test_with_the_second_moment_frozen_it_changes_as_its_share_says(step):
    """Where the law is linear: at a twentieth of the learning rate (at all of it, curvature makes up to 4 % of the largest)."""
    eta = ETA / 20
    base = step.truth(step.update.direction, eta)
    for i, t in chosen(step, small=1):
        own = step.token_gradient(i, t)
        without = {
            name: v + step.update.gain[name] * step.update.preconditioner[name] * own[name]
            for name, v in step.update.direction.items()
        }
        measured = stats.integrated_difference(step.truth(without, eta), base).value
        assert -step.shares[i, t] / 20 == pytest.approx(measured, rel=0.01)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    directory = tmp_path_factory.mktemp("attributed")
    table = pa.table({"sequence": [0, 0, 3], "position": [0, 1, 0], "weight": [0.0, 0.5, 1.0]})
    pq.write_table(table, directory / "mask.parquet")
    rules = ("drop-top:0.01", "clip-higher", str(directory / "mask.parquet"))
    config = MeasureConfig.demo(**SMALL, what_if=rules, verify=True)
    return directory, measure_step(config, directory=str(directory), progress=False)


def test_the_report_holds_sum_rules_correlations_cells_and_the_trial(measured):
    _, result = measured
    section = result.report["attribution"]
    for name in ("entropy", "reward"):
        found = section[name]
        assert found["sum_rule"]["missed"] < 1e-4
        assert set(found["sum_rule"]["parts"]) == {"policy_gradient", "momentum", "decay"}
        total = found["sum_rule"]["parts"]["policy_gradient"].value
        assert sum(cell["share"].value for cell in found["cells"]) == pytest.approx(total)
        assert sum(cell["size"] for cell in found["cells"]) == pytest.approx(1)
        assert sum(cell["tokens"] for cell in found["cells"]) == result.report["rollouts"]["u"]["tokens"]
        held = [top["held"]["estimate"].value for top in found["shares"]["top"]]
        assert 0 < held[0] < held[1] < held[2] < 1
    change = next(row for row in result.report["changes"] if row["eta"] == section["eta"])
    assert section["entropy"]["sum_rule"]["linear"].value == pytest.approx(change["linear"].value)
    trial = section["proxies"]
    assert set(trial["tokens"]) == {"cov_batch", "cov_prompt", "s_star", "steer"}
    for proxy in trial["tokens"].values():
        for held, ceiling in zip(proxy["top"], trial["ceiling"], strict=True):
            assert held["held"]["estimate"].value <= ceiling["held"]["estimate"].value


def test_tables_hold_every_token_and_sequence(measured):
    _, result = measured
    tokens, sequences = result.tables["tokens_u"], result.tables["sequences_u"]
    assert sequences.num_rows == 48
    for column in ("share", "marginal", "share_reward", "marginal_reward"):
        of_tokens = tokens[column].to_numpy()
        assert np.bincount(tokens["sequence"].to_numpy(), of_tokens) == pytest.approx(
            sequences[column].to_numpy()
        )
        assert of_tokens == pytest.approx(tokens[f"{column}_a"].to_numpy() + tokens[f"{column}_b"].to_numpy())
    change = tokens["own_change"].to_numpy()
    predicted = ETA * tokens["d_entropy"].to_numpy()
    assert np.corrcoef(change, predicted)[0, 1] > 0.999


def test_what_ifs_are_predicted_and_measured(measured):
    _, result = measured
    rows = {row["rule"]: row for row in result.report["attribution"]["what_if"]}
    top, nothing, mask = rows.values()
    assert top["tokens"] >= 1 and top["direction_changed_by"] > 0
    assert (
        nothing["tokens"] == 0 and nothing["touches_nothing"] and nothing["entropy"]["predicted"].value == 0
    )
    assert mask["tokens"] == 2
    tokens = result.tables["tokens_u"].slice(0, 2)["marginal"].to_numpy()
    assert mask["entropy"]["predicted"].value == pytest.approx(-tokens[0] - 0.5 * tokens[1])
    for name in ("entropy", "reward"):
        predicted, found = mask[name]["predicted"].value, mask[name]["measured"].value
        assert predicted == pytest.approx(found, rel=0.2)


def test_the_page_colours_responses_and_loads_nothing(measured):
    directory, result = measured
    text = result.save(directory).read_text()
    assert "Which tokens of the update move the entropy" in text
    assert text.count("<tr data-values=") == 40 and 'class="up"' in text and 'class="down"' in text
    assert (
        next(check for check in reading.checks(result.report) if check.name == "Shares add up").verdict
        == "pass"
    )
    assert len(result.summary().splitlines()) <= 25
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert Result.load(directory).report["attribution"]["eta"] == ETA


def test_a_stopped_run_goes_on_to_the_same_shares(measured, tmp_path, monkeypatch):
    """Stopped after the passes for entropy; what is there is read, not computed again."""
    _, result = measured
    config = MeasureConfig.demo(**SMALL, attribute=True, output=str(tmp_path))
    calls = []

    def count_gradients(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return half_gradient(*arguments, **options)

    monkeypatch.setattr(shares.attribution, "half_gradient", count_gradients)
    with pytest.raises(KeyboardInterrupt):
        measure_step(config, directory=str(tmp_path), progress=False)
    monkeypatch.undo()
    monkeypatch.setattr(
        shares.attribution, "entropy_weights", None
    )  # would be called if entropy were done again
    again = measure_step(replace(config, resume=True), directory=str(tmp_path), progress=False)
    for column in ("share", "marginal_reward"):
        np.testing.assert_array_equal(again.tables["tokens_u"][column], result.tables["tokens_u"][column])


@pytest.mark.parametrize(
    "table, message",
    [
        (None, "no file"),
        ({"sequence": [0], "position": [0]}, "none called weight"),
        ({"sequence": [0], "position": [7], "weight": [0.0]}, "does not have"),
        ({"sequence": [0, 0], "position": [1, 1], "weight": [0.0, 1.0]}, "twice"),
        ({"sequence": [0], "position": [0], "weight": [float("nan")]}, "NaN"),
    ],
)
def test_files_of_factors_that_do_not_fit_are_refused(table, message, tmp_path):
    path = tmp_path / "mask.parquet"
    if table is not None:
        pq.write_table(pa.table(table), path)
    with pytest.raises(UserError, match=message):
        read_factors(str(path), np.array([[False, True, True], [True, False, False]]))


def test_settings_that_ask_for_nothing_are_refused():
    for settings, message in (
        (dict(verify=True), "nothing to verify"),
        (dict(what_if=("drop-all",)), "drop-top"),
        (dict(attribute=True, update="next:x"), "which tokens made it"),
    ):
        with pytest.raises(UserError, match=message):
            MeasureConfig.demo(**settings)
