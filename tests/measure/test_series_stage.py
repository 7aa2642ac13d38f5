"""A series along checkpoints: exact relations between its numbers, re-weighting and re-sampling, going on after a stop, refusals."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import entropy_kernels as ek
from entropy_kernels import demo
from entropy_kernels.errors import UserError
from entropy_kernels.measure import SeriesConfig, measure_series
from entropy_kernels.measure import series as series_module
from entropy_kernels.measure.cli import main
from entropy_kernels.measure.series_config import find_checkpoints

SMALL = {
    "dataset": str(demo.prompts_file()), "prompts_e": 24, "group_size_e": 2, "max_new_tokens": 12,
    "sample_batch": 512, "micro_batch_tokens": 16384, "seed": 5,
}  # fmt: skip
PLACES = (
    0.0,
    10.0,
    20.0,
    110.0,
    120.0,
)  # of the checkpoints, in steps of the demo: the third interval is too long for its weights


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Five checkpoints: the demo's, and on along its step, the third step a long one."""
    directory = tmp_path_factory.mktemp("run")
    tokenizer = AutoTokenizer.from_pretrained(demo.checkpoint_dir())
    model = AutoModelForCausalLM.from_pretrained(demo.checkpoint_dir(), dtype=torch.float32)
    after = AutoModelForCausalLM.from_pretrained(demo.next_dir(), dtype=torch.float32)
    step = {
        n: p.detach() - q.detach()
        for (n, p), q in zip(after.named_parameters(), model.parameters(), strict=True)
    }
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    for number, along in zip((8, 9, 10, 14, 20), PLACES, strict=True):
        for name, p in model.named_parameters():
            p.data.copy_(start[name] + along * step[name])
        model.save_pretrained(directory / f"checkpoint-{number}")
        tokenizer.save_pretrained(directory / f"checkpoint-{number}")
        if number != 20:
            state = directory / f"checkpoint-{number}" / "trainer_state.json"
            state.write_text(f'{{"global_step": {number}}}')
    return directory


@pytest.fixture(scope="module")
def config(run) -> SeriesConfig:
    return SeriesConfig.along(
        f"{run}/checkpoint-*", min_ess=0.6, second_order=True, truth="integrated", **SMALL
    )


@pytest.fixture(scope="module")
def result(config):
    return measure_series(config, progress=False)


def test_sums_and_intervals_fit_together(result):
    rows = result.report["intervals"]
    assert [row["from"] for row in rows] == [f"checkpoint-{n}" for n in (8, 9, 10, 14)]
    assert [row["optimizer_steps"] for row in rows][:3] == [1, 1, 4] and np.isnan(
        rows[3]["optimizer_steps"] or np.nan
    )
    for kind in ("measured", "integrated", "linear", "quadratic", "missed"):
        sums = np.cumsum([row[kind].value for row in rows])
        np.testing.assert_allclose([row["cumulative"][kind].value for row in rows], sums, rtol=1e-12)
    for row in rows:
        assert row["missed"].value == pytest.approx(row["measured"].value - row["linear"].value, abs=1e-15)
    levels = [c["entropy"].value for c in result.report["checkpoints"]]
    first = [row for row in rows if row["batch"] == 0]
    assert levels[len(first) - 1] - levels[0] == pytest.approx(
        sum(r["measured"].value for r in first[:-1]), abs=2e-6
    )


def test_the_chord_integral_is_the_difference_of_end_points(result):
    """Above the floor of float32; on re-weighted samples (interval 1) as on fresh ones."""
    for row in result.report["intervals"]:
        apart = abs(row["integrated"].value - row["measured"].value)
        assert apart <= 3e-6 + row["integration_error"] + 1e-4 * abs(row["measured"].value), row["from"]
        assert row["integrated"].stderr == pytest.approx(row["measured"].stderr, rel=0.02)


