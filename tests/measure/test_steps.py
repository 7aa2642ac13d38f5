"""The order of events on the demo: direction against the step that really happened, reports, refusals."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from entropy_kernels import demo
from entropy_kernels.checkpoints import StepInfo
from entropy_kernels.errors import UserError
from entropy_kernels.measure.config import MeasureConfig, output_directory
from entropy_kernels.measure.direction import get_update, load_state, read_direction
from entropy_kernels.measure.steps import (
    batch_of,
    choose_etas,
    exact_arithmetic,
    get_rollouts,
    load_policy,
    measure_step,
)
from entropy_kernels.rl.rollouts import Rollouts

SMALL = dict(prompts_u=8, group_size=8, prompts_e=6, group_size_e=2, etas=(1e-6, 5e-5))


def step_taken(config, recorded, next_weights):
    """(1 − cosine, length ratio) of our direction against θ_next − θ."""
    policy = load_policy(config)
    state, info = load_state(config, policy)
    U = Rollouts.load(recorded)
    v = get_update(config, policy, state, U, batch_of(U), info.stored_lr, False).direction
    after = load_file(next_weights)
    a = torch.cat([(after[name].double() - p.double()).flatten() for name, p in policy.params.items()])
    b = torch.cat([v[name].double().flatten() for name in policy.params])
    return 1 - torch.nn.functional.cosine_similarity(a, b, dim=0).item(), (
        a.norm() / b.norm()
    ).item() / info.stored_lr


def test_direction_is_the_step_that_the_trainer_took():
    recorded = demo.next_dir() / "recorded" / "rollouts_u.parquet"
    config = MeasureConfig.demo(rollouts_u=str(recorded), loss="dapo")
    missed, length = step_taken(config, recorded, demo.next_dir() / "model.safetensors")
    assert missed < 1e-6
    assert length == pytest.approx(1, abs=1e-4)
    for wrong in (
        replace(config, max_grad_norm=0.1),
        replace(config, loss="grpo"),
        replace(config, update="rmsprop"),
    ):
        assert step_taken(wrong, recorded, demo.next_dir() / "model.safetensors")[0] > 1e-6


def test_the_step_taken_and_its_replay_change_entropy_alike(tmp_path):
    recorded = str(demo.next_dir() / "recorded" / "rollouts_u.parquet")
    common = dict(prompts_e=12, group_size_e=2, etas=(2e-5,), second_order=False, truth="integrated")
    replay = measure_step(
        MeasureConfig.demo(**common, rollouts_u=recorded), directory=str(tmp_path), progress=False
    )
    sample = dict(rollouts_e=str(tmp_path / "rollouts_e.parquet"), **common)
    for update in (f"next:{demo.next_dir()}", str(tmp_path / "update.safetensors")):
        result = measure_step(MeasureConfig.demo(**sample, update=update), progress=False)
        assert set(result.tables) == {"rollouts_e", "tokens_e", "influence"} and result.summary()
        change, want = (r.report["changes"][0]["true_integrated"].value for r in (result, replay))
        assert change == pytest.approx(want, rel=1e-3)
        result.save(tmp_path / "report")


@pytest.mark.parametrize(
    "update, message",
    [
        ("next:nowhere", "nowhere"),
        ("missing.safetensors", "missing.safetensors"),
        (f"next:{demo.checkpoint_dir()}", "no step at all"),
    ],
)
def test_a_direction_that_is_none_is_refused(update, message):
    config = MeasureConfig.demo(update=update)
    with pytest.raises(UserError, match=message):
        read_direction(config, load_policy(config), 1e-5)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    directory = tmp_path_factory.mktemp("report")
    config = MeasureConfig.demo(**SMALL)
    return directory, measure_step(config, directory=str(directory), progress=False)


def test_report_has_every_promised_section(measured):
    directory, result = measured
    assert set(result.report) >= {
        "config", "environment", "certify", "definitions", "entropy", "rollouts", "update", "changes", "derivatives",
        "sanity", "nodes", "timings",
    }  # fmt: skip
    for row in result.report["changes"]:
        assert set(row) == {
            "eta", "true_direct", "true_integrated", "integration_error", "linear", "quadratic", "z_linear",
            "ess_tokens", "ess_sequences", "rounding",
        }  # fmt: skip
    result.save(directory)
    for name in (
        "report.json",
        "report.html",
        "rollouts_u.parquet",
        "tokens_e.parquet",
        "update.safetensors",
    ):
        assert (directory / name).stat().st_size > 0
    saved = json.loads((directory / "report.json").read_text())
    assert set(saved["changes"][0]["linear"]) == {"value", "stderr", "n", "unit", "method"}


def test_token_contributions_add_up_to_the_first_derivative(measured):
    _, result = measured
    tokens = result.tables["tokens_e"]
    assert tokens.num_rows == result.report["rollouts"]["e"]["tokens"]
    total = tokens["contribution"].to_numpy().sum()
    assert total == pytest.approx(result.report["derivatives"]["first"].value, rel=1e-9)


def test_sampler_and_policy_agree_on_log_probs(measured):
    assert measured[1].report["sanity"]["logprob_mismatch"] < 1e-5


def test_same_seed_same_figures_and_rollouts_can_be_reused(measured):
    directory, result = measured
    again = MeasureConfig.demo(
        **SMALL,
        rollouts_u=str(directory / "rollouts_u.parquet"),
        rollouts_e=str(directory / "rollouts_e.parquet"),
    )
    other = measure_step(again, progress=False).report
    assert other["changes"][1]["true_integrated"].value == pytest.approx(
        result.report["changes"][1]["true_integrated"].value, rel=1e-6
    )


def test_report_says_how_far_the_samples_of_a_file_are_from_the_policy(measured, tmp_path):
    directory, _ = measured
    near = Rollouts.load(directory / "rollouts_e.parquet")
    replace(near, logprobs=tuple(x - 0.03 for x in near.logprobs)).save(tmp_path / "e.parquet")
    replace(Rollouts.load(directory / "rollouts_u.parquet"), logprobs=None).save(tmp_path / "u.parquet")
    config = MeasureConfig.demo(
        **SMALL, truth="direct", second_order=False, rollouts_u=str(tmp_path / "u.parquet"), rollouts_e=str(tmp_path / "e.parquet")
    )  # fmt: skip
    result = measure_step(config, progress=False)
    e, u = (result.report["rollouts"][x] for x in "eu")
    assert e["sampler_mean_difference"] == pytest.approx(0.03, abs=1e-3)
    assert e["sampler_largest_difference"] == pytest.approx(0.03, abs=1e-3)
    assert e["sampler_refused_above"] == 0.05 and "not recorded" in u["sampler"]
    line = next(x for x in result.summary().splitlines() if x.startswith("log-probs of samples from files"))
    assert (
        "E 0.03 nats per token off (refused above 0.05)" in line
        and "U: its log-probs are not recorded" in line
    )
    page = result.save(tmp_path / "report").read_text()
    assert "sampler mean difference" in page and "refused from 0.05 on" in page


def test_held_out_prompts_are_none_of_the_updates(measured):
    directory, _ = measured
    config = MeasureConfig.demo(
        rollouts_u=str(directory / "rollouts_u.parquet"), prompts_e=504, group_size_e=1, max_new_tokens=1
    )
    U, E = get_rollouts(config, load_policy(config), None, False)
    assert len(set(U.prompt_ids)) == 8 and len(set(E.prompt_ids)) == 504
    assert not set(U.prompt_ids) & set(E.prompt_ids)


def test_samples_of_another_policy_are_refused(measured):
    directory, _ = measured
    config = MeasureConfig.demo(
        **{**SMALL, "temperature": 0.7}, rollouts_u=str(directory / "rollouts_u.parquet"),
        rollouts_e=str(directory / "rollouts_e.parquet"),
    )  # fmt: skip
    with pytest.raises(UserError, match="not sampled from this checkpoint"):
        measure_step(config, progress=False)


def test_an_update_of_nothing_is_refused():
    config = MeasureConfig.demo(**SMALL)
    policy = load_policy(config)
    state, info = load_state(config, policy)
    U, _ = get_rollouts(config, policy, None, False)
    flat = replace(U, reward=np.ones(len(U), np.float32), advantage=None).with_advantages("grpo")
    with pytest.raises(UserError, match="every advantage is zero"):
        get_update(config, policy, state, flat, batch_of(flat), info.stored_lr, False)


@pytest.mark.parametrize(
    "settings", [dict(truth="direct", second_order=False), dict(truth="integrated", per="sequence")]
)
def test_parts_can_be_left_out(settings):
    report = measure_step(MeasureConfig.demo(**SMALL, **settings), progress=False).report
    row = report["changes"][0]
    assert ("true_direct" in row) == (settings["truth"] == "direct")
    assert ("quadratic" in row) == settings.get("second_order", True)
    assert np.isfinite(row["z_linear"])


def info(stored):
    return StepInfo(optimizer_steps=9, stored_lr=stored, logged_lr=3e-5, logged_step=9, logged_grad_norm=None)


def test_learning_rates_contain_the_checkpoints():
    eta, etas = choose_etas(MeasureConfig.demo(), info(5e-5))
    assert eta == 5e-5 and eta in etas and len(etas) == 8
    assert etas[0] == pytest.approx(1e-8) and etas[-1] == pytest.approx(5e-4)
    assert list(etas) == sorted(etas)
    assert choose_etas(MeasureConfig.demo(etas=(1e-4, 1e-6)), info(5e-5)) == (5e-5, (1e-6, 1e-4))


def test_a_stored_learning_rate_of_zero_is_explained_not_used():
    with pytest.raises(UserError, match=r"3e-05.*--learning-rate"):
        choose_etas(MeasureConfig.demo(), info(0.0))
    assert choose_etas(MeasureConfig.demo(learning_rate=1e-5), info(0.0))[0] == 1e-5


def test_tf32_is_off_whatever_was_set_and_put_back():
    torch.set_float32_matmul_precision("high")
    try:
        with exact_arithmetic():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(group_size=1), "at least 2"),
        (dict(prompts_e=1), "at least 2"),
        (dict(temperature=0.0), "temperature"),
        (dict(etas=(0.0,)), "positive"),
        (dict(update="adam"), "expected one of"),
        (dict(update="next:x", rollouts_u="u.parquet"), "needs no update batch"),
        (dict(ckpt=None), "nothing to measure"),
        (dict(ckpt=None, model="m"), "without a checkpoint"),
        (dict(dataset=None), "--dataset"),
        (dict(max_grad_norm=-1.0), "max_grad_norm"),
        (dict(learning_rate=0.0), "learning_rate"),
        (dict(max_new_tokens=0), "max_new_tokens"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_loaded(changes, message):
    with pytest.raises(UserError, match=message):
        MeasureConfig.demo(**changes)


def test_a_report_is_never_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert output_directory(MeasureConfig.demo()).name == "entropy_report"
    (tmp_path / "entropy_report").mkdir()
    assert output_directory(MeasureConfig.demo()).name == "entropy_report-2"
    (tmp_path / "mine").mkdir()
    assert output_directory(MeasureConfig.demo(output="mine")).name == "mine"
    (tmp_path / "mine" / "report.json").write_text("{}")
    with pytest.raises(UserError, match="holds a report already"):
        output_directory(MeasureConfig.demo(output="mine"))
