"""A run split over ranks: the plumbing among three processes, and the whole command among two against one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import faulty
import plumbing
import pytest
import torch

from entropy_kernels import distributed, measure_step
from entropy_kernels.errors import UserError
from entropy_kernels.measure import MeasureConfig
from entropy_kernels.measure.cli import main
from entropy_kernels.measure.samples import batch_of
from entropy_kernels.measure.steps import load_policy
from entropy_kernels.policy import micro_batches
from entropy_kernels.rl.rollouts import Rollouts

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def started(script: Path, arguments: list[str], ranks: int) -> list[subprocess.CompletedProcess[str]]:
    """The ranks of a run, as torchrun would start them, when all have ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            cwd=ROOT,
            env={**os.environ, **meeting, "RANK": str(rank), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        return [
            subprocess.CompletedProcess(p.args, p.returncode, out, err)
            for p, (out, err) in [(p, p.communicate(timeout=600)) for p in processes]
        ]
    finally:
        for p in processes:
            p.kill()


def test_every_rank_has_every_result_in_order():
    for done in started(HERE / "plumbing.py", ["agree"], plumbing.RANKS):
        assert done.returncode == 0, done.stderr


def test_a_rank_that_fails_by_itself_ends_all_and_the_first_says_it():
    first, second = started(HERE / "plumbing.py", ["fail_between"], 2)
    assert first.returncode == second.returncode == 1
    assert first.stdout == "rank 0 speaks\n" and first.stderr == f"rank 0: {plumbing.MESSAGE}\n"
    assert second.stdout == second.stderr == ""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="signal 9")
def test_a_rank_that_is_killed_ends_all():
    first, second = started(HERE / "plumbing.py", ["die"], 2)
    assert second.returncode == -9 and first.returncode == 1
    assert "another of the 2 ranks has ended" in first.stderr and "--resume" in first.stderr


SETTINGS = {
    "prompts_u": 2,
    "group_size": 4,
    "prompts_e": 9,
    "group_size_e": 2,
    "sample_batch": 7,
    "micro_batch_tokens": 140,
}
FLAGS = [text for name, value in SETTINGS.items() for text in (f"--{name.replace('_', '-')}", str(value))]
FLAGS += ["--fisher", "--no-second-order"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The directory of the same measurement by one process with one thread."""
    directory = tmp_path_factory.mktemp("alone")
    config = MeasureConfig.demo(**SETTINGS, fisher=True, second_order=False)
    measure_step(config, directory=str(directory), progress=False)
    return directory


def test_ranks_end_in_the_report_of_one_process_bit_for_bit_even_after_one_has_failed(alone, tmp_path):
    output = tmp_path / "out"
    policy = load_policy(MeasureConfig.demo(**SETTINGS))
    parts = [
        len(list(micro_batches(policy, batch_of(Rollouts.load(alone / f"rollouts_{x}.parquet")))))
        for x in "ue"
    ]
    assert parts == [1, 3]  # fewer than ranks, and one more

    first, second = started(HERE / "faulty.py", [*FLAGS, "--output", str(output)], 2)
    assert first.returncode == second.returncode == 1
    assert first.stderr.count(faulty.MESSAGE) == 1 and "Traceback" not in first.stderr
    assert second.stderr == second.stdout == first.stdout == ""
    assert not list(output.glob("report.*")) and (output / "stages" / "tangents.safetensors").exists()

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "entropy_kernels.measure", *FLAGS, "--output", str(output), "--resume"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report: ") == 1 and "Traceback" not in done.stderr
    assert sorted(p.name for p in output.iterdir()) == sorted(p.name for p in alone.iterdir())
    for path in alone.iterdir():
        if path.suffix in (".parquet", ".safetensors"):
            assert path.read_bytes() == (output / path.name).read_bytes(), path.name
    ours, theirs = (json.loads((d / "report.json").read_text()) for d in (output, alone))
    assert (ours["environment"].pop("ranks"), theirs["environment"].pop("ranks")) == (2, 1)
    for report in (ours, theirs):
        del report["timings"], report["config"]["output"]
    assert ours == theirs


@pytest.mark.parametrize("arguments", [["plan", "somewhere"], ["compare", "a", "b"], ["--dry-run"]])
def test_what_is_not_split_is_refused(arguments, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "_ranks", distributed._Ranks(0, 2))
    assert main(arguments) == 1
    assert "only measurements are split over ranks" in " ".join(capsys.readouterr().err.split())


def test_an_environment_without_a_meeting_point_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert main(["plan", "somewhere"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "rank 0 of 2 does not find the others" in said and "MASTER_ADDR" in said


def test_ranks_take_the_gpu_of_their_number(monkeypatch):
    assert distributed.own_device(None) is None and distributed.own_device("cuda:3") == "cuda:3"
    monkeypatch.setattr(distributed, "_ranks", distributed._Ranks(5, 8))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.own_device(None) == distributed.own_device("cpu") == "cpu"
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert distributed.own_device(None) == distributed.own_device("cuda") == "cuda:1" and taken == [1, 1]
    with pytest.raises(UserError, match="'cuda:0' for 8 ranks"):
        distributed.own_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="has 2 GPU.*--nproc-per-node 2"):
        distributed.own_device(None)