def test_first_interval_is_measure_step_with_the_next_checkpoint(result, config, tmp_path):
    """The same samples, the same step: `measure --update next:` at learning rate 1 gives the same numbers."""
    table = result.tables["rollouts_e"]
    pq.write_table(table.filter(np.asarray(table["batch"]) == 0), tmp_path / "e.parquet")
    once = ek.measure_step(
        ek.MeasureConfig(
            ckpt=config.checkpoints[0], update=f"next:{config.checkpoints[1]}", learning_rate=1.0, etas=(1.0,),
            rollouts_e=str(tmp_path / "e.parquet"), truth="direct", micro_batch_tokens=16384,
        ),
        progress=False,
    ).report  # fmt: skip
    row, there = result.report["intervals"][0], once["changes"][0]
    for mine, theirs in (("measured", "true_direct"), ("linear", "linear"), ("quadratic", "quadratic")):
        assert row[mine].value == pytest.approx(there[theirs].value, abs=3e-7, rel=1e-3), mine
        assert row[mine].stderr == pytest.approx(there[theirs].stderr, rel=1e-3), mine
    assert result.report["checkpoints"][0]["entropy"].value == pytest.approx(
        once["entropy"]["per_token"].value, rel=1e-6
    )


def test_samples_serve_while_their_weights_allow_it(result):
    rows, batches = result.report["intervals"], result.report["batches"]
    assert [row["batch"] for row in rows] == [0, 0, 1, 2]
    assert [b["drawn_at"] for b in batches] == ["checkpoint-8", "checkpoint-10", "checkpoint-14"]
    assert rows[0]["ess_before"] == 1.0 and rows[1]["ess_before"] == rows[0]["ess_after"]
    assert (
        rows[2]["ess_after"] < 0.6 < rows[1]["ess_after"]
    )  # fresh samples, and still too far: said, not hidden
    assert "warning: between checkpoint-10 and checkpoint-14" in result.summary()
    assert all(abs(b["new_minus_old"].z_score()) < 4 for b in batches[1:])
    names = [
        set(r["prompt_id"] for r in result.tables["influence"].to_pylist() if r["batch"] == m)
        for m in range(3)
    ]
    assert not names[0] & names[1] and not names[1] & names[2]


def test_influences_give_the_errors(result):
    table = result.tables["influence"].to_pandas()
    for j, row in enumerate(result.report["intervals"]):
        own = table[table.interval == j]
        for kind in ("measured", "linear", "missed"):
            assert own[kind].sum() == pytest.approx(0, abs=1e-12)
            B = len(own)
            assert row[kind].stderr == pytest.approx(np.sqrt(B / (B - 1) * (own[kind] ** 2).sum()), rel=1e-9)
    pulls = table.groupby("prompt_id").measured.sum()
    assert result.report["intervals"][-1]["cumulative"]["measured"].stderr == pytest.approx(
        np.sqrt(24 / 23 * (pulls**2).sum()), rel=1e-9
    )


def test_a_pool_that_is_used_up_comes_again_with_other_responses(config, tmp_path):
    lines = Path(demo.prompts_file()).read_text().splitlines()[:30]
    (tmp_path / "few.jsonl").write_text("\n".join(lines))
    again = replace(
        config,
        settings=replace(
            config.settings, dataset=str(tmp_path / "few.jsonl"), truth="direct", second_order=False
        ),
    )
    found = measure_series(again, progress=False)
    rows = found.tables["rollouts_e"].to_pylist()
    drawn = [{r["prompt_id"] for r in rows if r["batch"] == m} for m in (0, 1)]
    assert len(drawn[0]) == 24 and len(drawn[0] & drawn[1]) == 18
    kept = {(r["prompt_id"], r["sample_index"]): r["completion_ids"] for r in rows if r["batch"] == 0}
    later = {(r["prompt_id"], r["sample_index"]): r["completion_ids"] for r in rows if r["batch"] == 1}
    assert any(kept[key] != later[key] for key in kept.keys() & later.keys())


def same_numbers(left, right) -> bool:
    a, b = (
        {k: v for k, v in x.report.items() if k not in ("timings", "environment", "config")}
        for x in (left, right)
    )
    return repr(a) == repr(b)


