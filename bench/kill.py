"""`python -m bench.kill --kills 50`: runs killed with signal 9 at random, resumed, and compared with one that was left alone.

A kill comes after a random share of the time the undisturbed run took, or in the middle of a random write: the file is complete under its
temporary name and not yet moved into place. Every second run is killed once more after it was resumed. Equal means: every number of
report.json (timings and the output's name aside), every row of every table, and the update, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "kill.json"
# the demo with 14 prompts: some hundred micro-batches
SETTINGS = (
    "--prompts-u 8 --group-size 4 --prompts-e 6 --group-size-e 2 --max-new-tokens 6 --etas 1e-6 5e-5 "
    "--sample-batch 8 --micro-batch-tokens 64"
).split()
TABLES = ("rollouts_u", "rollouts_e", "tokens_u", "tokens_e")


def measure(output: Path, *, resume: bool, after: float | None = None, at_write: int | None = None) -> int:
    """A measurement in a process of its own; its exit status, negative for the signal that ended it.

    Args:
        output: directory; what is printed goes to a file beside it, and so does the number of files moved into place.
        resume: whether to pass --resume.
        after: seconds after which the process is killed.
        at_write: the process kills itself when it is about to move its n-th file into place.
    """
    end = time.monotonic() + (float("inf") if after is None else after)
    child = os.fork()
    if child == 0:
        _run_and_exit(output, resume, at_write)
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() >= end:
            os.kill(child, signal.SIGKILL)
            ended = os.waitpid(child, 0)
            break
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(ended[1])


def _run_and_exit(output: Path, resume: bool, at_write: int | None) -> None:
    """In the forked process."""
    from entropy_kernels.measure.cli import main

    moved, move = [0], os.replace

    def replace(*arguments: Any) -> None:
        moved[0] += 1
        if moved[0] == at_write:
            os.kill(os.getpid(), signal.SIGKILL)
        move(*arguments)

    os.replace = replace
    status = 1
    try:
        printed = os.open(f"{output}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        status = main([*SETTINGS, "--output", str(output), *(["--resume"] if resume else [])])
        Path(f"{output}.count").write_text(str(moved[0]))
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def found(output: Path) -> str:
    """What must be equal, as one text: the report without times and names of places, the tables, the bytes of the update."""
    import pyarrow.parquet as pq

    report = json.loads((output / "report.json").read_text())
    del report["timings"], report["config"]["output"]
    tables = {name: pq.read_table(output / f"{name}.parquet").to_pylist() for name in TABLES}
    update = (output / "update.safetensors").read_bytes().hex()
    return json.dumps({"report": report, "tables": tables, "update": update}, sort_keys=True)


def kill(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Kill `count` times at random and compare every run's end with that of an undisturbed run."""
    import entropy_kernels.measure.steps  # loaded once, before the forks
    import entropy_kernels.report.html  # noqa: F401
    from entropy_kernels.measure.writing import code

    start = time.monotonic()
    status = measure(folder / "undisturbed", resume=False)
    seconds = time.monotonic() - start
    if status:
        raise SystemExit((folder / "undisturbed.log").read_text())
    want, writes = found(folder / "undisturbed"), int((folder / "undisturbed.count").read_text())
    generator = random.Random(seed)
    runs: list[dict[str, Any]] = []
    output = folder / "killed"
    while (done := sum(len(each["kills"]) for each in runs)) < count:
        shutil.rmtree(output, ignore_errors=True)
        kills: list[dict[str, float]] = []
        for _ in range(min(1 + len(runs) % 2, count - done)):
            plan: dict[str, Any] = (
                {"after": generator.uniform(0, seconds)}
                if generator.random() < 0.5
                else {"at_write": generator.randint(1, writes)}
            )
            if (status := measure(output, resume=bool(kills), **plan)) != -signal.SIGKILL:
                break  # it ended before the kill came
            kills.append({name: round(value, 3) for name, value in plan.items()})
        if status == -signal.SIGKILL:
            status = measure(output, resume=True)
        runs.append({"kills": kills, "status": status, "same": status == 0 and found(output) == want})
    return {
        "kills": sum(len(each["kills"]) for each in runs),
        "runs": len(runs),
        "reports_that_differ": sum(not each["same"] for each in runs),
        "seed": seed,
        "seconds_undisturbed": round(seconds, 2),
        "files_written_undisturbed": writes,
        "settings": " ".join(SETTINGS),
        **code(),
        "each": runs,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.kill", description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULT, help="where the result is written, as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = kill(arguments.kills, arguments.seed, Path(scratch))
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['kills']} kills in {result['runs']} runs: {result['reports_that_differ']} reports differ")
    raise SystemExit(bool(result["reports_that_differ"]))
