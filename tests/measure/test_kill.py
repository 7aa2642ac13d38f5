"""Three kills with signal 9 at random, one of them in the middle of a write: what is resumed ends in the undisturbed run's report.

`python -m bench.kill --kills 50` does more of the same; its result is in bench/results/kill.json.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from entropy_kernels.measure.stopping import Stopped, stoppable

ROOT = Path(__file__).parents[2]
SEED = 6  # its first three kills: in a write, after a time, and after a time once more in the same run


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_a_killed_run_that_is_resumed_ends_in_the_same_report(tmp_path):
    command = [
        "-m",
        "bench.kill",
        "--kills",
        "3",
        "--seed",
        str(SEED),
        "--output",
        str(tmp_path / "kill.json"),
    ]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "kill.json").read_text())
    assert result["kills"] == 3 and result["reports_that_differ"] == 0
    assert {kind for run in result["each"] for kill in run["kills"] for kind in kill} == {"after", "at_write"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_stops_and_the_second_is_left_to_the_system(number, capsys):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as stop, stoppable():
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert stop.value.code == 128 + number and "once more" in capsys.readouterr().err
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_asked_to_stop_says_how_to_go_on(tmp_path, number, status):
    output = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "entropy_kernels.measure", "--output", str(output)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (output / "stages" / "run.json").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    printed, errors = process.communicate()
    assert process.returncode == status and printed == ""
    assert "once more to leave at once" in errors and "Traceback" not in errors
    assert f"--output {output} --resume" in " ".join(errors.split())