def test_a_stopped_series_goes_on_where_it_was(config, result, tmp_path, monkeypatch):
    """Stopped in the middle of interval 2 (samples drawn, one pass done): the end is the undisturbed one, bit for bit."""
    calls = {"token_stats": 0, "sample_rollouts": 0, "load_parameters": 0}
    for name in calls:
        real = getattr(series_module, name)

        def counted(*args, real=real, name=name, **kwargs):
            calls[name] += 1
            if stop and name == "token_stats" and calls[name] == 6:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        monkeypatch.setattr(series_module, name, counted)
    stop = True
    with pytest.raises(KeyboardInterrupt):
        measure_series(config, directory=str(tmp_path), progress=False)
    before, stop = dict(calls), False
    with pytest.raises(UserError, match="--resume"):
        measure_series(config, directory=str(tmp_path), progress=False)
    resumed = replace(config, settings=replace(config.settings, resume=True))
    found = measure_series(resumed, directory=str(tmp_path), progress=False)
    assert same_numbers(found, result)
    assert before["sample_rollouts"] == 2 and calls["sample_rollouts"] == 3  # none drawn twice
    with pytest.raises(UserError, match="min_ess was 0.6 and is now 0.3"):
        measure_series(replace(resumed, min_ess=0.3), directory=str(tmp_path), progress=False)


def test_to_disk_and_back(result, tmp_path):
    page = result.save(tmp_path)
    text = page.read_text()
    assert text.count("<svg") == 4 and "From checkpoint-8 to checkpoint-20" in text and "http" not in text
    again = ek.SeriesResult.load(tmp_path)
    assert again.summary() == result.summary()
    assert set(again.tables) == {"rollouts_e", "influence"}
    table = pq.read_table(tmp_path / "series.parquet")
    assert table.num_rows == 4 and {"measured", "measured_stderr", "cumulative.linear_stderr"} <= set(
        table.column_names
    )
    assert list(again.plots) == ["cumulative", "intervals", "entropy", "ess"]
    with pytest.raises(UserError, match=r"series\.json does not exist"):
        ek.SeriesResult.load(tmp_path / "nowhere")


def test_command_line(run, tmp_path, capsys):
    output = tmp_path / "out"
    flags = [
        "--dataset",
        str(demo.prompts_file()),
        "--prompts-e",
        "8",
        "--max-new-tokens",
        "6",
        "--output",
        str(output),
    ]
    paths = [f"{run}/checkpoint-8", f"{run}/checkpoint-9"]
    assert main(["series", *paths, *flags]) == 0
    printed = capsys.readouterr()
    assert "checkpoint-8 to checkpoint-9" in printed.out and "Σ measured" in printed.out
    assert "1 of 1, checkpoint-8 → checkpoint-9: measured" in printed.err
    assert {p.name for p in output.iterdir()} == {
        "series.json", "series.html", "series.parquet", "influence.parquet", "rollouts_e.parquet",
    }  # fmt: skip
    assert main(["series", *paths, *flags]) == 1
    assert "holds series.json already" in " ".join(capsys.readouterr().err.split())
    assert main(["series", *paths, *flags, "--resume"]) == 0
    assert "checkpoint-8 to checkpoint-9" in capsys.readouterr().out


def test_adapters_are_measured_as_what_they_train(run, tmp_path):
    """Three states of a LoRA adapter on the demo: only A and B move, and a full checkpoint is not one of the same run."""
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(demo.checkpoint_dir(), dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(0)
    for number in (1, 2, 3):
        for p in model.parameters():
            if p.requires_grad:
                p.data.add_(0.02 * torch.randn(p.shape, generator=generator))
        model.save_pretrained(tmp_path / f"checkpoint-{number}")
    settings = {**SMALL, "model": str(demo.checkpoint_dir()), "truth": "integrated"}
    report = measure_series(SeriesConfig.along(f"{tmp_path}/checkpoint-*", **settings), progress=False).report
    measured = report["parameters"]["numbers"]
    assert 0 < measured < 0.1 * report["parameters"]["numbers_in_model"]
    for row in report["intervals"]:
        assert row["integrated"].value == pytest.approx(row["measured"].value, rel=1e-3, abs=3e-6)
        assert row["linear"].value != 0 and np.isfinite(row["linear"].stderr)
    mixed = SeriesConfig.along(str(tmp_path / "checkpoint-1"), str(run / "checkpoint-9"), **settings)
    with pytest.raises(UserError, match="checkpoints: .*a full model, the checkpoint is not"):
        measure_series(mixed, progress=False)


# --- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, words",
    [
        (
            ["--update", "sgd"],
            "unrecognized arguments: --update sgd. python -m entropy_kernels.measure series --help",
        ),
        (["--min-ess", "2", "--dataset", "missing.jsonl"], "min_ess: got 2.0, expected a share"),
        ([], "dataset: a series samples held-out responses again"),
        (["--dataset", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_errors_are_one_paragraph(run, flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["series", f"{run}/checkpoint-8", f"{run}/checkpoint-9", *flags]) == 1
    printed = capsys.readouterr()
    assert words in " ".join(printed.err.split()) and "Traceback" not in printed.err and printed.out == ""
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_are_ordered_by_number(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-100", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-11.zip").write_text("")
    found = find_checkpoints([f"{tmp_path}/checkpoint-*"])
    assert [Path(name).name for name in found] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    listed = find_checkpoints([str(tmp_path / "other"), str(tmp_path / "checkpoint-9")])
    assert [Path(name).name for name in listed] == ["other", "checkpoint-9"]


@pytest.mark.parametrize(
    "names, pattern, message",
    [
        (["checkpoint-1"], "checkpoint-*", "expected at least two"),
        ([], "checkpoint-*", "no directory matches"),
        (["checkpoint-1", "checkpoint-2", "checkpoint-last"], "checkpoint-*", "no number at its end"),
        (["a/checkpoint-1", "b/checkpoint-1"], "*/checkpoint-*", "same number"),
    ],
)
def test_patterns_without_an_order_are_refused(names, pattern, message, tmp_path):
    for name in names:
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(UserError, match=message):
        find_checkpoints([f"{tmp_path}/{pattern}"])


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(min_ess=0.0), "min_ess"),
        (dict(dataset=None, rollouts_e="e.parquet"), "pass --dataset"),
        (dict(etas=(1e-6,)), "etas: .* no effect in a series"),
        (dict(prompts_e=1), "at least 2"),
        (dict(advantage="rloo"), "advantage: .* no effect in a series"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_loaded(changes, message, run):
    with pytest.raises(UserError, match=message):
        SeriesConfig.along(f"{run}/checkpoint-*", **{**SMALL, **changes})


def test_checkpoints_that_do_not_belong_together_are_refused(run, tmp_path):
    other, nan = tmp_path / "checkpoint-30", tmp_path / "checkpoint-31"
    model = AutoModelForCausalLM.from_pretrained(demo.checkpoint_dir(), dtype=torch.float32)
    next(iter(model.parameters())).data[0] = float("nan")
    for where in (other, nan):
        shutil.copytree(run / "checkpoint-9", where)
    model.save_pretrained(nan)
    first = str(run / "checkpoint-8")
    with pytest.raises(UserError, match="holds model.layers.* constant, but it moves between"):
        measure_series(
            SeriesConfig.along(first, str(other), **SMALL, parameters="embed|lm_head"), progress=False
        )
    with pytest.raises(UserError, match="checkpoints: .*NaN or infinite"):
        measure_series(SeriesConfig.along(first, str(nan), **SMALL), progress=False)
    with pytest.raises(UserError, match="prompts_e: got 600, but .* distinct prompts"):
        measure_series(SeriesConfig.along(first, str(other), **{**SMALL, "prompts_e": 600}), progress=False)
